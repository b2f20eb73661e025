"""The sign of a secret by opening it under a mask, and what is made of the bit: a plane, words, a choice.

Role 2 knows the mask t = x0 + r and deals monomials of its bits; roles 0 and 1 know x - t and merge carries of
blocks of bits. Role 2 receives nothing. Argument in docs/security/rep3.md, "sign"; plans in
:mod:`sfumato.ring.carry`. Source: [ABY3] for the problem, [ABY2] for products of opened bits; own: the
mask that needs no message, dealt blocks with free propagate bits, the choice with one conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Window, plane_bytes
from sfumato.protocol.rep3_close import reshare
from sfumato.ring.carry import (
    CarryPlan,
    Dealt,
    block_carry,
    carry_plan,
    group_carry,
    group_products,
    monomials,
    winner_products,
    winners,
)
from sfumato.ring.planes import from_plane, to_planes
from sfumato.session.session import Receive, Send, Session
from sfumato.types import B8, Ring, Secret, Shared

__all__ = ["bit_words", "select_by_bit", "select_largest", "share_plane", "sign_shares"]


async def sign_shares(s: Session, x: Shared, window: Window) -> Tensor | None:
    """The sign of x as a plane: xor shares at roles 0 and 1, None at role 2. Not yet safe to send.

    Cost for m bits: 1 + levels rounds; m + dealt + 2 opened bits: 95 and 2 rounds at m = 16. Error: values in
    [0, 2^shift) may count as negative; exact if shift is 0. Leaks: nothing.
    """
    window.check(x.ring)
    m, size = window.bits, plane_bytes(x.type.numel)
    plan = carry_plan(m)
    shape = (plan.dealt, size)
    first, second = x.parts
    if s.role == 2:
        r = s.prg("t", (1, 2), x.ring, x.shape)
        masks = _masks(s, plan, (0, 2), size), _masks(s, plan, (1, 2), size)
        other = s.prg("dealt", (0, 2), B8, shape)

        def deal() -> Tensor:
            planes = to_planes(second + r, m, window.shift)
            return _deal(plan, planes, masks[0] ^ masks[1]).bitwise_xor_(other)

        await s.exchange([Send(s.at(1), "dealt", s.local(shape, torch.uint8, deal), 8)])
        return None
    own = _masks(s, plan, (s.role, 2), size)
    if s.role == 0:
        products = s.prg("dealt", (0, 2), B8, shape)
        (delta,) = await s.exchange([], [Receive(s.at(1), "delta", (m, size), torch.uint8, 8)])
    else:
        r = s.prg("t", (1, 2), x.ring, x.shape)
        delta = s.local((m, size), torch.uint8, lambda: to_planes(first + second - r, m, window.shift))
        (products,) = await s.exchange(
            [Send(s.at(0), "delta", delta, 8)], [Receive(s.at(2), "dealt", shape, torch.uint8, 8)]
        )
    return await _merged(s, plan, delta, products, own)


def _masks(s: Session, plan: CarryPlan, roles: tuple[int, int], size: int) -> Tensor:
    """One mask for each bit that the plan opens."""
    shape = (sum(plan.opened), size)
    if not plan.levels:
        return torch.empty(shape, dtype=torch.uint8, device=s.device)
    return s.prg("ra" if roles == (0, 2) else "rb", roles, B8, shape)


async def _merged(s: Session, plan: CarryPlan, delta: Tensor, products: Tensor, masks: Tensor) -> Tensor:
    """Carries block by block, then one opening a level; at roles 0 and 1."""
    one, meta, size = 255 * (s.role == 0), s.device == "meta", delta.shape[1]
    dealt, at = Dealt(products), 0
    states: list[tuple[Tensor, Tensor | None]] = []
    for width in plan.blocks if not meta else ():
        block = delta[at : at + width]
        states.append(block_carry(block, dealt.take((1 << width) - 1), one, low=at == 0))
        at += width
    at = 0
    for level, (groups, count) in enumerate(zip(plan.levels, plan.opened, strict=True)):
        own = masks[at : at + count]
        mine = s.local((count, size), torch.uint8, lambda: _openings(states, groups) ^ own)  # noqa: B023
        bits = await _exchanged(s, f"z{level}", mine)
        if not meta:
            states = _regrouped(states, groups, bits, own, dealt, one)
        at += count
    if meta:
        return torch.empty((size,), dtype=torch.uint8, device="meta")
    sign = states[0][0] if plan.levels else states[0][0] ^ dealt.take(1)[0]
    return sign ^ delta[-1] if one else sign


async def _exchanged(s: Session, name: str, mine: Tensor) -> Tensor:
    """Roles 0 and 1 add up what they hold. Every caller has put a stream with role 2 on it."""
    peer = 1 - s.role
    (theirs,) = await s.exchange(
        [Send(s.at(peer), f"{name}{s.role}", mine, 8)],
        [Receive(s.at(peer), f"{name}{peer}", tuple(mine.shape), torch.uint8, 8)],
    )
    return s.local(tuple(mine.shape), torch.uint8, lambda: mine ^ theirs)


State = tuple[Tensor, Tensor | None]


def _groups(states: list[State], groups: tuple[int, ...]) -> list[list[State]]:
    out, at = [], 0
    for n in groups:
        out.append(states[at : at + n])
        at += n
    return out


def _openings(states: list[State], groups: tuple[int, ...]) -> Tensor:
    """Each group's propagates (the lowest block has none), then its carries but the highest."""
    rows: list[Tensor] = []
    for group in _groups(states, groups):
        if len(group) > 1:
            rows += [p for _, p in group if p is not None]
            rows += [g for g, _ in group[:-1]]
    return torch.stack(rows)


def _regrouped(
    states: list[State], groups: tuple[int, ...], bits: Tensor, masks: Tensor, dealt: Dealt, one: int
) -> list[State]:
    out, at = [], 0
    for i, group in enumerate(_groups(states, groups)):
        n, low = len(group), i == 0
        if n == 1:
            out += group
            continue
        rows = slice(at, at + 2 * n - 1 - low)
        out.append(group_carry(group[-1][0], bits[rows], masks[rows], dealt, n, one, low=low))
        at = rows.stop
    return out


def _deal(plan: CarryPlan, t: Tensor, masks: Tensor) -> Tensor:
    """All that role 2 deals, in the order of use. The product of the last opening's lowest chain of masks
    (whose factor is one) carries the top bit of t.
    """
    rows, at = [], 0
    for width in plan.blocks:
        rows.append(monomials(t[at : at + width])[1:])
        at += width
    at = 0
    for groups in plan.levels:
        for i, n in enumerate(groups):
            if n > 1:
                count = 2 * n - 1 - (i == 0)
                rows.append(group_products(masks[at : at + count], n, low=i == 0))
                at += count
    if not plan.levels:
        return torch.cat([*rows, t[-1:]])
    out = torch.cat(rows)
    last = plan.levels[-1][0]
    # Its carries come last, the lowest one's first: 2^(n-1) - 1 rows, the whole chain at their end.
    out[-_after(last) - 1] ^= t[-1]
    return out


def _after(n: int) -> int:
    """Rows that a lowest group of n blocks deals after the product of its whole chain."""
    return sum((1 << n - 1 - j) - 1 for j in range(1, n - 1))


async def share_plane(s: Session, bit: Tensor | None, size: int) -> Shared:
    """xor shares at roles 0 and 1 as a replicated plane. Cost: 1 round, 2 bits."""
    type = Secret(B8, 0, (size,))
    if s.role == 2:
        return Shared(type, (s.prg("c2", (1, 2), B8, (size,)), s.prg("c0", (0, 2), B8, (size,))))
    assert bit is not None
    own = s.prg("c0", (0, 2), B8, (size,)) if s.role == 0 else s.prg("c2", (1, 2), B8, (size,))
    both = await _exchanged(s, "y", s.local((size,), torch.uint8, lambda: bit ^ own))
    return Shared(type, (own, both) if s.role == 0 else (both, own))


async def _opened(s: Session, bits: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(bits ^ m, the own mask) at roles 0 and 1, m twice at role 2. Cost: 1 round, 2 bits a bit."""
    if s.role == 2:
        masks = s.prg("ra", (0, 2), B8, shape), s.prg("rb", (1, 2), B8, shape)
        both = s.local(shape, torch.uint8, lambda: masks[0] ^ masks[1])
        return both, both
    assert bits is not None
    own = s.prg("ra", (0, 2), B8, shape) if s.role == 0 else s.prg("rb", (1, 2), B8, shape)
    return await _exchanged(s, "b", s.local(shape, torch.uint8, lambda: bits ^ own)), own


async def _dealt_words(s: Session, words: Tensor | None, ring: Ring, shape: tuple[int, ...]) -> Tensor:
    """Additive shares of role 2's words at roles 0 and 1 (role 2 keeps them). Cost: k bits, no round of its
    own.
    """
    if s.role == 1:
        (dealt,) = await s.exchange([], [Receive(s.at(2), "r", shape, ring.dtype, ring.bits)])
        return dealt
    mask = s.prg("r", (0, 2), ring, shape)
    if s.role == 2:
        assert words is not None
        dealt = s.local(shape, ring.dtype, lambda: words - mask)
        await s.exchange([Send(s.at(1), "r", dealt, ring.bits)])
    return mask


async def bit_words(s: Session, bit: Tensor | None, ring: Ring, shape: tuple[int, ...]) -> Shared:
    """xor shares at roles 0 and 1 as 0/1 words. Cost: 2 rounds, 3k + 2 bits.

    Roles 0 and 1 open the bit under a mask that role 2 knows; role 2 deals additive shares of that mask.
    """
    plane, _ = await _opened(s, bit, (plane_bytes(math.prod(shape)),))
    words = s.local(shape, ring.dtype, lambda: from_plane(plane, shape, ring.dtype))
    dealt = await _dealt_words(s, words if s.role == 2 else None, ring, shape)
    if s.role == 2:
        return await reshare(s, None, shape, ring, 0)
    # b = b' + (1 - 2b') m
    mine = s.local(shape, ring.dtype, lambda: (1 - 2 * words).mul_(dealt).add_(words if s.role == 0 else 0))
    return await reshare(s, mine, shape, ring, 0)


async def select_by_bit(s: Session, bit: Tensor | None, y: Shared, shape: tuple[int, ...]) -> Shared:
    """bit * y for xor shares of bits of ``shape`` and y of shape (..., *shape). Cost: 2 rounds; k bits, and
    3k for each y, and 2.
    """
    lead, count = _lead(y, shape), math.prod(shape)
    bits = None if bit is None else bit[None]
    return await _choose(s, bits, y, (math.prod(lead), 1, count), (*lead, *shape))


def _lead(y: Shared, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = len(y.shape) - len(shape)
    if y.shape[at:] != shape:
        raise TypeMismatch(f"values of {y.type} cannot be chosen by bits of {list(shape)}, their last axes")
    return y.shape[:at]


async def _choose(
    s: Session, bits: Tensor | None, y: Shared, sizes: tuple[int, int, int], shape: tuple[int, ...]
) -> Shared:
    """sum_c bits_c * y_c as ``shape``. ``sizes``: of y as (q, c, n); a plane of bits for each of the c.

    b y = b' y + (1 - 2b') m y for the opened b' = b ^ m. Role 2 deals m, which roles 0 and 1 multiply by the
    component of y that both know, and m times the rest of y, which it knows itself. Cost: 2 rounds; k + 2
    bits a bit, k a value and 2k a result.
    """
    ring, (q, c, n) = y.ring, sizes
    planes, _ = await _opened(s, bits, (c, plane_bytes(n)))
    dealt_shape = (q + 1, c, n)
    first, second = (part.reshape(sizes) for part in y.parts)

    def words(dtype: torch.dtype) -> Tensor:
        wide = plane_bytes(n) * 8
        return from_plane(planes.reshape(-1), (c, wide), dtype)[:, :n]

    if s.role == 2:

        def products() -> Tensor:
            mask = words(ring.dtype)
            out = mask.new_empty(dealt_shape)
            out[0] = mask
            torch.mul(first + second, mask, out=out[1:])
            return out

        await _dealt_words(s, s.local(dealt_shape, ring.dtype, products), ring, dealt_shape)
        return await reshare(s, None, shape, ring, y.frac)
    dealt = await _dealt_words(s, None, ring, dealt_shape)

    def chosen() -> Tensor:
        masked = dealt[0] * (second if s.role == 0 else first)
        masked += dealt[1:]
        own = first + second if s.role == 0 else second
        out = torch.where(words(torch.bool), own - masked, masked)
        return (out if c == 1 else out.sum(1, dtype=ring.dtype)).reshape(shape)

    return await reshare(s, s.local(shape, ring.dtype, chosen), shape, ring, y.frac)


#: Who meets whom among three and four candidates; the bits in the order of :func:`winners`.
_PAIRS = {3: ((0, 0, 1), (1, 2, 2)), 4: ((0, 2, 0, 0, 1, 1), (1, 3, 2, 3, 2, 3))}


async def select_largest(s: Session, x: Shared, window: Window, y: Shared) -> Shared:
    """y (..., r, *S) where x (r, *S) is largest, r = 3 or 4. Cost: 3 + levels rounds; all pairs' signs, 19
    (4) and 25 bits for r = 3 (4), and with q values to choose from k (r - 1)(q + 1) + 2kq + 2(r - 1).

    All pairs are compared at once; their bits make one bit for each candidate but the first.
    """
    r, shape = x.shape[0], x.shape[1:]
    n = math.prod(shape)
    left, right = (list(side) for side in _PAIRS[r])
    size = plane_bytes(n)

    def gaps(part: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(part.reshape(r, n), (0, size * 8 - n))
        return flat[left] - flat[right]

    apart = _mapped(s, x, (len(left), size * 8), gaps)
    sign = await sign_shares(s.fork("sign"), apart, window)
    bits = await _winners(s.fork("winner"), None if sign is None else sign.reshape(len(left), size), r, size)
    lead = _lead(y, x.shape)
    q, out = math.prod(lead), (*lead, *shape)
    first = _mapped(s, y, out, lambda part: part.reshape(q, r, n)[:, 0].reshape(out))
    steps = _mapped(s, y, (q, r - 1, n), lambda part: _steps(part.reshape(q, r, n)))
    gain = await _choose(s.fork("select"), bits, steps, (q, r - 1, n), out)
    if s.device == "meta":
        return gain
    return Shared(gain.type, tuple(a + b for a, b in zip(first.parts, gain.parts, strict=True)))


def _mapped(s: Session, x: Shared, shape: tuple[int, ...], f: Callable[[Tensor], Tensor]) -> Shared:
    def one(part: Tensor) -> Tensor:
        return s.local(shape, x.ring.dtype, lambda: f(part))

    return Shared(Secret(x.ring, x.frac, shape), tuple(one(part) for part in x.parts))


def _steps(rows: Tensor) -> Tensor:
    return rows[:, 1:] - rows[:, :1]


async def _winners(s: Session, bits: Tensor | None, r: int, size: int) -> Tensor | None:
    """Shares of r - 1 bits at roles 0 and 1. Cost: 1 round; 2 bits a bit, 2 (13) dealt for r = 3 (4)."""
    count, dealt = len(_PAIRS[r][0]), {3: 2, 4: 13}[r]
    shape = (dealt, size)
    if s.role == 1:
        opened, own = await _opened(s, bits, (count, size))
        (products,) = await s.exchange([], [Receive(s.at(2), "dealt", shape, torch.uint8, 8)])
    else:
        products = s.prg("dealt", (0, 2), B8, shape)
        opened, own = await _opened(s, bits, (count, size))
        if s.role == 2:
            work = s.local(shape, torch.uint8, lambda: winner_products(opened).bitwise_xor_(products))
            await s.exchange([Send(s.at(1), "dealt", work, 8)])
            return None
    assert bits is not None
    one = 255 * (s.role == 0)
    return s.local((r - 1, size), torch.uint8, lambda: winners(bits, opened, own, products, one))
