"""Masks of attention scores: public ones taken apart, secret ones as 0/1 words."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["FORBIDDEN", "MASKED_BELOW", "lowered", "raised", "score_masks", "split_mask"]

#: Additive masks at or below this value mean "not at all"; they never reach the ring.
MASKED_BELOW = -1e3
#: What published methods add to a score that is masked: more would leave the range of the limit exponentials.
FORBIDDEN = -50.0


def split_mask(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(allowed 0/1 or None, finite additive part or None) of a bool or additive mask, broadcastable to the
    scores."""
    if mask.dtype == torch.bool:
        return (None if bool(mask.all()) else mask), None
    allowed = mask > MASKED_BELOW
    bias = torch.where(allowed, mask.to(torch.float64), 0.0)
    return (None if bool(allowed.all()) else allowed), (bias if bool((bias != 0).any()) else None)


def score_masks(
    shape: tuple[int, int], mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(allowed or None, finite additive part or None) for scores of ``shape`` (..., L, S), by mask and causality."""
    allowed, bias = (None, None) if mask is None else split_mask(mask)
    if causal:
        allowed = torch.ones(shape, dtype=torch.bool).tril()
    return allowed, bias


def lowered(p: Protocol, s: Session, scores: Shared, mask: Shared, by: float) -> Shared:
    """Scores plus (mask - 1) * by, for a mask of 0/1 words. Local."""
    step = round(by * 2.0**scores.frac)
    added = p.linear(lambda u, m: u + m.broadcast_to(u.shape) * step, scores, mask, frac=scores.frac)
    return p.add_public(s, added, p.encode(added, -by))


def raised(p: Protocol, mask: Shared, by: float, frac: int, keep: Tensor | None) -> Shared:
    """What a mask of 0/1 words adds to scores of ``frac`` fraction bits that are lowered by as much: words of the ring,
    wrapped where they do not fit. ``keep``: a public 0/1 mask over the scores. Local."""
    bits = mask.ring.bits
    step = (round(by * 2.0**frac) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))

    def scaled(part: Tensor) -> Tensor:
        words = part * step
        return words if keep is None or words.device.type == "meta" else words * keep.to(words.device)

    return p.linear(scaled, mask, frac=frac)
