"""Images for a classifier: a folder with one folder of images a class, and the base that reads them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from maskllm.core.base import Base, find, read_base
from maskllm.data import BadData

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Classifier(NamedTuple):
    """A frozen image classifier in evaluation mode, and what turns images into its inputs."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    base: Base


def is_classifier(model: str) -> bool:
    """Whether a base (a folder or a Hugging Face name) classifies images, by its own config."""
    config = find(model) / "config.json"
    architectures = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return any(name.endswith("ForImageClassification") for name in architectures or [])


def load_classifier(model: str, dtype: torch.dtype, device: str) -> Classifier:
    """Load an image classifier with every parameter frozen. Raises BadBase where there is none."""
    folder = find(model)
    base = read_base(folder)
    loaded = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype)
    nn.Module.to(loaded, device)
    loaded.requires_grad_(False)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # type: ignore[no-untyped-call]
    return Classifier(loaded, processor, _named_as_in(loaded, base))


def read_classifier(model: str) -> Base:
    """The base of `load_classifier`, without its weights."""
    folder = find(model)
    with torch.device("meta"):
        skeleton = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    return _named_as_in(skeleton, read_base(folder))


def _named_as_in(model: nn.Module, base: Base) -> Base:
    """A base whose tensors also have their names in the model: ViT's files still have those of 2020."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Base(base.fingerprint, base.shapes | shapes)


class Folder:
    """The images of `FOLDER/CLASS/*.png` (and .jpg, .webp, .bmp), read when they are asked for.

    `labels` is (images,) int64 by the classifier's own numbers. Raises BadData where the folder has no
    images or a class that the classifier does not know.
    """

    def __init__(self, processor: BaseImageProcessor, label2id: dict[str, int], folder: Path) -> None:
        self.processor = processor
        files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise BadData(f"no images in {folder}: put them into {folder}/CLASS/*.png")
        for name in sorted({file.parent.name for file in files} - label2id.keys()):
            raise BadData(f"{folder} has a class {name!r}; the base knows {', '.join(label2id)}")
        self.files = files
        self.labels = torch.tensor([label2id[file.parent.name] for file in files])

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Images as the classifier reads them, (images, channels, height, width) float32."""
        images = [_read(self.files[index]) for index in indices]
        pixels: Tensor = self.processor(images, return_tensors="pt")["pixel_values"]
        return pixels


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # what Pillow raises on half an image and on a PNG with wrong checksums
        raise BadData(f"{file} is not an image that Pillow can read") from None


@torch.no_grad()
def measure(model: PreTrainedModel, folder: Folder, batch: int = 64) -> dict[str, float]:
    """`loss`, the mean cross-entropy in nats, and `accuracy`, the share of images whose class is first."""
    loss, right = 0.0, 0
    for indices in torch.split(torch.arange(len(folder.files)), batch):
        pixels = folder.pixels(indices.tolist()).to(model.device, model.dtype)
        labels = folder.labels[indices].to(model.device)
        logits = model(pixel_values=pixels).logits.float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
    return {"loss": loss / len(folder.files), "accuracy": right / len(folder.files)}
