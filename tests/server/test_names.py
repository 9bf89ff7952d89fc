"""What names mean, without an engine: masks, versions, aliases, and what a start keeps of the last."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from maskllm.core.maskset import MaskSet
from server.errors import BadAlias, ContradictingMasks, UnknownMask, UnknownModel, UnwritableFolder
from server.masks import Mask
from server.names import BadState, Names

SHA = "0123456789abcdef" * 4


@pytest.fixture
def names(tmp_path: Path) -> Names:
    known = {
        name: Mask(name, tmp_path / name, number, MaskSet(2, 4, "", {}, {}, sha256=SHA), 0)
        for number, name in enumerate(["legal@v1", "legal@v2", "medical"])
    }
    return Names(tmp_path / "masks.json", "base", known, {"broken": "it is cut off"})


def test_an_alias_answers_by_weight(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 90, "legal@v2": 10}))
    random.seed(0)
    drawn = Counter(names.resolve(None, query="legal").name for _ in range(2000))
    assert set(drawn) == {"legal@v1", "legal@v2"}
    assert 0.07 < drawn["legal@v2"] / 2000 < 0.13


def test_a_request_that_names_nothing_gets_the_default_alias_or_the_dense_base(names: Names):
    assert names.resolve("base") is None
    asyncio.run(names.alias("default", {"medical": 1}))
    assert names.resolve("base").name == "medical"
    assert names.resolve("base", query="none") is None
    assert names.resolve("base:none") is None


def test_an_alias_may_send_a_share_to_the_dense_base(names: Names):
    asyncio.run(names.alias("trial", {"medical": 1, "none": 1}))
    assert {names.resolve("trial") for _ in range(100)} == {None, names.known["medical"]}


def test_what_a_request_names_is_every_name_that_it_gives(names: Names):
    assert list(names.named("base:legal", query=None, header="code").values()) == ["code", "legal"]
    assert list(names.named("base", query="legal").values()) == ["legal"]
    assert list(names.named(None).values()) == ["none"]
    asyncio.run(names.alias("default", {"medical": 1}))
    assert list(names.named("base").values()) == ["default"]


def test_a_version_and_an_alias_that_stands_for_it_do_not_contradict(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 99, "legal@v2": 1}))
    assert names.resolve("base:legal", header="legal@v2").name == "legal@v2"
    with pytest.raises(ContradictingMasks, match="the header says 'medical'"):
        names.resolve("legal", header="medical")


def test_content_names_a_version_by_twelve_digits(names: Names):
    assert names.mask(f"legal@v1@{SHA[:12]}").name == "legal@v1"
    assert names.mask(f"medical@{SHA}").name == "medical"
    with pytest.raises(UnknownMask, match="is now medical@0123456789ab"):
        names.mask("medical@ffffffffffff")
    with pytest.raises(UnknownMask):
        names.mask(f"medical@{SHA[:11]}")


def test_what_is_unknown_is_refused_with_what_there_is(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 1}))
    with pytest.raises(UnknownMask, match="no mask 'nope'; known: legal, legal@v1, legal@v2, medical, none"):
        names.resolve(None, query="nope")
    with pytest.raises(UnknownMask, match="its file was refused: it is cut off"):
        names.mask("broken")
    with pytest.raises(UnknownMask, match="'legal' is an alias, not a mask"):
        names.mask("legal")
    with pytest.raises(UnknownModel, match="no model 'other:legal'"):
        names.resolve("other:legal")


@pytest.mark.parametrize("name", ["medical", "none", "base", "", "../x", "a b", "x@0123456789ab"])
def test_an_alias_cannot_take_a_name_that_means_something_else(names: Names, name: str):
    with pytest.raises(BadAlias):
        asyncio.run(names.alias(name, {"medical": 1}))


def test_an_alias_points_to_masks_only(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 1}))
    with pytest.raises(BadAlias, match="'legal', which is no mask"):
        asyncio.run(names.alias("law", {"legal": 1}))


def test_an_alias_whose_mask_is_gone_says_so_and_shifts_no_traffic(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 1, "legal@v2": 1}))
    del names.known["legal@v2"]
    with pytest.raises(UnknownMask, match="no mask 'legal@v2'"):
        names.resolve(None, query="legal")


def test_aliases_and_pins_outlive_the_server(names: Names):
    asyncio.run(names.alias("legal", {"legal@v1": 90, "legal@v2": 10}))
    asyncio.run(names.pin("medical", True))
    again = Names(names.file, "base", names.known, {})
    assert again.aliases == {"legal": {"legal@v1": 90, "legal@v2": 10}}
    assert again.pinned == {"medical"}
    assert again.pointing("legal@v2") == ["legal"]
    asyncio.run(again.unalias("legal"))
    asyncio.run(again.pin("medical", False))
    assert json.loads(names.file.read_text()) == {"aliases": {}, "pinned": []}


def test_what_cannot_be_kept_is_not_done(names: Names, tmp_path: Path):
    names.file = tmp_path / "missing" / "masks.json"
    with pytest.raises(UnwritableFolder, match="No such file or directory"):
        asyncio.run(names.alias("legal", {"legal@v1": 1}))
    assert names.aliases == {}


def test_what_cannot_be_kept_leaves_no_part_of_a_file(names: Names, tmp_path: Path):
    names.file.mkdir()
    with pytest.raises(UnwritableFolder, match="Is a directory"):
        asyncio.run(names.alias("legal", {"legal@v1": 1}))
    assert list(tmp_path.iterdir()) == [names.file]


def test_a_mask_that_goes_while_an_alias_is_written_gets_none_and_nobody_waits_for_the_disk(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.3))

    async def both() -> None:
        aliasing = asyncio.create_task(names.alias("law", {"medical": 1}))
        await asyncio.sleep(0.1)
        del names.known["medical"]
        assert not aliasing.done()
        with pytest.raises(BadAlias, match="would point to 'medical', which is no mask"):
            await aliasing

    asyncio.run(both())
    assert names.aliases == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["{", '{"alias": {}}', '{"aliases": {"a": {"b": 0}}}', '{"aliases": {"a": {}}}']
)
def test_a_damaged_state_file_is_refused_at_start(names: Names, content: str):
    names.file.write_text(content)
    with pytest.raises(BadState, match=r"masks\.json"):
        Names(names.file, "base", {}, {})


def test_who_may_use_one_mask_learns_no_other_names(names: Names):
    asyncio.run(names.alias("secret", {"medical": 1}))
    for ask in (
        lambda: names.resolve("nope", may_use="legal@v1".__eq__),
        lambda: names.mask("x", "legal@v1".__eq__),
    ):
        with pytest.raises((UnknownMask, UnknownModel)) as refused:
            ask()
        assert "legal@v1" in str(refused.value)
        assert "medical" not in str(refused.value)
        assert "secret" not in str(refused.value)


def test_who_may_use_only_an_alias_does_not_learn_what_is_missing_behind_it(names: Names):
    asyncio.run(names.alias("law", {"medical": 1}))
    del names.known["medical"]
    names.refused["medical"] = "it is cut off"
    with pytest.raises(UnknownMask) as refused:
        names.resolve(None, query="law", may_use="law".__eq__)
    assert str(refused.value) == "alias 'law' stands for a mask that is missing"
    with pytest.raises(UnknownMask, match=r"no mask 'medical'.*it is cut off"):
        names.resolve(None, query="law")


def test_what_is_kept_is_on_the_disk_before_it_has_its_name(names: Names, monkeypatch: pytest.MonkeyPatch):
    on_disk: dict[int, int] = {}  # bytes by inode
    monkeypatch.setattr(os, "fsync", lambda fd: on_disk.update({os.fstat(fd).st_ino: os.fstat(fd).st_size}))
    asyncio.run(names.alias("legal", {"legal@v1": 1}))
    assert on_disk == {names.file.stat().st_ino: names.file.stat().st_size}
