"""What a mask's life does when the engine fails in the middle of it. The engine is a stand-in, as a real one
does not fail on demand; what a real one does is in test_lifecycle.py and test_faults.py."""

import asyncio
import os
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from running import BASE, MASKS

from maskllm.core import maskset
from maskllm.core.base import read_base
from maskllm.core.patterns import best
from server.errors import BadMaskName, NoRoom, RefusedMask, UnavailableMask, UnknownMask, UnwritableFolder
from server.masks import ROOM_WAIT_S, Mask, Masks
from server.metrics import Metrics
from server.names import BadState

SHAPES = maskset.load(MASKS / "legal.safetensors").shapes
PACKED = sum(rows * ceil(columns / 12) for rows, columns in SHAPES.values())
"""Bytes of one of the demo's masks: three groups of four a byte."""


class Fails(Exception):
    """Any trouble."""


class Engine:
    """Holds what it is told to, and refuses or fails when it is told to."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.pinned: set[int] = set()
        self.most_pinned = 0
        self.busy: set[int] = set()
        self.users: Counter[int] = Counter()
        self.refuse = ""
        self.fail = False

    async def load(self, mask: Mask) -> str:
        await asyncio.sleep(0)
        if self.fail:
            raise Fails
        if not self.refuse:
            self.held.add(mask.id)
        return self.refuse

    async def unload(self, mask: Mask) -> None:
        while self.in_flight(mask):
            await asyncio.sleep(0.001)
        self.held.discard(mask.id)
        self.pinned.discard(mask.id)

    async def pin(self, mask: Mask, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(mask.id)
        self.most_pinned = max(self.most_pinned, len(self.pinned))

    async def forget(self, name: str) -> None:
        pass

    @contextmanager
    def using(self, mask: Mask) -> Iterator[None]:
        assert mask.id in self.held
        self.users[mask.id] += 1
        yield
        self.users[mask.id] -= 1

    def in_flight(self, mask: Mask) -> int:
        return self.users[mask.id] + (mask.id in self.busy)

    async def stats(self) -> dict:
        return {}


@pytest.fixture
def masks(tmp_path: Path) -> Masks:
    for file in MASKS.glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    metrics, engine, base = Metrics(CollectorRegistry()), Engine(), read_base(BASE)
    made = Masks(tmp_path, "base", base, engine, slots=3, room=3 * PACKED, place=PACKED, metrics=metrics)
    made.scan()
    return made


def landed(masks: Masks, file: str) -> Path:
    """A copy of a mask's file as an upload leaves it."""
    return shutil.copy(masks.folder / f"{file}.safetensors", masks.folder / "upload.partial")


def put(masks: Masks, name: str, file: str) -> tuple[Mask, bool]:
    return asyncio.run(masks.put(name, landed(masks, file)))


def all_in_use(masks: Masks) -> list[Mask]:
    """Medical, code and novels have the three places in host memory, and each a request in flight."""
    here = [asyncio.run(masks.load(name)) for name in ("medical", "code", "novels")]
    masks.engine.busy = {mask.id for mask in here}
    return here


def test_a_republished_pin_is_held_by_one_content_at_a_time(masks: Masks):
    asyncio.run(masks.pin("legal", True))
    new, _ = put(masks, "legal", "medical")
    assert masks.engine.pinned == masks.engine.held == {new.id}
    assert masks.engine.most_pinned == 1


@pytest.mark.parametrize("how", ["refuse", "fail"])
def test_a_put_that_fails_leaves_the_old_content_known_packed_and_pinned(masks: Masks, how: str):
    old = asyncio.run(masks.pin("legal", True))
    setattr(masks.engine, how, "it is broken")
    with pytest.raises((UnavailableMask, Fails)):
        put(masks, "legal", "medical")
    assert masks.known["legal"] is old
    assert set(masks.packed) == masks.engine.held == masks.engine.pinned == {old.id}


def test_a_mask_waits_for_a_place_in_host_memory_until_one_is_idle(masks: Masks):
    here = all_in_use(masks)

    async def load() -> None:
        loading = asyncio.create_task(masks.load("legal"))
        await asyncio.sleep(0.1)
        assert not loading.done()
        masks.engine.busy.discard(here[1].id)
        await asyncio.wait_for(loading, 2)

    asyncio.run(load())
    legal = masks.known["legal"]
    assert set(masks.packed) == masks.engine.held == {here[0].id, legal.id, here[2].id}


def test_host_memory_holds_fewer_of_larger_masks(masks: Masks):
    """A group of 4:8 takes 7 bits, two of 2:4 take 5 and a third: three places are two of such masks."""
    kept = {name: best(torch.ones(shape), 4, 8) for name, shape in SHAPES.items()}
    maskset.save(maskset.from_masks(kept, masks.base, n=4, m=8), masks.folder / "wide.safetensors")
    for name in ("legal", "medical", "code"):
        asyncio.run(masks.load(name))
    put(masks, "wide@v1", "wide")
    assert [mask.name for mask in masks.packed.values()] == ["code", "wide@v1"]
    assert masks.limit == 2
    masks.room = PACKED
    with pytest.raises(RefusedMask, match="start with more --packed"):
        put(masks, "wide@v2", "wide")
    assert [mask.name for mask in masks.packed.values()] == ["code", "wide@v1"]


def test_a_large_mask_that_is_refused_or_gone_leaves_the_others_their_places(masks: Masks):
    kept = {name: best(torch.ones(shape), 4, 8) for name, shape in SHAPES.items()}
    maskset.save(maskset.from_masks(kept, masks.base, n=4, m=8), masks.folder / "wide.safetensors")
    masks.engine.refuse = "it needs --enforce-eager"
    with pytest.raises(UnavailableMask, match="--enforce-eager"):
        put(masks, "wide@v1", "wide")
    assert masks.limit == 3
    masks.engine.refuse = ""
    put(masks, "wide@v1", "wide")
    assert masks.limit == 2
    asyncio.run(masks.delete("wide@v1"))
    assert masks.limit == 3


def test_all_who_wait_for_a_mask_are_refused_at_the_same_time(masks: Masks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.2)
    all_in_use(masks)

    async def six() -> list[object]:
        waiting = [masks.ready(masks.known["legal"]) for _ in range(6)]
        return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 0.6)

    assert [type(result) for result in asyncio.run(six())] == [NoRoom] * 6


def test_a_version_that_still_answers_takes_a_place_in_host_memory(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.1)
    masks.room = 2 * PACKED
    old = asyncio.run(masks.load("legal"))
    masks.engine.busy = {old.id}

    async def republish() -> None:
        putting = asyncio.create_task(masks.put("legal", landed(masks, "medical")))
        while old.id in masks.packed:
            await asyncio.sleep(0.001)
        masks.engine.busy.add(masks.known["legal"].id)
        with pytest.raises(NoRoom, match="all 2 masks"):
            await masks.load("code")
        assert len(masks.engine.held) == 2
        masks.engine.busy.discard(old.id)
        await putting
        await masks.load("code")

    asyncio.run(asyncio.wait_for(republish(), 5))


def test_a_mask_that_is_pinned_just_when_another_needs_its_place_stays(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.1)
    code, *others = [asyncio.run(masks.load(name)) for name in ("code", "medical", "novels")]
    masks.engine.busy = {mask.id for mask in others}

    async def both() -> None:
        lock = masks._locks["code"]
        await lock.acquire()
        pinning = asyncio.create_task(masks.pin("code", True))
        await asyncio.sleep(0)  # it waits for the lock
        lock.release()  # and has not got it yet
        with pytest.raises(NoRoom):
            await masks.load("legal")
        await pinning

    asyncio.run(both())
    assert code.id in masks.engine.held & masks.engine.pinned & set(masks.packed)


def test_a_mask_does_not_wait_for_places_that_are_pinned(masks: Masks):
    masks.room = 2 * PACKED
    for name in ("medical", "code"):
        asyncio.run(masks.pin(name, True))
    begin = time.monotonic()
    with pytest.raises(NoRoom, match="all 2 masks"):
        asyncio.run(masks.load("legal"))
    assert time.monotonic() - begin < ROOM_WAIT_S / 2


def test_a_pin_that_finds_no_room_is_not_remembered(masks: Masks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.05)
    for name in ("medical", "code", "novels"):
        mask = asyncio.run(masks.load(name))
        masks.engine.busy.add(mask.id)
    with pytest.raises(NoRoom, match="all 3 masks"):
        asyncio.run(masks.pin("legal", True))
    assert masks.names.pinned == set()
    assert not (masks.folder / "masks.json").exists()


def test_pins_at_the_same_time_leave_a_slot_to_the_others(masks: Masks):
    asyncio.run(masks.pin("legal", True))

    async def two() -> list[object]:
        pins = masks.pin("code", True), masks.pin("medical", True)
        return await asyncio.gather(*pins, return_exceptions=True)

    assert [type(result) for result in asyncio.run(two())] == [Mask, NoRoom]
    assert len(masks.names.pinned) == 2
    assert masks.engine.pinned == {masks.known[name].id for name in masks.names.pinned}


def test_a_pin_that_waited_while_its_mask_was_replaced_holds_nothing(masks: Masks):
    async def both() -> list[object]:
        new = masks.put("legal", landed(masks, "medical"))
        return await asyncio.gather(new, masks.pin("legal", True), return_exceptions=True)

    assert isinstance(asyncio.run(both())[1], UnknownMask)
    assert masks.engine.pinned == masks.names.pinned == set()


def test_a_pin_that_waited_while_the_same_content_was_put_again_holds_it(masks: Masks):
    async def both() -> None:
        await asyncio.gather(masks.put("legal", masks.folder / "legal.safetensors"), masks.pin("legal", True))

    asyncio.run(masks.load("legal"))
    asyncio.run(both())
    assert masks.engine.pinned == {masks.known["legal"].id}


def test_pins_of_masks_whose_files_are_missing_count_too(masks: Masks):
    asyncio.run(masks.pin("legal", True))
    asyncio.run(masks.pin("code", True))
    del masks.known["code"]
    with pytest.raises(NoRoom, match=r"2 masks are pinned in 3 slots, .*: unpin one of code, legal,"):
        asyncio.run(masks.pin("medical", True))
    with pytest.raises(BadState, match="pins 2 masks, and one of 2 slots must be left"):
        Masks(masks.folder, "base", masks.base, Engine(), 2, 3 * PACKED, PACKED, masks.metrics)
    with pytest.raises(UnknownMask, match="no mask 'code', and no pin of that name any more"):
        asyncio.run(masks.pin("code", False))
    asyncio.run(masks.pin("medical", True))


def test_a_start_removes_what_a_crash_left_and_not_what_another_server_is_writing(masks: Masks):
    left, written = (masks.folder / f".{name}.partial" for name in ("left", "written"))
    for file in (left, written):
        file.touch()
    an_hour_ago = time.time() - 3601
    os.utime(left, (an_hour_ago, an_hour_ago))
    masks.scan()
    assert (left.exists(), written.exists()) == (False, True)


def test_a_mask_that_is_pinned_while_no_engine_has_it_is_loaded_first(masks: Masks):
    """Not taken for one that the new engine has, where the last one had it."""
    asyncio.run(masks.load("legal"))
    masks.engine = Engine()
    masks.lose()
    legal = asyncio.run(masks.pin("legal", True))
    assert masks.engine.held == masks.engine.pinned == {legal.id}


@pytest.mark.parametrize("pinned", [False, True])
def test_a_put_that_ends_when_the_engine_has_died_is_brought_back_too(masks: Masks, pinned: bool):
    if pinned:
        asyncio.run(masks.pin("legal", True))
    dead, again = masks.engine, Engine()

    async def load(mask: Mask) -> str:  # the last that it did; the next one has nothing
        dead.held.add(mask.id)
        masks.engine = again
        masks.lose()
        return ""

    dead.load = load
    new, _ = put(masks, "legal", "medical")
    asyncio.run(masks.restore())
    assert masks.engine.held == set(masks.packed) == {new.id}
    assert masks.engine.pinned == ({new.id} if pinned else set())


def test_of_names_that_come_and_go_no_lock_stays(masks: Masks):
    for name in ("a", "b"):
        put(masks, name, "legal")
        asyncio.run(masks.delete(name))
    (masks.folder / "c.safetensors").write_bytes(b"no mask")
    with pytest.raises(RefusedMask):
        asyncio.run(masks.put("c", masks.folder / "c.safetensors"))
    assert not {"a", "b", "c"} & masks._locks.keys()


def test_a_new_engine_gets_what_the_last_one_had_and_nothing_that_was_deleted_meanwhile(masks: Masks):
    for name in ("legal", "medical"):
        asyncio.run(masks.load(name))
    asyncio.run(masks.pin("legal", True))
    masks.engine = Engine()
    masks.lose()

    async def both() -> None:
        await asyncio.gather(masks.restore(), masks.delete("medical"))

    asyncio.run(both())
    assert masks.engine.held == masks.engine.pinned == set(masks.packed) == {masks.known["legal"].id}


def test_an_engine_that_dies_before_it_has_all_masks_leaves_them_to_the_next(masks: Masks):
    for name in ("legal", "medical", "code"):
        asyncio.run(masks.load(name))
    before = set(masks.packed)
    masks.engine = Engine()
    masks.lose()
    masks.engine.fail = True
    with pytest.raises(Fails):
        asyncio.run(masks.restore())
    masks.engine = Engine()
    masks.lose()
    asyncio.run(masks.restore())
    assert masks.engine.held == set(masks.packed) == before


def test_loads_that_fail_are_counted_from_0_on(masks: Masks):
    def failures(name: str) -> float | None:
        return masks.metrics.registry.get_sample_value("maskllm_mask_load_failures_total", {"mask": name})

    assert failures("legal") == 0  # an increase from nothing to 1 is none to Prometheus
    masks.engine.refuse = "it is gone"
    for _ in range(2):
        with pytest.raises(UnavailableMask):
            asyncio.run(masks.load("legal"))
    assert (failures("legal"), failures("medical")) == (2, 0)


def test_refused_files_are_counted_until_they_are_replaced(masks: Masks):
    broken = masks.folder / "broken.safetensors"
    broken.write_bytes(b"no mask")
    masks.scan()
    assert masks.metrics.registry.get_sample_value("maskllm_refused_files") == 1
    broken.write_bytes((MASKS / "legal.safetensors").read_bytes())
    put(masks, "broken", "broken")
    assert masks.metrics.registry.get_sample_value("maskllm_refused_files") == 0


def test_a_load_that_fails_gives_its_place_back(masks: Masks):
    masks.engine.fail = True
    for _ in range(4):  # one more than the limit
        with pytest.raises(Fails):
            asyncio.run(masks.load("legal"))
    masks.engine.fail = False
    asyncio.run(masks.load("legal"))
    assert set(masks.packed) == {masks.known["legal"].id}


def test_a_name_that_became_an_alias_while_its_mask_was_loading_is_no_mask(masks: Masks):
    async def both() -> None:
        putting = asyncio.create_task(masks.put("tax", landed(masks, "medical")))
        while not masks.engine.held:
            await asyncio.sleep(0)
        await masks.names.alias("tax", {"legal": 1})
        with pytest.raises(BadMaskName, match="'tax' is an alias"):
            await putting

    masks.engine.load = slow = Slow(masks.engine.load)
    asyncio.run(both())
    assert slow.calls == 1
    assert masks.names.resolve(None, query="tax") is masks.known["legal"]
    assert "tax" not in masks.known
    assert masks.engine.held == set()
    assert not (masks.folder / "tax.safetensors").exists()


class Slow:
    """A call that takes a while after it has done its work."""

    def __init__(self, call) -> None:
        self.call = call
        self.calls = 0

    async def __call__(self, *args):
        self.calls += 1
        result = await self.call(*args)
        await asyncio.sleep(0.05)
        return result


@pytest.mark.parametrize("pinned", [False, True])
def test_a_mask_is_replaced_where_its_old_content_has_the_only_place(
    masks: Masks, monkeypatch: pytest.MonkeyPatch, pinned: bool
):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.1)
    masks.room = PACKED
    asyncio.run(masks.pin("legal", True) if pinned else masks.load("legal"))
    new, _ = put(masks, "legal", "medical")
    assert masks.engine.held == set(masks.packed) == {new.id}
    assert masks.engine.pinned == ({new.id} if pinned else set())


@pytest.mark.parametrize("pinned", [False, True])
def test_old_content_that_left_its_place_to_a_new_one_is_back_where_that_is_refused(
    masks: Masks, pinned: bool
):
    masks.room = PACKED
    old = asyncio.run(masks.pin("legal", True) if pinned else masks.load("legal"))
    new = landed(masks, "medical")
    own = masks.folder / "legal.safetensors"
    own.unlink()
    own.mkdir()  # so that the new file cannot have its name
    with pytest.raises(UnwritableFolder):
        asyncio.run(masks.put("legal", new))
    assert masks.known["legal"] is old
    assert masks.engine.held == set(masks.packed) == {old.id}
    assert masks.engine.pinned == ({old.id} if pinned else set())


def test_a_mask_that_was_just_loaded_is_not_the_first_to_leave(masks: Masks):
    for name in ("medical", "code"):
        with masks.using(asyncio.run(masks.load(name))):
            pass
    legal = asyncio.run(masks.load("legal"))
    novels = asyncio.run(masks.load("novels"))
    assert list(masks.packed.values()) == [masks.known["code"], legal, novels]


def test_a_cold_mask_gets_its_turn_after_one_answer_and_so_does_the_one_that_left_for_it(masks: Masks):
    """Three places, and four masks of which each always has a request in flight."""
    answers = {name: ExitStack() for name in ("medical", "code", "novels", "legal")}

    async def begin(name: str) -> None:
        assert await masks.ready(masks.known[name])
        answers[name].enter_context(masks.using(masks.known[name]))

    async def turns() -> None:
        for name in ("medical", "code", "novels"):
            await begin(name)
        cold = asyncio.create_task(begin("legal"))
        await asyncio.sleep(0.05)
        again = asyncio.create_task(begin("medical"))
        await asyncio.wait_for(begin("novels"), 0.01)  # the others go on
        await asyncio.sleep(0.05)
        assert not cold.done()
        assert not again.done()
        answers["medical"].close()
        await asyncio.wait_for(cold, 1)
        assert not again.done()
        answers["code"].close()  # the next that was used least recently
        await asyncio.wait_for(again, 1)

    asyncio.run(turns())
    assert masks.packed.keys() == {masks.known[name].id for name in ("novels", "legal", "medical")}


def test_those_who_wait_for_a_place_get_it_in_the_order_in_which_they_came(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.masks.ROOM_POLL_S", 0.1)
    here = all_in_use(masks)

    async def use(name: str) -> None:
        masks.engine.busy.add((await masks.load(name)).id)

    async def two() -> None:
        first = asyncio.create_task(use("legal"))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(use("general"))
        await asyncio.sleep(0.075)  # so that `second` looks for a place next
        masks.engine.busy.discard(here[2].id)
        await asyncio.wait_for(first, 1)
        await asyncio.sleep(0.2)
        assert not second.done()
        masks.engine.busy.discard(here[0].id)
        await asyncio.wait_for(second, 1)

    asyncio.run(two())


def test_a_mask_in_use_stays_where_another_was_idle_before_it_could_leave(masks: Masks):
    here = all_in_use(masks)

    async def both() -> None:
        cold = asyncio.create_task(masks.load("legal"))
        await asyncio.sleep(0.05)  # medical is to leave
        masks.engine.busy.discard(here[1].id)
        await asyncio.wait_for(cold, 1)
        assert await asyncio.wait_for(masks.ready(here[0]), 0.1)

    asyncio.run(both())
    assert masks.engine.held == set(masks.packed) == {here[0].id, here[2].id, masks.known["legal"].id}


def test_who_gave_up_waiting_finds_a_place_once_the_long_answers_have_ended(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.05)
    here = all_in_use(masks)

    async def both() -> None:
        for _ in range(3):
            with pytest.raises(NoRoom, match="all 3 masks"):
                await masks.load("legal")
        # However often it asks, only one mask leaves for it.
        assert await asyncio.wait_for(masks.ready(here[1]), 0.1)
        masks.engine.busy.discard(here[0].id)
        await masks.load("legal")

    asyncio.run(both())


def test_a_mask_on_its_way_out_refuses_requests_in_time_and_stays_once_nobody_wants_its_place(
    masks: Masks, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("server.masks.ROOM_WAIT_S", 0.6)
    here = all_in_use(masks)

    async def leave_and_stay() -> None:
        cold = asyncio.create_task(masks.load("legal"))
        await asyncio.sleep(0.1)  # medical is to leave, once its answers have ended
        with pytest.raises(NoRoom, match="all 3 masks"):
            await asyncio.wait_for(masks.ready(here[0]), 1)
        with pytest.raises(NoRoom):
            await cold
        assert here[0].id not in masks.packed  # who comes again soon finds it on its way
        await asyncio.sleep(0.8)
        assert await asyncio.wait_for(masks.ready(here[0]), 0.1)

    asyncio.run(leave_and_stay())
    assert set(masks.packed) == {mask.id for mask in here}


@pytest.mark.parametrize("what", ["put", "pin"])
def test_an_admin_does_not_wait_for_the_answers_of_a_mask_on_its_way_out(masks: Masks, what: str):
    here = all_in_use(masks)

    async def meanwhile() -> None:
        cold = asyncio.create_task(masks.load("legal"))
        await asyncio.sleep(0.1)  # medical is to leave, once its answers have ended
        if what == "put":
            await asyncio.wait_for(masks.put("medical", landed(masks, "medical")), 0.5)
        else:
            await asyncio.wait_for(masks.pin("medical", True), 0.5)
        assert here[0].id in masks.packed
        masks.engine.busy.clear()
        await asyncio.wait_for(cold, 1)

    asyncio.run(meanwhile())


def test_of_twice_as_many_masks_as_places_none_starves(masks: Masks, monkeypatch: pytest.MonkeyPatch):
    """Two users for each of six masks on three places, each asking again as soon as it is answered.

    A request waits for at most two answers: while its mask leaves, and while another leaves for it, as every
    mask that waits has one leave. In that time each of another mask's two users can begin three.
    """
    monkeypatch.setattr("server.masks.ROOM_POLL_S", 0.001)
    begun, most = Counter[str](), 0

    async def ask(name: str) -> None:
        nonlocal most
        for _ in range(15):
            before = begun.copy()
            assert await masks.ready(masks.known[name])
            with masks.using(masks.known[name]):
                most = max(most, *(begun[other] - before[other] for other in masks.known if other != name))
                begun[name] += 1
                await asyncio.sleep(0.02)

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(name) for name in masks.known for _ in range(2)))

    assert len(masks.known) == 2 * masks.limit
    asyncio.run(all_of_them())
    assert set(begun.values()) == {30}
    assert most <= 6


def test_a_file_that_is_larger_than_any_mask_is_refused_unread(masks: Masks):
    huge = masks.folder / "checkpoint.safetensors"
    huge.touch()
    os.truncate(huge, 256 << 20)
    tracemalloc.start()
    try:
        masks.scan()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "checkpoint.safetensors has 268435456 bytes" in masks.refused["checkpoint"]
    assert peak < 64 << 20
    assert "legal" in masks.known


def test_an_upload_is_on_the_disk_before_it_has_its_name(masks: Masks, monkeypatch: pytest.MonkeyPatch):
    on_disk: dict[int, int] = {}  # bytes by inode
    monkeypatch.setattr(os, "fsync", lambda fd: on_disk.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}))
    put(masks, "legal", "medical")
    own = (masks.folder / "legal.safetensors").stat()
    assert on_disk == {own.st_ino: own.st_size}
