"""Carries from dealt monomials, against the adder they stand for: all small operands, every shape of plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.protocol import rep3_sign
from sfumato.ring.carry import (
    CarryPlan,
    Dealt,
    block_carry,
    carry_plan,
    group_carry,
    group_products,
    monomials,
)
from sfumato.ring.planes import from_plane, to_planes


def split(planes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    raw = np.random.default_rng(seed).integers(0, 256, tuple(planes.shape), dtype=np.uint8)
    mask = torch.from_numpy(raw)
    return mask, planes ^ mask


def operands(bits: int) -> tuple[Tensor, Tensor]:
    """All pairs of words of so many bits, or a sample with the edges."""
    if bits <= 6:
        a, b = torch.meshgrid(torch.arange(1 << bits), torch.arange(1 << bits), indexing="ij")
        return a.reshape(-1), b.reshape(-1)
    g = np.random.default_rng(bits)
    edges = np.array([0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1], dtype=np.int64)
    a = np.concatenate([np.repeat(edges, 5), g.integers(0, 1 << bits, 500)])
    b = np.concatenate([np.tile(edges, 5), g.integers(0, 1 << bits, 500)])
    # chains of propagates, as long as they come
    a, b = np.concatenate([a, a]), np.concatenate([b, ((1 << bits) - a) & ((1 << bits) - 1)])
    return torch.from_numpy(a), torch.from_numpy(b)


@pytest.mark.parametrize("bits", range(1, 7))
def test_a_block_carries_and_propagates(bits: int) -> None:
    d, t = operands(bits)
    delta, shares = to_planes(d, bits), split(monomials(to_planes(t, bits))[1:], bits)
    for low in (True, False):
        found = [block_carry(delta, part, one, low=low) for part, one in zip(shares, (255, 0), strict=True)]
        carry = from_plane(found[0][0] ^ found[1][0], tuple(d.shape), torch.int64)
        assert torch.equal(carry, (d + t) >> bits)
        if low:
            assert found[0][1] is None
            continue
        assert found[0][1] is not None
        assert found[1][1] is not None
        propagate = from_plane(found[0][1] ^ found[1][1], tuple(d.shape), torch.int64)
        assert torch.equal(propagate, (d + t == (1 << bits) - 1).long())


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_group_merges_its_blocks(n: int, low: bool) -> None:
    """For all bits and all masks' parity: the chain of carries, opened under masks."""
    count = 2 * n - low
    every = torch.arange(1 << count)
    bits = to_planes(every, count)
    p, g = bits[: n - low], bits[n - low :]
    size = bits.shape[1]
    masks = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (count - 1, size), dtype=np.uint8))
    opened = torch.cat([p, g[:-1]]) ^ masks
    tops, mask_shares = split(g[-1], 1), split(masks, 2)
    dealt = split(group_products(masks, n, low=low), 3)
    found = [
        group_carry(tops[i], opened, mask_shares[i], Dealt(dealt[i]), n, (255, 0)[i], low=low)
        for i in range(2)
    ]
    carry, propagate = g[0], p[0]
    for j in range(1, n):
        carry = g[j] ^ (p[j - low] & carry)
        propagate = propagate & p[j - low]
    assert torch.equal(found[0][0] ^ found[1][0], carry)
    if low:
        assert found[0][1] is None
    else:
        assert found[0][1] is not None
        assert found[1][1] is not None
        assert torch.equal(found[0][1] ^ found[1][1], propagate)


def adder(plan: CarryPlan, bits: int, d: Tensor, t: Tensor) -> Tensor:
    """The top bit of d + t by the protocol's own local steps, without a session."""
    delta, hidden = to_planes(d, bits), to_planes(t, bits)
    size = delta.shape[1]
    raw = np.random.default_rng(bits).integers(0, 256, (sum(plan.opened), size), dtype=np.uint8)
    masks = torch.from_numpy(raw)
    planes = rep3_sign._deal(plan, hidden, masks)
    assert planes.shape[0] == plan.dealt
    dealt = [Dealt(part) for part in split(planes, 4)]
    mask_shares = split(masks, 5)
    states: list[list[rep3_sign.State]] = [[], []]
    for i, one in enumerate((255, 0)):
        at = 0
        for width in plan.blocks:
            rows = dealt[i].take((1 << width) - 1)
            states[i].append(block_carry(delta[at : at + width], rows, one, low=at == 0))
            at += width
    at = 0
    for groups, count in zip(plan.levels, plan.opened, strict=True):
        parts = [rep3_sign._openings(states[i], groups) for i in range(2)]
        assert parts[0].shape[0] == count
        opened = parts[0] ^ parts[1] ^ masks[at : at + count]
        states = [
            rep3_sign._regrouped(
                states[i], groups, opened, mask_shares[i][at : at + count], dealt[i], (255, 0)[i]
            )
            for i in range(2)
        ]
        at += count
    signs = [states[i][0][0] if plan.levels else states[i][0][0] ^ dealt[i].take(1)[0] for i in range(2)]
    return from_plane(signs[0] ^ signs[1] ^ delta[-1], tuple(d.shape), torch.int64)


@pytest.mark.parametrize("bits", [*range(2, 42), 62])
def test_the_top_bit_of_a_sum(bits: int) -> None:
    d, t = operands(bits)
    plan = carry_plan(bits)
    assert sum(plan.blocks) == bits - 1
    assert not plan.levels or len(plan.levels[-1]) == 1
    assert torch.equal(adder(plan, bits, d, t), ((d + t) >> (bits - 1)) & 1)


@pytest.mark.parametrize(
    "plan",
    [
        CarryPlan((1, 1), ((2,),)),
        CarryPlan((1, 2, 1), ((1, 2), (2,))),
        CarryPlan((2, 1, 1, 1), ((2, 1, 1), (1, 2), (2,))),
        CarryPlan((1, 1, 1, 1, 1), ((5,),)),
        CarryPlan((1, 1, 1, 1, 1), ((3, 2), (2,))),
    ],
    ids=str,
)
def test_any_plan_adds(plan: CarryPlan) -> None:
    bits = sum(plan.blocks) + 1
    d, t = operands(bits)
    assert torch.equal(adder(plan, bits, d, t), ((d + t) >> (bits - 1)) & 1)


def test_plans_are_cheap_and_shallow() -> None:
    costs = {m: (m + carry_plan(m).bits, len(carry_plan(m).levels)) for m in (4, 8, 12, 16, 40, 64)}
    assert costs == {4: (12, 0), 8: (34, 1), 12: (62, 1), 16: (95, 1), 40: (239, 2), 64: (370, 3)}
