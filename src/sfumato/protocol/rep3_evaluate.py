"""Univariate functions by one opening: role 2 deals functions of a mask, roles 0 and 1 open the masked value.

The mask covers x0, which role 2 holds: t = x0 + r. One way, r is the stream of roles 1 and 2, so that role 1 knows
x - t = x1 + x2 - r by itself and one message tells role 0; everything in that round goes from a role to the one below
it. Two ways, t is made of streams alone, so that what is dealt does not depend on x and can be made ahead of time.
Role 2 never sees the masked value. Argument in docs/security/rep3.md, "evaluate" and "exponential". Source: [SHAFT] for
sine series by one opening; own: dense periods by a public multiplier, words as narrow as the tolerance allows, and the
exponential as a product of two factors with the wrap read off the opened value's top bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Protocol
from sfumato.protocol.rep3_close import Additive, close
from sfumato.protocol.series import Exponential, Series
from sfumato.ring import powers, trig
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z32, Z64, Ring, Secret, Shared

__all__ = ["check_domain", "check_exponential", "evaluate", "exponential", "opened_bits"]


def opened_bits(series: Series, frac: int) -> int:
    """Bits of the phase that are opened: a period of x at ``frac`` fraction bits."""
    return series.period_log2 + frac


def check_domain(series: Sequence[Series], type: Secret, ring: Ring, frac: int) -> None:
    """Raise ``TypeMismatch`` unless a value of this type can be put into these series, all at once."""
    if type.ring.kind != "Z" or ring.kind != "Z":
        raise TypeMismatch(f"evaluate works in Z rings, not from {type.ring} to {ring}; cast first")
    first = series[0]
    if len({(g.centre, g.period_log2, g.multiplier, g.dealt, g.word) for g in series}) != 1:
        raise TypeMismatch("series that share an opening need one centre, period and word; fit them together")
    bits = opened_bits(first, type.frac)
    if not (12 <= bits <= 50 and bits <= type.ring.bits):
        raise TypeMismatch(
            f"a period of 2^{first.period_log2} with {type.frac} fraction bits is outside the 12 to "
            f"{min(50, type.ring.bits)} bits that {type.ring} can open; truncate or cast first"
        )
    for g in series:
        _check_result(g.scale, g.word, frac)
        if g.linear and (g.scale < type.frac + g.linear_frac or g.word > type.ring.bits):
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


async def _open(s: Session, x: Shared, multiplier: int, bits: int, two_way: bool) -> Tensor:
    """``multiplier * x - t`` mod 2^bits, flat, at roles 0 and 1. Cost: 1 round, ``bits`` bits, twice that two ways."""
    shape, count = x.shape, x.type.numel
    first, second = x.parts
    low = (1 << bits) - 1
    long = torch.int64

    def phase(*parts: Tensor, less: Tensor) -> Tensor:
        total = parts[0].to(long) if len(parts) == 1 else parts[0].to(long) + parts[1]
        return (total * multiplier - less).reshape(-1) & low

    def local(*parts: Tensor, less: Tensor) -> Tensor:
        return s.local((count,), long, lambda: phase(*parts, less=less))

    if two_way:
        name, peer = ("t0", 1) if s.role == 0 else ("t1", 0)
        own = s.prg(name, (0, 2) if s.role == 0 else (1, 2), Z64, shape)
        mine = local(first, second, less=own) if s.role == 0 else local(second, less=own)
        (theirs,) = await s.exchange(
            [Send(s.at(peer), f"delta{s.role}", mine, bits)],
            [Receive(s.at(peer), f"delta{peer}", (count,), long, bits)],
        )
        return s.local((count,), long, lambda: (mine + theirs) & low)
    if s.role == 1:
        delta = local(first, second, less=s.prg("t", (1, 2), Z64, shape))
        await s.exchange([Send(s.at(0), "delta", delta, bits)])
        return delta
    (delta,) = await s.exchange([], [Receive(s.at(1), "delta", (count,), long, bits)])
    return delta


def _mask(s: Session, x: Shared, multiplier: int, bits: int, two_way: bool) -> Tensor:
    """Role 2's mask of the phase, flat."""
    shape, count = x.shape, x.type.numel
    low = (1 << bits) - 1
    if two_way:
        t0, t1 = s.prg("t0", (0, 2), Z64, shape), s.prg("t1", (1, 2), Z64, shape)
        return s.local((count,), torch.int64, lambda: (t0 + t1).reshape(-1) & low)
    r, mine = s.prg("t", (1, 2), Z64, shape), x.parts[1]
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
    x: Shared,
    frac: int,
    ring: Ring,
    *,
    two_way: bool = False,
) -> tuple[Shared, ...]:
    """Each series of x with ``frac`` fraction bits in ``ring``; all from one opening.

    Domain: the series' interval; x in Z64 or Z32. Cost: 3 rounds; period_log2 + f bits opened (twice, two ways), 2 word
    bits dealt per harmonic, then per series the closing truncation 2k' + (k' - word + scale - f') + 2.
    Error: the fit's, noise of standard deviation ``series.noise`` and mean 0, one ulp. Range: |series| 2^scale <
    2^(word - 2). Leaks: nothing; role 2 knows the mask and receives nothing.
    """
    check_domain(series, x.type, ring, frac)
    first = series[0]
    if first.centre:
        x = p.add_public(s, x, p.encode(x, -first.centre))
    bits = opened_bits(first, x.frac)
    shape, count = x.shape, x.type.numel
    harmonics = max(len(g.cos) for g in series)
    dealt_ring, size = _word_ring(first.word), (2 * harmonics, count)
    if s.role == 2:
        mask, own = _mask(s, x, first.multiplier, bits, two_way), s.prg("dealt", (0, 2), dealt_ring, size)

        def rest() -> Tensor:
            return trig.dealt(mask, bits, harmonics, first.dealt, dealt_ring.dtype).sub_(own)

        await s.exchange([Send(s.at(1), "dealt", s.local(size, dealt_ring.dtype, rest), first.word)])
        return await _closed(p, s, [Additive(None, shape)] * len(series), series, frac, ring)
    delta = await _open(s, x, first.multiplier, bits, two_way)
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


def _summed(role: int, g: Series, x: Shared, delta: Tensor, bits: int, table: Tensor) -> Tensor:
    """Role 0's or 1's summand of one series at its scale, flat, sign-extended."""
    unit = 2.0**trig.COEFFICIENT_BITS
    cos, sin = [round(c * unit) for c in g.cos], [round(c * unit) for c in g.sin]
    u = trig.weighted(delta, bits, table[: 2 * len(cos)], cos, sin, g.public)
    if g.linear:
        factor = round(g.linear * 2.0**g.linear_frac) << (g.scale - x.frac - g.linear_frac)
        mine = x.parts[0] + x.parts[1] if role == 0 else x.parts[1]
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


def check_exponential(spec: Exponential, type: Secret, ring: Ring, frac: int) -> None:
    """Raise ``TypeMismatch`` unless a value of this type can be put into the exponential."""
    if type.ring.kind != "Z" or ring.kind != "Z" or spec.opened > type.ring.bits:
        raise TypeMismatch(
            f"an exponential works in Z rings of at least {spec.opened} bits, not from {type.ring} to {ring}"
        )
    if type.frac != spec.frac:
        raise TypeMismatch(f"this exponential was planned for {spec.frac} fraction bits, not {type.frac}")
    _check_result(spec.frac_out, spec.word, frac)


async def exponential(
    p: Protocol, s: Session, spec: Exponential, x: Shared, frac: int, ring: Ring, *, two_way: bool = False
) -> Shared:
    """exp(x) with ``frac`` fraction bits in ``ring``: exp(d + t) = exp(d) exp(t), one factor opened, one dealt.

    z = multiplier (x - lo) is masked mod 2^opened; role 2 deals exp of what its mask adds for every value of the top
    ``blocks`` bits of the opened word, because these and the bound on z say whether the mask wrapped.
    Domain: [spec.lo, spec.hi]; outside it the result is meaningless. Cost: 3 rounds; ``opened`` + 2^blocks ``word``
    bits, and the closing truncation 2k' + (k' - word + frac_out - f') + 2. Error: relative ``spec.error``, and one ulp.
    Leaks: nothing; role 2 knows the mask and receives nothing.
    """
    check_exponential(spec, x.type, ring, frac)
    x = p.add_public(s, x, p.encode(x, -spec.lo))
    shape, count = x.shape, x.type.numel
    denominator = spec.multiplier << spec.frac
    block = spec.opened - spec.blocks
    dealt_ring, size = _word_ring(spec.word), (spec.entries, count)
    if s.role == 2:
        mask = _mask(s, x, spec.multiplier, spec.opened, two_way)
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
    delta = await _open(s, x, spec.multiplier, spec.opened, two_way)
    if s.role == 0:
        table = s.prg("dealt", (0, 2), dealt_ring, size)
    else:
        (table,) = await s.exchange([], [Receive(s.at(2), "dealt", size, dealt_ring.dtype, spec.word)])

    def product() -> Tensor:
        factor = powers.exponentials(delta & ((1 << block) - 1), block, denominator, 0, spec.public)
        return powers.chosen(delta, block, factor, table, spec.word).reshape(shape)

    u = Additive(s.local(shape, dealt_ring.dtype, product), shape)
    return await _lifted(p, s, u, spec.frac_out, spec.word, frac, ring)
