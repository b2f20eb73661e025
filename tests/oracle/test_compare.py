"""Comparisons, clamps and maxima against float64, up to the window's band."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import RangeError
from sfumato.ops import compare
from sfumato.protocol.rep3 import Rep3
from sfumato.types import Z32

ULP = 2.0**-18


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


@pytest.mark.parametrize("bound", [16.0, 200.0])
def test_sign_is_right_outside_the_band(protocol, run, bound: float) -> None:
    x = torch.linspace(-bound * 0.99, bound * 0.99, 2049, dtype=torch.float64)
    found = run(protocol, lambda p, s, v: compare.less_than_zero(p, s, v, bound), x).value
    sure = (x < 0) | (x >= compare.band(bound, 18))
    assert torch.equal(found[sure], (x < 0).double()[sure])


def test_relu_and_its_kin(protocol, run, normal) -> None:
    x, bound = normal(5, 7, 3) * 3, 16.0
    band = compare.band(bound, 18) + 2 * ULP
    cases = (
        (lambda p, s, v: compare.relu(p, s, v, bound), F.relu(x)),
        (lambda p, s, v: compare.leaky_relu(p, s, v, 0.1, bound), F.leaky_relu(x, 0.1)),
        (lambda p, s, v: compare.absolute(p, s, v, bound), x.abs()),
        (lambda p, s, v: compare.clamp(p, s, v, -1.0, 2.0, bound), x.clamp(-1, 2)),
        (lambda p, s, v: compare.clamp(p, s, v, 0.5, None, bound), x.clamp_min(0.5)),
        (lambda p, s, v: compare.clamp(p, s, v, None, -0.5, bound), x.clamp_max(-0.5)),
        (lambda p, s, v: compare.clamp(p, s, v, None, None, bound), x),
    )
    for op, expected in cases:
        assert off(run(protocol, op, x).value, expected) <= 2 * band


def test_operations_cost_what_their_docstrings_say(run) -> None:
    count = 1024
    x = torch.ones(count, dtype=torch.float64)
    cases = (
        (lambda p, s, v: compare.less_than_zero(p, s, v, 8.0), 289, 4),
        (lambda p, s, v: compare.relu(p, s, v, 8.0), 353, 4),
        (lambda p, s, v: compare.absolute(p, s, v, 8.0), 353, 4),
        (lambda p, s, v: compare.leaky_relu(p, s, v, 0.1, 8.0), 353 + 2 * 64 + 24 + 2, 6),
        (lambda p, s, v: compare.clamp(p, s, v, -1.0, None, 8.0), 353, 4),
        (lambda p, s, v: compare.clamp(p, s, v, -1.0, 1.0, 8.0), 2 * 353, 4),
    )
    for op, bits, rounds in cases:
        found = run(Rep3(), op, x)
        assert (found.bits, found.rounds) == (count * bits, rounds)
    tournaments = (
        (2, 353, 4),
        (3, 681, 5),
        (4, 1113, 5),
        (9, 4 * 681, 10),
        (16, 5 * 1113, 10),
        (64, 23373, 15),
    )
    for n, bits, rounds in tournaments:
        found = run(Rep3(), largest, torch.ones(n, 8, dtype=torch.float64))
        assert found.bits == 8 * bits
        # One more where a party has not waited for its input, fewer where role 2 runs ahead of the others.
        assert rounds - 1 <= found.rounds <= rounds + 1


def largest(p, s, x):
    return compare.maximum(p, s, x, 0, 4.0)


def test_a_maximum_in_the_small_ring(run, normal) -> None:
    """Values and indices, ties and all, on 32-bit words."""
    x = normal(13, 6) * 2

    async def op(p, s, v, where: bool):
        small = await p.cast(s.fork("cast"), v, Z32)
        find = compare.argmax if where else compare.maximum
        return await find(p, s.fork("find"), small, 0, 8.0)

    top = run(Rep3(), lambda p, s, v: op(p, s, v, False), x).value
    where = run(Rep3(), lambda p, s, v: op(p, s, v, True), x).value
    band = 4 * compare.band(16.0, 18) + ULP
    assert off(top, x.amax(0, keepdim=True)) <= band
    assert off(x.gather(0, where.long()), x.amax(0, keepdim=True)) <= band


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 9, 11, 32])
@pytest.mark.parametrize("dim", [0, -1])
def test_maximum_and_argmax(protocol, run, normal, n: int, dim: int) -> None:
    x = normal(*((n, 5) if dim == 0 else (3, n))) * 2
    top = run(protocol, lambda p, s, v: compare.maximum(p, s, v, dim, 16.0), x).value
    where = run(protocol, lambda p, s, v: compare.argmax(p, s, v, dim, 16.0), x).value
    band = compare.band(32.0, 18)
    assert off(top, x.amax(dim, keepdim=True)) <= 5 * band + ULP
    picked = x.gather(dim, where.long())
    assert off(picked, x.amax(dim, keepdim=True)) <= 5 * band + ULP


@settings(max_examples=8, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    half=st.booleans(),
)
def test_max_pool_over_shapes(run, kernel, stride, half: bool) -> None:
    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    padding = tuple(k // 2 for k in kernel) if half else (0, 0)
    found = run(Rep3(), lambda p, s, v: compare.max_pool(p, s, v, kernel, stride, padding, 8.0), x).value
    assert off(found, F.max_pool2d(x, kernel, stride, padding)) <= 4 * compare.band(16.0, 18) + ULP


@settings(max_examples=200)
@given(bound=st.floats(2.0**-60, 2.0**40), frac=st.integers(0, 20), bits=st.integers(2, 40))
def test_a_window_holds_its_bound(bound: float, frac: int, bits: int) -> None:
    """The bound's words lie inside, in exact arithmetic, and no narrower window holds them."""
    seen = compare.window(bound, frac, bits)
    word = Fraction(bound) * 2**frac
    assert word < 2 ** (seen.shift + seen.bits - 1)
    assert seen.bits == 2 or word >= 2 ** (seen.shift + seen.bits - 2)
    assert seen.bits <= bits


def test_windows_that_cannot_work_are_refused() -> None:
    for bound in (0.0, -1.0, float("inf"), 2.0**50):
        with pytest.raises(RangeError):
            compare.window(bound, 18)


def test_ceil_mode_is_refused(run) -> None:
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(RangeError, match="ceil_mode"):
        run(Rep3(), lambda p, s, v: compare.max_pool(p, s, v, (2, 2), (2, 2), (0, 0), 8.0, ceil_mode=True), x)
