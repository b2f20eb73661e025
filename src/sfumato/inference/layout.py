"""Where tokens lie while a text is written on: the prompt at the end of its length, then one place a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """``count`` tokens of a prompt, at the end of ``prompt`` places; ``length`` places in all. How many of the first
    places are padding is the client's secret. ``learnt``: the model looks positions up, so that it is told them."""

    count: int
    prompt: int
    length: int
    pad: int
    learnt: bool

    def first(self, ids: Sequence[int]) -> dict[str, Tensor]:
        """Arguments of `Prefill`. Padding looks at itself alone, so that no row of scores is empty."""
        before = self.prompt - self.count
        real = torch.arange(self.prompt) >= before
        allowed = torch.ones(self.prompt, self.prompt, dtype=torch.bool).tril()
        allowed &= real[None] | torch.eye(self.prompt, dtype=torch.bool)
        found = {"ids": torch.tensor([[self.pad] * before + list(ids)]), "mask": allowed[None, None]}
        if self.learnt:
            found["places"] = (torch.arange(self.prompt) - before).clamp_min(0)[None]
        return found

    def next(self, k: int) -> dict[str, Tensor]:
        """Arguments of `Decode` for the token ``k`` after the prompt, but for the token and what is kept."""
        slot, places = self.prompt + k, torch.arange(self.length)
        allowed = (places >= self.prompt - self.count) & (places <= slot)
        found = {"mask": allowed[None, None, None], "slot": torch.tensor(slot)}
        if self.learnt:
            found["places"] = torch.tensor([[self.count + k]])
        return found
