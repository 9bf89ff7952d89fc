"""A mask for an image classifier: a ViT trained here on scikit-learn's digits gets its accuracy back."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from maskllm import cli
from maskllm.core import maskset
from maskllm.core.layers import apply_masks, maskable
from maskllm.core.patterns import best
from maskllm.data import BadData
from maskllm.images import Folder, is_classifier, load_classifier, measure, read_classifier
from maskllm.learn.config import LearnConfig
from maskllm.learn.trainer import run
from maskllm.prune.calibration import Walk
from maskllm.prune.oneshot import Method

TRAIN = 1_297
"""Of the 1,797 digits; 500 are held out."""


class Digits(NamedTuple):
    """A classifier, and images it was trained on and was not."""

    base: str
    train: Path
    test: Path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """Images of 8 x 8 as FOLDER/CLASS/*.png, and a ViT of three blocks that tells 96 % of them apart."""
    folder, order = tmp_path_factory.mktemp("digits"), torch.Generator().manual_seed(0)
    bunch = load_digits()
    shuffled = torch.randperm(len(bunch.target), generator=order).tolist()
    for place, index in enumerate(shuffled):
        file = folder / ("train" if place < TRAIN else "test") / f"digit {bunch.target[index]}/{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((bunch.images[index] * 15).astype("uint8")).save(file)

    names = {number: f"digit {number}" for number in range(10)}
    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0,
            initializer_range=0.2,  # so that no weight is idle, and dropping half of them hurts
            id2label=names,
            label2id={name: number for number, name in names.items()},
        )
    )
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    images = Folder(processor, vit.config.label2id, folder / "train")
    train(vit, images.pixels(range(TRAIN)), images.labels, order)
    vit.save_pretrained(folder / "vit")
    processor.save_pretrained(folder / "vit")
    return Digits(str(folder / "vit"), folder / "train", folder / "test")


def train(vit: ViTForImageClassification, pixels: Tensor, labels: Tensor, order: torch.Generator) -> None:
    """Twelve times through the images."""
    steps, batch = 12 * TRAIN // 64, 64
    optimizer = torch.optim.AdamW(vit.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(TRAIN, (batch,), generator=order)
        F.cross_entropy(vit(pixel_values=pixels[chosen]).logits, labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def config(digits: Digits, out: Path, **settings: Any) -> LearnConfig:
    small = {"steps": 2, "batch": 16, "micro_batch": 16, "prior": "magnitude", "device": "cpu"}
    known = {"out": out, "data": [str(digits.train)], "heldout": [str(digits.test)]}
    return LearnConfig(**known | small | settings)


def accuracy(digits: Digits, masks: dict[str, Tensor]) -> float:
    """Of the base under masks, on the held-out images."""
    classifier = load_classifier(digits.base, torch.float32, "cpu")
    apply_masks(classifier.model, masks)
    images = Folder(classifier.processor, classifier.model.config.label2id, digits.test)
    return measure(classifier.model, images)["accuracy"]


def magnitude(digits: Digits) -> dict[str, Tensor]:
    model = load_classifier(digits.base, torch.float32, "cpu").model
    return {name: best(layer.weight.abs()) for name, layer in maskable(model).items()}


def test_a_learned_mask_gets_back_most_of_what_magnitude_loses(
    digits: Digits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits.safetensors"
    folders = ["--data", str(digits.train), "--heldout", str(digits.test)]
    settings = "--prior magnitude --steps 40 --batch 64 --micro-batch 32 --lr 3e-3 --device cpu --json"
    assert cli.main(["learn", digits.base, *folders, *settings.split(), "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    dense, learned, pruned = (
        report["dense"]["accuracy"],
        report["scores"]["accuracy"],
        accuracy(digits, magnitude(digits)),
    )
    assert dense > 0.93
    assert dense - pruned > 0.15
    assert (learned - pruned) / (dense - pruned) > 0.7

    # and what is reported is what the file gives
    saved = maskset.load(out, read_classifier(digits.base))
    assert accuracy(digits, saved.masks()) == learned == saved.scores["accuracy"]
    assert report["protocol"] == "500 images, float32"
    assert cli.main(["verify", str(out), "--base", digits.base]) == 0


@pytest.mark.parametrize("prior", get_args(Method))
def test_every_one_shot_prior_is_a_place_to_start(digits: Digits, tmp_path: Path, prior: str) -> None:
    still = {"prior_strength": 1000, "lr": 1e-12, "steps": 1, "prior": prior}
    report = run(digits.base, config(digits, tmp_path / "a.safetensors", **still))
    assert report.changed == 0
    assert report.scores["accuracy"] > 0.4
    saved = maskset.load(tmp_path / "a.safetensors").masks()
    same = torch.cat([(saved[name] == mask).flatten() for name, mask in magnitude(digits).items()])
    assert bool(same.all()) == (prior == "magnitude")


def test_calibration_reads_what_the_model_reads(digits: Digits) -> None:
    classifier = load_classifier(digits.base, torch.float32, "cpu")
    images = Folder(classifier.processor, classifier.model.config.label2id, digits.train).pixels(range(5))
    layer, read = next(iter(maskable(classifier.model).values())), list[Tensor]()
    with layer.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        classifier.model(pixel_values=images)
    walked = torch.cat(list(Walk(classifier.model, images, batch=2).inputs(layer)))
    assert walked.shape == (5 * 5, 32)  # of five images a class token and four patches
    torch.testing.assert_close(walked, read[0].flatten(0, 1))


def test_images_are_learned_from_with_every_setting_and_computing_again_changes_nothing(
    digits: Digits, tmp_path: Path
) -> None:
    settings = {"parameterisation": "per-item", "distill": 0.5}
    for name, again in ("a", True), ("b", False):
        out = tmp_path / f"{name}.safetensors"
        run(digits.base, config(digits, out, gradient_checkpointing=again, **settings))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.png").is_file()


def test_pixels_are_what_the_processor_makes_of_each_image(digits: Digits) -> None:
    classifier = load_classifier(digits.base, torch.float32, "cpu")
    images = Folder(classifier.processor, classifier.model.config.label2id, digits.test)
    with Image.open(images.files[3]) as image:
        levels = torch.tensor(list(image.tobytes())).view(8, 8) / 255
    pixels = images.pixels([0, 3])
    assert pixels.shape == (2, 3, 8, 8)
    torch.testing.assert_close(pixels[1], (2 * levels - 1).expand(3, 8, 8))
    assert images.files[3].parent.name == f"digit {images.labels[3]}"


def test_what_is_wrong_with_a_folder_is_said(digits: Digits, tmp_path: Path) -> None:
    def learn(**settings: Any) -> None:
        run(digits.base, config(digits, tmp_path / "a.safetensors", **settings))

    empty = tmp_path / "empty"
    (empty / "digit 1").mkdir(parents=True)
    for nothing in empty, tmp_path / "nope":
        with pytest.raises(BadData, match=r"no images in .*: put them into .*/CLASS/\*\.png"):
            learn(data=[str(nothing)])
    shutil.copytree(digits.test, tmp_path / "more")
    (tmp_path / "more/digit 1").rename(tmp_path / "more/cat")
    with pytest.raises(BadData, match="has a class 'cat'; the base knows digit 0, digit 1"):
        learn(heldout=[str(tmp_path / "more")])
    with pytest.raises(BadData, match="one folder of images"):
        learn(data=[str(digits.train), str(digits.test)])
    with pytest.raises(BadData, match="one folder of images"):
        learn(stream=True)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("damage", ["no image", "half an image", "wrong checksum"])
def test_a_broken_image_is_said_by_name(digits: Digits, tmp_path: Path, damage: str) -> None:
    (tmp_path / "images/digit 1").mkdir(parents=True)
    whole = sorted(digits.test.glob("digit 1/*.png"))[0].read_bytes()
    start = whole.index(b"IDAT") + 4
    (tmp_path / "images/digit 1/7.png").write_bytes(
        {
            "no image": b"once upon a time",
            "half an image": whole[: start + 8],
            "wrong checksum": whole[: start + 4] + b"\xff" + whole[start + 5 :],
        }[damage]
    )
    with pytest.raises(BadData, match=r"7\.png is not an image that Pillow can read"):
        run(digits.base, config(digits, tmp_path / "a.safetensors", data=[str(tmp_path / "images")]))


def test_a_base_is_a_classifier_if_its_config_says_so(
    digits: Digits, base_folder: Path, tmp_path: Path
) -> None:
    assert is_classifier(digits.base)
    assert not is_classifier(str(base_folder))
    assert not is_classifier(str(tmp_path))  # which is no base at all: reading it says so
