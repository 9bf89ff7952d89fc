"""A mask file holds what was saved, and any damage to it is refused under its own name."""

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskllm.core import maskset
from maskllm.core.base import Base
from maskllm.core.maskset import (
    CodeOutOfRange,
    DamagedMask,
    MaskError,
    MaskSet,
    MissingLayer,
    NotAMask,
    TruncatedMask,
    UnknownLayer,
    WrongBase,
    WrongPattern,
    WrongShape,
    diff,
    from_masks,
    load,
    most_bytes,
    reload,
    save,
    verify,
)
from maskllm.core.patterns import best

BASE = Base("ab" * 32, {"q.weight": (2, 12), "up.weight": (3, 8), "norm.weight": (8,)})


def a_mask_set() -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: best(torch.rand(*BASE.shapes[f"{name}.weight"], generator=generator)) for name in ("q", "up")
    }
    return from_masks(masks, BASE, provenance={"method": "random", "seed": 0}, scores={"perplexity": 9.5})


def row(bits: str) -> torch.Tensor:
    """A mask of one row: "1100 0011"."""
    return torch.tensor([[bit == "1" for bit in bits.replace(" ", "")]])


def test_a_loaded_mask_set_is_the_saved_one(tmp_path: Path) -> None:
    saved = a_mask_set()
    sha256 = save(saved, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", BASE)
    assert loaded.sha256 == sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert (loaded.n, loaded.m, loaded.base, loaded.shapes) == (2, 4, "ab" * 32, {"q": (2, 12), "up": (3, 8)})
    assert loaded.provenance == {"method": "random", "seed": 0}
    assert loaded.scores == {"perplexity": 9.5}
    assert all(torch.equal(loaded.mask(layer), saved.mask(layer)) for layer in ("q", "up"))


def test_a_file_read_again_is_what_was_loaded_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = save(a_mask_set(), path)
    most = most_bytes([(2, 12), (3, 8)])
    assert most == 12 + (4 << 20)  # 48 weights
    first, again = load(path), reload(path, sha256, most)
    assert again.packed.keys() == first.packed.keys()
    assert all(torch.equal(again.packed[layer], first.packed[layer]) for layer in first.packed)
    assert replace(again, packed={}) == replace(first, packed={})
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DamagedMask, match=r"a\.safetensors has changed since it was registered"):
        reload(path, sha256, most)
    with path.open("ab") as file:
        file.truncate(1 << 40)  # no memory holds what this file says that it has
    with pytest.raises(DamagedMask, match=r"a\.safetensors has changed since it was registered"):
        reload(path, sha256, most)


@given(
    n_m=st.sampled_from([(2, 4), (1, 4), (4, 8), (2, 8), (8, 16), (1, 2), (3, 5)]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50)
def test_masks_of_any_shape_and_n_m_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, n_m: tuple[int, int], rows: int, groups: int, seed: int
) -> None:
    (n, m), path = n_m, tmp_path_factory.getbasetemp() / "any.safetensors"
    base = Base("cd" * 32, {"up.weight": (rows, groups * m)})
    mask = best(torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed)), n, m)
    save(from_masks({"up": mask}, base, n, m), path)
    assert torch.equal(load(path, base).mask("up"), mask)


def test_widths_that_fill_their_bytes_cost_two_thirds_of_a_bit_a_weight() -> None:
    base = Base("ab" * 32, {"a.weight": (5, 12), "b.weight": (7, 36)})
    full = from_masks({"a": best(torch.rand(5, 12)), "b": best(torch.rand(7, 36))}, base)
    assert full.weights == 5 * 12 + 7 * 36
    assert full.bits_per_weight == pytest.approx(8 / 12)


def test_row_padding_counts_as_bits() -> None:
    base = Base("ab" * 32, {"a.weight": (1, 16)})
    assert from_masks({"a": best(torch.rand(1, 16))}, base).bits_per_weight == 2 * 8 / 16


def test_saving_twice_gives_the_same_file(tmp_path: Path) -> None:
    assert save(a_mask_set(), tmp_path / "a") == save(a_mask_set(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    old = save(replace(a_mask_set(), provenance={"seed": 1}), path)
    with disk_full_after(100), pytest.raises(OSError, match="File too large"):
        save(a_mask_set(), path)
    assert load(path).sha256 == old
    assert list(tmp_path.iterdir()) == [path]


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(a_mask_set(), path)
    good = path.read_bytes()
    for flip in range(0, 8 * len(good), 5):  # one or two bits of every byte, and each of the eight in turn
        bad = bytearray(good)
        bad[flip // 8] ^= 1 << flip % 8
        path.write_bytes(bad)
        with pytest.raises(MaskError):
            load(path)


def test_a_flipped_code_that_is_still_in_range_does_not_match_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(from_masks({"up": row("1100 1100")}, Base("ab" * 32, {"up.weight": (1, 8)})), path)
    good = path.read_bytes()
    assert good[-1] == 0  # the one byte of codes: 0 + 0 * 6
    path.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(DamagedMask, match="digest"):
        load(path)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("n", "2.0"),
        ("m", "true"),
        ("base", "null"),
        ("provenance", "null"),
        ("scores", '["by hand"]'),
        ("scores", f'{{"deep": {nested(100)}}}'),  # an API that shows it would fail
        ("scores", f'{{"deep": {nested(100_000)}}}'),
        ("scores", '{"a": "\\ud800"}'),
        ("more", nested(100)),
        ("layers", "[]"),
        ("layers", '{"q": ["x", "y"]}'),
        ("layers", '{"q": [2, 12, 1], "up": [3, 8]}'),
        ("layers", f'{{"q": [2, {10**400}], "up": [3, 8]}}'),
        ("layers", '{"q": [2, -12], "up": [3, 8]}'),
    ],
)
def test_a_header_that_says_what_none_can_is_damaged_though_its_digest_is_right(
    tmp_path: Path, field: str, said: str
) -> None:
    made, path = a_mask_set(), tmp_path / "a.safetensors"
    header = maskset._header(made)
    with suppress(RecursionError):
        header |= {field: json.loads(said)}
        header["digest"] = maskset._digest(header, made.packed)
    kept = {key: value for key, value in header.items() if key != field}
    text = f'{json.dumps(kept)[:-1]}, "{field}": {said}}}'
    path.write_bytes(safetensors.torch.save(dict(made.packed), {maskset.KEY: text}))
    with pytest.raises(DamagedMask, match=r"damaged|garbles"):
        load(path)


def test_a_dtype_that_torch_does_not_have_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(a_mask_set(), path)
    good = path.read_bytes()
    assert b'"dtype":"U8"' in good
    for dtype in (b"F4", b"F6_E2M3", b"F8_E8M0", b"U9"):
        changed = good[8:].replace(b'"dtype":"U8"', b'"dtype":"' + dtype + b'"')
        size = int.from_bytes(good[:8], "little") + len(changed) - len(good) + 8
        path.write_bytes(size.to_bytes(8, "little") + changed)
        with pytest.raises(MaskError):
            load(path)


@pytest.mark.parametrize(
    "entry",
    [
        nested(100_000),
        '{"data_offsets": [0, "2"]}',
        f'{{"data_offsets": [0, {"9" * 4300}]}}',
        '{"data_offsets": [0, true]}',
        '{"data_offsets": "02"}',
        "1",
    ],
)
def test_an_outer_header_that_says_what_none_can_is_none(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "a.safetensors"
    text = f'{{"__metadata__": {{"{maskset.KEY}": "1"}}, "q": {entry}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(NotAMask):
        load(path)


def test_a_file_cut_off_anywhere_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(a_mask_set(), path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(TruncatedMask):
            load(path)


def test_a_code_out_of_range_is_found_behind_a_valid_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = a_mask_set()
    save(replace(made, packed=made.packed | {"q": torch.full((2, 1), 216, dtype=torch.uint8)}), path)
    with pytest.raises(CodeOutOfRange, match="layer q: code out of range"):
        load(path)


def test_a_layer_of_another_shape_than_the_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = a_mask_set()
    save(replace(made, packed=made.packed | {"q": torch.zeros(3, 1, dtype=torch.uint8)}), path)
    with pytest.raises(WrongShape, match=r"layer q is torch.uint8 \(3, 1\), but a 2:4 mask of 2 x 12"):
        load(path)


def test_a_layer_that_the_header_lacks_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = a_mask_set()
    save(replace(made, shapes={"q": (2, 12)}), path)
    with pytest.raises(UnknownLayer, match="layer up"):
        load(path)


def test_a_layer_that_only_the_header_has_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = a_mask_set()
    save(replace(made, packed={"q": made.packed["q"]}), path)
    with pytest.raises(MissingLayer, match="layer up"):
        load(path)


def test_an_n_m_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    save(replace(a_mask_set(), n=5), tmp_path / "a.safetensors")
    with pytest.raises(WrongPattern, match="no pattern 5:4"):
        load(tmp_path / "a.safetensors")


def test_other_kinds_of_files_are_not_masks(tmp_path: Path) -> None:
    text, weights = tmp_path / "notes.txt", tmp_path / "model.safetensors"
    text.write_text("Once upon a time, there was a mask.")
    weights.write_bytes(safetensors.torch.save({"q": torch.zeros(2, 2)}))
    for path in (text, weights):
        with pytest.raises(NotAMask, match=path.name):
            load(path)


def test_an_empty_file_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(TruncatedMask, match="ends after 0 bytes"):
        load(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (Base("cd" * 32, BASE.shapes), WrongBase, "made for base abababababab, not for cdcdcdcdcdcd"),
        (Base("ab" * 32, {"q.weight": (2, 12)}), UnknownLayer, "the base has no layer up"),
        (Base("ab" * 32, BASE.shapes | {"up.weight": (8, 3)}), WrongShape, r"up is \(3, 8\), but \(8, 3\)"),
    ],
)
def test_a_mask_of_other_weights_is_refused(
    tmp_path: Path, base: Base, error: type[MaskError], message: str
) -> None:
    save(a_mask_set(), tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        load(tmp_path / "a.safetensors", base)


def test_a_mask_of_another_n_m_than_asked_for_is_refused() -> None:
    verify(a_mask_set(), BASE, pattern=(2, 4))
    with pytest.raises(WrongPattern, match="legal is 2:4, not 4:8"):
        verify(a_mask_set(), BASE, "legal", pattern=(4, 8))


def test_masks_that_do_not_follow_the_n_m_are_not_packed() -> None:
    base = Base("ab" * 32, {"up.weight": (1, 4)})
    with pytest.raises(WrongPattern, match="keeps 3 of 4"):
        from_masks({"up": row("1110")}, base)


def test_difference_counts_changed_groups_and_shared_weights() -> None:
    base = Base("ab" * 32, {"q.weight": (1, 8), "up.weight": (1, 4)})
    a = from_masks({"q": row("1100 1100"), "up": row("1010")}, base)
    b = from_masks({"q": row("1100 0110"), "up": row("1010")}, base)
    result = diff(a, b)
    assert (result["q"].changed, result["q"].jaccard, result["q"].groups) == (1 / 2, 3 / 5, 2)
    assert (result["up"].changed, result["up"].jaccard, result["up"].groups) == (0, 1, 1)
    assert (result["total"].changed, result["total"].jaccard, result["total"].groups) == (1 / 3, 5 / 7, 3)


def test_masks_that_have_nothing_in_common_are_not_compared() -> None:
    made = a_mask_set()
    with pytest.raises(WrongBase):
        diff(made, replace(made, base="cd" * 32))
    with pytest.raises(WrongPattern, match="2:4 and 1:4"):
        diff(made, replace(made, n=1))
    with pytest.raises(UnknownLayer, match="only one mask has up"):
        diff(made, replace(made, shapes={"q": (2, 12)}))
