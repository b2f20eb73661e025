"""The place of a maximum as a row of 0/1 words."""

from __future__ import annotations

import pytest
import torch

from sfumato.ops import compare
from sfumato.ops.winner import argmax_one_hot
from sfumato.protocol.rep3 import Rep3
from sfumato.types import Z32


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 9, 11, 16, 33, 70])
@pytest.mark.parametrize("dim", [0, -1])
def test_one_hot_of_the_maximum(protocol, run, normal, n: int, dim: int) -> None:
    x = normal(*((n, 5) if dim == 0 else (3, n))) * 2
    hot = run(protocol, lambda p, s, v: argmax_one_hot(p, s, v, dim, 16.0), x).value
    assert hot.shape == x.shape
    assert torch.equal(hot.sum(dim), torch.ones_like(hot.sum(dim)))
    assert set(hot.unique().tolist()) <= {0.0, 1.0}
    top = (hot * x).sum(dim)
    assert float((x.amax(dim) - top).abs().max()) <= 7 * compare.band(32.0, 18)


def test_equal_candidates_get_one_place_between_them(run) -> None:
    hot = run(Rep3(), lambda p, s, v: argmax_one_hot(p, s, v, -1, 4.0), torch.ones(4, 21).double()).value
    assert torch.equal(hot.sum(-1), torch.ones(4).double())
    assert set(hot.unique().tolist()) == {0.0, 1.0}


def test_in_the_small_ring(run, normal) -> None:
    x = normal(2, 13)

    async def op(p, s, v):
        return await argmax_one_hot(p, s.fork("find"), await p.cast(s.fork("cast"), v, Z32), -1, 8.0)

    hot = run(Rep3(), op, x).value
    assert torch.equal(hot.argmax(-1), x.argmax(-1))


def test_cost_is_what_the_docstring_says(run, normal) -> None:
    """Tournament, five of whose values are what won a group of four, then the products on the way down."""
    found = run(Rep3(), lambda p, s, v: argmax_one_hot(p, s, v, 0, 16.0), normal(64, 8))
    groups = 16 + 4 + 1
    tournament = groups * (1113 + 3 * 5 * 64)
    products = 3 * 64 * (3 * 16 + 3 * 4)  # none at the top, where the last winner's bits are the answer
    assert found.bits == 8 * (tournament + products)
    assert 14 <= found.rounds <= 17
