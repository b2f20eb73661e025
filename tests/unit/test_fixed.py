"""Fixed point: exact rounding, ties, and errors instead of silent overflow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import RangeError
from sfumato.ring.fixed import decode, encode, encode_scalar
from sfumato.types import Z32, Z64, Ring


@pytest.mark.parametrize("ring", [Z32, Z64], ids=str)
def test_ties_go_to_even(ring: Ring) -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) / 2**4
    assert encode(halves, ring, 4).tolist() == [0, 2, 2, 0, -2, -2]
    assert [encode_scalar(float(h), 4) for h in halves] == [0, 2, 2, 0, -2, -2]


@settings(max_examples=200, deadline=None)
@given(x=st.floats(-1000, 1000), frac=st.integers(0, 20))
def test_round_trip(x: float, frac: int) -> None:
    words = encode(torch.tensor(x, dtype=torch.float64), Z64, frac)
    assert abs(float(decode(words, frac)) - x) <= 0.5 * 2.0**-frac
    assert int(words) == encode_scalar(x, frac)
    assert torch.equal(encode(decode(words, frac), Z64, frac), words)


@settings(max_examples=100, deadline=None)
@given(word=st.integers(-(1 << 53), 1 << 53), frac=st.integers(0, 40))
def test_words_up_to_2_53_decode_exactly(word: int, frac: int) -> None:
    assert encode(decode(torch.tensor(word), frac), Z64, frac).item() == word


@pytest.mark.parametrize("ring", [Z32, Z64], ids=str)
def test_the_range_is_the_one_that_truncation_allows(ring: Ring) -> None:
    limit = 2.0 ** (ring.bits - 2)
    inside = limit - (1 if ring == Z32 else 512)
    for sign in (1, -1):
        assert encode(torch.tensor(sign * inside, dtype=torch.float64), ring, 0).item() == sign * int(inside)
        with pytest.raises(RangeError, match="fraction bits"):
            encode(torch.tensor(sign * limit, dtype=torch.float64), ring, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("ring", [Z32, Z64], ids=str)
def test_what_is_no_number_is_refused(ring: Ring, bad: float) -> None:
    with pytest.raises(RangeError):
        encode(torch.tensor([0.0, bad], dtype=torch.float64), ring, 8)


def test_a_value_that_rounds_up_to_the_limit_is_refused() -> None:
    with pytest.raises(RangeError):
        encode(torch.tensor(2.0**30 - 0.25, dtype=torch.float64), Z32, 0)


def test_shapes_types_and_gradients() -> None:
    for shape in ((), (0,), (2, 3)):
        words = encode(torch.zeros(shape, dtype=torch.float16, requires_grad=True), Z32, 3)
        assert (words.shape, words.dtype, words.requires_grad) == (shape, torch.int32, False)
    meta = encode(torch.empty(2, 3, device="meta"), Z64, 3)
    assert (meta.shape, meta.dtype, meta.device.type) == ((2, 3), torch.int64, "meta")
