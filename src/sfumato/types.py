"""Rings, the public type of a secret value, and shares: frozen, and without imports of ours except errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["B8", "B64", "Z32", "Z64", "Index", "Ring", "Secret", "Shared", "SharedIndex", "TruncationError"]


@dataclass(frozen=True, slots=True)
class Ring:
    """Integers mod 2^bits (``Z``) or words under xor (``B``), kept in two's complement torch words.

    ``B8`` holds bit planes: one bit each of eight elements in a byte, so that boolean circuits run bit-sliced.
    """

    kind: Literal["Z", "B"]
    bits: int

    def __post_init__(self) -> None:
        if f"{self.kind}{self.bits}" not in ("Z64", "Z32", "B64", "B8"):
            raise ValueError(f"no ring {self.kind}{self.bits}; use Z32, Z64, B64 or B8")

    @property
    def dtype(self) -> torch.dtype:
        return {64: torch.int64, 32: torch.int32, 8: torch.uint8}[self.bits]

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}"

    @staticmethod
    def named(name: str) -> Ring:
        """The ring called ``Z64``, ``Z32``, ``B64`` or ``B8``."""
        for ring in (Z64, Z32, B64, B8):
            if str(ring) == name:
                return ring
        raise ValueError(f"no ring {name!r}; use Z32, Z64, B64 or B8")


Z64 = Ring("Z", 64)
Z32 = Ring("Z", 32)
B64 = Ring("B", 64)
B8 = Ring("B", 8)


@dataclass(frozen=True, slots=True)
class Secret:
    """What everybody may know of a secret value: ring, fraction bits, shape."""

    ring: Ring
    frac: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.ring}f{self.frac}{list(self.shape)}"


@dataclass(frozen=True, slots=True, repr=False)
class Shared:
    """One party's holding of a secret. ``parts`` are for the protocol alone; the repr never shows them."""

    type: Secret
    parts: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return f"Shared({self.type})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def frac(self) -> int:
        return self.type.frac

    @property
    def ring(self) -> Ring:
        return self.type.ring

    def viewed(self, frac: int) -> Shared:
        """The same words read with other fraction bits: an exact, free multiplication by 2^(old - new)."""
        return Shared(replace(self.type, frac=frac), self.parts)


@dataclass(frozen=True, slots=True)
class Index:
    """What everybody may know of secret row numbers: how many rows their table has, the ring of the words that pick
    one, and the shape of the numbers."""

    ring: Ring
    rows: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"row numbers {list(self.shape)} of {self.rows} in {self.ring}"


@dataclass(frozen=True, slots=True, repr=False)
class SharedIndex:
    """One party's holding of secret row numbers: no words to compute with, but what a look-up needs. ``parts`` are for
    the protocol alone."""

    type: Index
    parts: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return f"SharedIndex({self.type})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape


@dataclass(frozen=True, slots=True)
class TruncationError:
    """Error model of a protocol's truncation: result = exact quotient + e, |e| < ``max_ulp``, mean ``bias_ulp``.

    It cannot fail while the word before truncation lies strictly between -2^(k - ``headroom_bits``) and
    2^(k - ``headroom_bits``). A quotient without remainder is exact.
    """

    max_ulp: float
    bias_ulp: float
    headroom_bits: int
