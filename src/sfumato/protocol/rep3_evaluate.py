"""Univariate functions by one opening: role 2 deals functions of a mask, roles 0 and 1 open the masked value.

The mask covers x0, which role 2 holds: t = x0 + r. One way, r is the stream of roles 1 and 2, so that role 1 knows
x - t = x1 + x2 - r by itself and one message tells role 0; everything in that round goes from a role to the one below
it. Two ways, t is made of streams alone, so that what is dealt does not depend on x and can be made ahead of time.
Role 2 never sees the masked value. Argument in docs/security/rep3.md, "evaluate" and "exponential".

The argument may be a product before its truncation, u0 + u1 at roles 0 and 1: each drops bits of its own summand, and
what is left is opened two ways. A wrap of u0 + u1 is a multiple of what is opened, so that none has to be found.

Source: [SHAFT] for sine series by one opening; own: dense periods by a public multiplier, words as narrow as the
tolerance allows, the exponential as a product of two factors with the wrap read off the opened value's top bits, and
products that are opened without being closed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Protocol, Unclosed
from sfumato.protocol.rep3_close import Additive, close, open_product, without_wrap
from sfumato.protocol.series import Exponential, Series, linear_word
from sfumato.ring import powers, trig
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z32, Z64, Ring, Secret, Shared

__all__ = ["check_domain", "check_exponential", "evaluate", "exponential", "opened_bits"]


def opened_bits(series: Series, frac: int) -> int:
    """Bits of the phase that are opened: a period of x at ``frac`` fraction bits."""
    return series.period_log2 + frac


def check_domain(
    series: Sequence[Series], type: Secret, ring: Ring, frac: int, known: int | None = None
) -> None:
    """Raise ``TypeMismatch`` unless a value of this type can be put into these series, all at once. ``known``: low bits
    of its words that can be told (default: all)."""
    if type.ring.kind != "Z" or ring.kind != "Z":
        raise TypeMismatch(f"evaluate works in Z rings, not from {type.ring} to {ring}; cast first")
    first, known = series[0], type.ring.bits if known is None else known
    if len({(g.centre, g.period_log2, g.multiplier, g.dealt, g.word) for g in series}) != 1:
        raise TypeMismatch("series that share an opening need one centre, period and word; fit them together")
    bits, most = opened_bits(first, type.frac), min(50, known)
    if not 12 <= bits <= most:
        raise TypeMismatch(
            f"a period of 2^{first.period_log2} with {type.frac} fraction bits is outside the 12 to "
            f"{most} bits that {type.ring} can open; truncate or cast first"
        )
    for g in series:
        _check_result(g.scale, g.word, frac)
        if g.linear and (
            g.scale < type.frac + g.linear_frac
            or g.word > linear_word(known, type.frac, g.scale, g.linear_frac)
        ):
            raise TypeMismatch(
                f"the series' linear part was fitted for fewer than {type.frac} fraction bits or for a wider ring than "
                f"{type.ring}; fit it for this type"
            )


def _check_result(scale: int, word: int, frac: int) -> None:
    """Raise ``TypeMismatch`` unless words at this scale can be closed to ``frac`` fraction bits."""
    if not (frac >= 0 and scale - frac <= word - 2):
        raise TypeMismatch(
            f"words of {word} bits with {scale} fraction bits hold nothing of a result with {frac}; ask for more"
        )


@dataclass(frozen=True, slots=True)
class _Argument:
    """What a function of one opening is computed of: this role's summands of the argument (none at role 2).

    ``held``: one way, what role 2 has of it, which the mask covers, and at role 1 all the rest; None two ways, where
    masks are made of streams alone.
    """

    shape: tuple[int, ...]
    frac: int
    summands: tuple[Tensor, ...]
    held: tuple[Tensor, ...] | None

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


def _shared(p: Protocol, s: Session, x: Shared, move: float, *, two_way: bool) -> _Argument:
    """x + move: x0 + x1 at role 0, x2 at role 1."""
    x = p.add_public(s, x, p.encode(x, move)) if move else x
    first, second = x.parts
    summands = {0: (first, second), 1: (second,), 2: ()}[s.role]
    held = {0: (), 1: (first, second), 2: (second,)}[s.role]
    return _Argument(x.shape, x.frac, summands, None if two_way else held)


async def _summed_up(s: Session, x: Unclosed) -> Additive:
    """The product, or the linear map, as u0 + u1 at its own scale, without the offset."""
    if x.y is not None:
        return await open_product(s, x.f, x.x, x.y, x.plus)
    u = Additive.fold(s, x.f, x.x, x.shape)
    return u if x.plus is None else u.plus(s, x.plus)


def _dropped(p: Protocol, s: Session, x: Unclosed, u: Additive, move: float) -> _Argument:
    """(u0 + u1) >> bits and public summands: each role drops bits of its own."""
    if u.words is None:
        return _Argument(x.shape, x.frac, (), None)
    words = without_wrap(s, u, x.bits, x.ring)
    assert words is not None
    if s.role == 0:
        for constant in (x.offset, move):
            if isinstance(constant, Tensor) or constant:
                words = words + p.encode(x.x, constant, x.frac)
    return _Argument(x.shape, x.frac, (words,), None)


async def _applied(
    p: Protocol,
    s: Session,
    x: Shared | Unclosed,
    move: float,
    function: Callable[[Session, _Argument], Awaitable[tuple[Shared, ...]]],
    *,
    two_way: bool,
) -> tuple[Shared, ...]:
    """``function`` of x + move. Of a product the samples that are asked for are closed meanwhile."""
    if isinstance(x, Shared):
        return await function(s, _shared(p, s, x, move, two_way=two_way))
    u = await _summed_up(s, x)
    argument = _dropped(p, s, x, u, move)
    pick, seen = x.pick, x.seen
    if pick is None or seen is None:
        return await function(s, argument)
    shape = tuple(pick(torch.empty(x.shape, device="meta")).shape)
    few = Additive(None if u.words is None else pick(u.words), shape)
    offset = pick(x.offset.broadcast_to(x.shape)) if isinstance(x.offset, Tensor) else x.offset

    async def sampled(child: Session) -> Shared:
        y = await close(child, few, x.bits, x.ring, x.frac)
        return p.add_public(child, y, p.encode(y, offset))

    async def computed(child: Session) -> tuple[Shared, ...]:
        return await function(child, argument)

    found, results = await s.gather(sampled, computed)
    seen(found)
    return results


async def _open(s: Session, x: _Argument, multiplier: int, bits: int) -> Tensor:
    """``multiplier * x - t`` mod 2^bits, flat, at roles 0 and 1. Cost: 1 round, ``bits`` bits, twice that two ways."""
    count, low, long = x.count, (1 << bits) - 1, torch.int64

    def phase(parts: tuple[Tensor, ...], less: Tensor) -> Tensor:
        total = parts[0].to(long) if len(parts) == 1 else parts[0].to(long) + parts[1]
        return (total * multiplier - less).reshape(-1) & low

    def local(parts: tuple[Tensor, ...], less: Tensor) -> Tensor:
        return s.local((count,), long, lambda: phase(parts, less))

    if x.held is None:
        name, peer = ("t0", 1) if s.role == 0 else ("t1", 0)
        mine = local(x.summands, s.prg(name, (0, 2) if s.role == 0 else (1, 2), Z64, x.shape))
        (theirs,) = await s.exchange(
            [Send(s.at(peer), f"delta{s.role}", mine, bits)],
            [Receive(s.at(peer), f"delta{peer}", (count,), long, bits)],
        )
        return s.local((count,), long, lambda: (mine + theirs) & low)
    if s.role == 1:
        delta = local(x.held, s.prg("t", (1, 2), Z64, x.shape))
        await s.exchange([Send(s.at(0), "delta", delta, bits)])
        return delta
    (delta,) = await s.exchange([], [Receive(s.at(1), "delta", (count,), long, bits)])
    return delta


def _mask(s: Session, x: _Argument, multiplier: int, bits: int) -> Tensor:
    """Role 2's mask of the phase, flat."""
    shape, count = x.shape, x.count
    low = (1 << bits) - 1
    if x.held is None:
        t0, t1 = s.prg("t0", (0, 2), Z64, shape), s.prg("t1", (1, 2), Z64, shape)
        return s.local((count,), torch.int64, lambda: (t0 + t1).reshape(-1) & low)
    r, mine = s.prg("t", (1, 2), Z64, shape), x.held[0]
    return s.local((count,), torch.int64, lambda: (mine.to(torch.int64) * multiplier + r).reshape(-1) & low)


def _word_ring(word: int) -> Ring:
    """The narrowest machine word that holds a dealt word."""
    return Z32 if word <= 32 else Z64


def _signed(words: Tensor, word: int) -> Tensor:
    """Words mod 2^word, with their sign extended to the machine word."""
    spare = words.element_size() * 8 - word
    return (words << spare) >> spare if spare else words


async def evaluate(
    p: Protocol,
    s: Session,
    series: Sequence[Series],
    x: Shared | Unclosed,
    frac: int,
    ring: Ring,
    *,
    two_way: bool = False,
) -> tuple[Shared, ...]:
    """Each series of x with ``frac`` fraction bits in ``ring``; all from one opening.

    Domain: the series' interval; x in Z64 or Z32. Cost: 3 rounds; period_log2 + f bits opened (twice, two ways), 2 word
    bits dealt per harmonic, then per series the closing truncation 2k' + (k' - word + scale - f') + 2. Of a product:
    1 round and k bits before, opened two ways; of a linear map nothing.
    Error: the fit's, noise of standard deviation ``series.noise`` and mean 0, one ulp; of a product a truncation's,
    too, in the argument. Range: |series| 2^scale < 2^(word - 2).
    Leaks: nothing; role 2 knows the mask and receives nothing.
    """
    known = x.known if isinstance(x, Unclosed) else None
    check_domain(series, x.type, ring, frac, known)

    async def function(child: Session, argument: _Argument) -> tuple[Shared, ...]:
        return await _series(p, child, series, argument, frac, ring)

    return await _applied(p, s, x, -series[0].centre, function, two_way=two_way)


async def _series(
    p: Protocol, s: Session, series: Sequence[Series], x: _Argument, frac: int, ring: Ring
) -> tuple[Shared, ...]:
    """The series of an argument from whose centre it was moved."""
    first, shape, count = series[0], x.shape, x.count
    bits = opened_bits(first, x.frac)
    harmonics = max(len(g.cos) for g in series)
    dealt_ring, size = _word_ring(first.word), (2 * harmonics, count)
    if s.role == 2:
        mask, own = _mask(s, x, first.multiplier, bits), s.prg("dealt", (0, 2), dealt_ring, size)

        def rest() -> Tensor:
            return trig.dealt(mask, bits, harmonics, first.dealt, dealt_ring.dtype).sub_(own)

        await s.exchange([Send(s.at(1), "dealt", s.local(size, dealt_ring.dtype, rest), first.word)])
        return await _closed(p, s, [Additive(None, shape)] * len(series), series, frac, ring)
    delta = await _open(s, x, first.multiplier, bits)
    if s.role == 0:
        table = s.prg("dealt", (0, 2), dealt_ring, size)
    else:
        (table,) = await s.exchange([], [Receive(s.at(2), "dealt", size, dealt_ring.dtype, first.word)])

    def summed(g: Series) -> Additive:
        words = s.local(
            shape, dealt_ring.dtype, lambda: _summed(s.role, g, x, delta, bits, table).reshape(shape)
        )
        return Additive(words, shape)

    return await _closed(p, s, [summed(g) for g in series], series, frac, ring)


def _summed(role: int, g: Series, x: _Argument, delta: Tensor, bits: int, table: Tensor) -> Tensor:
    """Role 0's or 1's summand of one series at its scale, flat, sign-extended."""
    unit = 2.0**trig.COEFFICIENT_BITS
    cos, sin = [round(c * unit) for c in g.cos], [round(c * unit) for c in g.sin]
    u = trig.weighted(delta, bits, table[: 2 * len(cos)], cos, sin, g.public)
    if g.linear:
        factor = round(g.linear * 2.0**g.linear_frac) << (g.scale - x.frac - g.linear_frac)
        mine = x.summands[0] if len(x.summands) == 1 else x.summands[0] + x.summands[1]
        u += (mine.reshape(-1).to(torch.int64) * factor).to(u.dtype)
    if role == 0:
        u += _wrapped(round(g.constant * 2.0**g.scale), u.dtype)
    return _signed(u, g.word)


def _wrapped(value: int, dtype: torch.dtype) -> int:
    """An integer as a signed word."""
    size = dtype.itemsize * 8
    return (value + (1 << (size - 1))) % (1 << size) - (1 << (size - 1))


async def _closed(
    p: Protocol, s: Session, sums: Sequence[Additive], series: Sequence[Series], frac: int, ring: Ring
) -> tuple[Shared, ...]:
    async def one(child: Session, u: Additive, g: Series) -> Shared:
        return await _lifted(p, child, u, g.scale, g.word, frac, ring)

    if len(sums) == 1:
        return (await one(s, sums[0], series[0]),)
    pairs = list(zip(sums, series, strict=True))
    closed = await s.gather(*(lambda child, u=u, g=g: one(child, u, g) for u, g in pairs))
    return tuple(closed)


async def _lifted(
    p: Protocol, s: Session, u: Additive, scale: int, word: int, frac: int, ring: Ring
) -> Shared:
    """The closing truncation; a result finer than the sum is shifted up in the ring."""
    kept = min(frac, scale)
    return p.lift(await close(s, u, scale - kept, word, kept, ring), frac)


# ---- exponentials ------------------------------------------------------------------------------------------


def check_exponential(
    spec: Exponential, type: Secret, ring: Ring, frac: int, known: int | None = None
) -> None:
    """Raise ``TypeMismatch`` unless a value of this type can be put into the exponential. ``known`` as in
    :func:`check_domain`."""
    known = type.ring.bits if known is None else known
    if type.ring.kind != "Z" or ring.kind != "Z" or spec.opened > known:
        raise TypeMismatch(
            f"an exponential works in Z rings of at least {spec.opened} bits, not from {known} bits of {type.ring} to "
            f"{ring}"
        )
    if type.frac != spec.frac:
        raise TypeMismatch(f"this exponential was planned for {spec.frac} fraction bits, not {type.frac}")
    _check_result(spec.frac_out, spec.word, frac)


async def exponential(
    p: Protocol,
    s: Session,
    spec: Exponential,
    x: Shared | Unclosed,
    frac: int,
    ring: Ring,
    *,
    two_way: bool = False,
) -> Shared:
    """exp(x) with ``frac`` fraction bits in ``ring``: exp(d + t) = exp(d) exp(t), one factor opened, one dealt.

    z = multiplier (x - lo) is masked mod 2^opened; role 2 deals exp of what its mask adds for every value of the top
    ``blocks`` bits of the opened word, because these and the bound on z say whether the mask wrapped.
    Domain: [spec.lo, spec.hi]; outside it the result is meaningless. Cost: 3 rounds; ``opened`` (twice, two ways) +
    2^blocks ``word`` bits, and the closing truncation 2k' + (k' - word + frac_out - f') + 2; of a product as in
    :func:`evaluate`. Error: relative ``spec.error``, and one ulp; of a product that of a truncation in the argument.
    Leaks: nothing; role 2 knows the mask and receives nothing.
    """
    known = x.known if isinstance(x, Unclosed) else None
    check_exponential(spec, x.type, ring, frac, known)

    async def function(child: Session, argument: _Argument) -> tuple[Shared, ...]:
        return (await _factors(p, child, spec, argument, frac, ring),)

    (y,) = await _applied(p, s, x, -spec.lo, function, two_way=two_way)
    return y


async def _factors(p: Protocol, s: Session, spec: Exponential, x: _Argument, frac: int, ring: Ring) -> Shared:
    """The exponential of an argument that was moved to begin at 0."""
    shape, count = x.shape, x.count
    denominator = spec.multiplier << spec.frac
    block = spec.opened - spec.blocks
    dealt_ring, size = _word_ring(spec.word), (spec.entries, count)
    if s.role == 2:
        mask = _mask(s, x, spec.multiplier, spec.opened)
        own = s.prg("dealt", (0, 2), dealt_ring, size)
        start = spec.multiplier * round(spec.lo * 2.0**spec.frac) - (1 << block)
        scale = spec.frac_out - spec.public

        def rest() -> Tensor:
            return (
                powers.rows(mask, spec.opened, denominator, start, scale, spec.blocks)
                .to(dealt_ring.dtype)
                .sub_(own)
            )

        await s.exchange([Send(s.at(1), "dealt", s.local(size, dealt_ring.dtype, rest), spec.word)])
        return await _lifted(p, s, Additive(None, shape), spec.frac_out, spec.word, frac, ring)
    delta = await _open(s, x, spec.multiplier, spec.opened)
    if s.role == 0:
        table = s.prg("dealt", (0, 2), dealt_ring, size)
    else:
        (table,) = await s.exchange([], [Receive(s.at(2), "dealt", size, dealt_ring.dtype, spec.word)])

    def product() -> Tensor:
        factor = powers.exponentials(delta & ((1 << block) - 1), block, denominator, 0, spec.public)
        return powers.chosen(delta, block, factor, table, spec.word).reshape(shape)

    u = Additive(s.local(shape, dealt_ring.dtype, product), shape)
    return await _lifted(p, s, u, spec.frac_out, spec.word, frac, ring)
