"""One-opening moves at every corner of shares, masks and ranges: ``evaluate`` and ``exponential``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import protocol_suite as suite

from sfumato.errors import RangeError, TypeMismatch
from sfumato.protocol.base import Exponential, Protocol, Series
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.session.drive import simulate, simulation_keys
from sfumato.session.randomness import PairStreams
from sfumato.session.session import Session
from sfumato.types import B64, Z32, Z64, Ring, Shared


class Chosen(PairStreams):
    """Streams whose masks are given by name; all others are drawn."""

    def __init__(self, party: int, masks: dict[str, Tensor]) -> None:
        super().__init__(simulation_keys(b"chosen", party))
        self.masks = masks

    def words(self, peer: int, label: str, ring: Ring, shape: tuple[int, ...]) -> Tensor:
        given = self.masks.get(label.rpartition("|")[2])
        return super().words(peer, label, ring, shape) if given is None else given.reshape(shape).clone()


def opened(
    spec: Exponential | Series,
    words: Tensor,
    mask: Tensor,
    *,
    ring: Ring = Z64,
    to: Ring | None = None,
    frac: int,
    argument: int,
    two_way: bool = False,
    turn: int = 0,
    shares: tuple[int, int] | None = None,
) -> Tensor:
    """The move on x = x0 + x1 + x2 in roles, with role 2's mask of the phase as given: real numbers."""
    p = Rep3(two_way=two_way)
    multiplier, offset = spec.multiplier, spec.lo if isinstance(spec, Exponential) else spec.centre
    if shares is None:
        x0, x1 = suite.components(words, ring, 3)[:2]
    else:
        x0, x1 = (torch.full_like(words, v) for v in shares)
    parts = [x0, x1, words - x0 - x1]
    moved = suite.shares(p, 0, parts, ring, argument)
    # The public offset goes to component 0 of the parties, whatever role that is.
    shift = p.encode(moved, -offset).to(torch.int64)
    first = x0.long() + (shift if turn == 0 else 0)
    low = mask.long() // 3 if two_way else mask.long() - first * multiplier
    masks = {"t": low, "t0": low, "t1": mask.long() - low}
    rotated = [parts[(j - turn) % 3] for j in range(3)]

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, rotated, ring, argument)
        child = s.fork("case", turn=turn)
        if isinstance(spec, Exponential):
            return await p.exponential(child, spec, x, frac=frac, ring=to)
        return await p.evaluate(child, spec, x, frac=frac, ring=to)

    outputs, _ = simulate(main, streams=lambda party: Chosen(party, masks))
    return suite.combine(p, outputs).double() / 2.0**frac


def alone(p: Protocol, spec: Exponential | Series, words: Tensor, argument: int, frac: int) -> list[Shared]:
    parts = [words] if p.parties == 1 else suite.components(words, Z64, 1)

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, parts, Z64, argument)
        if isinstance(spec, Exponential):
            return await p.exponential(s, spec, x, frac=frac)
        return await p.evaluate(s, spec, x, frac=frac)

    return simulate(main, parties=p.parties)[0]


# ---- exponential -------------------------------------------------------------------------------------------


def tiny(blocks: int) -> Exponential:
    """Words of 9 opened bits, three of them fraction bits of x, the longest range that its blocks allow."""
    multiplier = 5
    length = ((1 << 9) - (1 << (9 - blocks)) - 1) // multiplier
    return Exponential(-3.0, -3.0 + length / 8, 3, multiplier, 9, blocks, 12, 36, 54, 2.0**-10)


@pytest.mark.parametrize("two_way", [False, True], ids=["one way", "two ways"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_exponential_of_every_word_under_every_mask(blocks: int, two_way: bool) -> None:
    """All of [lo, hi], its ends included, under all 512 masks: no wrap is judged wrongly."""
    spec = tiny(blocks)
    count = round((spec.hi - spec.lo) * 8) + 1
    words = torch.arange(count).repeat_interleave(512) + round(spec.lo * 8)
    masks = torch.arange(512).repeat(count)
    found = opened(spec, words, masks, frac=24, argument=3, two_way=two_way)
    exact = torch.exp(words.double() / 8)
    assert float(((found - exact).abs() - 2.0**-24).div(exact).max()) <= spec.error


EDGES = (0, 1, -1, (1 << 63) - 1, -(1 << 63), 1 << 62, -(1 << 62), 0x5555555555555555)


@settings(max_examples=120, deadline=None)
@given(
    blocks=st.integers(1, 4),
    place=st.integers(0, 16),
    step=st.integers(-2, 2),
    corner=st.integers(0, 16),
    near=st.integers(-2, 2),
    shares=st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    turn=st.integers(0, 2),
    two_way=st.booleans(),
    to=st.sampled_from([Z64, Z32]),
)
def test_exponential_at_block_borders(
    blocks: int,
    place: int,
    step: int,
    corner: int,
    near: int,
    shares: tuple[int, int],
    turn: int,
    two_way: bool,
    to: Ring,
) -> None:
    """x at lo, hi and where the phase crosses sixteenths of the word, masks there too, shares at the ring's edges."""
    spec = Exponential(
        -6.0, 1.0, 18, 15 if blocks == 1 else 13, 25 if blocks > 1 else 26, blocks, 14, 52, 58, 2.0**-12
    )
    spec = replace(spec, multiplier=min(15, (spec.reach - 1) // (7 << 18)))
    low, high = round(spec.lo * 2**18), round(spec.hi * 2**18)
    word = min(max(low + (place << (spec.opened - 4)) // spec.multiplier + step, low), high)
    mask = ((corner << (spec.opened - 4)) + near) % (1 << spec.opened)
    found = opened(
        spec, torch.tensor([word]), torch.tensor([mask]), frac=20, argument=18, to=to, two_way=two_way,
        turn=turn, shares=shares,
    )  # fmt: skip
    exact = np.exp(word / 2.0**18)
    assert abs(float(found) - exact) <= spec.error * exact + 2.0**-20


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.integers(-(1 << 61), 1 << 61), min_size=1, max_size=5),
    blocks=st.integers(1, 4),
    two_way=st.booleans(),
)
def test_outside_its_range_an_exponential_is_garbage_and_no_crash(
    words: list[int], blocks: int, two_way: bool
) -> None:
    """What a party does may not tell that a secret left its range; plain says so."""
    spec, x = tiny(blocks), torch.tensor(words)
    outputs = alone(Rep3(two_way=two_way), spec, x, 3, 20)
    assert suite.combine(Rep3(), outputs).shape == x.shape
    inside = all(spec.lo <= w / 8 <= spec.hi for w in words)
    if not inside:
        with pytest.raises(RangeError, match="planned for"):
            alone(Plain(), spec, x, 3, 20)


def test_an_exponential_that_cannot_tell_its_wraps_is_refused() -> None:
    good = tiny(1)
    for bad in ({"hi": good.hi + 0.125}, {"lo": -3.01}, {"hi": good.lo}, {"blocks": 5}, {"word": 65}):
        with pytest.raises(ValueError, match="exponential"):
            replace(good, **bad)


# ---- evaluate ----------------------------------------------------------------------------------------------


def worst(g: Series) -> float:
    """No rounding of sines and factors exceeds this, and no error of the sines."""
    sizes = [(c * c + s * s) ** 0.5 for c, s in zip(g.cos, g.sin, strict=True)]
    dealt, public = sum(sizes) * 2**0.5 * 2.0 ** -(g.dealt + 1), len(sizes) * 2.0**-g.public
    return dealt + public + 4 * sum(sizes) * 2.0**-26


SMALL = Series(-3.5, 3.75, 0.125, 4, 2, 0.75, 0.0, 0, (0.5, -0.25), (0.125, 1.5), 12, 14, 32, 0.0)


@pytest.mark.parametrize("two_way", [False, True], ids=["one way", "two ways"])
def test_evaluate_at_both_ends_under_every_mask(two_way: bool) -> None:
    """x = lo, hi and centre under all 4,096 masks of a 12-bit phase."""
    words = torch.tensor([round(v * 256) for v in (SMALL.lo, SMALL.hi, SMALL.centre)]).repeat_interleave(4096)
    found = opened(SMALL, words, torch.arange(4096).repeat(3), frac=22, argument=8, two_way=two_way)
    assert float((found - SMALL(words.double() / 256)).abs().max()) <= worst(SMALL) + 2.0**-22


@settings(max_examples=150, deadline=None)
@given(
    word=st.integers(-(7 << 7), 15 << 6),
    mask=st.integers(0, 4095),
    shares=st.tuples(st.sampled_from(EDGES), st.sampled_from(EDGES)),
    scales=st.sampled_from(
        [(4, 4, 13), (8, 10, 24), (12, 14, 31), (12, 14, 32), (12, 15, 33), (20, 21, 47), (28, 28, 62),
         (28, 28, 63), (30, 28, 64)]
    ),
    slope=st.sampled_from([0.0, 0.5, -1.5]),
    turn=st.integers(0, 2),
    two_way=st.booleans(),
    rings=st.sampled_from([(Z64, Z64), (Z64, Z32), (Z32, Z32), (Z32, Z64)]),
    frac=st.integers(0, 24),
)  # fmt: skip
def test_evaluate_in_words_of_any_width(
    word: int,
    mask: int,
    shares: tuple[int, int],
    scales: tuple[int, int, int],
    slope: float,
    turn: int,
    two_way: bool,
    rings: tuple[Ring, Ring],
    frac: int,
) -> None:
    """Words from 13 to 64 bits, with and without a line, from and to either ring, shares at the ring's edges."""
    dealt, public, width = scales
    ring, to = rings
    line = slope if dealt + public >= 9 and width <= ring.bits else 0.0
    g = replace(SMALL, dealt=dealt, public=public, word=width, linear=line, linear_frac=1)
    edges = tuple(torch.tensor(v).to(ring.dtype).item() for v in shares)
    frac = min(frac, 26) if to == Z32 else frac
    found = opened(
        g, torch.tensor([word], dtype=ring.dtype), torch.tensor([mask]), ring=ring, to=to, frac=frac, argument=8,
        two_way=two_way, turn=turn, shares=edges,
    )  # fmt: skip
    exact = float(g(torch.tensor(word / 256)))
    assert abs(float(found) - exact) <= worst(g) + 2.0**-frac


@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.integers(-(1 << 61), 1 << 61), min_size=1, max_size=5), two_way=st.booleans())
def test_outside_its_range_a_series_is_garbage_and_no_crash(words: list[int], two_way: bool) -> None:
    g = replace(SMALL, linear=0.5, linear_frac=1)
    outputs = alone(Rep3(two_way=two_way), g, torch.tensor(words), 8, 20)
    assert suite.combine(Rep3(), outputs).shape == (len(words),)


def test_several_series_are_those_of_single_openings() -> None:
    """Values agree with each series by itself; the opening is shared, the rounding is not."""
    p, words = Rep3(), torch.arange(-200, 200)
    group = (
        SMALL,
        replace(SMALL, cos=(1.0,), sin=(0.0,), linear=0.25, linear_frac=2),
        replace(SMALL, public=12),
    )
    parts = suite.components(words, Z64, 4)

    async def main(s: Session) -> tuple[Shared, ...]:
        return await p.evaluate_all(s, group, suite.shares(p, s.party, parts, Z64, 8), frac=16)

    held, _ = simulate(main)
    for i, g in enumerate(group):
        found = suite.combine(p, [h[i] for h in held]).double() / 2.0**16
        assert float((found - g(words.double() / 256)).abs().max()) <= worst(g) + 2.0**-16


def test_what_cannot_be_opened_is_refused_everywhere() -> None:
    for p in (Rep3(), Plain()):

        def value(s: Session, ring: Ring, frac: int, p: Protocol = p) -> Shared:
            return suite.shares(p, s.party, [torch.zeros(3, dtype=ring.dtype)] * 3, ring, frac)

        async def bits(s: Session, p: Protocol = p) -> Shared:
            return await p.evaluate(s, SMALL, value(s, Z64, 3), frac=8)

        async def boolean(s: Session, p: Protocol = p) -> Shared:
            return await p.evaluate(s, SMALL, value(s, B64, 8), frac=8)

        async def fine(s: Session, p: Protocol = p) -> Shared:
            line = replace(SMALL, linear=0.5, linear_frac=1)
            return await p.evaluate(s, line, value(s, Z64, 26), frac=8)

        async def apart(s: Session, p: Protocol = p) -> tuple[Shared, ...]:
            return await p.evaluate_all(s, (SMALL, replace(SMALL, centre=0.0)), value(s, Z64, 8), frac=8)

        async def scale(s: Session, p: Protocol = p) -> Shared:
            return await p.exponential(s, tiny(1), value(s, Z64, 4), frac=8)

        async def nothing(s: Session, p: Protocol = p) -> Shared:
            return await p.exponential(s, replace(tiny(1), frac_out=60), value(s, Z64, 3), frac=4)

        for body in (bits, boolean, fine, apart, scale, nothing):
            with pytest.raises(TypeMismatch):
                simulate(body, parties=p.parties)
    for bad in (
        {"cos": (), "sin": ()},
        {"cos": (9.0, 0.0)},
        {"word": 27},
        {"multiplier": 0},
        {"linear": 0.3},
    ):
        with pytest.raises(ValueError, match="series"):
            replace(SMALL, **bad)
