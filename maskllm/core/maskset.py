"""A mask set: one packed N:M mask for each masked layer of a base, kept in one file.

The file is a `.safetensors`: a uint8 tensor of packed codes (out, row_bytes) under each layer's
Hugging Face name, and one metadata entry `maskllm`, a JSON object with N:M, the base's fingerprint,
the shape of every layer, how the mask was made, what it scored, and a digest over all of it.
A mask's identity is the sha256 of its file.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from maskllm.core import patterns
from maskllm.core.base import Base

VERSION = 1
KEY = "maskllm"
MAX_DEPTH = 16
"""Of objects and lists in a header, one in another."""


class MaskError(ValueError):
    """A mask that cannot be used; each subclass is one kind of damage."""


class NotAMask(MaskError):
    """Some other kind of file."""


class TruncatedMask(MaskError):
    """The file ends too early."""


class DamagedMask(MaskError):
    """The content does not match its own digest."""


class CodeOutOfRange(MaskError):
    """A byte that is no code of this N:M."""


class WrongShape(MaskError):
    """A layer of another shape than the header or the base says."""


class UnknownLayer(MaskError):
    """A layer that the header or the base does not have."""


class MissingLayer(MaskError):
    """A layer that the header lists and the file lacks."""


class WrongBase(MaskError):
    """A mask that was made for other weights."""


class WrongPattern(MaskError):
    """Another N:M than asked for, or one that does not exist."""


@dataclass(frozen=True)
class MaskSet:
    """Packed masks of one base. `sha256` is the file's, and empty before the first save."""

    n: int
    m: int
    base: str
    shapes: dict[str, tuple[int, int]]
    packed: dict[str, Tensor] = field(repr=False)
    provenance: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def weights(self) -> int:
        """How many weights the mask decides on."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Size of the packed codes, row padding included, without the file's header."""
        return 8 * sum(t.numel() for t in self.packed.values()) / self.weights

    def codes(self, layer: str) -> Tensor:
        """Pattern codes of one layer, (out, in/m)."""
        return patterns.unpack(self.packed[layer], self.shapes[layer][1] // self.m, self.n, self.m)

    def mask(self, layer: str) -> Tensor:
        """Mask of one layer, (out, in) bool."""
        return patterns.expand(self.codes(layer), self.n, self.m)

    def masks(self) -> dict[str, Tensor]:
        """All masks by layer, (out, in) bool each."""
        return {layer: self.mask(layer) for layer in self.shapes}


def from_masks(
    masks: Mapping[str, Tensor],
    base: Base,
    n: int = 2,
    m: int = 4,
    provenance: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> MaskSet:
    """Pack bool masks (out, in) by layer. Raises MaskError where they do not fit the base or N:M."""
    try:
        packed = {k: patterns.pack(patterns.encode(v.cpu(), n, m), n, m) for k, v in masks.items()}
    except patterns.BadPattern as error:
        raise WrongPattern(str(error)) from None
    shapes = {layer: (mask.shape[0], mask.shape[1]) for layer, mask in masks.items()}
    made = MaskSet(n, m, base.fingerprint, shapes, packed, dict(provenance or {}), dict(scores or {}))
    verify(made, base)
    return made


def save(mask_set: MaskSet, path: Path) -> str:
    """Write the file whole or not at all, and return its sha256."""
    header = _header(mask_set)
    header["digest"] = _digest(header, mask_set.packed)
    raw = safetensors.torch.save(
        {layer: tensor.contiguous() for layer, tensor in mask_set.packed.items()},
        {KEY: json.dumps(header, sort_keys=True)},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            partial.chmod(0o644)  # NamedTemporaryFile makes it private; a server must read it
            partial.replace(path)
        except BaseException:
            partial.unlink()
            raise
    return hashlib.sha256(raw).hexdigest()


def load(path: Path, base: Base | None = None) -> MaskSet:
    """Read a mask file and check everything about it; with a base, also that it fits that base.

    Raises FileNotFoundError, or the MaskError that names the damage.
    """
    raw = path.read_bytes()
    header, tensors = _parse(raw, path.name)
    try:
        _check_header(header)
        n, m, shapes = header["n"], header["m"], {k: (s[0], s[1]) for k, s in header["layers"].items()}
        patterns.check(n, m)
    except patterns.BadPattern as error:
        raise WrongPattern(f"{path.name}: {error}") from None
    except (KeyError, TypeError) as error:
        raise DamagedMask(f"{path.name}: its header lacks or garbles {error}") from None
    for layer in tensors.keys() - shapes.keys():
        raise UnknownLayer(f"{path.name}: layer {layer} is not in the file's own list")
    for layer in shapes.keys() - tensors.keys():
        raise MissingLayer(f"{path.name}: layer {layer} is listed but not there")
    for layer, (rows, columns) in shapes.items():
        want, tensor = (rows, patterns.row_bytes(columns // m, n, m)), tensors[layer]
        if columns % m or tuple(tensor.shape) != want or str(tensor.dtype) != "torch.uint8":
            raise WrongShape(
                f"{path.name}: layer {layer} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"but a {n}:{m} mask of {rows} x {columns} packs into uint8 {want}"
            )
    for layer, (_, columns) in shapes.items():
        try:
            patterns.unpack(tensors[layer], columns // m, n, m)
        except patterns.BadPattern as error:
            raise CodeOutOfRange(f"{path.name}: layer {layer}: {error}") from None
    if header.get("digest") != _digest(header, tensors):
        raise DamagedMask(f"{path.name}: content and digest differ; make or copy the file again")
    sha256 = hashlib.sha256(raw).hexdigest()
    mask_set = MaskSet(n, m, header["base"], shapes, tensors, header["provenance"], header["scores"], sha256)
    if base is not None:
        verify(mask_set, base, path.name)
    return mask_set


def most_bytes(shapes: Iterable[tuple[int, ...]]) -> int:
    """More than the file of any mask of these weights has: 2 bits a weight, and its header."""
    return sum(map(math.prod, shapes)) // 4 + (4 << 20)


def reload(path: Path, sha256: str, most: int) -> MaskSet:
    """Read again a file that `load` has checked, and check that it is the same: nothing else needs to be.

    It neither computes nor copies, and leaves the GIL to others while it reads and hashes.
    Raises FileNotFoundError, or DamagedMask where the file has changed. More than `most` bytes are not read.
    """
    changed = DamagedMask(f"{path.name} has changed since it was registered")
    if (size := path.stat().st_size) > most:
        raise changed
    content = torch.empty(size, dtype=torch.uint8)
    raw = content.numpy().data
    with path.open("rb") as file:
        file.readinto(raw)
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise changed
    begin = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(bytes(raw[8:begin]))
    header = json.loads(entries.pop("__metadata__")[KEY])
    shapes = {layer: (shape[0], shape[1]) for layer, shape in header["layers"].items()}
    packed = {}
    for layer, entry in entries.items():
        start, end = entry["data_offsets"]
        packed[layer] = content[begin + start : begin + end].reshape(entry["shape"])
    provenance, scores = header["provenance"], header["scores"]
    return MaskSet(header["n"], header["m"], header["base"], shapes, packed, provenance, scores, sha256)


def verify(mask_set: MaskSet, base: Base, name: str = "mask", pattern: tuple[int, int] | None = None) -> None:
    """Raise the MaskError that says why this mask does not fit this base (or the wanted N:M)."""
    if pattern is not None and pattern != (mask_set.n, mask_set.m):
        raise WrongPattern(f"{name} is {mask_set.n}:{mask_set.m}, not {pattern[0]}:{pattern[1]}")
    for layer, shape in mask_set.shapes.items():
        weight = base.shapes.get(f"{layer}.weight")
        if weight is None:
            raise UnknownLayer(f"{name}: the base has no layer {layer}")
        if weight != shape:
            raise WrongShape(f"{name}: layer {layer} is {shape}, but {weight} in the base")
    if mask_set.base != base.fingerprint:
        raise WrongBase(
            f"{name} was made for base {mask_set.base[:12]}, not for {base.fingerprint[:12]}: "
            "learn it again on these weights"
        )


@dataclass(frozen=True)
class Difference:
    """How far two masks are apart: share of groups that changed, and Jaccard of the kept weights."""

    changed: float
    jaccard: float
    groups: int


def diff(a: MaskSet, b: MaskSet) -> dict[str, Difference]:
    """Difference of each layer and, under "total", of all of them.

    Raises MaskError where the two do not cover the same layers of one base with one N:M.
    """
    if (a.n, a.m) != (b.n, b.m):
        raise WrongPattern(f"{a.n}:{a.m} and {b.n}:{b.m} masks cannot be compared")
    if a.base != b.base:
        raise WrongBase(f"the masks have different bases: {a.base[:12]} and {b.base[:12]}")
    if a.shapes != b.shapes:
        raise UnknownLayer(f"only one mask has {', '.join(sorted(a.shapes.keys() ^ b.shapes.keys()))}")
    counts = {layer: _count(a, b, layer) for layer in a.shapes}
    counts["total"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    return {
        layer: Difference(changed / groups, both / either, groups)
        for layer, (changed, groups, both, either) in counts.items()
    }


def _count(a: MaskSet, b: MaskSet, layer: str) -> tuple[int, ...]:
    """(changed groups, groups, weights both keep, weights either keeps)."""
    codes_a, codes_b = a.codes(layer), b.codes(layer)
    mask_a, mask_b = a.mask(layer), b.mask(layer)
    changed, both = int((codes_a != codes_b).sum()), int((mask_a & mask_b).sum())
    return changed, codes_a.numel(), both, int(mask_a.sum() + mask_b.sum()) - both


def _header(mask_set: MaskSet) -> dict[str, Any]:
    return {
        "version": VERSION,
        "n": mask_set.n,
        "m": mask_set.m,
        "axis": "in",
        "base": mask_set.base,
        "layers": {layer: list(shape) for layer, shape in mask_set.shapes.items()},
        "provenance": mask_set.provenance,
        "scores": mask_set.scores,
    }


def _digest(header: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    """sha256 of the header without its digest, then of every layer in the order of its name."""
    rest = {key: value for key, value in header.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for layer, tensor in sorted(packed.items()):
        sha.update(layer.encode())
        sha.update(tensor.contiguous().numpy().data)
    return sha.hexdigest()


def _parse(raw: bytes, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, or why it has none."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) <= 8 or (raw[8:9] == b"{" and len(raw) < 8 + length):
        raise TruncatedMask(f"{name} ends after {len(raw)} bytes, within its header")
    try:
        entries = json.loads(raw[8 : 8 + length])
        metadata = entries.pop("__metadata__")[KEY]
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        if not all(type(end) is int and 0 <= end < 1 << 63 for end in ends):
            raise ValueError
        size = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise NotAMask(f"{name} is not a mask file: it has no `{KEY}` header") from None
    if len(raw) < size:
        raise TruncatedMask(f"{name} has {len(raw)} of {size} bytes")
    try:
        header = json.loads(metadata)
        tensors = safetensors.torch.load(raw)
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise DamagedMask(f"{name}: its header is damaged: {error}") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise DamagedMask(f"{name}: unknown header version; this program reads version {VERSION}")
    return header, tensors


def _check_header(header: dict[str, Any]) -> None:
    """Raise KeyError or TypeError, naming it, where an entry lacks or is not what `_header` writes."""
    if not _is_flat(header):
        raise TypeError(f"what is nested deeper than {MAX_DEPTH}")
    try:
        json.dumps(header, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise TypeError("text that is not Unicode's") from None
    kinds = {"n": int, "m": int, "base": str, "layers": dict, "provenance": dict, "scores": dict}
    for key, kind in kinds.items():
        if type(header[key]) is not kind:  # True is no 1
            raise TypeError(f"{key}, which must be of JSON's {kind.__name__}")
    for layer, shape in header["layers"].items():
        whole = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
        if not whole or not all(0 < size < 1 << 31 for size in shape):
            raise TypeError(f"the shape of {layer}")


def _is_flat(value: Any, most: int = MAX_DEPTH) -> bool:
    """Whether who walks a JSON value by recursion, as an API that shows it does, soon arrives."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return most > 0 and all(_is_flat(each, most - 1) for each in inner)
