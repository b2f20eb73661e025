"""The model: fixed-point words in numpy, rounded at every product, wrapped in their ring, and counted.

Rounding is that of probabilistic truncation: down, or up with probability equal to the fraction, from a hash
of the position, so runs repeat. What is not modelled: the rare failure of a local truncation of two shares
(probability about |word| / 2^(k-1) for each).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sfumato.catalogue.machine import Machine, Wave

__all__ = ["Arithmetic", "Exact", "Reals", "Step", "Words", "run"]

Ints = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """A library's fixed point: ring bits, fraction bits, and whether public constants are cut or rounded."""

    frac: int
    bits: int = 64
    cut_constants: bool = False
    salt: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One interactive operation: its kind and element counts. ``terms``: thresholds, constants or row length."""

    kind: str
    left: int
    right: int
    out: int
    terms: int = 1


@dataclass(eq=False)
class Words(Machine[Ints]):
    """Signed words below 2^(bits-1) in int64. ``steps`` is what was done, in order."""

    arithmetic: Arithmetic
    steps: list[Step] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        self.frac = self.arithmetic.frac

    # ---- in and out ----------------------------------------------------------------------------------------

    def encode(self, x: Reals) -> Ints:
        """Reals to words, rounded to nearest, then reduced."""
        scaled = np.rint(np.asarray(x, dtype=np.float64) * 2.0**self.frac)
        return self._wrapped(_as_words(scaled))

    def decode(self, x: Ints) -> Reals:
        """Words to reals."""
        return np.asarray(x, dtype=np.float64) / 2.0**self.frac

    def _constant(self, c: float, extra: int = 0) -> int:
        scaled = c * 2.0 ** (self.frac + extra)
        return math.trunc(scaled) if self.arithmetic.cut_constants else round(scaled)

    def _wrapped(self, words: Ints) -> Ints:
        if self.arithmetic.bits == 64:
            return words
        shift = np.int64(64 - self.arithmetic.bits)
        return (words << shift) >> shift

    def _truncated(self, words: Ints, bits: int) -> Ints:
        words = self._wrapped(words)
        if bits == 0:
            return words
        return (words + self._noise(words.shape, bits)) >> np.int64(bits)

    def _noise(self, shape: tuple[int, ...], bits: int) -> Ints:
        """Hashed words in [0, 2^bits)."""
        self._turn += 1
        start = np.uint64(((self._turn + 1000 * self.arithmetic.salt) * _GOLDEN) & _MASK)
        z = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(_GOLDEN) + start
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        return (z >> np.uint64(64 - bits)).astype(np.int64).reshape(shape)

    def _did(self, kind: str, left: Ints, right: Ints | None, out: Ints, terms: int = 1) -> None:
        self.steps.append(Step(kind, left.size, 0 if right is None else right.size, out.size, terms))

    # ---- local ---------------------------------------------------------------------------------------------

    def add(self, x: Ints, y: Ints) -> Ints:
        return self._wrapped(x + y)

    def times(self, x: Ints, n: int) -> Ints:
        return self._wrapped(x * np.int64(n))

    def plus(self, x: Ints, c: float) -> Ints:
        return self._wrapped(x + np.int64(self._constant(c)))

    def inverted(self, bit: Ints) -> Ints:
        return 1 - bit

    def row_sum(self, x: Ints) -> Ints:
        return self._wrapped(x.sum(-1, keepdims=True))

    def width(self, x: Ints) -> int:
        return int(x.shape[-1])

    def spread(self, row: Ints, like: Ints) -> Ints:
        return np.broadcast_to(row, like.shape)

    # ---- interactive ---------------------------------------------------------------------------------------

    async def mul(self, x: Ints, y: Ints) -> Ints:
        z = self._truncated(x * y, self.frac)
        self._did("mul", x, y, z)
        return z

    async def square(self, x: Ints) -> Ints:
        z = self._truncated(x * x, self.frac)
        self._did("square", x, None, z)
        return z

    async def combine(
        self, terms: Sequence[tuple[Ints, float]], constant: float = 0.0, *, extra: int = 0
    ) -> Ints:
        total = sum((x * np.int64(self._constant(c, extra)) for x, c in terms), np.zeros((), np.int64))
        z = self._truncated(np.asarray(total), self.frac + extra)
        self._did("scale", terms[0][0], None, z, len(terms))
        return self.plus(z, constant)

    async def halve(self, x: Ints, times: int) -> Ints:
        z = self._truncated(x, times)
        self._did("halve", x, None, z)
        return z

    async def divide(self, x: Ints, n: int) -> Ints:
        quotient, rest = x // np.int64(n), x % np.int64(n)
        z = quotient + (rest > (self._noise(x.shape, 30) * n >> np.int64(30)))
        self._did("divide", x, None, z)
        return z

    async def below(self, x: Ints, thresholds: Sequence[float]) -> list[Ints]:
        found = [(self.plus(x, -t) < 0).astype(np.int64) for t in thresholds]
        self._did("compare", x, None, x, len(thresholds))
        return found

    async def pick(self, bit: Ints, x: Ints) -> Ints:
        z = bit * x
        self._did("pick", bit, x, z)
        return z

    async def magnitude(self, x: Ints, gains: Sequence[Callable[[int], float]]) -> list[Ints]:
        _, length = np.frexp(np.maximum(x, 1).astype(np.float64))
        found = []
        for gain in gains:
            # Only exponents that the words can have: index by bit length.
            known = [round(gain(e - self.frac) * 2.0**self.frac) for e in range(self.arithmetic.bits + 1)]
            found.append(np.array([_reduced(word) for word in known], dtype=np.int64)[length])
        self._did("magnitude", x, None, x, len(gains))
        return [self._wrapped(words) for words in found]

    async def whole(self, x: Ints, count: int) -> tuple[list[Ints], Ints]:
        whole = x >> np.int64(self.frac)
        self._did("whole", x, None, x, count)
        return [(whole >> np.int64(i)) & np.int64(1) for i in range(count)], x - (
            whole << np.int64(self.frac)
        )

    async def wave(self, x: Ints, wave: Wave) -> Ints:
        d, grain = self.decode(x), 2.0**-self.frac
        y = wave.constant + wave.linear * d + wave.quadratic * d * d
        for coefficients, f in ((wave.cos, np.cos), (wave.sin, np.sin)):
            for k, c in enumerate(coefficients, 1):
                y = y + c * np.rint(f(2 * np.pi * k / wave.period * d) / grain) * grain
        z = self._truncated(_as_words(y * 2.0 ** (self.frac + 8)), 8)
        self._did("wave", x, None, z, len(wave.sin) + len(wave.cos))
        return z

    async def table(self, x: Ints, f: Callable[[Any], Any], *, low: float, high: float, frac: int) -> Ints:
        drop = max(0, self.frac - frac)
        index = ((x >> np.int64(drop)) << np.int64(drop)).astype(np.float64) / 2.0**self.frac
        z = self.encode(f(np.clip(index, low, high)))
        self._did("table", x, None, z)
        return z

    async def row_max(self, x: Ints) -> Ints:
        z = x.max(-1, keepdims=True)
        self._did("row_max", x, None, z, x.shape[-1])
        return z


class Exact(Machine[Reals]):
    """The formula alone, in float64: no rounding, no ring, and constants as they are printed."""

    frac = 52

    def add(self, x: Reals, y: Reals) -> Reals:
        return x + y

    def times(self, x: Reals, n: int) -> Reals:
        return x * n

    def plus(self, x: Reals, c: float) -> Reals:
        return x + c

    def inverted(self, bit: Reals) -> Reals:
        return 1.0 - bit

    def row_sum(self, x: Reals) -> Reals:
        return np.asarray(x.sum(-1, keepdims=True))

    def width(self, x: Reals) -> int:
        return int(x.shape[-1])

    def spread(self, row: Reals, like: Reals) -> Reals:
        return np.broadcast_to(row, like.shape)

    async def mul(self, x: Reals, y: Reals) -> Reals:
        return x * y

    async def square(self, x: Reals) -> Reals:
        return x * x

    async def combine(
        self, terms: Sequence[tuple[Reals, float]], constant: float = 0.0, *, extra: int = 0
    ) -> Reals:
        return np.asarray(sum(x * c for x, c in terms) + constant)

    async def halve(self, x: Reals, times: int) -> Reals:
        return x / 2.0**times

    async def divide(self, x: Reals, n: int) -> Reals:
        return x / n

    async def below(self, x: Reals, thresholds: Sequence[float]) -> list[Reals]:
        return [(x < t).astype(np.float64) for t in thresholds]

    async def pick(self, bit: Reals, x: Reals) -> Reals:
        return np.where(bit != 0.0, x, 0.0)

    async def magnitude(self, x: Reals, gains: Sequence[Callable[[int], float]]) -> list[Reals]:
        _, exponent = np.frexp(x)
        known = {e: [gain(e) for gain in gains] for e in np.unique(exponent).tolist()}
        return [np.vectorize(lambda e, i=i: known[e][i])(exponent) for i in range(len(gains))]

    async def whole(self, x: Reals, count: int) -> tuple[list[Reals], Reals]:
        whole = np.floor(x)
        return [np.floor(whole / 2.0**i) % 2.0 for i in range(count)], x - whole

    async def wave(self, x: Reals, wave: Wave) -> Reals:
        y = wave.constant + wave.linear * x + wave.quadratic * x * x
        for coefficients, f in ((wave.cos, np.cos), (wave.sin, np.sin)):
            for k, c in enumerate(coefficients, 1):
                y = y + c * f(2 * np.pi * k / wave.period * x)
        return y

    async def table(self, x: Reals, f: Callable[[Any], Any], *, low: float, high: float, frac: int) -> Reals:
        return np.asarray(f(np.clip(np.floor(x * 2.0**frac) / 2.0**frac, low, high)))

    async def row_max(self, x: Reals) -> Reals:
        return np.asarray(x.max(-1, keepdims=True))


def _as_words(scaled: Reals) -> Ints:
    """Whole reals mod 2^64, as signed words."""
    if np.abs(scaled).max(initial=0.0) < 2.0**62:
        return np.asarray(scaled).astype(np.int64)
    return np.array([_reduced(int(v)) for v in scaled.ravel()], dtype=np.int64).reshape(scaled.shape)


def _reduced(word: int) -> int:
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine over :class:`Words`, which never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a method over words waited")
