"""Which masks exist, and their way into the engine and out again.

A mask is *known* (its file is checked), *packed* (in the engine's host memory) or *resident* (in a slot). The
HTTP side owns what is known and what is packed; the engine brings packed masks into slots as it needs them.
"""

import asyncio
import logging
import os
import time
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.maskset import MaskError, MaskSet
from server.errors import BadMaskName, MaskInUse, NoRoom, RefusedMask, UnavailableMask, UnknownMask, writing
from server.metrics import Metrics
from server.names import DENSE, NAME, PARTIAL, UNFIT, BadState, Names

logger = logging.getLogger("maskllm.masks")

SUFFIX = ".safetensors"
ROOM_WAIT_S = 5.0
"""How long a mask waits for a place in host memory before its request is refused."""
ROOM_POLL_S = 0.02
ABANDONED_S = 3600
"""A file that is being written is left alone by a start for so long after its last piece."""


@dataclass
class Use:
    """What requests have asked of a mask."""

    requests: int = 0
    in_flight: int = 0
    last_s: float | None = None
    """Unix time."""


@dataclass(frozen=True, eq=False)
class Mask:
    """One content of a named mask: a checked file, and the number the engine knows it by."""

    name: str
    path: Path
    id: int
    mask_set: MaskSet
    """Without its packed codes, which only the engine keeps."""
    packed_bytes: int
    use: Use = field(default_factory=Use)

    @property
    def key(self) -> str:
        """What the engine calls it; unlike the label it is never used twice."""
        return f"{self.label}#{self.id}"

    @property
    def label(self) -> str:
        """Name and content, as in `X-Mask: legal@0123456789ab`."""
        return f"{self.name}@{self.mask_set.sha256[:12]}"


class MaskCard(BaseModel, use_attribute_docstrings=True):
    """A mask as `GET /v1/masks/{name}` shows it."""

    id: str
    object: Literal["mask"] = "mask"
    sha256: str
    """Of its content; the first 12 digits are in `X-Mask`."""
    file: str
    base: str
    state: Literal["known", "packed", "resident"]
    slot: int | None
    pinned: bool
    aliases: list[str]
    requests: int
    in_flight: int
    last_used: float | None
    """Unix time."""
    n: int
    m: int
    weights: int
    """How many the mask decides on."""
    packed_bytes: int
    """In host memory, once it is packed."""
    resident_bytes: int
    """In a slot; 0 where it has none."""
    bits_per_weight: float
    provenance: dict[str, Any]
    """How it was made, as its file says."""
    scores: dict[str, Any]
    """What it reached, as its file says."""


class Engine(Protocol):
    """What the masks need of the engine."""

    async def load(self, mask: Mask) -> str:
        """Bring a mask into the engine's memory; returns why the engine refuses it, or nothing."""

    async def unload(self, mask: Mask) -> None:
        """Wait until no request uses the mask, then free it."""

    async def pin(self, mask: Mask, pinned: bool) -> None:
        """Make a loaded mask resident for good, or no longer."""

    async def forget(self, name: str) -> None:
        """Drop what is counted of a mask that is no more."""

    def using(self, mask: Mask) -> AbstractContextManager[None]:
        """While the block runs, the mask is not unloaded."""

    def in_flight(self, mask: Mask) -> int:
        """How many requests use it."""

    async def stats(self) -> dict[str, Any]:
        """What the worker holds; empty while there is none."""


class Lock(asyncio.Lock):
    """A lock that knows whether it is had at once."""

    _wanted = 0

    @property
    def free(self) -> bool:
        return not self._wanted and not self.locked()

    async def acquire(self) -> Literal[True]:
        self._wanted += 1
        try:
            return await super().acquire()
        finally:
            self._wanted -= 1


class Masks:
    """The masks of one base by name."""

    def __init__(
        self,
        folder: Path,
        base_name: str,
        base: Base,
        engine: Engine,
        slots: int,
        room: int,
        place: int,
        metrics: Metrics,
    ) -> None:
        """`room` are the bytes of the engine's host memory for all masks, `place` those of a 2:4 mask."""
        self.folder = folder.resolve()
        self.base_name = base_name
        self.base = base
        self.engine = engine
        self.slots = slots
        self.room = room
        self.place = self._least = place
        """Bytes that each mask in host memory may take: as many as the largest one needs."""
        self.known: dict[str, Mask] = {}
        self.refused: dict[str, str] = {}
        self.metrics = metrics
        metrics.known = self.known
        metrics.refused_files.set_function(lambda: len(self.refused))
        self.packed: OrderedDict[int, Mask] = OrderedDict()
        """By number, the least recently used first."""
        self._lost: dict[int, Mask] = {}
        self.names = Names(self.folder / "masks.json", base_name, self.known, self.refused)
        if len(self.names.pinned) >= slots:
            raise BadState(
                f"{self.names.file.name} pins {len(self.names.pinned)} masks, and one of {slots} slots must "
                "be left for the others: start with more --slots, or take pins out of the file"
            )
        self._ids = count(1)
        # For a place in host memory, first come, first served; for the engine; for their last request to end.
        self._waiting: list[Mask] = []
        self._loading: list[Mask] = []
        self._leaving: list[Mask] = []
        self._drains: dict[int, asyncio.Task[None]] = {}
        self._wanted_s = 0.0
        """When somebody last waited for a place."""
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)

    @property
    def limit(self) -> int:
        """How many masks host memory may hold."""
        return self.room // self.place

    @property
    def most_bytes(self) -> int:
        """More than any file of a mask of this base has."""
        return maskset.most_bytes(self.base.shapes.values())

    def scan(self) -> None:
        """Register every mask file of the folder; one that cannot be used is logged and left out."""
        for left in self.folder.glob(f"*{PARTIAL}"):
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - ABANDONED_S:  # else it may be another server's
                    left.unlink()
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = os.fsencode(path.name).decode(errors="replace").removesuffix(SUFFIX)  # answers are UTF-8
            try:
                self.known[name] = self._read(name, path)
                self.metrics.load_failures.labels(name)
            except (BadMaskName, RefusedMask) as error:
                self.refused[name] = str(error)
                logger.warning("refused %s: %s", path.name, error)
        self._fit()
        logger.info("masks: %s", ", ".join(self.known) or "none found")

    def lose(self) -> None:
        """The engine has died: no mask is in its memory any more."""
        self._lost |= self.packed  # an engine that died before it had them all has left some here
        self.packed.clear()

    async def restore(self) -> None:
        """Bring a new engine to where the last was: pinned masks into slots, packed ones into its memory."""
        self.lose()  # what was under way when the last one died may have come to an end since
        self._lost |= {mask.id: mask for name, mask in self.known.items() if name in self.names.pinned}
        for mask in list(self._lost.values()):
            async with self._locked(mask.name):
                if self._is_current(mask):
                    try:
                        await self._load(self.known[mask.name])  # which may have another path by now
                    except (UnavailableMask, NoRoom) as error:
                        logger.warning("%s", error)
            del self._lost[mask.id]

    @contextmanager
    def using(self, mask: Mask) -> Iterator[None]:
        """While the block runs, the mask answers a request, and is not unloaded."""
        mask.use.requests += 1
        mask.use.in_flight += 1
        mask.use.last_s = time.time()
        if mask.id in self.packed:
            self.packed.move_to_end(mask.id)
        try:
            with self.engine.using(mask):
                yield
        finally:
            mask.use.in_flight -= 1

    async def ready(self, mask: Mask) -> bool:
        """Load a mask on its first use; False where it was replaced or removed in the meantime.

        Raises UnavailableMask or NoRoom, saying why, and then changes nothing.
        """
        if mask.id in self.packed:
            return True
        end = time.monotonic() + ROOM_WAIT_S  # before the lock: who waits for it does not wait again
        while mask.id in self._drains:  # which holds the lock for as long as the longest answer takes
            if not (await asyncio.wait([self._drains[mask.id]], timeout=end - time.monotonic()))[0]:
                raise self._no_room()
        async with self._locked(mask.name):
            if not self._is_current(mask):
                return False
            await self._load(mask, end)
            return True

    async def put(self, name: str, path: Path, called: str = "") -> tuple[Mask, bool]:
        """Register and load a mask from a file; returns it, and whether its name is new.

        The file is NAME.safetensors, which is what the next start finds, or becomes it; errors say `called`
        for its name. A mask of that name is replaced: requests in flight finish on the old one, which is then
        freed. Raises BadMaskName, RefusedMask, UnavailableMask, NoRoom or UnwritableFolder, and then changes
        nothing.
        """
        self._keep(name)
        async with self._locked(name):
            mask = await asyncio.to_thread(self._read, name, path, called)
            own = self.folder / f"{name}{SUFFIX}"
            moves = path.resolve() != own.resolve()
            if moves:
                await asyncio.to_thread(self._sync, path)
            old = self.known.get(name)
            if old is not None and old.mask_set.sha256 == mask.mask_set.sha256:
                mask = replace(mask, id=old.id, use=old.use)
            retired = old if old is not None and old.id != mask.id else None
            # A pin passes to the new content: held by both, it would take a slot from the others.
            was = self.packed.get(retired.id) if retired else None
            held = was if name in self.names.pinned else None
            if held:
                await self.engine.pin(held, False)
            try:
                await self._load(mask, retired=was)
                self.check(name)  # an alias may have taken the name meanwhile
                if moves:
                    with writing():
                        mask = replace(mask, path=mask.path.replace(own))
            except BaseException:
                if old is None or retired:
                    await self._unload(mask)
                if old is None:
                    await self.engine.forget(name)
                if was:  # it may have left its place to the new one
                    with suppress(UnavailableMask, NoRoom):
                        await self._load(was)
                if held and held.id in self.packed:
                    await self.engine.pin(held, True)
                raise
            self.known[name] = self.packed[mask.id] = mask
            self.metrics.load_failures.labels(name)
            self.refused.pop(name, None)
        if retired:
            await self._unload(retired)
        return mask, old is None

    async def delete(self, name: str) -> None:
        """Forget a mask at once, and free it when its last request has finished. Keeps the file.

        Raises UnknownMask, or MaskInUse where an alias points to it.
        """
        mask = self.names.mask(name)
        self._keep(mask.name)
        async with self._locked(mask.name):
            self._check_current(mask)

            def check() -> None:
                if aliases := self.names.pointing(mask.name):
                    raise MaskInUse(
                        f"alias {aliases[0]!r} points to mask {name!r}: change or delete it first"
                    )

            await self.names.pin(mask.name, False, check)
            del self.known[mask.name]  # at once, and an alias that is being written looks again
        await self._unload(mask)
        if mask.name not in self.known:  # else published anew while its last request was answered
            await self.engine.forget(mask.name)

    async def pin(self, name: str, pinned: bool) -> Mask:
        """Keep a mask resident in a slot, or no longer.

        Raises NoRoom where no slot would be left, or UnknownMask where it was replaced in the meantime. The
        pin of a mask whose file has gone counts, as it may come back; unpinned, UnknownMask says so.
        """
        if not pinned and name in self.names.pinned - self.known.keys():
            async with self._locked(name):
                if name not in self.known:
                    await self.names.pin(name, False)
                    raise UnknownMask(f"no mask {name!r}, and no pin of that name any more")
        mask = self.names.mask(name)
        self._keep(mask.name)
        async with self._locked(mask.name):
            self._check_current(mask)

            def check() -> None:
                if pinned:
                    self._check_pins(mask)

            check()
            if pinned:
                await self._load(mask)
            await self.names.pin(mask.name, pinned, check)  # again, as others may have been pinned meanwhile
            if mask.id in self.packed:
                await self.engine.pin(mask, pinned)
        return mask

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        """One at a time for each name; of names that come and go nothing stays."""
        lock = self._locks[name]
        try:
            async with lock:
                yield
        finally:
            if name not in self.known and lock.free:
                self._locks.pop(name, None)

    def _keep(self, name: str) -> None:
        """Let a mask stay that was to leave once its requests are answered, for which no admin waits."""
        if (mask := self.known.get(name)) and (drain := self._drains.pop(mask.id, None)):
            drain.cancel()

    def _fit(self) -> None:
        """Settle the size of a place: no mask that is known, or held, or coming, takes more."""
        held = (*self.packed.values(), *self._waiting, *self._loading, *self._leaving)
        self.place = max([self._least, *(mask.packed_bytes for mask in (*self.known.values(), *held))])

    def _is_current(self, mask: Mask) -> bool:
        known = self.known.get(mask.name)
        return known is not None and known.id == mask.id  # the same content may have been put again

    def _check_current(self, mask: Mask) -> None:
        if not self._is_current(mask):
            raise UnknownMask(f"mask {mask.name!r} was replaced or removed in the meantime")

    def _check_pins(self, mask: Mask) -> None:
        others = self.names.pinned - {mask.name}
        if len(others) + 1 >= self.slots:
            raise NoRoom(
                f"{len(others)} masks are pinned in {self.slots} slots, and one must be left for the "
                f"others: unpin one of {', '.join(sorted(others))}, or start with more --slots"
            )

    async def load(self, name: str) -> Mask:
        """Bring a mask into the engine's host memory before anybody asks for it."""
        while not await self.ready(mask := self.names.mask(name)):
            pass
        return mask

    def check(self, name: str) -> None:
        """Raise BadMaskName where a mask cannot be called so."""
        if not NAME.fullmatch(name) or name in (DENSE, self.base_name):
            raise BadMaskName(f"{name!r} cannot name a mask: it is {UNFIT}")
        if name in self.names.aliases:
            raise BadMaskName(f"{name!r} is an alias: delete it first, or name the mask {name}@v1")

    def path(self, file: str) -> Path:
        """A file of the folder by its name. Raises BadMaskName where it is none."""
        path = (self.folder / file).resolve() if "\0" not in file else self.folder
        if not path.is_relative_to(self.folder) or path.suffix != SUFFIX:
            raise BadMaskName(f"file {file!r} is not a *{SUFFIX} under the masks folder")
        return path

    async def describe(self, masks: list[Mask], may_use: Callable[[str], bool]) -> list[MaskCard]:
        """Masks as they are shown, with the aliases that the caller may use."""
        stats: dict[str, Any] = {"slots": {}, "slot_bytes": 0} | await self.engine.stats()
        return [
            self._describe(mask, stats["slots"].get(mask.id), stats["slot_bytes"], may_use) for mask in masks
        ]

    def _describe(
        self, mask: Mask, slot: int | None, slot_bytes: int, may_use: Callable[[str], bool]
    ) -> MaskCard:
        mask_set, packed = mask.mask_set, mask.id in self.packed
        return MaskCard(
            id=mask.name,
            sha256=mask_set.sha256,
            file=mask.path.name,
            base=self.base_name,
            state="resident" if slot is not None else "packed" if packed else "known",
            slot=slot,
            pinned=mask.name in self.names.pinned,
            aliases=list(filter(may_use, self.names.pointing(mask.name))),
            requests=mask.use.requests,
            in_flight=mask.use.in_flight,
            last_used=mask.use.last_s,
            n=mask_set.n,
            m=mask_set.m,
            weights=mask_set.weights,
            packed_bytes=mask.packed_bytes,
            resident_bytes=0 if slot is None else slot_bytes,
            bits_per_weight=8 * mask.packed_bytes / mask_set.weights,
            provenance=mask_set.provenance,
            scores=mask_set.scores,
        )

    def _read(self, name: str, path: Path, called: str = "") -> Mask:
        """Check a file in full. Raises BadMaskName or RefusedMask."""
        self.check(name)
        called = called or path.name
        try:
            if (size := path.stat().st_size) > self.most_bytes:  # reading it could take all memory
                raise RefusedMask(
                    f"{called} has {size} bytes, and no mask of this base has more than {self.most_bytes}"
                )
            mask_set = maskset.load(path, self.base)
        except FileNotFoundError:
            raise BadMaskName(f"no file {called!r} in the masks folder") from None
        except MaskError as error:
            raise RefusedMask(str(error).replace(path.name, called)) from None
        except OSError as error:
            raise RefusedMask(f"{called} cannot be read: {error.strerror}") from None
        size = sum(packed.nbytes for packed in mask_set.packed.values())
        if size > self.room:
            raise RefusedMask(
                f"{called} takes {size} bytes of host memory, and masks may take {self.room}: "
                "start with more --packed"
            )
        return Mask(name, path, next(self._ids), replace(mask_set, packed={}), size)

    def _sync(self, file: Path) -> None:
        """Have a file on the disk, so that a power cut leaves no part of it under another name."""
        with writing(), file.open("rb") as written:
            os.fsync(written.fileno())

    async def _load(self, mask: Mask, end: float | None = None, retired: Mask | None = None) -> None:
        """Pack a mask, pinned if its name is, where it is not packed yet; wait for room until `end`.

        `retired` is the content that it replaces, which may leave its place to it.
        """
        if mask.id in self.packed:
            return
        failures = self.metrics.load_failures.labels(mask.name)
        with failures.count_exceptions((UnavailableMask, NoRoom)):
            await self._make_room(mask, end or time.monotonic() + ROOM_WAIT_S, retired)
            with among(self._loading, mask):
                if refusal := await self.engine.load(mask):
                    raise UnavailableMask(
                        f"mask {mask.name!r} cannot be loaded: {refusal}; "
                        f"put its file back, or PUT /v1/masks/{mask.name}"
                    )
                self.packed[mask.id] = mask
        if mask.name in self.names.pinned:
            await self.engine.pin(mask, True)

    async def _make_room(self, mask: Mask, end: float, retired: Mask | None) -> None:
        """Wait for a place in host memory; places go to those who wait in the order in which they came.

        Where the limit is reached, the least recently used mask that is not pinned leaves: an idle one at
        once, else one in use, as soon as the requests that it has are answered. Raises NoRoom at `end`.
        """
        with among(self._waiting, mask):
            self._fit()
            while self._taken() + (ahead := self._waiting.index(mask)) >= self.limit:
                self._wanted_s = time.monotonic()
                others = [m for m in self.packed.values() if m is retired or m.name not in self.names.pinned]
                free = [m for m in others if m is retired or self._locks[m.name].free]
                idle = next((m for m in free if not self.engine.in_flight(m)), None)
                busy = next((m for m in free if m is not retired and m.id not in self._drains), None)
                if idle and idle is retired:  # whose lock is held for the one that waits here
                    await self._unload(idle)
                elif idle:
                    async with self._locks[idle.name]:  # at once: who has it may wait for this one's place
                        await self._unload(idle)
                elif not (others or self._loading or self._leaving or ahead) or time.monotonic() >= end:
                    raise self._no_room()
                elif busy and len(self._drains) < len(self._waiting):
                    self._drains[busy.id] = asyncio.create_task(self._drain(busy))
                else:
                    await asyncio.sleep(ROOM_POLL_S)
            if self._drains and len(self._drains) >= len(self._waiting):
                self._drains.popitem()[1].cancel()  # the place was another's

    def _no_room(self) -> NoRoom:
        return NoRoom(
            f"all {self.limit} masks that host memory may hold are in use: try again, or start with more "
            "--packed"
        )

    def _taken(self) -> int:
        """How many places in host memory are taken, by masks that come or go, too."""
        return len(self.packed) + len(self._loading) + len(self._leaving)

    async def _drain(self, mask: Mask) -> None:
        """Free a mask once its requests in flight are answered; new ones wait for their turn meanwhile.

        Cancelled, it stays. Who waits for its place may give up: the drain goes on for as long again, so that
        one who keeps trying finds the place even where answers take longer than a request waits.
        """
        async with self._locks[mask.name]:
            leaves = mask.id in self.packed and mask.name not in self.names.pinned
            if leaves:
                del self.packed[mask.id]
                try:
                    with among(self._leaving, mask):
                        while self.engine.in_flight(mask) and leaves:
                            await asyncio.sleep(ROOM_POLL_S)
                            leaves = time.monotonic() < self._wanted_s + ROOM_WAIT_S
                finally:
                    self.packed[mask.id] = mask
            del self._drains[mask.id]  # too late to be cancelled
            if leaves:
                await self._unload(mask)

    async def _unload(self, mask: Mask) -> None:
        if self.packed.pop(mask.id, None):
            with among(self._leaving, mask):  # its memory is taken until its last request has ended
                await self.engine.unload(mask)
        self._fit()


@contextmanager
def among(masks: list[Mask], mask: Mask) -> Iterator[None]:
    """While the block runs, the mask is one of these."""
    masks.append(mask)
    try:
        yield
    finally:
        masks.remove(mask)
