"""Which masks exist, which one a request means, and their way into the engine and out again."""

import asyncio
import logging
import re
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.maskset import MaskError, MaskSet
from server.errors import (
    BadMaskName,
    ContradictingMasks,
    RefusedMask,
    UnavailableMask,
    UnknownMask,
    UnknownModel,
)

logger = logging.getLogger("maskllm.masks")

DENSE = "none"
"""The name that asks for the base without a mask."""

SUFFIX = ".safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, eq=False)
class Mask:
    """One version of a named mask: a checked file, and the number the engine knows it by."""

    name: str
    path: Path
    id: int
    mask_set: MaskSet

    @property
    def key(self) -> str:
        """What the engine calls this version; unlike the label it is never used twice."""
        return f"{self.label}#{self.id}"

    @property
    def label(self) -> str:
        """Name and content, as in `X-Mask: legal@0123456789ab`."""
        return f"{self.name}@{self.mask_set.sha256[:12]}"


class Engine(Protocol):
    """What the masks need of the engine."""

    async def load(self, mask: Mask) -> str:
        """Bring a mask into the engine's memory; returns why the engine refuses it, or nothing."""

    async def unload(self, mask: Mask) -> None:
        """Wait until no request uses the mask, then free it."""

    def using(self, mask: Mask) -> AbstractContextManager[None]:
        """While the block runs, the mask is not unloaded."""


class Masks:
    """The masks of one base by name. The HTTP side owns it; the engine owns what is loaded."""

    def __init__(self, folder: Path, base_name: str, base: Base, engine: Engine) -> None:
        self.folder = folder.resolve()
        self.base_name = base_name
        self.base = base
        self.engine = engine
        self.known: dict[str, Mask] = {}
        self.refused: dict[str, str] = {}
        self.loaded: set[int] = set()
        self._ids = count(1)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def scan(self) -> None:
        """Register every mask file of the folder; one that cannot be used is logged and left out."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            try:
                self.known[name] = self._read(name, path)
            except (BadMaskName, RefusedMask) as error:
                self.refused[name] = str(error)
                logger.warning("refused %s: %s", path.name, error)
        logger.info("masks: %s", ", ".join(self.known) or "none found")

    def resolve(self, model: str | None, **named: str | None) -> Mask | None:
        """The mask that a request means, None for dense.

        `named` are the ways that name a mask outright (`query`, `body`, `header`); `model` may be
        the base, a mask, or "base:mask". Raises ContradictingMasks, UnknownMask or UnknownModel.
        """
        asked = {f"the {way}": name for way, name in named.items() if name is not None}
        if model is not None and model != self.base_name:
            base, colon, mask = model.rpartition(":")
            if base != self.base_name if colon else model.partition("@")[0] not in self.known:
                models = ", ".join([self.base_name, *self.known])
                raise UnknownModel(f"no model {model!r}; known: {models}, {self.base_name}:MASK")
            asked["the model"] = mask
        meant = {None if name == DENSE else self._get(name) for name in asked.values()}
        if len(meant) > 1:
            details = ", ".join(f"{way} says {name!r}" for way, name in asked.items())
            raise ContradictingMasks(f"the request names different masks: {details}")
        return meant.pop() if meant else None

    async def ready(self, mask: Mask) -> bool:
        """Load a mask on its first use; False where it was replaced or removed in the meantime.

        Raises UnavailableMask, saying why, and then changes nothing.
        """
        if mask.id in self.loaded:
            return True
        async with self._locks[mask.name]:
            if self.known.get(mask.name) is not mask:
                return False
            await self._load(mask)
            return True

    async def put(self, name: str, file: str) -> tuple[Mask, bool]:
        """Register and load a mask from a file of the folder; returns it, and whether it is new.

        A mask of that name is replaced: requests in flight finish on the old one, which is then
        freed. Raises BadMaskName, RefusedMask or UnavailableMask, and then changes nothing.
        """
        async with self._locks[name]:
            mask = await asyncio.to_thread(self._read, name, self._path(file))
            old = self.known.get(name)
            same = old is not None and old.mask_set.sha256 == mask.mask_set.sha256
            if old is not None and same and old.id in self.loaded:
                return old, False
            await self._load(mask)
            self.known[name] = mask
            self.refused.pop(name, None)
        if old is not None:
            await self._unload(old)
        return mask, old is None

    async def delete(self, name: str) -> None:
        """Forget a mask at once, and free it when its last request has finished. Keeps the file."""
        async with self._locks[name.partition("@")[0]]:
            mask = self._get(name)
            del self.known[mask.name]
        await self._unload(mask)

    def describe(self, mask: Mask) -> dict[str, Any]:
        """A mask as `GET /v1/masks` shows it."""
        mask_set = mask.mask_set
        return {
            "id": mask.name,
            "object": "mask",
            "sha256": mask_set.sha256,
            "file": mask.path.name,
            "base": self.base_name,
            "state": "loaded" if mask.id in self.loaded else "known",
            "n": mask_set.n,
            "m": mask_set.m,
            "weights": mask_set.weights,
            "bits_per_weight": mask_set.bits_per_weight,
            "provenance": mask_set.provenance,
            "scores": mask_set.scores,
        }

    def _get(self, name: str) -> Mask:
        """A mask by its name, or by name@sha with the first digits of its content."""
        bare, at, sha = name.partition("@")
        mask = self.known.get(bare)
        if mask is None:
            known = ", ".join([*self.known, DENSE])
            reason = f" (its file was refused: {self.refused[bare]})" if bare in self.refused else ""
            raise UnknownMask(f"no mask {bare!r}{reason}; known: {known}")
        if at and not (len(sha) >= 12 and mask.mask_set.sha256.startswith(sha)):
            raise UnknownMask(f"mask {bare!r} is now {mask.label}, not {name}")
        return mask

    def _path(self, file: str) -> Path:
        path = (self.folder / file).resolve()
        if not path.is_relative_to(self.folder) or path.suffix != SUFFIX:
            raise BadMaskName(f"file {file!r} is not a *{SUFFIX} under the masks folder")
        return path

    def _read(self, name: str, path: Path) -> Mask:
        """Check a file in full. Raises BadMaskName or RefusedMask."""
        if not NAME.fullmatch(name) or name in (DENSE, self.base_name):
            raise BadMaskName(
                f"{name!r} cannot name a mask: use letters, digits, '.', '_' and '-', at most 64, "
                f"and not {DENSE!r} or the base's name"
            )
        try:
            return Mask(name, path, next(self._ids), maskset.load(path, self.base))
        except FileNotFoundError:
            raise BadMaskName(f"no file {path.name!r} in the masks folder") from None
        except MaskError as error:
            raise RefusedMask(str(error)) from None
        except OSError as error:
            raise RefusedMask(f"{path.name} cannot be read: {error.strerror}") from None

    async def _load(self, mask: Mask) -> None:
        if mask.id not in self.loaded:
            if refusal := await self.engine.load(mask):
                raise UnavailableMask(
                    f"mask {mask.name!r} cannot be loaded: {refusal}; "
                    f"put its file back, or PUT /v1/masks/{mask.name}"
                )
            self.loaded.add(mask.id)

    async def _unload(self, mask: Mask) -> None:
        if mask.id in self.loaded:
            self.loaded.discard(mask.id)
            await self.engine.unload(mask)
