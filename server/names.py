"""What a request's name means: a mask, the dense base, or an alias that stands for some of them."""

import asyncio
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError

from server.errors import (
    BadAlias,
    ContradictingMasks,
    UnknownAlias,
    UnknownMask,
    UnknownModel,
    UnwritableFolder,
)

if TYPE_CHECKING:
    from server.masks import Mask

DENSE = "none"
"""The name that asks for the base without a mask."""
DEFAULT = "default"
"""The alias that answers requests which name nothing; without it they get the dense base."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9._-]{1,11})?")
"""A name, and perhaps a version such as `legal@v2`: shorter than the 12 digits that name content."""
UNFIT = (
    "no name of letters, digits, '.', '_' and '-', at most 64, perhaps with a version as in 'legal@v2'; "
    f"or it is {DENSE!r} or the base's"
)
PARTIAL = ".partial"
"""How files end that are being written; what a crash left of them is removed at the next start."""

Weights = Annotated[dict[str, Annotated[float, Field(gt=0, le=1e9)]], Field(min_length=1)]
"""Masks, or "none", and how often each answers, in proportion."""


class State(BaseModel, extra="forbid"):
    """What `masks.json` in the masks folder keeps from one start of the server to the next."""

    aliases: dict[str, Weights] = {}
    pinned: set[str] = set()


@contextmanager
def _kept(file: Path) -> Iterator[None]:
    """Remove a file if the block fails."""
    try:
        yield
    except BaseException:
        file.unlink()
        raise


def _all(name: str) -> bool:  # noqa: ARG001
    return True


class BadState(ValueError):
    """A `masks.json` that cannot be read, or kept."""


class Names:
    """Aliases and pins, kept in a file, beside the masks that others register in `known` and `refused`."""

    def __init__(
        self, file: Path, base_name: str, known: Mapping[str, "Mask"], refused: Mapping[str, str]
    ) -> None:
        self.file = file
        self.base_name = base_name
        self.known = known
        self.refused = refused
        self._lock = asyncio.Lock()
        try:
            self.state = State.model_validate_json(file.read_bytes()) if file.exists() else State()
        except (ValidationError, OSError) as error:
            raise BadState(f"{file.name} in the masks folder: {error}") from None

    @property
    def aliases(self) -> dict[str, dict[str, float]]:
        return self.state.aliases

    @property
    def pinned(self) -> set[str]:
        return self.state.pinned

    def resolve(
        self, model: str | None, *, may_use: Callable[[str], bool] = _all, **named: str | None
    ) -> "Mask | None":
        """The mask that answers a request, None for dense; one of an alias's is drawn by weight.

        `named` are the ways that name a mask outright (`query`, `body`, `header`); `model` may be the base, a
        mask, or "base:mask". Raises ContradictingMasks, UnknownMask or UnknownModel, which name what there
        is of the names that the caller may use.
        """
        asked = self.named(model, **named)
        if "the model" in asked and not self._is_model(str(model), asked["the model"]):
            models = ", ".join([self.base_name, *filter(may_use, [*self.aliases, *self.known])])
            raise UnknownModel(f"no model {model!r}; known: {models}, {self.base_name}:MASK")
        meant, *others = (self._meant(name, may_use) for name in asked.values())
        common = {mask: weight for mask, weight in meant.items() if all(mask in other for other in others)}
        if not common:
            details = ", ".join(f"{way} says {name!r}" for way, name in asked.items())
            raise ContradictingMasks(f"the request names different masks: {details}")
        mask, *others_too = common
        return random.choices(list(common), list(common.values()))[0] if others_too else mask

    def named(self, model: str | None, **named: str | None) -> dict[str, str]:
        """The names that a request gives, known or not, by how it gives them; at least one."""
        asked = {f"the {way}": name for way, name in named.items() if name is not None}
        if model is not None and model != self.base_name:
            asked["the model"] = model.removeprefix(f"{self.base_name}:")
        return asked or {"nothing": DEFAULT if DEFAULT in self.aliases else DENSE}

    def mask(self, name: str, may_use: Callable[[str], bool] = _all) -> "Mask":
        """A mask by its name, or by name@sha with the first digits of its content. Raises UnknownMask."""
        if name in self.known:
            return self.known[name]
        if name in self.aliases:
            raise UnknownMask(f"{name!r} is an alias, not a mask")
        bare, _, sha = name.rpartition("@")
        if bare not in self.known:
            reason = f" (its file was refused: {self.refused[name]})" if name in self.refused else ""
            known = ", ".join(filter(may_use, [*self.aliases, *self.known, DENSE]))
            raise UnknownMask(f"no mask {name!r}{reason}; known: {known}")
        mask = self.known[bare]
        if not (len(sha) >= 12 and mask.mask_set.sha256.startswith(sha)):
            raise UnknownMask(f"mask {bare!r} is now {mask.label}, not {name}")
        return mask

    def pointing(self, name: str) -> list[str]:
        """The aliases that stand for a mask, among others."""
        return [alias for alias, weights in self.aliases.items() if name in weights]

    async def alias(self, name: str, weights: dict[str, float]) -> bool:
        """Let a name stand for masks; whether it is new. Raises BadAlias or UnwritableFolder."""
        async with self._lock:
            new = name not in self.aliases
            state = State(aliases={**self.aliases, name: weights}, pinned=self.pinned)
            await self._save(state, partial(self._check_alias, name, weights))
        return new

    def _check_alias(self, name: str, weights: dict[str, float]) -> None:
        if not NAME.fullmatch(name) or name in (DENSE, self.base_name) or name in self.known:
            raise BadAlias(f"{name!r} cannot be an alias: it is {UNFIT}, or a mask's")
        for target in weights:
            if target != DENSE and target not in self.known:
                known = ", ".join([*self.known, DENSE])
                raise BadAlias(f"alias {name!r} would point to {target!r}, which is no mask; known: {known}")

    async def unalias(self, name: str) -> None:
        """Forget an alias. Raises UnknownAlias or UnwritableFolder."""
        async with self._lock:
            if name not in self.aliases:
                raise UnknownAlias(f"no alias {name!r}; known: {', '.join(self.aliases) or 'none'}")
            rest = {alias: weights for alias, weights in self.aliases.items() if alias != name}
            await self._save(State(aliases=rest, pinned=self.pinned))

    async def pin(self, name: str, pinned: bool, check: Callable[[], None] = lambda: None) -> None:
        """Remember that a mask is pinned, or not, unless `check` raises. Raises UnwritableFolder."""
        async with self._lock:
            if pinned == (name in self.pinned):
                check()
            else:
                await self._save(State(aliases=self.aliases, pinned=self.pinned ^ {name}), check)

    def _is_model(self, model: str, name: str) -> bool:
        """Whether a model is "base:NAME", whatever the name, or a name that there is."""
        return (
            model != name
            or name in self.aliases
            or name in self.known
            or name.rpartition("@")[0] in self.known
        )

    def _meant(self, name: str, may_use: Callable[[str], bool]) -> "dict[Mask | None, float]":
        weights = self.aliases.get(name, {name: 1.0})
        if name in self.aliases and not all(t in (DENSE, *self.known) or may_use(t) for t in weights):
            raise UnknownMask(f"alias {name!r} stands for a mask that is missing")
        return {
            None if each == DENSE else self.mask(each, may_use): weight for each, weight in weights.items()
        }

    async def _save(self, state: State, check: Callable[[], None] = lambda: None) -> None:
        """Write the file whole or not at all, and only then believe it.

        In a thread, as disks take their time; `check` raises where it must not be, before and after that.
        """

        def write() -> Path:
            out = tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=PARTIAL, delete=False)  # noqa: SIM115
            with _kept(Path(out.name)), out:
                out.write(state.model_dump_json(indent=2) + "\n")
                out.flush()
                os.fsync(out.fileno())  # a power cut must not leave an empty file under this name
            return Path(out.name)

        check()
        try:
            written = await asyncio.to_thread(write)
            with _kept(written):
                check()
                written.replace(self.file)
        except OSError as error:
            raise UnwritableFolder(
                f"{error.strerror}: aliases and pins are kept in {self.file.name} in the masks folder, which "
                "the server must be able to write"
            ) from None
        self.state = state
