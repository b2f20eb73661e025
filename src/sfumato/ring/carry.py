"""The carry of an opened word plus a hidden word, bit-sliced, from xor shares of monomials of hidden bits.

Hidden bits are those of t (blocks) and of the masks under which block carries are opened (levels). Every
function here is linear in the shares, so two parties run it on theirs alone. Layout and argument in
docs/security/rep3.md, "sign".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "CarryPlan",
    "Dealt",
    "block_carry",
    "carry_plan",
    "group_carry",
    "group_products",
    "monomials",
    "winner_products",
    "winners",
]

#: Bits per element that one round less is worth when a plan is chosen.
_ROUND_BITS = 64
_WIDEST_BLOCK = 6
_MOST_LEVELS = 3


@dataclass(frozen=True, slots=True)
class CarryPlan:
    """How a window's carry into its top bit is put together. Lowest bits first everywhere.

    ``blocks``: bits of each block, which get a carry and a propagate bit from dealt monomials of t.
    ``levels``: sizes of the groups that each opening merges; the last level is one group.
    """

    blocks: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]

    @property
    def dealt(self) -> int:
        """Planes that role 2 deals: monomials of t, of masks, and the top bit of t if no monomial carries
        it.
        """
        merged = sum(_dealt(n, low=i == 0) for level in self.levels for i, n in enumerate(level))
        return sum((1 << b) - 1 for b in self.blocks) + merged + (not self.levels)

    @property
    def opened(self) -> tuple[int, ...]:
        """Bits that each level opens."""
        return tuple(sum(_opened(n, low=i == 0) for i, n in enumerate(level)) for level in self.levels)

    @property
    def bits(self) -> int:
        """What dealing and opening cost; the window itself comes on top."""
        return self.dealt + 2 * sum(self.opened)


def _dealt(n: int, *, low: bool) -> int:
    """Monomials of two masks or more in the carry (and, above the lowest group, the propagate bit) of n
    blocks.
    """
    return 3 * (1 << n - 1) - 2 * n - 1 if low else 2 * ((1 << n) - 1 - n)


def _opened(n: int, *, low: bool) -> int:
    """All propagate bits but the lowest group's lowest, all carries but the highest."""
    return 0 if n == 1 else 2 * n - 1 - low


def _even(total: int, pieces: int) -> tuple[int, ...]:
    """Nearly equal parts, larger ones first."""
    return tuple(total // pieces + (i < total % pieces) for i in range(pieces))


@cache
def carry_plan(bits: int) -> CarryPlan:
    """The cheapest plan for a window of ``bits`` bits (2 to 64), a level counted as ``_ROUND_BITS`` bits."""
    low = bits - 1
    plans = (
        CarryPlan(_even(low, count), levels)
        for count in range(-(-low // _WIDEST_BLOCK), low + 1)
        for levels in _merges(count)
    )
    return min(plans, key=lambda plan: (plan.bits + _ROUND_BITS * len(plan.levels), plan.dealt))


@cache
def _merges(count: int, most: int = _MOST_LEVELS) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each number of levels up to ``most``, the cheapest way to merge ``count`` blocks into one."""
    if count == 1:
        return ((),)
    found: dict[int, tuple[tuple[int, ...], ...]] = {}
    for groups in range(1, count if most else 1):
        for rest in _merges(groups, most - 1):
            levels = (_even(count, groups), *rest)
            if len(levels) not in found or _price(levels) < _price(found[len(levels)]):
                found[len(levels)] = levels
    return tuple(found.values())


def _price(levels: tuple[tuple[int, ...], ...]) -> int:
    return CarryPlan((), levels).bits


def monomials(bits: Tensor) -> Tensor:
    """(n, size) -> (2^n, size): row T is the and of the rows in T, row 0 all ones."""
    n = bits.shape[0]
    out = bits.new_empty((1 << n, *bits.shape[1:]))
    out[0] = 255
    for j in range(n):
        torch.bitwise_and(out[: 1 << j], bits[j], out=out[1 << j : 2 << j])
    return out


def _fold(rows: Tensor, bit: Tensor) -> Tensor:
    """Put bit ^ mask for the lowest variable: rows over the other variables."""
    return (rows[0::2] & bit).bitwise_xor_(rows[1::2])


class Dealt:
    """Dealt planes in the order in which a plan uses them."""

    def __init__(self, planes: Tensor) -> None:
        self.planes = planes
        self._at = 0

    def take(self, rows: int) -> Tensor:
        self._at += rows
        return self.planes[self._at - rows : self._at]


def block_carry(delta: Tensor, products: Tensor, one: int, *, low: bool) -> tuple[Tensor, Tensor | None]:
    """Shares of carry and propagate of delta + t for one block. ``products``: shares of the 2^b - 1 monomials of t.

    With E = carry of the bits below j times a monomial U of the bits from j on,
    E' = d_j (t_j U ^ E) ^ t_j E; the lowest block's propagate bit is not asked for.
    """
    # rows over subsets of the bits from j on; the empty monomial is missing, and never asked for.
    known = torch.cat([products.new_full((1, products.shape[1]), one), products])
    carry = known[1::2] & delta[0]
    above = known
    for bit in delta[1:]:
        above = above[0::2]
        carry = ((above[1::2] ^ carry[0::2]) & bit).bitwise_xor_(carry[1::2])
    if low:
        return carry[0], None
    for bit in delta:
        known = _fold(known, bit)
    return carry[0], known[0]


def _ranks(n: int) -> list[int]:
    """Rows of the monomials of at least two of n variables."""
    return [t for t in range(1 << n) if t.bit_count() > 1]


def group_products(masks: Tensor, n: int, *, low: bool) -> Tensor:
    """What is dealt for a group of n > 1 blocks: monomials of its masks (propagates first, then carries)."""
    first = int(low)
    every = monomials(masks[: n - first])
    rows = [every[_ranks(n - first)]]
    for j in range(n - 1):
        rows.append(every[0 :: 1 << j + 1 - first][1:] & masks[n - first + j])
    return torch.cat(rows)


def group_carry(
    top: Tensor, opened: Tensor, masks: Tensor, dealt: Dealt, n: int, one: int, *, low: bool
) -> tuple[Tensor, Tensor | None]:
    """Shares of carry and propagate of n > 1 blocks: g_(n-1) ^ p_(n-1) (g_(n-2) ^ p_(n-2) (...)).

    ``top``: share of g_(n-1). ``opened``: the other bits under masks, propagates first. ``masks``: shares of
    the masks.
    """
    first = int(low)
    count = n - first
    p, g = opened[:count], opened[count:]
    every = masks.new_empty((1 << count, masks.shape[1]))
    every[0] = one
    for i in range(count):
        every[1 << i] = masks[i]
    ranks = _ranks(count)
    if ranks:
        every[ranks] = dealt.take(len(ranks))
    total: Tensor | None = None
    for j in range(n - 1):
        upper = every[0 :: 1 << j + 1 - first]
        own = torch.cat([masks[count + j : count + j + 1], dealt.take(upper.shape[0] - 1)])
        own.bitwise_xor_(upper & g[j])
        total = own if total is None else total.bitwise_xor_(own)
        total = _fold(total, p[j + 1 - first])
    assert total is not None
    if low:
        return total[0] ^ top, None
    for bit in p:
        every = _fold(every, bit)
    return total[0] ^ top, every[0]


def winner_products(masks: Tensor) -> Tensor:
    """What is dealt for the bits of a small tournament, by their masks: a, of three candidates c02, c12, or a, b,
    c02, c03, c12, c13 of four; products with every monomial of a (and b).
    """
    heads = 1 if masks.shape[0] == 3 else 2
    every = monomials(masks[:heads])
    return torch.cat([every[_ranks(heads)], *(every[1:] & mask for mask in masks[heads:])])


def winners(bits: Tensor, opened: Tensor, masks: Tensor, dealt: Tensor, one: int) -> Tensor:
    """Shares of [candidate j is the largest], j = 1, 2 (, 3), from shares of the bits and the opened bits.

    a = [x0 < x1] and b = [x2 < x3] (0 with three candidates) say who meets, c_ij = [xi < xj] who wins: exactly one
    candidate, whatever the bits are.
    """
    heads = 1 if opened.shape[0] == 3 else 2
    every = masks.new_empty((1 << heads, masks.shape[1]))
    every[0] = one
    for i in range(heads):
        every[1 << i] = masks[i]
    rows = Dealt(dealt)
    if heads == 2:
        every[3] = rows.take(1)[0]

    def met(c: int, *sides: int) -> Tensor:
        """c and, for each head, the head (1) or its complement (0)."""
        held = torch.cat([masks[c : c + 1], products[c - heads]]).bitwise_xor_(every & opened[c])
        for i, side in enumerate(sides):
            held = _fold(held, opened[i] if side else ~opened[i])
        return held[0]

    products = [rows.take((1 << heads) - 1) for _ in range(opened.shape[0] - heads)]
    if heads == 1:
        return torch.stack([bits[0] ^ met(2, 1), met(1, 0) ^ met(2, 1)])
    second = bits[0] ^ met(4, 1, 0) ^ met(5, 1, 1)
    third = met(2, 0, 0) ^ met(4, 1, 0)
    return torch.stack([second, third, met(3, 0, 1) ^ met(5, 1, 1)])
