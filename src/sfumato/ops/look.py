"""Who may look at values inside an operation: the range certificate, which samples them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from sfumato.types import Shared

__all__ = ["Look", "Sampler"]

#: (pick, seen): which elements of a value are wanted, and what gets them as shares.
Sampler = tuple[Callable[[Tensor], Tensor], Callable[[Shared], None]]


class Look(Protocol):
    """Gets values inside an operation by name."""

    def __call__(self, part: str, value: Shared) -> None:
        """Look at a value that is at hand. Local; calls come in the same order at all parties."""

    def sampler(self, part: str, path: str, count: int) -> Sampler | None:
        """How to look at a value of ``count`` elements that will never be at hand: None if nobody wants to. ``path``
        tells pieces of one value apart; samples of pieces may come in any order.
        """
