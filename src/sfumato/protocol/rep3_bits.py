"""Bit-sliced boolean circuits of replicated gates: carries, sign bits, a2b, and single bits back to words.

A secret of m bits is m bit planes in B8 (byte = eight elements), so a gate is one xor or and over packed
bytes and planes travel without packing. Signs are cheaper by :mod:`sfumato.protocol.rep3_sign`; the tree here is for
``fused=False``. Argument in docs/security/rep3.md, "to_bits".
"""

from __future__ import annotations

import torch

from sfumato.protocol.base import Window, plane_bytes
from sfumato.protocol.rep3_close import zero_share
from sfumato.protocol.rep3_sign import bit_words
from sfumato.ring.planes import to_planes
from sfumato.session.session import Receive, Send, Session
from sfumato.types import B8, Ring, Secret, Shared

__all__ = ["bits_to_words", "less_bits", "to_bits"]


async def _operands(s: Session, x: Shared, window: Window) -> tuple[Shared, Shared]:
    """The window of u0 = x0 + x1 and of u1 = x2 as shared planes; x = u0 + u1. Cost: 1 round, m bits.

    Role 0 hides its planes under a stream with role 2; u1 is known to roles 1 and 2, so sharing it is free.
    """
    window.check(x.ring)
    m, size = window.bits, plane_bytes(x.type.numel)
    type = Secret(B8, 0, (m, size))
    zero = torch.zeros(type.shape, dtype=torch.uint8, device=s.device)
    first, second = x.parts
    if s.role == 0:
        planes = to_planes(first + second, m, window.shift)
        b0 = s.prg("planes", (0, 2), B8, type.shape)
        b1 = planes ^ b0
        await s.exchange([Send(s.at(1), "planes", b1, 8)])
        return Shared(type, (b0, b1)), Shared(type, (zero, zero))
    if s.role == 1:
        (b1,) = await s.exchange([], [Receive(s.at(0), "planes", type.shape, torch.uint8, 8)])
        return Shared(type, (b1, zero)), Shared(type, (zero, to_planes(second, m, window.shift)))
    b0 = s.prg("planes", (0, 2), B8, type.shape)
    return Shared(type, (zero, b0)), Shared(type, (to_planes(first, m, window.shift), zero))


async def _first_and(s: Session, u: Shared, v: Shared) -> Shared:
    """u & v where v has component 2 alone. Cost: 1 round, 2 bits a bit: roles 1 and 2 exchange masked
    summands.
    """
    shape = u.shape
    if s.role == 0:
        return Shared(u.type, (s.prg("c0", (0, 2), B8, shape), s.prg("c1", (0, 1), B8, shape)))
    if s.role == 1:
        c1 = s.prg("c1", (0, 1), B8, shape)
        mine = (u.parts[0] & v.parts[1]) ^ c1
        (theirs,) = await s.exchange(
            [Send(s.at(2), "g1", mine, 8)], [Receive(s.at(2), "g2", shape, torch.uint8, 8)]
        )
        return Shared(u.type, (c1, mine ^ theirs))
    c0 = s.prg("c0", (0, 2), B8, shape)
    mine = (u.parts[1] & v.parts[0]) ^ c0
    (theirs,) = await s.exchange(
        [Send(s.at(1), "g2", mine, 8)], [Receive(s.at(1), "g1", shape, torch.uint8, 8)]
    )
    return Shared(u.type, (mine ^ theirs, c0))


async def _and(s: Session, x: Shared, y: Shared) -> Shared:
    """Bitwise and of replicated planes. Cost: 1 round, 3 bits a bit. Zero shares hide the messages."""
    (a, b), (c, d) = x.parts, y.parts
    shape, r = x.shape, s.role
    nxt, prv = (r + 1) % 3, (r + 2) % 3
    z = (a & (c ^ d)) ^ (b & c) ^ zero_share(s, B8, shape)
    (other,) = await s.exchange(
        [Send(s.at(prv), "z", z, 8)], [Receive(s.at(nxt), "z", shape, torch.uint8, 8)]
    )
    return Shared(x.type, (z, other))


def _rows(x: Shared, rows: slice | list[int]) -> Shared:
    parts = tuple(part[rows] for part in x.parts)
    return Shared(Secret(B8, 0, tuple(parts[0].shape)), parts)


def _xor(x: Shared, y: Shared) -> Shared:
    parts = tuple(a ^ b for a, b in zip(x.parts, y.parts, strict=True))
    return Shared(Secret(B8, 0, tuple(parts[0].shape)), parts)


def _stack(*xs: Shared) -> Shared:
    parts = tuple(torch.cat(components) for components in zip(*(x.parts for x in xs), strict=True))
    return Shared(Secret(B8, 0, tuple(parts[0].shape)), parts)


async def less_bits(s: Session, x: Shared, window: Window) -> Shared:
    """The top bit of the window of x = u0 + u1 as a plane, by a carry tree.

    Cost for m bits: 2 + ceil(log2(m - 1)) rounds, about 8m bits (118 at m = 16). Error: values in [0,
    2^shift) may count as negative; exact if shift is 0. Leaks: nothing. Source: [ABY3] for the operands,
    [SPU] for the tree.
    """
    u, v = await _operands(s.fork("operands"), x, window)
    low = slice(0, window.bits - 1)
    g = await _first_and(s.fork("and"), _rows(u, low), _rows(v, low))
    p = _xor(_rows(u, low), _rows(v, low))
    level = 0
    while g.shape[0] > 1:
        groups = g.shape[0]
        pairs = groups // 2
        high, lower = slice(1, 2 * pairs, 2), slice(0, 2 * pairs, 2)
        p_high = _rows(p, high)
        # The lowest group has no carry in: its propagate bit is never asked for.
        left = _stack(p_high, _rows(p_high, slice(1, None)))
        right = _stack(_rows(g, lower), _rows(_rows(p, lower), slice(1, None)))
        product = await _and(s.fork(f"tree{level}"), left, right)
        g_new = _xor(_rows(g, high), _rows(product, slice(0, pairs)))
        p_new = _stack(_rows(p, slice(0, 1)), _rows(product, slice(pairs, None)))
        if groups % 2:
            g_new = _stack(g_new, _rows(g, slice(groups - 1, groups)))
            p_new = _stack(p_new, _rows(p, slice(groups - 1, groups)))
        g, p, level = g_new, p_new, level + 1
    top = slice(window.bits - 1, window.bits)
    sign = _xor(_xor(_rows(u, top), _rows(v, top)), g)
    return _rows_flat(sign)


def _rows_flat(x: Shared) -> Shared:
    parts = tuple(part.reshape(-1) for part in x.parts)
    return Shared(Secret(B8, 0, tuple(parts[0].shape)), parts)


async def to_bits(s: Session, x: Shared, window: Window) -> Shared:
    """a2b: all bits of the window as planes (m, ceil(n / 8)), by a Sklansky prefix adder.

    Cost: 2 + ceil(log2(m - 1)) rounds, about 3m + 3m log2(m) bits. Error: the window of floor(u0) +
    floor(u1), which is one unit of 2^shift low for half of the values when shift > 0.
    """
    m = window.bits
    u, v = await _operands(s.fork("operands"), x, window)
    half_sum = _xor(u, v)
    low = slice(0, m - 1)
    g = await _first_and(s.fork("and"), _rows(u, low), _rows(v, low))
    p = _rows(half_sum, low)
    span, level = 1, 0
    while span < m - 1:
        upper = [i for i in range(m - 1) if (i // span) % 2 == 1]
        pivot = [(i // span) * span - 1 for i in upper]
        p_upper = _rows(p, upper)
        product = await _and(
            s.fork(f"prefix{level}"), _stack(p_upper, p_upper), _stack(_rows(g, pivot), _rows(p, pivot))
        )
        g = _replaced(g, upper, _xor(_rows(g, upper), _rows(product, slice(0, len(upper)))))
        p = _replaced(p, upper, _rows(product, slice(len(upper), None)))
        span, level = span * 2, level + 1
    return _stack(_rows(half_sum, slice(0, 1)), _xor(_rows(half_sum, slice(1, m)), g))


def _replaced(x: Shared, rows: list[int], values: Shared) -> Shared:
    parts = []
    for part, new in zip(x.parts, values.parts, strict=True):
        changed = part.clone()
        changed[rows] = new
        parts.append(changed)
    return Shared(x.type, tuple(parts))


async def bits_to_words(s: Session, plane: Shared, ring: Ring, shape: tuple[int, ...]) -> Shared:
    """b2a of one bit plane. Cost: 2 rounds, 3k + 2 bits."""
    first, second = plane.parts
    bit = None if s.role == 2 else first ^ second if s.role == 0 else second
    return await bit_words(s, bit, ring, shape)
