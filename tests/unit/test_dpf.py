"""Point functions shared between two: right at every position, of any number of rows, natively and in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ring import dpf, native
from sfumato.types import Z32, Z64, Ring

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 100, 1000, 1025)
KERNELS = {"native": native.expand, "numpy": lambda *given: False}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and not native.available():
        pytest.skip(f"no native kernels: {native.describe()}")
    monkeypatch.setattr(native, "expand", KERNELS[request.param])


def fixed(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def at(rows: int) -> Tensor:
    """The first and the last row, and others."""
    return torch.from_numpy(
        np.concatenate([[0, rows - 1], np.random.default_rng(rows).integers(0, rows, 11)])
    )


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_the_words_of_both_keys_add_up_to_a_one(rows: int, ring: Ring) -> None:
    positions = at(rows)
    first, second = dpf.make_keys(positions, rows, ring)
    assert first.shape == second.shape == (len(positions), dpf.key_bytes(rows, ring))
    words = [dpf.expand(first, rows, ring, first=True), dpf.expand(second, rows, ring, first=False)]
    assert words[0].dtype == ring.dtype
    assert torch.equal(words[0] + words[1], F.one_hot(positions, rows).to(ring.dtype))


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_both_kernels_make_the_same_words_of_any_bytes(rows: int, ring: Ring) -> None:
    """Keys of a client that follows no rule, too: one unit of difference would be a random word."""
    size = (5, dpf.key_bytes(rows, ring))
    keys = torch.from_numpy(np.random.default_rng(rows).integers(0, 256, size, dtype=np.uint8))
    words = ring.dtype
    _, leaves, levels = dpf._tree(rows, ring)
    for first in (True, False):
        twin, out = torch.empty((5, rows), dtype=words), torch.empty((5, rows), dtype=words)
        dpf._expand(keys, levels, leaves, first, twin)
        if not native.expand(keys, levels, leaves, dpf._FIXED_BYTES, first, out):
            pytest.skip(f"no native kernels: {native.describe()}")
        assert torch.equal(out, twin)


def test_many_keys_at_once_are_keys_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "expand", KERNELS["numpy"])
    keys, _ = dpf.make_keys(at(100), 100, Z64)
    whole = dpf.expand(keys, 100, Z64, first=True)
    monkeypatch.setattr(dpf, "_LEAVES_AT_ONCE", 1)
    assert torch.equal(dpf.expand(keys, 100, Z64, first=True), whole)


def test_a_key_is_as_long_as_its_tree_is_deep() -> None:
    """Two rows a leaf in Z64, four in Z32; 17 bytes a level."""
    assert [dpf.key_bytes(rows, Z64) for rows in (2, 3, 30522, 50257)] == [32, 49, 32 + 14 * 17, 32 + 15 * 17]
    assert [dpf.key_bytes(rows, Z32) for rows in (4, 5, 30522)] == [32, 49, 32 + 13 * 17]


def test_keys_are_fresh() -> None:
    positions = torch.zeros(8, dtype=torch.int64)
    (a, _), (b, _) = (dpf.make_keys(positions, 100, Z64) for _ in range(2))
    assert len({bytes(key) for key in torch.cat([a, b]).numpy()}) == 16


@pytest.mark.parametrize("positions", [[-1], [5], [0, 9]])
def test_a_position_must_be_a_row(positions: list[int]) -> None:
    with pytest.raises(RangeError, match="outside the 5 rows"):
        dpf.make_keys(torch.tensor(positions), 5, Z64)


def test_a_changed_correction_changes_the_words() -> None:
    """Each byte of a key counts: 100 rows have six levels."""
    first, second = dpf.make_keys(torch.tensor([41]), 100, Z64, draw=fixed(1))
    right = dpf.expand(first, 100, Z64, first=True) + dpf.expand(second, 100, Z64, first=False)
    for place in range(first.shape[1]):
        odd = second.clone()
        odd[0, place] ^= 1 if place >= 16 and (place - 16) % 17 == 16 else 128
        assert not torch.equal(
            dpf.expand(first, 100, Z64, first=True) + dpf.expand(odd, 100, Z64, first=False), right
        )
