"""Values, costs and schedules of every move, for every protocol, both rings, every turn and odd shapes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import protocol_suite as suite
from protocol_suite import CASES, PROTOCOLS, SHAPES, Case

from sfumato.errors import RangeError, TypeMismatch
from sfumato.protocol import cost, rep3_bits, rep3_look_up
from sfumato.protocol.base import Protocol, Window
from sfumato.protocol.plain import Plain
from sfumato.ring.planes import from_plane, to_planes
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import B64, Z32, Z64, Index, Ring, Secret, Shared, SharedIndex

COMBINATIONS = [
    pytest.param(name, case, ring, id=f"{name}-{case}-{ring}")
    for name in PROTOCOLS
    for case in CASES
    for ring in case.rings
    if name in case.protocols
]


COUNTED_BY_INPUT = (
    "evaluate",
    "exponential",
    "evaluate, not closed",
    "exponential, not closed",
    "to_bits",
    "sign_bits",
    "less_than_zero",
    "select_negative",
)


def check_value(result: torch.Tensor, case: Case, words: list[torch.Tensor], ring: Ring) -> None:
    exact, bits, slack = case.expect(words, ring)
    assert result.shape == exact.shape
    if bits == 0:
        assert torch.equal(result, exact.to(result.dtype))
        return
    difference = (result.long() << bits) - exact.long()
    assert bool((difference.abs() < (1 << bits) + slack).all()), int(difference.abs().max())
    if not slack:
        whole = (exact.long() & ((1 << bits) - 1)) == 0
        assert bool((difference[whole] == 0).all())


@pytest.mark.parametrize(("name", "case", "ring"), COMBINATIONS)
def test_value_and_cost(name: str, case: Case, ring: Ring) -> None:
    """The value is right, every party sends exactly the declared bytes, the rounds are the declared ones, and
    the same holds on shapes alone.
    """
    p = PROTOCOLS[name]
    for turn, shape in itertools.product(range(3), SHAPES if case.any_shape else SHAPES[:1]):
        words = suite.draw(case, ring, shape, seed=turn)
        outputs, ledgers = suite.execute(p, case, ring, words, turn=turn, seed=turn)
        check_value(suite.combine(p, outputs), case, words, ring)
        for device in () if turn else ("meta",):
            on_shapes, meta = suite.execute(p, case, ring, words, turn=turn, seed=turn, device=device)
            assert [o.type for o in on_shapes] == [o.type for o in outputs]
            assert [tuple(q.shape) for o in on_shapes for q in o.parts] == [
                tuple(q.shape) for o in outputs for q in o.parts
            ]
            assert meta == ledgers
        if p.parties == 1:
            assert all(ledger.sends == 0 for ledger in ledgers)
            continue
        told = suite.declared(p, case, ring)
        # Comparisons and openings are counted by the elements that go in, products by those that come out.
        count = words[0].numel() if case.move in COUNTED_BY_INPUT else outputs[0].type.numel
        by_role = told.bytes_by_role(count)
        first = turn if case.relative_owner is None else case.relative_owner
        assert [ledgers[(role + first) % 3].bytes_sent for role in range(3)] == list(by_role)
        assert max(ledger.rounds for ledger in ledgers) == told.rounds
        assert sum(ledger.messages for ledger in ledgers) == len(told.messages)


@pytest.mark.parametrize(
    ("move", "sizes", "bits", "rounds"),
    [
        ("share", {"k": 64}, 64, 1),
        ("reveal", {"k": 64}, 192, 1),
        ("bilinear", {"k": 64}, 192, 1),
        ("look_up", {"k": 64}, 192, 1),
        ("look_up", {"k": 32}, 96, 1),
        ("bilinear_truncate", {"k": 64, "f": 18}, 3 * 64 + 18 + 2, 3),
        ("bilinear_truncate", {"k": 32, "f": 12}, 110, 3),
        ("linear_truncate", {"k": 64, "f": 18}, 2 * 64 + 18 + 2, 2),
        ("truncate", {"k": 32, "f": 12}, 78, 2),
        ("cast up", {}, 162, 2),
        ("cast down", {}, 0, 0),
        ("sign_bits", {"m": 16}, 97, 3),
        ("sign_bits, not fused", {"m": 16}, 118, 6),
        ("less_than_zero", {"k": 64, "m": 12}, 62 + 3 * 64 + 2, 4),
        ("less_than_zero", {"k": 64, "m": 16}, 95 + 3 * 64 + 2, 4),
        ("less_than_zero", {"k": 64, "m": 40}, 239 + 3 * 64 + 2, 5),
        ("select_negative", {"k": 64, "m": 8}, 34 + 4 * 64 + 2, 4),
        ("select_negative", {"k": 64, "m": 16}, 353, 4),
        ("select_negative", {"k": 32, "m": 16}, 225, 4),
        ("select_negative", {"k": 64, "m": 16, "ys": 2}, 353 + 192, 4),
        ("select_largest", {"k": 64, "m": 16, "r": 3}, 681, 5),
        ("select_largest", {"k": 64, "m": 16, "r": 4}, 1113, 5),
        ("select_largest", {"k": 32, "m": 16, "r": 4}, 857, 5),
        ("bits_to_words", {"k": 64}, 194, 2),
        ("to_bits", {"m": 32}, 544, 7),
        ("truncate", {"k": 46, "f": 24, "out": 64}, 128 + 42 + 2, 2),
        ("truncate", {"k": 46, "f": 14, "out": 32}, 64, 1),
        ("evaluate", {"opened": 26, "harmonics": 11, "word": 36, "scale": 33, "out": 18, "k": 64}, 991, 3),
        ("exponential", {"opened": 26, "blocks": 1, "word": 50, "scale": 39, "out": 30, "k": 64}, 279, 3),
    ],
)
def test_the_declared_totals(move: str, sizes: dict[str, int], bits: int, rounds: int) -> None:
    assert (cost.bits(move, **sizes), cost.rounds(move, **sizes)) == (bits, rounds)


# ---- reveal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [Z64, Z32, B64], ids=str)
@pytest.mark.parametrize("to", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_reveal(ring: Ring, to: tuple[int, ...]) -> None:
    """The named parties get the value, the others None, and only their missing components travel."""
    p = PROTOCOLS["rep3"]
    for turn, shape in itertools.product(range(3), SHAPES):
        words = suite._words(np.random.default_rng(3), ring.bits, ring, shape)
        parts = suite.components(words, ring, 5)

        async def main(
            s: Session, parts: list[torch.Tensor] = parts, turn: int = turn
        ) -> torch.Tensor | None:
            return await p.reveal(s.fork("r", turn=turn), suite.shares(p, s.party, parts, ring, 0), to)

        opened, ledgers = simulate(main)
        told = cost.MOVES["reveal"](k=ring.bits, to=sum(1 << i for i in to))
        assert [ledger.bytes_sent for ledger in ledgers] == list(told.bytes_by_role(words.numel()))
        assert max(ledger.rounds for ledger in ledgers) == told.rounds
        for party, value in enumerate(opened):
            assert (value is not None) == (party in to)
            assert value is None or torch.equal(value, words)


def test_inject() -> None:
    """Each component is a sharing of its own, in either ring, and they add up where the ring shrinks."""
    p = PROTOCOLS["rep3"]
    words = torch.tensor([0, 1, -1, 1 << 40, -(1 << 62)])
    parts = suite.components(words, Z64, 1)
    for ring in (Z64, Z32, B64):

        async def main(s: Session, ring: Ring = ring) -> tuple[Shared, ...]:
            return p.inject(s.fork("i", turn=1), suite.shares(p, s.party, parts, Z64, 4), ring)

        held, ledgers = simulate(main)
        assert sum(ledger.sends for ledger in ledgers) == 0
        for j in range(3):
            assert torch.equal(suite.combine(p, [h[j] for h in held]), parts[j].to(ring.dtype))
        assert held[0][0].frac == (4 if ring.kind == "Z" else 0)

    async def twin(s: Session) -> tuple[Shared, ...]:
        return PROTOCOLS["plain"].inject(s, suite.shares(PROTOCOLS["plain"], 0, [words], Z64, 4), Z32)

    ((whole,),), _ = simulate(twin, parties=1)
    assert torch.equal(whole.parts[0], words.to(torch.int32))


# ---- look_up -----------------------------------------------------------------------------------------------


def looked_up(table: torch.Tensor, numbers: torch.Tensor, ring: Ring) -> torch.Tensor:
    p, parts = PROTOCOLS["rep3"], suite.components(table, ring, 8)
    type = Index(ring, table.shape[0], tuple(numbers.shape))

    async def main(s: Session) -> Shared:
        at = SharedIndex(type, tuple(suite.held_keys(type, numbers, s.party)))
        return await p.look_up(s, suite.shares(p, s.party, parts, ring, 7), at)

    outputs, _ = simulate(main)
    return suite.combine(p, outputs)


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
def test_every_row_of_a_table_is_found(ring: Ring) -> None:
    table = suite._words(np.random.default_rng(2), ring.bits, ring, (77, 3))
    for numbers in (torch.arange(77), torch.arange(77).flip(0).reshape(7, 11)):
        assert torch.equal(looked_up(table, numbers, ring), table[numbers])


def test_a_look_up_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    table, numbers = torch.arange(50 * 4).reshape(50, 4), torch.tensor([49, 0, 7, 7, 31])
    monkeypatch.setattr(rep3_look_up, "WORDS_AT_ONCE", 101)
    assert torch.equal(looked_up(table, numbers, Z64), table[numbers])


@pytest.mark.parametrize("name", ["rep3", "plain"])
@pytest.mark.parametrize(
    ("table", "ring"), [(Secret(Z64, 0, (6, 2)), Z64), (Secret(Z64, 0, (5, 2)), Z32), (Secret(B64, 0, (5,)), Z64)],
    ids=str,
)  # fmt: skip
def test_row_numbers_fit_one_table(name: str, table: Secret, ring: Ring) -> None:
    """Other rows, a ring that is too narrow, bits."""
    p = PROTOCOLS[name]
    at = SharedIndex(Index(ring, 5, (1,)), (torch.zeros(1, dtype=torch.int64),) * 2)

    async def main(s: Session) -> Shared:
        return await p.look_up(s, Shared(table, (torch.zeros(table.shape, dtype=table.ring.dtype),) * 2), at)

    with pytest.raises(TypeMismatch, match="do not pick rows of a table"):
        simulate(main, parties=p.parties)


# ---- truncation --------------------------------------------------------------------------------------------

TRUNCATIONS = [c for c in CASES if c.name in ("truncate", "bilinear_truncate", "linear_truncate, plus")]


def one(case: Case, words: torch.Tensor) -> list[torch.Tensor]:
    """Operands of a truncating case whose word before truncation is ``words``."""
    unit = {"truncate": [], "bilinear_truncate": [torch.ones_like(words)]}
    if case.name in unit:
        return [words, *unit[case.name]]
    return [torch.zeros_like(words), words]


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize("case", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_truncation_is_right_up_to_its_range(name: str, case: Case, ring: Ring) -> None:
    """Every word within 2^11 of +-2^(k-2) inside, of 0, and edges of powers of two, under many sharings."""
    p, limit = PROTOCOLS[name], 1 << (ring.bits - 2)
    near = torch.arange(0, 2048)
    words = torch.cat(
        [limit - 1 - near, -limit + 1 + near, near, -near, 2 ** torch.arange(0, ring.bits - 2) - 1]
    )
    words = words.to(ring.dtype)
    for seed in range(3):
        operands = one(case, words)
        outputs, _ = suite.execute(p, case, ring, operands, turn=seed, seed=seed)
        result, bits = suite.combine(p, outputs).long(), suite.dropped(ring)
        low = words.long() >> bits
        assert bool(((result == low) | ((result == low + 1) & (words.long() & ((1 << bits) - 1) != 0))).all())


@pytest.mark.parametrize("corner", range(12))
def test_truncation_survives_every_corner_of_the_shares(corner: int) -> None:
    """Exhaustive near edges: u1 = x2 takes the ring's own edges while the value sits at the edge of its
    range.
    """
    p, case = PROTOCOLS["rep3"], TRUNCATIONS[0]
    edges = torch.tensor([0, 1 << 29, 1 << 30, (1 << 31) - 1, -(1 << 31), -(1 << 30), -(1 << 29)])
    near = torch.arange(-3, 4)
    u1 = (edges[:, None] + near).reshape(-1)
    values = torch.cat([(1 << 30) - 1 - torch.arange(4), -(1 << 30) + 1 + torch.arange(4), near])
    words, last = (t.reshape(-1).to(torch.int32) for t in torch.meshgrid(values, u1, indexing="ij"))
    first = suite.components(torch.zeros_like(words), Z32, corner)[0]
    parts = [first, words - last - first, last]
    for turn in range(3):
        rotated = [parts[(j - turn) % 3] for j in range(3)]
        outputs, _ = suite.execute(p, case, Z32, [words], turn=turn, seed=corner, split=[rotated])
        suite.combine(p, outputs)
        check_value(suite.combine(p, outputs), case, [words], Z32)


@pytest.mark.parametrize("sharing", ["uniform", "zeros"])
@pytest.mark.parametrize("case", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_truncation_has_no_bias(name: str, case: Case, sharing: str) -> None:
    """Mean error below five standard errors: for uniform low bits, for one fixed remainder, and for a value
    whose other components are zeros (an input or a constant).
    """
    p, ring, n = PROTOCOLS[name], Z32, 60_000
    bits = suite.dropped(ring)
    uniform = torch.from_numpy(np.random.default_rng(1).integers(-(1 << 28), 1 << 28, n)).to(ring.dtype)
    for turn, words in ((0, uniform), (1, torch.full((n,), (1 << 20) + 100, dtype=ring.dtype))):
        operands = one(case, words)
        zero = torch.zeros_like(words)
        split = [[w] if p.parties == 1 else [w, zero, zero] for w in operands] if sharing == "zeros" else None
        outputs, _ = suite.execute(p, case, ring, operands, turn=turn, seed=9, split=split)
        error = suite.combine(p, outputs).double() - words.double() / 2**bits
        fraction = (words.long() & ((1 << bits) - 1)).double() / 2**bits
        deviation = float((fraction * (1 - fraction)).sum().sqrt()) / n
        assert abs(float(error.mean())) < 5 * deviation
        assert float(error.abs().max()) < 1


@settings(max_examples=40, deadline=None)
@given(
    word=st.integers(-(1 << 30) + 1, (1 << 30) - 1),
    shares=st.tuples(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(-(1 << 31), (1 << 31) - 1)),
    bits=st.integers(0, 29),
    turn=st.integers(0, 2),
    wide=st.booleans(),
)
def test_truncation_of_any_word(word: int, shares: tuple[int, int], bits: int, turn: int, wide: bool) -> None:
    p = PROTOCOLS["rep3"]
    a, b = (torch.tensor([v], dtype=torch.int32) for v in shares)
    words = torch.tensor([word], dtype=torch.int32)
    parts = [a, b, words - a - b]

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, parts, Z32, 30)
        return await p.truncate(s.fork("t", turn=turn), x, bits, ring=Z64 if wide else Z32)

    outputs, _ = simulate(main)
    exact, result = word / 2**bits, int(suite.combine(p, outputs))
    assert abs(result - exact) < 1
    assert outputs[0].frac == 30 - bits


@pytest.mark.parametrize("name", PROTOCOLS)
def test_truncations_that_make_no_sense_are_refused(name: str) -> None:
    p = PROTOCOLS[name]
    parts = [torch.zeros(3, dtype=torch.int64)] * 3

    async def main(s: Session, bits: int, ring: Ring | None, source: Ring = Z64) -> Shared:
        x = suite.shares(p, s.party, [q.to(source.dtype) for q in parts], source, 0)
        return await p.truncate(s, x, bits, ring=ring)

    for bits, ring, source in (
        (64, None, Z64),
        (-1, None, Z64),
        (33, Z32, Z64),
        (1, None, B64),
        (1, B64, Z64),
    ):
        with pytest.raises(TypeMismatch):
            simulate(lambda s, b=bits, r=ring, o=source: main(s, b, r, o), parties=p.parties)


def test_plain_asserts_headroom() -> None:
    p, case = PROTOCOLS["plain"], TRUNCATIONS[0]
    for word in (1 << 30, -(1 << 30)):
        with pytest.raises(RangeError, match="/case"):
            suite.execute(p, case, Z32, [torch.tensor([word], dtype=torch.int32)])


def test_plain_wraps_where_it_is_told_to() -> None:
    """A power of a published polynomial may overflow, and a bit of zero then take it out: no reason to end."""
    case, wrapping = TRUNCATIONS[0], Plain(wraps=True)
    small = torch.tensor([0, 5 << 8], dtype=torch.int32)
    with_large = torch.tensor([1 << 30, 5 << 8], dtype=torch.int32)
    (wanted,), _ = suite.execute(PROTOCOLS["plain"], case, Z32, [small])
    (found,), _ = suite.execute(wrapping, case, Z32, [with_large])
    assert found.parts[0][1] == wanted.parts[0][1]


# ---- bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize(
    "window", [Window(0, 2), Window(0, 3), Window(5, 6), Window(20, 12), Window(0, 32)], ids=str
)
def test_comparison_on_its_whole_window(ring: Ring, window: Window) -> None:
    """Right at the edges of the window's range and around zero; words in [0, 2^shift) may go either way."""
    p = PROTOCOLS["rep3"]
    unit, top = 1 << window.shift, 1 << (window.shift + window.bits - 1)
    low = -top + (unit if window.shift else 0)
    steps = [
        low,
        low + 1,
        low + unit,
        -unit - 1,
        -unit,
        -unit + 1,
        -2,
        -1,
        0,
        1,
        unit - 1,
        unit,
        unit + 1,
        top - unit,
        top - 1,
    ]
    inside = sorted({v for v in steps if low <= v < top})
    words = torch.tensor(inside).to(ring.dtype).repeat(40)

    async def main(s: Session, turn: int) -> Shared:
        x = suite.shares(p, s.party, parts, ring, 0)
        return await p.less_than_zero(s.fork("c", turn=turn), x, window)

    for turn in range(3):
        parts = suite.components(words, ring, turn)
        outputs, _ = simulate(lambda s, t=turn: main(s, t))
        sign = suite.combine(p, outputs)
        band = (
            (words >= 0) & (words.long() < unit)
            if window.shift
            else torch.zeros_like(words, dtype=torch.bool)
        )
        assert bool((sign == (words < 0).to(ring.dtype))[~band].all())
        assert bool(((sign == 0) | (sign == 1)).all())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_window_outside_the_ring_is_refused(name: str) -> None:
    p = PROTOCOLS[name]

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, [torch.zeros(3, dtype=torch.int32)] * 3, Z32, 0)
        return await p.less_than_zero(s, x, Window(20, 20))

    with pytest.raises(TypeMismatch, match="window"):
        simulate(main, parties=p.parties)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=20), bits=st.integers(1, 64))
def test_planes_round_trip(words: list[int], bits: int) -> None:
    tensor = torch.tensor(words, dtype=torch.int64)
    planes = to_planes(tensor, bits)
    assert planes.shape == (bits, -(-len(words) // 8))
    for j in range(bits):
        assert torch.equal(from_plane(planes[j], (len(words),), torch.int64), (tensor >> j) & 1)


@settings(max_examples=20, deadline=None)
@given(
    words=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=12),
    shift=st.integers(0, 40),
    m=st.integers(2, 24),
    turn=st.integers(0, 2),
)
def test_to_bits_of_any_words(words: list[int], shift: int, m: int, turn: int) -> None:
    """Bits of the window, at most one unit low."""
    p, tensor = PROTOCOLS["rep3"], torch.tensor(words)
    parts = suite.components(tensor, Z64, turn)

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, parts, Z64, 0)
        return await rep3_bits.to_bits(s.fork("a2b", turn=turn), x, Window(shift, m))

    outputs, _ = simulate(main)
    planes = suite.combine(p, outputs)
    got = sum(from_plane(planes[j], tensor.shape, torch.int64) << j for j in range(m))
    exact = (tensor >> shift) & ((1 << m) - 1)
    low = (exact - got) & ((1 << m) - 1)
    assert bool(((low == 0) | ((low == 1) & (shift > 0))).all())


# ---- types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_mixed_types_are_refused(name: str) -> None:
    p = PROTOCOLS[name]

    def value(s: Session, ring: Ring, frac: int = 0, n: int = 3) -> Shared:
        return suite.shares(p, s.party, [torch.zeros(n, dtype=ring.dtype)] * 3, ring, frac)

    async def rings(s: Session) -> Shared:
        return await p.bilinear_truncate(s, torch.mul, value(s, Z64), value(s, Z32), 4)

    async def addend(s: Session) -> Shared:
        return await p.linear_truncate(s, lambda a: a, value(s, Z64), 4, shape=(3,), plus=value(s, Z32))

    async def scales(s: Session) -> Shared:
        return p.add(value(s, Z64, 1), value(s, Z64, 2))

    async def lowered(s: Session) -> Shared:
        return p.lift(value(s, Z64, 3), 2)

    async def cast(s: Session) -> Shared:
        return await p.cast(s, value(s, B64), Z64)

    for body in (rings, addend, scales, lowered, cast):
        with pytest.raises(TypeMismatch):
            simulate(body, parties=p.parties)


def test_a_linear_map_that_lies_about_its_shape_is_refused() -> None:
    p = PROTOCOLS["rep3"]

    async def main(s: Session) -> Shared:
        x = suite.shares(p, s.party, [torch.zeros(3, dtype=torch.int64)] * 3, Z64, 4)
        return await p.linear_truncate(s, lambda a: a[:2], x, 2, shape=(3,))

    with pytest.raises(TypeMismatch, match="declared"):
        simulate(main)


# ---- schedules ---------------------------------------------------------------------------------------------


async def _mixture(p: Protocol, s: Session, x: Shared) -> list[Shared]:
    """Overlapping branches of different depth under different turns."""

    async def product(t: Session) -> Shared:
        return await p.bilinear_truncate(t, torch.mul, x, x, 9)

    async def sign(t: Session) -> Shared:
        return await p.less_than_zero(t, x, Window(0, 12))

    async def chain(t: Session) -> Shared:
        y = await p.truncate(t.fork("a", turn=1), x, 2)
        one, two = await t.gather(product, lambda k: p.truncate(k.fork("b", turn=2), y, 3))
        return p.add(one.viewed(0), two.viewed(0))

    return await s.gather(product, sign, chain)


@pytest.mark.parametrize("name", ["rep3", "rep3-moves"])
def test_any_schedule_gives_the_same_words_and_cost(name: str) -> None:
    p = PROTOCOLS[name]
    case = Case("mixture", None, None)  # type: ignore[arg-type]
    words = torch.arange(-7, 8) * 11

    async def run(r: suite.Run) -> list[Shared]:
        return await _mixture(r.p, r.s, r.x[0])

    object.__setattr__(case, "run", run)
    outputs, ledgers = suite.execute(p, case, Z64, [words], seed=4)
    for seed in range(25):
        again, counted = suite.execute(p, case, Z64, [words], seed=4, drive=suite.shuffled(seed))
        assert counted == ledgers
        for one_party, other in zip(outputs, again, strict=True):
            for a, b in zip(one_party, other, strict=True):
                assert all(torch.equal(m, n) for m, n in zip(a.parts, b.parts, strict=True))


@pytest.mark.parametrize("depths", [(1,), (3, 1), (1, 2, 4), ()])
def test_gather_costs_the_rounds_of_its_longest_branch(depths: tuple[int, ...]) -> None:
    p = PROTOCOLS["rep3"]
    parts = [torch.ones(2, dtype=torch.int64)] * 3

    async def main(s: Session) -> int:
        x = suite.shares(p, s.party, parts, Z64, 0)

        async def branch(t: Session, depth: int) -> None:
            y = x
            for i in range(depth):
                y = await p.bilinear(t.fork(f"m{i}"), torch.mul, y, x)

        await s.gather(*(lambda t, d=depth: branch(t, d) for depth in depths))
        return s.clock

    clocks, ledgers = simulate(main)
    assert clocks == [max(depths, default=0)] * 3
    assert sum(ledger.messages for ledger in ledgers) == 3 * sum(depths)


def test_every_protocol_agrees_on_types() -> None:
    """The twin gives the same public types as the real protocol."""
    for case in CASES:
        ring = case.rings[0]
        words = suite.draw(case, ring, (7,), 1)
        types = {
            name: suite.execute(p, case, ring, words)[0][0].type
            for name, p in PROTOCOLS.items()
            if name in case.protocols
        }
        assert len(set(types.values())) == 1, (case.name, types)
