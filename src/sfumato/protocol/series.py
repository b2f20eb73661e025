"""What one opening can evaluate: a sine series of any calibrated function, and an exponential of wide dynamic range.

Plain numbers, fitted at plan time (:mod:`sfumato.ops.fit`), the same at all parties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Exponential", "Series", "linear_word"]

#: Longest words in which a series or an exponential is summed up; values stay two bits below.
_LONGEST = 64


def linear_word(known: int, frac: int, scale: int, linear_frac: int) -> int:
    """Bits of the longest word in which a linear part of ``scale`` fraction bits is right, of which a multiple of the
    argument's unit is all that is known mod 2^known."""
    return known + scale - frac - linear_frac


@dataclass(frozen=True, slots=True)
class Series:
    """f(x) ~ constant + linear d + sum_k cos[k] cos(k w d) + sin[k] sin(k w d), d = x - centre, on [lo, hi] alone.

    w = 2 pi multiplier / 2^period_log2, so that periods are dense although masks wrap at a power of two. The sum is
    made in words of ``word`` bits at ``scale = dealt + public`` fraction bits: sines are dealt with ``dealt`` of them,
    the public factors have ``public``. ``linear`` is an exact multiple of 2^-linear_frac, so it costs no precision.
    ``error`` bounds the fit's error on the interval; :attr:`noise` is what rounding adds.
    """

    lo: float
    hi: float
    centre: float
    period_log2: int
    multiplier: int
    constant: float
    linear: float
    linear_frac: int
    cos: tuple[float, ...]
    sin: tuple[float, ...]
    dealt: int
    public: int
    word: int
    error: float

    def __post_init__(self) -> None:
        if not 1 <= len(self.cos) == len(self.sin) or any(abs(c) >= 8.0 for c in (*self.cos, *self.sin)):
            raise ValueError(
                "a series needs as many sines as cosines, one at least, each coefficient below 8"
            )
        if not (1 <= self.multiplier < 256 and 4 <= self.dealt <= 30 and 4 <= self.public <= 30):
            raise ValueError("a series takes multipliers below 256 and scales of 4 to 30 bits")
        if not self.scale + 2 <= self.word <= _LONGEST:
            raise ValueError(f"a series at {self.scale} bits does not fit words of {self.word} bits")
        if self.linear and (self.linear * 2.0**self.linear_frac) % 1:
            raise ValueError("a series' linear coefficient must be a multiple of 2^-linear_frac")

    @property
    def scale(self) -> int:
        """Fraction bits before the closing truncation."""
        return self.dealt + self.public

    @property
    def period(self) -> float:
        """The longest wave's period in x."""
        return 2.0**self.period_log2 / self.multiplier

    @property
    def noise(self) -> float:
        """Standard deviation that rounded sines and rounded public factors give the result (mean 0). Above 26 dealt
        bits the sines' own error, 2^-31 a harmonic, comes on top.
        """
        size = math.fsum(c * c for c in (*self.cos, *self.sin))
        dealt, public = 2.0**-self.dealt * math.sqrt(size), 2.0**-self.public * math.sqrt(len(self.cos))
        return math.hypot(dealt, public) / math.sqrt(12.0)

    def __call__(self, x: Tensor) -> Tensor:
        """The series in float64, any shape; what ``Protocol.evaluate`` computes up to rounding."""
        d = x.to(torch.float64) - self.centre
        w = 2.0 * math.pi / self.period
        y = self.constant + self.linear * d
        for k, (c, s) in enumerate(zip(self.cos, self.sin, strict=True), 1):
            y = y + c * torch.cos(k * w * d) + s * torch.sin(k * w * d)
        return y


@dataclass(frozen=True, slots=True)
class Exponential:
    """exp(x) on [lo, hi] with relative accuracy, for ``frac`` fraction bits of x.

    ``multiplier * (x - lo)`` in words lies in [0, 2^opened (1 - 2^-blocks)), so that a masked value's top ``blocks``
    bits say when it wrapped; ``frac_out`` = fraction bits of the product before truncation, of which the public factor
    has ``public``; ``word`` bits hold it. ``error`` bounds the relative error.
    """

    lo: float
    hi: float
    frac: int
    multiplier: int
    opened: int
    blocks: int
    public: int
    frac_out: int
    word: int
    error: float

    def __post_init__(self) -> None:
        if not (1 <= self.multiplier < 256 and 1 <= self.blocks <= 4 and 8 <= self.opened <= 48):
            raise ValueError(
                "an exponential takes multipliers below 256, 1 to 4 block bits, 8 to 48 opened bits"
            )
        if not (0 <= self.frac <= 40 and 4 <= self.public <= 28 and 8 <= self.word <= _LONGEST):
            raise ValueError("an exponential's scales do not fit a word")
        if self.lo * 2.0**self.frac % 1:
            raise ValueError("an exponential's range begins at a multiple of its argument's unit")
        if not 0 < self.multiplier * (self.hi - self.lo) * 2.0**self.frac < self.reach:
            raise ValueError("an exponential's range does not leave the block in which wraps are seen")

    @property
    def entries(self) -> int:
        """Words dealt per element."""
        return 1 << self.blocks

    @property
    def reach(self) -> int:
        """What ``multiplier * (x - lo)`` in words stays below: 2^opened less one block."""
        return (1 << self.opened) - (1 << (self.opened - self.blocks))

    def __call__(self, x: Tensor) -> Tensor:
        """exp in float64."""
        return torch.exp(x.to(torch.float64))
