"""The frozen base model as a mask sees it: a fingerprint, and the shape of every tensor."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open


class BadBase(ValueError):
    """A folder that holds no readable safetensors checkpoint."""


@dataclass(frozen=True)
class Base:
    """Identity of a checkpoint: sha256 over all its tensors, and their shapes by name."""

    fingerprint: str
    shapes: dict[str, tuple[int, ...]]


def find(model: str) -> Path:
    """The local folder of a model: a folder as it is, a Hugging Face name from cache or hub."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError):
        raise BadBase(f"{model!r} is no folder here and cannot be had from the Hugging Face hub") from None


def read_base(folder: Path) -> Base:
    """Fingerprint a Hugging Face checkpoint folder.

    The fingerprint covers name, dtype, shape and bytes of every tensor, whatever files they are
    sharded over. Raises BadBase where there is no safetensors checkpoint.
    """
    files = _tensor_files(folder)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        digests = dict(sorted(pool.map(_digest, files.items())))
    total = hashlib.sha256(json.dumps({n: d for n, (d, _) in digests.items()}).encode())
    return Base(total.hexdigest(), {name: shape for name, (_, shape) in digests.items()})


def is_bf16(folder: Path) -> bool:
    """Whether every matrix of a checkpoint is bfloat16, or its config says so, where not all are here."""
    try:
        return all(map(_has_bf16_only, set(_tensor_files(folder).values())))
    except (BadBase, FileNotFoundError):
        config = json.loads((folder / "config.json").read_text())
        return "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def _has_bf16_only(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
    return all(each.get_dtype() == "BF16" for each in tensors if len(each.get_shape()) > 1)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor of the checkpoint and the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {n: folder / f for n, f in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise BadBase(f"no model.safetensors in {folder}: give a Hugging Face safetensors checkpoint")
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except Exception as error:
        raise BadBase(f"{single} is not a safetensors file: {error}") from None


def _digest(item: tuple[str, Path]) -> tuple[str, tuple[str, tuple[int, ...]]]:
    name, path = item
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name)
    sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return name, (sha.hexdigest(), tuple(tensor.shape))
