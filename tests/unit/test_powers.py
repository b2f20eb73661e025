"""Integer exponentials: the same words everywhere, and close to the real ones over any number of octaves."""

from __future__ import annotations

import hashlib
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.ring import powers


def exact(numerator: int, denominator: int, scale: int) -> Decimal:
    """2^scale exp(numerator / denominator) to 60 digits."""
    with localcontext(prec=80):
        return (Decimal(numerator) / Decimal(denominator)).exp() * Decimal(2) ** scale


def check(found: int, numerator: int, denominator: int, scale: int) -> None:
    """Relative error 2^-27, and half a unit."""
    with localcontext(prec=80):
        right = exact(numerator, denominator, scale)
        assert abs(Decimal(found) - right) <= right * Decimal(2) ** -27 + Decimal("0.5000001")


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernel where there is one, and the same in torch."""
    if request.param == "torch":
        monkeypatch.setattr(powers.native, "powers", lambda *_: None)
        monkeypatch.setattr(powers.native, "chosen", lambda *_: None)
    return request.param


def test_golden(kernels: str) -> None:
    """Bit-identical on every machine: one unit of difference between two parties would be a random word later."""
    digest = hashlib.blake2b(digest_size=8)
    for bits, denominator, start, scale, blocks in (
        (8, 3 << 4, -100, 20, 1),
        (21, 15 << 14, -(1 << 20), 26, 1),
        (26, 11 << 18, -(1 << 25), 43, 2),
        (35, 13 << 26, -(1 << 33), 40, 3),
        (48, 9 << 40, -(1 << 46), 50, 4),
    ):
        n = (torch.arange(5000) * 68719476731 + 12345) & ((1 << bits) - 1)
        digest.update(powers.rows(n, bits, denominator, start, scale, blocks).numpy().tobytes())
    assert digest.hexdigest() == "b38d689498b0547d"
    words = powers.exponentials(torch.tensor([0, 1, 16, 160]), 8, 16, 0, 20)
    assert words.tolist() == [1 << 20, 1116203, 2850325, 23096423392]


@pytest.mark.parametrize("bits", [4, 8, 12, 13, 21, 22, 30, 31, 40, 48])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_every_block_is_exact_at_its_borders(kernels: str, bits: int, blocks: int) -> None:
    """Words around 0, the borders of every block and the end; results from nothing to 60 bits."""
    top, block = 1 << bits, 1 << (bits - blocks)
    near = {(v * block + d) % top for v in range(1 << blocks) for d in (-2, -1, 0, 1, 2)}
    near |= {512 % top, 511 % top, 262143 % top, 262144 % top, 0x555555555555 % top}
    n = sorted(near)
    denominator, start = 11 * max(1, top >> 5), -(top // 2) - 7
    found = powers.rows(torch.tensor(n), bits, denominator, start, 30, blocks)
    assert found.shape == (1 << blocks, len(n))
    for v in range(1 << blocks):
        for word, got in zip(n, found[v].tolist(), strict=True):
            check(got, start + (word + (v + 1) * block) % top, denominator, 30)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(8, 48),
    octaves=st.floats(0.5, 60.0),
    last=st.floats(-400.0, 20.0),
    scale=st.integers(4, 40),
    data=st.data(),
)
def test_any_word(bits: int, octaves: float, last: float, scale: int, data: st.DataObject) -> None:
    """Any rate and start whose results fit; those far below a unit are 0."""
    denominator = max(1, round((1 << bits) / (octaves * 0.693)))
    start = round(last * denominator * 0.693) - (1 << bits)
    n = data.draw(st.integers(0, (1 << bits) - 1))
    (found,) = powers.exponentials(torch.tensor([n]), bits, denominator, start, scale).tolist()
    check(found, start + n, denominator, scale)


def test_the_entry_of_a_block_times_a_factor(kernels: str) -> None:
    """Any block, words narrower than their machine words, products that wrap."""
    g = torch.Generator().manual_seed(3)
    for word, dtype in (
        (32, torch.int32),
        (25, torch.int32),
        (33, torch.int64),
        (58, torch.int64),
        (64, torch.int64),
    ):
        for blocks in (1, 2, 3, 4):
            words = torch.cat([torch.arange(64), torch.randint(0, 64, (1000,), generator=g)])
            half = 1 << (word - 1)
            table = torch.randint(-half, half - 1, (1 << blocks, len(words)), generator=g).to(dtype)
            factor = torch.randint(0, 1 << 30, (len(words),), generator=g)
            found = powers.chosen(words, 6 - blocks, factor, table, word)
            rows = table[words >> (6 - blocks), torch.arange(len(words))].tolist()
            exact = [(a * b + half) % (2 * half) - half for a, b in zip(rows, factor.tolist(), strict=True)]
            assert found.dtype == dtype
            assert found.tolist() == exact


def test_ranges_hundreds_of_octaves_below_one(kernels: str) -> None:
    """Nothing underflows on the way: exp(-600) is 2^-865.6."""
    for start in (-600, -3000, -400_000):
        for scale in (20, 866, 4330):
            (found,) = powers.exponentials(torch.tensor([5]), 8, 1, start, scale).tolist()
            if exact(start + 5, 1, scale) < 2**60:
                check(found, start + 5, 1, scale)


def test_digits_cover_the_word_and_keep_tables_small() -> None:
    for bits in range(4, 49):
        widths = powers._digits(bits)
        assert sum(widths) == bits
        assert all(width == powers.DIGIT_BITS for width in widths[:-1])
        assert 4 <= widths[-1] <= 12


def test_shapes_devices_and_nothing(kernels: str) -> None:
    n = torch.arange(12).reshape(3, 4)
    found = powers.rows(n, 12, 1000, 0, 20, 2)
    assert found.shape == (4, 3, 4)
    assert torch.equal(found.reshape(4, -1), powers.rows(n.reshape(-1), 12, 1000, 0, 20, 2))
    assert powers.rows(n[:0], 12, 1000, 0, 20, 1).shape == (2, 0, 4)
    assert powers.exponentials(torch.tensor(7), 12, 1000, 0, 20).shape == ()
    on_shapes = powers.rows(n.to("meta"), 12, 1000, 0, 20, 3)
    assert (on_shapes.device.type, on_shapes.shape, on_shapes.dtype) == ("meta", (8, 3, 4), torch.int64)


def test_chunks_do_not_show(kernels: str) -> None:
    n = torch.arange(powers._CHUNK + 5) & 4095
    whole = powers.exponentials(n, 12, 777, -4000, 30)
    assert torch.equal(whole[-5:], powers.exponentials(n[-5:], 12, 777, -4000, 30))


def test_what_does_not_fit_a_word_is_no_error() -> None:
    """An entry of a block that is not chosen may be of any size."""
    found = powers.exponentials(torch.tensor([255]), 8, 1, 0, 50)
    assert found.shape == (1,)
