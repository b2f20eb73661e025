"""Signs and what is chosen by them, for any window, word and sharing, and how often a party has to send."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import protocol_suite as suite
from protocol_suite import PROTOCOLS

from sfumato.errors import TypeMismatch
from sfumato.link.base import Frame
from sfumato.ops import compare
from sfumato.protocol.base import Protocol, Window
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.planes import from_plane
from sfumato.session.drive import LockstepLink, simulate
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Ring, Shared


def signs(
    p: Protocol, parts: list[torch.Tensor], ring: Ring, window: Window, turn: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sign plane as words, less_than_zero, select_negative of the words themselves)."""

    async def main(s: Session) -> tuple[Shared, Shared, Shared]:
        x = suite.shares(p, s.party, parts, ring, 0)
        s = s.fork("s", turn=turn)
        return (
            await p.sign_bits(s.fork("plane"), x, window),
            await p.less_than_zero(s.fork("words"), x, window),
            await p.select_negative(s.fork("part"), x, window),
        )

    outputs, _ = simulate(main, parties=p.parties)
    plane, words, part = (suite.combine(p, [out[i] for out in outputs]) for i in range(3))
    return from_plane(plane, tuple(words.shape), ring.dtype), words, part


def check(words: torch.Tensor, window: Window, found: tuple[torch.Tensor, ...]) -> None:
    """Right outside the band, and inside it 0 or 1, and the choice that of one of the two."""
    plane, bit, part = found
    ring_words = words.long()
    negative = (words < 0).to(words.dtype)
    sure = torch.ones_like(words, dtype=torch.bool)
    if window.shift:
        sure = ~((ring_words >= 0) & (ring_words < 1 << window.shift))
    assert torch.equal(plane[sure], negative[sure])
    assert torch.equal(bit[sure], negative[sure])
    assert torch.equal(part[sure], (negative * words)[sure])
    assert bool(((bit == 0) | (bit == 1)).all())
    assert bool(((part == 0) | (part == words)).all())


def limits(window: Window) -> tuple[int, int]:
    top = 1 << (window.shift + window.bits - 1)
    return -top + ((1 << window.shift) if window.shift else 0), top - 1


@st.composite
def windows(draw: st.DrawFn) -> tuple[Ring, Window]:
    ring = draw(st.sampled_from([Z64, Z32]))
    bits = draw(st.integers(2, min(40, ring.bits)))
    return ring, Window(draw(st.integers(0, ring.bits - bits)), bits)


@settings(max_examples=120, deadline=None)
@given(
    where=windows(),
    fractions=st.lists(st.floats(0, 1), max_size=9),
    seed=st.integers(0, 1 << 20),
    turn=st.integers(0, 2),
    name=st.sampled_from(list(PROTOCOLS)),
)
def test_any_window_and_word(
    where: tuple[Ring, Window], fractions: list[float], seed: int, turn: int, name: str
) -> None:
    ring, window = where
    p, (low, high), unit = PROTOCOLS[name], limits(window), 1 << window.shift
    near = [low, low + 1, -unit - 1, -unit, -1, 0, unit - 1, unit, high - 1, high]
    drawn = [low + int(f * (high - low)) for f in fractions]
    words = torch.tensor([min(high, max(low, v)) for v in near + drawn]).to(ring.dtype)
    parts = [words] if p.parties == 1 else suite.components(words, ring, seed)
    check(words, window, signs(p, parts, ring, window, turn))


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize("window", [Window(0, 12), Window(5, 16), Window(9, 7), Window(3, 26)], ids=str)
def test_every_corner_of_the_shares(ring: Ring, window: Window) -> None:
    """Components at the edges of the ring and of the window, in every role."""
    p = PROTOCOLS["rep3"]
    low, high = limits(window)
    unit, top = 1 << window.shift, 1 << (ring.bits - 1)
    values = [low, -unit, -1, 0, unit - 1, unit, high]
    edges = [0, 1, -1, -top, top - 1, unit, unit - 1, -unit, high, high + 1, low]
    grid = [torch.tensor(v).to(ring.dtype) for v in (values, edges, edges)]
    words, a, b = (t.reshape(-1) for t in torch.meshgrid(*grid, indexing="ij"))
    for turn in range(3):
        for place in range(3):
            parts = [a, b, words - a - b]
            parts = parts[place:] + parts[:place]
            check(words, window, signs(p, parts, ring, window, turn))


def test_choosing_from_other_shapes_is_refused() -> None:
    p = PROTOCOLS["rep3"]

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, [torch.zeros(3, dtype=torch.int64)] * 3, Z64, 0)
        y = suite.shares(p, s.party, [torch.zeros(3, 2, dtype=torch.int64)] * 3, Z64, 0)
        return await p.select_negative(s, x, Window(0, 8), y)

    with pytest.raises(TypeMismatch, match="last axes"):
        simulate(main)


def test_a_choice_may_live_in_another_ring() -> None:
    x, y = torch.tensor([-5, 4, -3]), torch.tensor([7, 8, -9], dtype=torch.int32)
    for p in PROTOCOLS.values():
        split = [[w] if p.parties == 1 else suite.components(w, r, 3) for w, r in ((x, Z64), (y, Z32))]

        async def main(s: Session, p: Protocol = p, split: list[list[torch.Tensor]] = split) -> Shared:
            held = [suite.shares(p, s.party, split[i], (Z64, Z32)[i], 2 * i) for i in range(2)]
            return await p.select_negative(s, held[0], Window(0, 8), held[1])

        outputs, _ = simulate(main, parties=p.parties)
        assert outputs[0].frac == 2
        assert torch.equal(suite.combine(p, outputs), torch.tensor([7, 0, -9], dtype=torch.int32))


# ---- sends -------------------------------------------------------------------------------------------------


class Counting(LockstepLink):
    """A link that keeps (receiver, round) of what it sent: messages of one pair travel as one packet."""

    def __init__(self, party: int, boxes: dict[tuple[int, int], dict[bytes, Frame]]) -> None:
        super().__init__(party, boxes)
        self.packets: set[tuple[int, object]] = set()

    def send(self, to: int, frame: Frame) -> None:
        self.packets.add((to, frame.clock))
        super().send(to, frame)


Op = Callable[[Protocol, Session, Shared], Awaitable[object]]


def _in_fours(p: Protocol, x: Shared) -> Shared:
    return p.linear(lambda part: part.reshape(4, -1), x)


@pytest.mark.parametrize(
    ("op", "sends", "rounds"),
    [
        (lambda p, s, x: compare.relu(p, s, x, 8.0), 7, 4),
        (lambda p, s, x: compare.less_than_zero(p, s, x, 8.0), 7, 4),
        (lambda p, s, x: compare.clamp(p, s, x, -1.0, 1.0, 8.0), 7, 4),
        (lambda p, s, x: compare.maximum(p, s, x, 0, 8.0), 7, 4),
        (lambda p, s, x: compare.argmax(p, s, x, 0, 8.0), 7, 4),
        (lambda p, s, x: compare.maximum(p, s, _in_fours(p, x), 0, 8.0), 9, 5),
    ],
    ids=["relu", "less_than_zero", "clamp", "maximum", "argmax", "maximum of four"],
)
def test_sends_of_the_rotated_form(op: Op, sends: int, rounds: int) -> None:
    """No party sends more often than once to one neighbour in the first round and to both in the others."""
    p, count = Rep3(), 3 * 4096
    words = (torch.arange(2 * count) % 997 - 500).reshape(2, count) << 8
    parts = suite.components(words, Z64, 1)
    boxes: dict[tuple[int, int], dict[bytes, Frame]] = {}
    links = [Counting(i, boxes) for i in range(3)]

    async def main(s: Session) -> None:
        await op(p, s.fork("op"), suite.shares(p, s.party, parts, Z64, 18))

    _, ledgers = simulate(main, links=links)
    assert max(ledger.rounds for ledger in ledgers) == rounds
    assert max(len(link.packets) for link in links) <= sends
