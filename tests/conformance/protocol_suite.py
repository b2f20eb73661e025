"""Every move of a protocol as data: how to run it, what it must give, what it may cost.

An implementation enrols with one line in ``PROTOCOLS``; a move or override enrols with one `Case` and is then
checked for value, cost, meta run, schedule, views and mutations by the tests of this folder.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.link.base import Link
from sfumato.protocol import cost, rep3_bits
from sfumato.protocol.base import Exponential, Protocol, Series, Unclosed, Window
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.ring import dpf, kernels
from sfumato.ring.planes import to_planes
from sfumato.session.drive import LockstepLink, Scheduler, lockstep, simulate, simulation_keys
from sfumato.session.ledger import Ledger
from sfumato.session.randomness import PairStreams
from sfumato.session.session import Session
from sfumato.types import B8, B64, Z32, Z64, Index, Ring, Secret, Shared, SharedIndex

PROTOCOLS: Mapping[str, Protocol] = {"rep3": Rep3(), "rep3-moves": Rep3(fused=False), "plain": Plain()}

SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 5))

Words = Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """One call of a case at one party: its session, its shares, and the words (for owners of inputs)."""

    p: Protocol
    s: Session
    x: tuple[Shared, ...]
    words: Words
    ring: Ring

    def own(self, index: int, owner: int) -> Tensor | None:
        mine = self.p.parties == 1 or self.s.party == owner
        return self.words[index] if mine or self.s.device == "meta" else None


@dataclass(frozen=True)
class Case:
    """``expect`` gives (exact words before truncation, bits dropped, slack in the last place beyond the
    truncation's).
    """

    name: str
    run: Callable[[Run], Coroutine[Any, Any, Shared]]
    expect: Callable[[Words, Ring], tuple[Tensor, int, int]]
    move: str = ""  # name in protocol.cost
    sizes: Callable[[Ring], Mapping[str, int]] = lambda ring: {"k": ring.bits}
    bits: tuple[int, ...] = (24, 24)  # magnitude of each operand's words, in bits
    rings: tuple[Ring, ...] = (Z64, Z32)
    source: Mapping[int, Ring] = field(default_factory=dict)  # operands in another ring
    shapes: Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]] | None = None
    any_shape: bool = True
    protocols: tuple[str, ...] = ("rep3", "rep3-moves", "plain")
    relative_owner: int | None = None  # roles of `move` count from this party instead of the turn
    unfused: str = ""  # name in protocol.cost when fused=False
    frac: int = 0  # of the operands

    def __str__(self) -> str:
        return self.name


F = 9  # bits that the truncations below drop; 13 in the 64-bit ring


def dropped(ring: Ring) -> int:
    return F if ring.bits == 32 else 13


def _kf(ring: Ring) -> dict[str, int]:
    return {"k": ring.bits, "f": dropped(ring)}


def _same(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
    return words[0], 0, 0


def _share(owner: int) -> Case:
    async def run(r: Run) -> Shared:
        type = Secret(r.ring, 3, tuple(r.words[0].shape))
        return await r.p.share(r.s, r.own(0, owner), owner, type)

    return Case(
        f"share by {owner}", run, _same, "share", bits=(64,), rings=(Z64, Z32, B64), relative_owner=owner
    )


async def _linear(r: Run) -> Shared:
    return r.p.linear(lambda a, b: 3 * a - b, *r.x)


async def _add_public(r: Run) -> Shared:
    return r.p.add_public(r.s, r.x[0], r.words[1])


async def _mul(r: Run) -> Shared:
    return await r.p.bilinear(r.s, torch.mul, *r.x)


async def _and(r: Run) -> Shared:
    return await r.p.bilinear(r.s, torch.bitwise_and, *r.x)


async def _matmul(r: Run) -> Shared:
    return await r.p.bilinear(r.s, kernels.matmul, *r.x)


def row_numbers(words: Tensor, rows: int) -> Tensor:
    return words.long() % rows


def _look_up(index_ring: Ring | None = None) -> Callable[[Run], Coroutine[Any, Any, Shared]]:
    async def run(r: Run) -> Shared:
        rows = r.words[0].shape[0]
        type = Index(index_ring or r.ring, rows, tuple(r.words[1].shape))
        if r.s.device == "meta":
            parts = [
                r.words[1].new_empty((type.numel, dpf.key_bytes(rows, type.ring)), dtype=torch.uint8)
            ] * 2
        else:
            numbers = row_numbers(r.words[1], rows)
            parts = [numbers] if r.p.parties == 1 else held_keys(type, numbers, r.s.party)
        return await r.p.look_up(r.s, r.x[0], SharedIndex(type, tuple(parts)))

    return run


def held_keys(type: Index, numbers: Tensor, party: int, seed: int = 3) -> list[Tensor]:
    """A party's keys of the pairs of its two components; the same pairs at all parties."""
    draw = np.random.default_rng(seed).bytes
    pairs = [dpf.make_keys(numbers.reshape(-1), type.rows, type.ring, draw=draw) for _ in range(3)]
    return [pairs[party][0], pairs[(party + 1) % 3][1]]


CONV = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}


async def _conv(r: Run) -> Shared:
    return await r.p.bilinear(r.s, lambda a, b: kernels.conv(a, b, **CONV), *r.x)


async def _truncate(r: Run) -> Shared:
    return await r.p.truncate(r.s, r.x[0], dropped(r.ring))


async def _truncate_wide(r: Run) -> Shared:
    return await r.p.truncate(r.s, r.x[0], 5, ring=Z64)


async def _truncate_narrow(r: Run) -> Shared:
    return await r.p.truncate(r.s, r.x[0], 20, ring=Z32)


async def _truncate_nothing(r: Run) -> Shared:
    return await r.p.truncate(r.s, r.x[0], 0)


async def _bilinear_truncate(r: Run) -> Shared:
    return await r.p.bilinear_truncate(r.s, torch.mul, r.x[0], r.x[1], dropped(r.ring))


async def _bilinear_truncate_plus(r: Run) -> Shared:
    return await r.p.bilinear_truncate(r.s, torch.mul, r.x[0], r.x[1], dropped(r.ring), plus=r.x[2])


async def _two_products(r: Run) -> Shared:
    a, b, c, d = r.x
    return await r.p.bilinear_truncate(
        r.s, kernels.matmul, a, b, dropped(r.ring), more=((torch.mul, c, d), (torch.mul, d, c))
    )


async def _matmul_truncate(r: Run) -> Shared:
    return await r.p.bilinear_truncate(r.s, kernels.matmul, r.x[0], r.x[1], dropped(r.ring))


async def _linear_truncate(r: Run) -> Shared:
    shape = (2, *r.x[0].shape)
    return await r.p.linear_truncate(
        r.s, lambda a: torch.stack([5 * a, -3 * a]), r.x[0], dropped(r.ring), shape=shape, gain_frac=2
    )


async def _linear_truncate_plus(r: Run) -> Shared:
    return await r.p.linear_truncate(
        r.s,
        lambda a: 5 * a,
        r.x[0],
        dropped(r.ring),
        shape=r.x[0].shape,
        plus=r.x[1],
        gain_frac=dropped(r.ring),
    )


async def _cast_up(r: Run) -> Shared:
    return await r.p.cast(r.s, r.x[0], Z64)


async def _cast_down(r: Run) -> Shared:
    return await r.p.cast(r.s, r.x[0], Z32)


WINDOW = Window(0, 10)
SHIFTED = Window(6, 7)
#: One block, so no opening before the sign; two levels of openings.
NARROW, WIDE = Window(0, 4), Window(0, 25)


def _less(window: Window) -> Callable[[Run], Coroutine[Any, Any, Shared]]:
    async def run(r: Run) -> Shared:
        return await r.p.less_than_zero(r.s, r.x[0], window)

    return run


def _sign_bits(window: Window) -> Callable[[Run], Coroutine[Any, Any, Shared]]:
    async def run(r: Run) -> Shared:
        return await r.p.sign_bits(r.s, r.x[0], window)

    return run


async def _select_negative(r: Run) -> Shared:
    return await r.p.select_negative(r.s, r.x[0], WINDOW)


async def _select_negative_narrow(r: Run) -> Shared:
    return await r.p.select_negative(r.s, r.x[0], NARROW, r.x[1])


async def _select_negative_of_two(r: Run) -> Shared:
    y = r.p.linear(lambda a, b: torch.stack([a, b]), r.x[1], r.x[2])
    return await r.p.select_negative(r.s, r.x[0], WINDOW, y)


def _select_largest(window: Window) -> Callable[[Run], Coroutine[Any, Any, Shared]]:
    async def run(r: Run) -> Shared:
        return await r.p.select_largest(r.s, r.x[0], window, r.x[1] if len(r.x) > 1 else None)

    return run


def _at_largest(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
    first = np.asarray(np.argmax(words[0].numpy(), 0))  # of several, the first one wins
    picked = np.take_along_axis(words[-1].numpy(), first[None], 0)
    return torch.from_numpy(picked).squeeze(0), 0, 0


def _candidates(count: int) -> Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]]:
    return lambda shape: [(count, *shape)] * 2


async def _select(r: Run) -> Shared:
    return await r.p.select(r.s, r.x[0].viewed(0), r.x[1])


async def _select_either(r: Run) -> Shared:
    return await r.p.select(r.s, r.x[0].viewed(0), r.x[1], r.x[2])


async def _to_bits(r: Run) -> Shared:
    planes = await rep3_bits.to_bits(r.s, r.x[0], WINDOW)
    return Shared(Secret(B8, 0, planes.shape), planes.parts)


async def _bits_to_words(r: Run) -> Shared:
    plane = Shared(Secret(B8, 0, tuple(r.x[0].shape)), r.x[0].parts)
    return await r.p.bits_to_words(r.s, plane, r.ring, (plane.shape[0] * 8,))


#: One centre, period and word, so that one opening serves them all; words of 46 bits.
SINES = Series(
    -4, 4, 0.5, 4, 1, 0.25, 0.0, 0, (0.5, -0.125), (-0.25, 0.0625), 20, 22, 46, 0.0
)  # fmt: skip
#: A dense period and a straight line; other scales share no opening with SINES.
LINE = Series(-4, 4, 0.0, 7, 13, -1.0, 0.5, 1, (0.75, 0.5, 0.25), (0.0, -1.5, 0.125), 19, 21, 44, 0.0)
OTHERS = (
    SINES,
    replace(SINES, constant=-2.0, linear=-1.5, linear_frac=1, cos=(1.0,), sin=(0.5,)),
    replace(SINES, cos=(0.0, 0.5), sin=(1.5, 0.0)),
)
#: Words of 32 and of 28 bits, for values in Z32.
SHORT = Series(-4, 4, 0.5, 4, 1, 0.25, 0.25, 2, (0.5, -0.125), (-0.25, 0.0625), 12, 14, 32, 0.0)
SHORTER = Series(-4, 4, 0.0, 6, 5, 0.25, 0.0, 0, (0.5, -0.125), (-0.25, 0.0625), 10, 12, 28, 0.0)
FRAC, OUT = 14, 9


def _twofold(p: Protocol, two_way: bool) -> Protocol:
    return Rep3(fused=p.fused, two_way=True) if two_way and p.parties == 3 else p


def _evaluate(
    series: Sequence[Series], to: Ring | None = None, *, two_way: bool = False, out: int = OUT
) -> Callable[[Run], Coroutine[Any, Any, Shared]]:
    async def run(r: Run) -> Shared:
        p = _twofold(r.p, two_way)
        found = await p.evaluate_all(r.s, series, r.x[0].viewed(FRAC), frac=out, ring=to)
        return found[0] if len(found) == 1 else p.linear(lambda *parts: torch.stack(parts), *found)

    return run


def _evaluated(series: Sequence[Series], out: int = OUT) -> Callable[[Words, Ring], tuple[Tensor, int, int]]:
    def expect(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
        exact = [g(words[0].to(torch.float64) / 2.0**FRAC) for g in series]
        slack = math.ceil(7 * max(g.noise for g in series) * 2.0**30)
        stacked = exact[0] if len(exact) == 1 else torch.stack(exact)
        return (stacked * 2.0**30).round().to(torch.int64), 30 - out, slack + 2

    return expect


def _case_evaluate(
    name: str, *series: Series, rings: tuple[Ring, ...] = (Z64,), to: Ring | None = None, two_way: bool = False,
    out: int = OUT,
) -> Case:  # fmt: skip
    def sizes(ring: Ring) -> Mapping[str, int]:
        first = series[0]
        return {
            "opened": first.period_log2 + FRAC, "harmonics": max(len(g.cos) for g in series), "word": first.word,
            "scale": first.scale, "out": out, "k": (to or ring).bits, "two_way": int(two_way), "count": len(series),
        }  # fmt: skip

    run = _evaluate(series, to, two_way=two_way, out=out)
    protocols = ("rep3", "plain") if two_way else ("rep3", "rep3-moves", "plain")
    return Case(
        name, run, _evaluated(series, out), "evaluate", sizes, bits=(15,), rings=rings, protocols=protocols
    )


#: Arguments in (-2, 2) with 14 fraction bits. Words: 50, 44 and, for Z32 too, 32 bits.
EXPONENTIALS = (
    Exponential(-2.0, 2.0, FRAC, 15, 21, 1, 18, 44, 50, 2.0**-16),
    Exponential(-2.0, 2.0, FRAC, 11, 20, 2, 17, 38, 44, 2.0**-15),
    Exponential(-2.0, 2.0, FRAC, 13, 20, 3, 12, 26, 32, 2.0**-10),
)


def _case_exponential(
    name: str, spec: Exponential, *, rings: tuple[Ring, ...] = (Z64,), to: Ring | None = None, two_way: bool = False,
) -> Case:  # fmt: skip
    async def run(r: Run) -> Shared:
        p = _twofold(r.p, two_way)
        return await p.exponential(r.s, spec, r.x[0].viewed(FRAC), frac=OUT, ring=to)

    def expect(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
        exact = torch.exp(words[0].to(torch.float64) / 2.0**FRAC)
        return (
            (exact * 2.0**30).round().to(torch.int64),
            30 - OUT,
            math.ceil(spec.error * math.e**2 * 2.0**30),
        )

    def sizes(ring: Ring) -> Mapping[str, int]:
        return {
            "opened": spec.opened, "blocks": spec.blocks, "word": spec.word, "scale": spec.frac_out, "out": OUT,
            "k": (to or ring).bits, "two_way": int(two_way),
        }  # fmt: skip

    return Case(name, run, expect, "exponential", sizes, bits=(15,), rings=rings, protocols=("rep3", "plain"))


#: Words of 26 bits with a line, for 18 known bits: a product in Z32 less 14 of its 28 fraction bits.
FEW_KNOWN = Series(-1, 1, 0.0, 4, 3, 0.25, 0.5, 1, (0.5, -0.125), (-0.25, 0.0625), 11, 12, 26, 0.0)
NOT_CLOSED = Exponential(-1.0, 1.5, FRAC, 3, 18, 2, 12, 30, 34, 2.0**-10)
OFFSET = 0.375


def _case_unclosed(
    name: str, spec: Series | Exponential, *, drop: int = FRAC, product: bool = True, plus: bool = False,
    rings: tuple[Ring, ...] = (Z64, Z32), to: Ring | None = None,
) -> Case:  # fmt: skip
    """A function of x y, or of 3 x, which has 14 fraction bits after ``drop`` are gone."""
    exact = spec.error * math.e**2 if isinstance(spec, Exponential) else 7 * spec.noise
    moved = 0.0 if plus else OFFSET

    async def run(r: Run) -> Shared:
        def f(a: Tensor, *b: Tensor) -> Tensor:
            return a * b[0] if b else 3 * a

        x = Unclosed(
            f, r.x[0], r.x[1] if product else None, r.x[0].shape, drop, FRAC, r.x[-1] if plus else None, moved
        )
        if isinstance(spec, Exponential):
            return await r.p.exponential(r.s, spec, x, frac=OUT, ring=to)
        return await r.p.evaluate(r.s, spec, x, frac=OUT, ring=to)

    def expect(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
        made = words[0].double() * (words[1].double() if product else 3) + (words[-1].double() if plus else 0)
        value = made / 2.0 ** (drop + FRAC) + moved
        found = torch.exp(value) if isinstance(spec, Exponential) else spec(value)
        # The argument's rounding, times the largest slope on the range.
        slack = exact + 5.0 * 2.0**-FRAC * (drop > 0)
        return (found * 2.0**30).round().to(torch.int64), 30 - OUT, math.ceil(slack * 2.0**30) + 2

    def sizes(ring: Ring) -> Mapping[str, int]:
        if isinstance(spec, Exponential):
            own = {"opened": spec.opened, "blocks": spec.blocks, "scale": spec.frac_out}
        else:
            own = {"opened": spec.period_log2 + FRAC, "harmonics": len(spec.cos), "scale": spec.scale}
        return own | {"word": spec.word, "out": OUT, "k": (to or ring).bits, "source": ring.bits * product}

    move = "exponential, not closed" if isinstance(spec, Exponential) else "evaluate, not closed"
    # Words of the product, or of x, below 2^(drop + 14).
    bits = ((drop + FRAC) // 2, drop + FRAC - 1 - (drop + FRAC) // 2) if product else (drop + FRAC - 2,)
    return Case(
        name, run, expect, move, sizes, bits=(*bits, *([drop + FRAC - 2] if plus else [])), rings=rings,
        protocols=("rep3", "plain"),
    )  # fmt: skip


def _from_planes(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
    bits = np.unpackbits(words[0].numpy(), bitorder="little")
    return torch.from_numpy(bits).to(ring.dtype), 0, 0


def _bytes(shape: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    return [(int(np.prod(shape, dtype=np.int64)),)]


def _broadcast(shape: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    return [shape, (2, *(1 for _ in shape))]


def _fixed(*shapes: tuple[int, ...]) -> Callable[[tuple[int, ...]], Sequence[tuple[int, ...]]]:
    return lambda shape: shapes


def _negative(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
    return (words[0] < 0).to(ring.dtype), 0, 0


def _sign_plane(words: Words, ring: Ring) -> tuple[Tensor, int, int]:
    return to_planes(words[0], 1, ring.bits - 1)[0], 0, 0


def _window(ring: Ring, window: Window = WINDOW) -> dict[str, int]:
    return {"k": ring.bits, "m": window.bits}


CASES: tuple[Case, ...] = (
    _share(0),
    _share(1),
    _share(2),
    Case("linear", _linear, lambda w, r: (3 * w[0] - w[1], 0, 0), "linear"),
    Case("add_public", _add_public, lambda w, r: (w[0] + w[1], 0, 0), "add_public"),
    Case("add_public, wider", _add_public, lambda w, r: (w[0] + w[1], 0, 0), "add_public", shapes=_broadcast),
    Case("mul", _mul, lambda w, r: (w[0] * w[1], 0, 0), "bilinear"),
    Case("mul, broadcast", _mul, lambda w, r: (w[0] * w[1], 0, 0), "bilinear", shapes=_broadcast),
    Case("and", _and, lambda w, r: (w[0] & w[1], 0, 0), "bilinear", rings=(B64,), bits=(64, 64)),
    Case(
        "matmul", _matmul, lambda w, r: (w[0] @ w[1], 0, 0), "bilinear",
        shapes=_fixed((2, 3, 4), (2, 4, 5)), any_shape=False,
    ),
    Case(
        "conv", _conv, lambda w, r: (kernels.conv(w[0], w[1], **CONV), 0, 0), "bilinear",
        shapes=_fixed((2, 4, 7, 6), (6, 2, 3, 2)), any_shape=False,
    ),
    Case(
        "look_up", _look_up(), lambda w, r: (w[0][row_numbers(w[1], 5)], 0, 0), "look_up", bits=(64, 20),
        shapes=lambda shape: [(5, *shape), (3,)],
    ),
    Case(
        "look_up by wider words", _look_up(Z64), lambda w, r: (w[0][row_numbers(w[1], 7)], 0, 0), "look_up",
        bits=(64, 20), rings=(Z32,), shapes=lambda shape: [(7, *shape), (2, 1)],
    ),
    Case("truncate", _truncate, lambda w, r: (w[0], dropped(r), 0), "truncate", _kf, bits=(30,)),
    Case(
        "truncate by nothing", _truncate_nothing, _same, "truncate", lambda r: {"k": r.bits, "f": 0},
        bits=(30,),
    ),
    Case(
        "truncate to Z32", _truncate_narrow, lambda w, r: (w[0], 20, 0), "truncate",
        lambda r: {"k": 64, "f": 20, "out": 32}, bits=(50,), rings=(Z64,),
    ),
    Case(
        "truncate to Z64", _truncate_wide, lambda w, r: (w[0].long(), 5, 0), "truncate",
        lambda r: {"k": 32, "f": 5, "out": 64}, bits=(30,), rings=(Z32,),
    ),
    Case(
        "bilinear_truncate", _bilinear_truncate, lambda w, r: (w[0] * w[1], dropped(r), 0),
        "bilinear_truncate", _kf,
        bits=(15, 14), unfused="bilinear_truncate, not fused",
    ),
    Case(
        "bilinear_truncate, plus", _bilinear_truncate_plus, lambda w, r: (w[0] * w[1] + w[2], dropped(r), 0),
        "bilinear_truncate", _kf, bits=(15, 14, 28), unfused="bilinear_truncate, not fused",
    ),
    Case(
        "matmul_truncate", _matmul_truncate, lambda w, r: (w[0] @ w[1], dropped(r), 0),
        "bilinear_truncate", _kf,
        bits=(13, 13), shapes=_fixed((3, 4), (4, 7)), any_shape=False, unfused="bilinear_truncate, not fused",
    ),
    Case(
        "bilinear_truncate, two more products", _two_products,
        lambda w, r: (w[0] @ w[1] + 2 * w[2] * w[3], dropped(r), 0), "bilinear_truncate", _kf,
        bits=(12, 12, 13, 13), shapes=_fixed((3, 4), (4, 7), (3, 7), (1, 7)), any_shape=False,
        protocols=("rep3", "plain"),
    ),
    Case(
        "linear_truncate", _linear_truncate,
        lambda w, r: (torch.stack([5 * w[0], -3 * w[0]]), dropped(r), 0), "linear_truncate", _kf, bits=(27,),
    ),
    Case(
        "linear_truncate, plus", _linear_truncate_plus, lambda w, r: (5 * w[0] + w[1], dropped(r), 0),
        "linear_truncate",
        _kf, bits=(26, 28), unfused="linear_truncate",
    ),
    Case("cast up", _cast_up, lambda w, r: (w[0].long(), 0, 0), "cast up", bits=(30,), rings=(Z32,)),
    Case("cast down", _cast_down, lambda w, r: (w[0].int(), 0, 0), "cast down", bits=(30,), rings=(Z64,)),
    Case(
        "sign_bits", _sign_bits(WINDOW), _sign_plane, "sign_bits", _window, bits=(9,),
        unfused="sign_bits, not fused",
    ),
    Case(
        "sign_bits, narrow", _sign_bits(NARROW), _sign_plane, "sign_bits", lambda r: _window(r, NARROW),
        bits=(3,), unfused="sign_bits, not fused",
    ),
    Case(
        "less_than_zero", _less(WINDOW), _negative, "less_than_zero", _window, bits=(9,),
        unfused="less_than_zero, not fused",
    ),
    Case(
        # Words are even multiples of the window's unit and a half: outside its error band.
        "less_than_zero, shifted", _less(SHIFTED), _negative, "less_than_zero",
        lambda r: _window(r, SHIFTED), bits=(-6,), unfused="less_than_zero, not fused",
    ),
    Case(
        "less_than_zero, narrow", _less(NARROW), _negative, "less_than_zero", lambda r: _window(r, NARROW),
        bits=(3,), unfused="less_than_zero, not fused",
    ),
    Case(
        "less_than_zero, wide", _less(WIDE), _negative, "less_than_zero", lambda r: _window(r, WIDE),
        bits=(24,), unfused="less_than_zero, not fused",
    ),
    Case(
        "select_negative", _select_negative, lambda w, r: (w[0].clamp(max=0), 0, 0), "select_negative",
        _window, bits=(9,), unfused="select_negative, not fused",
    ),
    Case(
        "select_negative, narrow", _select_negative_narrow, lambda w, r: (torch.where(w[0] < 0, w[1], 0), 0, 0),
        "select_negative", lambda r: _window(r, NARROW), bits=(3, 29), unfused="select_negative, not fused",
    ),
    Case(
        "select_negative of two", _select_negative_of_two,
        lambda w, r: (torch.where(w[0] < 0, torch.stack([w[1], w[2]]), 0), 0, 0), "select_negative",
        lambda r: _window(r) | {"ys": 2}, bits=(9, 29, 29), protocols=("rep3", "plain"),
    ),
    *(
        Case(
            f"select_largest of {r}{', narrow' * (window is NARROW)}", _select_largest(window), _at_largest,
            "select_largest", lambda ring, r=r, window=window: _window(ring, window) | {"r": r}, bits=bits,
            shapes=_candidates(r), protocols=("rep3", "plain"),
        )
        for r in (3, 4) for window, bits in ((WINDOW, (8,)), (NARROW, (2, 29)))
    ),
    Case("select", _select, lambda w, r: (w[0] * w[1], 0, 0), "select", bits=(0, 29)),
    Case(
        "select of two", _select_either, lambda w, r: (torch.where(w[0] == 1, w[1], w[2]), 0, 0), "select",
        bits=(0, 29, 29),
    ),
    Case(
        "to_bits", _to_bits, lambda w, r: (to_planes(w[0], WINDOW.bits), 0, 0), "to_bits",
        _window, bits=(9,),
        protocols=("rep3",),
    ),
    Case(
        "bits_to_words", _bits_to_words, _from_planes, "bits_to_words", bits=(8,), source={0: B8},
        shapes=_bytes,
    ),
    _case_evaluate("evaluate", SINES),
    _case_evaluate("evaluate, two ways", SINES, two_way=True),
    _case_evaluate("evaluate, a line", LINE),
    _case_evaluate("evaluate, three series", *OTHERS),
    _case_evaluate("evaluate, three series, two ways", *OTHERS, two_way=True),
    _case_evaluate("evaluate, Z32", SHORT, rings=(Z32,)),
    _case_evaluate("evaluate, Z32 to Z64", SHORTER, rings=(Z32,), to=Z64),
    _case_evaluate("evaluate, Z64 to Z32", SINES, to=Z32),
    _case_evaluate("evaluate, no wrap in sight", SINES, to=Z32, out=28),
    # The sum has fewer fraction bits than the result.
    _case_evaluate("evaluate, finer than its scale", SHORTER, rings=(Z64, Z32), out=24),
    _case_exponential("exponential", EXPONENTIALS[0]),
    _case_exponential("exponential, two ways", EXPONENTIALS[0], two_way=True),
    _case_exponential("exponential, two block bits", EXPONENTIALS[1]),
    _case_exponential("exponential, three block bits, Z32", EXPONENTIALS[2], rings=(Z32, Z64)),
    _case_exponential("exponential, three block bits, two ways", EXPONENTIALS[2], two_way=True),
    _case_exponential("exponential, Z32 to Z64", EXPONENTIALS[2], rings=(Z32,), to=Z64),
    _case_exponential("exponential, Z64 to Z32", EXPONENTIALS[1], to=Z32),
    _case_unclosed("evaluate, not closed", FEW_KNOWN),
    _case_unclosed("evaluate, not closed, plus", FEW_KNOWN, plus=True),
    _case_unclosed("evaluate, not closed, of a map", FEW_KNOWN, product=False, to=Z64),
    _case_unclosed("evaluate, not closed, nothing dropped", FEW_KNOWN, drop=0, rings=(Z32,)),
    _case_unclosed("exponential, not closed", NOT_CLOSED),
    _case_unclosed("exponential, not closed, plus", NOT_CLOSED, plus=True, rings=(Z32,), to=Z64),
    _case_unclosed("exponential, not closed, of a map", NOT_CLOSED, product=False, rings=(Z64,), to=Z32),
    _case_unclosed("exponential, not closed, nothing dropped", NOT_CLOSED, drop=0, rings=(Z32,)),
)  # fmt: skip


def shapes_of(case: Case, shape: tuple[int, ...]) -> Sequence[tuple[int, ...]]:
    return [shape] * len(case.bits) if case.shapes is None else case.shapes(shape)


def draw(case: Case, ring: Ring, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Random operand words within the case's magnitudes."""
    g = np.random.default_rng(seed)
    out = []
    for i, (size, bits) in enumerate(zip(shapes_of(case, shape), case.bits, strict=False)):
        kind = case.source.get(i, ring)
        out.append(_words(g, bits, kind, size))
    return out


def _words(g: np.random.Generator, bits: int, ring: Ring, shape: tuple[int, ...]) -> Tensor:
    if ring.kind == "B" or bits >= ring.bits:
        raw = g.integers(0, 256, (*shape, ring.bits // 8), dtype=np.uint8)
        return torch.from_numpy(raw.view({64: np.int64, 32: np.int32, 8: np.uint8}[ring.bits]).reshape(shape))
    if bits == 0:
        return torch.from_numpy(np.asarray(g.integers(0, 2, shape))).to(ring.dtype)
    if bits < 0:
        units = 1 << -bits
        whole = np.asarray(g.integers(-31, 32, shape)) * units
        return torch.from_numpy(np.asarray(whole + np.where(whole < 0, 0, units))).to(ring.dtype)
    return torch.from_numpy(np.asarray(g.integers(-(1 << bits) + 1, 1 << bits, shape))).to(ring.dtype)


def components(words: Tensor, ring: Ring, seed: int) -> list[Tensor]:
    """Three uniform components of a value."""
    g = np.random.default_rng(seed)
    masks = [_words(g, ring.bits, ring, tuple(words.shape)) for _ in range(2)]
    return list(Rep3.split(words, ring, masks))


def shares(p: Protocol, party: int, parts: Sequence[Tensor], ring: Ring, frac: int) -> Shared:
    """One party's holding of a value given by all its components."""
    type = Secret(ring, frac, tuple(parts[0].shape))
    if p.parties == 1:
        return Shared(type, (parts[0],))
    return Shared(type, (parts[party], parts[(party + 1) % 3]))


Streams = Callable[[int], PairStreams]


def execute(
    p: Protocol,
    case: Case,
    ring: Ring,
    words: Words,
    *,
    turn: int = 0,
    seed: int = 0,
    split: Sequence[Sequence[Tensor]] | None = None,
    device: str = "cpu",
    streams: Streams | None = None,
    links: Sequence[Link] | None = None,
    drive: Callable[[Sequence[Scheduler]], list[Any]] | None = None,
) -> tuple[list[Shared], list[Ledger]]:
    """Run one case at all parties on given (or fresh) components of its operands."""
    rings = [case.source.get(i, ring) for i in range(len(words))]
    if split is None:
        split = [
            [w] if p.parties == 1 else components(w, r, seed * 7 + i)
            for i, (w, r) in enumerate(zip(words, rings, strict=True))
        ]
    if device == "meta":
        split = [[c.to("meta") for c in parts] for parts in split]
        words = [w.to("meta") for w in words]

    async def main(s: Session) -> Shared:
        x = tuple(shares(p, s.party, parts, r, case.frac) for parts, r in zip(split, rings, strict=True))
        return await case.run(Run(p, s.fork("case", turn=turn), x, words, ring))

    if drive is None:
        key = f"seed {seed}".encode()
        return simulate(main, parties=p.parties, seed=key, device=device, streams=streams, links=links)
    mesh = links or LockstepLink.mesh(p.parties)
    ledgers = [Ledger() for _ in range(p.parties)]
    drawn = [PairStreams(simulation_keys(f"seed {seed}".encode(), i, p.parties)) for i in range(p.parties)]
    sessions = [Session(i, mesh[i], drawn[i], ledgers[i]) for i in range(p.parties)]
    results = drive([Scheduler(mesh[i], main(sessions[i])) for i in range(p.parties)])
    for session, ledger in zip(sessions, ledgers, strict=True):
        ledger.rounds = session.clock
    return results, ledgers


def combine(p: Protocol, outputs: Sequence[Shared]) -> Tensor:
    """The value of an output; checks that neighbours hold the same components."""
    if p.parties == 1:
        return outputs[0].parts[0]
    for i in range(3):
        assert torch.equal(outputs[i].parts[1], outputs[(i + 1) % 3].parts[0]), (
            f"parties {i} and {(i + 1) % 3} differ"
        )
        assert outputs[i].type == outputs[0].type
        assert all(tuple(part.shape) == outputs[i].shape for part in outputs[i].parts)
        assert all(part.dtype == outputs[i].ring.dtype for part in outputs[i].parts)
    return Rep3.combine([out.parts[0] for out in outputs], outputs[0].ring)


def declared(p: Protocol, case: Case, ring: Ring) -> cost.Cost:
    name = case.unfused if case.unfused and not p.fused else case.move
    return cost.MOVES[name](**case.sizes(ring))


def shuffled(seed: int) -> Callable[[Sequence[Scheduler]], list[Any]]:
    """A driver that steps parties and their ready tasks in random order, one task at a time."""

    def drive(schedulers: Sequence[Scheduler]) -> list[Any]:
        order = random.Random(seed)
        for scheduler in schedulers:
            _shuffle(scheduler, order)
        lockstep(sorted(schedulers, key=lambda _: order.random()))
        return [scheduler.result for scheduler in schedulers]

    return drive


def _shuffle(scheduler: Scheduler, order: random.Random) -> None:
    def advance() -> bool:
        moved = scheduler._deliver()
        for _ in range(order.randrange(1, 4)):
            if scheduler._ready:
                scheduler._ready.rotate(order.randrange(len(scheduler._ready)))
                scheduler._step(*scheduler._ready.popleft())
                moved = True
        return moved

    scheduler.advance = advance  # type: ignore[method-assign]
