"""What a published approximation needs of fixed point, so that each method is written once.

A method is a coroutine over a :class:`Machine`. On :class:`~sfumato.catalogue.words.Words` it is the model in
numpy, which rounds at every product, wraps in its ring and counts what it did; on
:class:`~sfumato.catalogue.shares.Shares` the same lines run on secrets, over the moves of a protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Machine", "Wave"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Wave:
    """constant + linear x + quadratic x^2 + sum_k cos[k] cos(k w x) + sin[k] sin(k w x), w = 2 pi / period."""

    period: float
    sin: tuple[float, ...] = ()
    cos: tuple[float, ...] = ()
    constant: float = 0.0
    linear: float = 0.0
    quadratic: float = 0.0


class Machine(ABC, Generic[V]):
    """Fixed-point arithmetic on values of one scale ``frac``; bits are values 0 and 1 without fraction bits.

    Shapes broadcast: a row value has a last axis of length 1.
    """

    frac: int

    # ---- local ---------------------------------------------------------------------------------------------

    @abstractmethod
    def add(self, x: V, y: V) -> V:
        """x + y."""

    @abstractmethod
    def times(self, x: V, n: int) -> V:
        """x n for a whole number n; of bits, too."""

    @abstractmethod
    def plus(self, x: V, c: float) -> V:
        """x + c for a public real c."""

    @abstractmethod
    def inverted(self, bit: V) -> V:
        """1 - bit."""

    @abstractmethod
    def row_sum(self, x: V) -> V:
        """The sum over the last axis, which is kept with length 1."""

    @abstractmethod
    def width(self, x: V) -> int:
        """The length of the last axis."""

    @abstractmethod
    def spread(self, row: V, like: V) -> V:
        """A row value at the shape of ``like``."""

    def sub(self, x: V, y: V) -> V:
        """x - y."""
        return self.add(x, self.times(y, -1))

    def minus_from(self, c: float, x: V) -> V:
        """c - x."""
        return self.plus(self.times(x, -1), c)

    def constant(self, like: V, c: float) -> V:
        """A public constant at the shape of ``like``."""
        return self.plus(self.times(like, 0), c)

    # ---- interactive ---------------------------------------------------------------------------------------

    @abstractmethod
    async def mul(self, x: V, y: V) -> V:
        """x y, truncated."""

    @abstractmethod
    async def square(self, x: V) -> V:
        """x^2, truncated."""

    @abstractmethod
    async def combine(self, terms: Sequence[tuple[V, float]], constant: float = 0.0, *, extra: int = 0) -> V:
        """sum of x c over the terms, plus a constant, for public reals c of ``frac + extra`` fraction bits."""

    @abstractmethod
    async def halve(self, x: V, times: int) -> V:
        """x / 2^times, truncated."""

    @abstractmethod
    async def divide(self, x: V, n: int) -> V:
        """x / n for a public whole number n."""

    @abstractmethod
    async def below(self, x: V, thresholds: Sequence[float]) -> list[V]:
        """[x < t] for every threshold, as bits: one batch of comparisons."""

    @abstractmethod
    async def pick(self, bit: V, x: V) -> V:
        """bit x, exact."""

    @abstractmethod
    async def magnitude(self, x: V, gains: Sequence[Callable[[int], float]]) -> list[V]:
        """g(e) for every gain g, where 2^(e-1) <= x < 2^e: a look at the highest one bit of a positive x."""

    @abstractmethod
    async def whole(self, x: V, count: int) -> tuple[list[V], V]:
        """The bits of the whole part of x in [0, 2^count), low first, and the fraction."""

    @abstractmethod
    async def wave(self, x: V, wave: Wave) -> V:
        """A sine series by one opening."""

    @abstractmethod
    async def table(self, x: V, f: Callable[[Any], Any], *, low: float, high: float, frac: int) -> V:
        """f of x clipped to [low, high] and cut to ``frac`` fraction bits: one table look-up."""

    @abstractmethod
    async def row_max(self, x: V) -> V:
        """The maximum over the last axis, which is kept with length 1: a tournament."""

    # ---- written on top ------------------------------------------------------------------------------------

    async def choose(self, bit: V, x: V, y: V) -> V:
        """bit ? x : y, exact."""
        return self.add(y, await self.pick(bit, self.sub(x, y)))

    async def magnitude_of(self, x: V, gain: Callable[[int], float]) -> V:
        """One gain of :meth:`magnitude`."""
        return (await self.magnitude(x, [gain]))[0]
