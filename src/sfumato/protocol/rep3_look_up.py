"""Rows of a secret table by the client's secret row numbers.

Component c of the table is held by exactly two parties. The client gives these two a pair of keys of the point function
that is 1 at the number and 0 elsewhere, an independent pair for each component; each of the two expands its key to
additive shares of the one-hot row and multiplies. Argument in docs/security/rep3.md, "look_up". Source: [BGI16] for the
functions; own: one pair for each component of a replicated table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfumato.protocol.rep3_close import replicate
from sfumato.ring import dpf, kernels
from sfumato.session.session import Session
from sfumato.types import Ring, Shared, SharedIndex

__all__ = ["WORDS_AT_ONCE", "look_up"]

#: Words of one-hot rows that are expanded at once: 64 MiB.
WORDS_AT_ONCE = 1 << 23


async def look_up(s: Session, x: Shared, at: SharedIndex) -> Shared:
    """x[number] for each number of ``at``. Cost: 1 round, 3k bits an element of the result. Exact. Leaks: nothing.

    ``at.parts``: party i's keys of the pairs of components i and i + 1, each (numbers, key bytes); it is the first
    holder of the former and the second of the latter. Work: that of a product with one-hot rows, and 3 AES blocks for
    each leaf of 128 bits.
    """
    shape = (*at.shape, *x.shape[1:])

    def summed() -> Tensor:
        width = math.prod(x.shape[1:])
        total = torch.zeros((at.type.numel, width), dtype=x.ring.dtype)
        for part, keys, first in zip(x.parts, at.parts, (True, False), strict=True):
            _add_rows(total, part.reshape(at.type.rows, width), keys, at.type.ring, first)
        return total.reshape(shape)

    return await replicate(s, s.local(shape, x.ring.dtype, summed), x.ring, x.frac)


def _add_rows(total: Tensor, table: Tensor, keys: Tensor, ring: Ring, first: bool) -> None:
    """Add this holder's summands of the rows that the keys stand for, some keys at a time."""
    rows = table.shape[0]
    step = max(1, WORDS_AT_ONCE // rows)
    for start in range(0, len(keys), step):
        some = slice(start, start + step)
        words = dpf.expand(keys[some], rows, ring, first=first)
        total[some] += kernels.matmul(words.to(table.dtype), table)  # the low bits of wider words will do
