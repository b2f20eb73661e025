"""The same methods on secrets: a machine over the moves of a protocol, and the call that runs an entry on it.

Nothing here opens a value or knows a share. Where a source's protocol has a move that ours lacks (the highest
one bit of a word), comparisons stand in, and the measured cost is that of the stand-in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sfumato.catalogue.entry import Entry
from sfumato.catalogue.machine import Machine, Wave
from sfumato.errors import RangeError
from sfumato.protocol.base import Protocol, Series, Window
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["Shares", "secure"]

#: Comparisons look at every bit below this one, exact for |x| < 2^29 at 18 fraction bits; in Z32 at the whole word.
_WINDOW_BITS = 48
#: Bits of a public factor 1 / n.
_DIVISOR_BITS = 24
#: Fraction bits of sines and of public factors, and of a series' linear coefficient.
_SINE_BITS, _LINE_BITS = 20, 16


class Shares(Machine[Shared]):
    """One party's view: each operation is a fork of its own."""

    def __init__(self, p: Protocol, s: Session, frac: int, *, cut_constants: bool = False) -> None:
        self._p, self._s, self.frac = p, s, frac
        self._cut = cut_constants
        self._turn = 0

    def _fork(self, kind: str) -> Session:
        self._turn += 1
        return self._s.fork(f"{kind}{self._turn}")

    def _word(self, c: float, extra: int = 0) -> int:
        scaled = c * 2.0 ** (self.frac + extra)
        return math.trunc(scaled) if self._cut else round(scaled)

    # ---- local ---------------------------------------------------------------------------------------------

    def add(self, x: Shared, y: Shared) -> Shared:
        return self._p.add(x, y)

    def times(self, x: Shared, n: int) -> Shared:
        return self._p.linear(lambda part: part * n, x)

    def plus(self, x: Shared, c: float) -> Shared:
        word = self._word(c)
        return self._p.add_public(self._s, x, self._p.encode(x, word / 2.0**self.frac))

    def inverted(self, bit: Shared) -> Shared:
        return self._p.add_public(self._s, self._p.linear(torch.neg, bit), self._p.encode(bit, 1.0))

    def row_sum(self, x: Shared) -> Shared:
        return self._p.linear(lambda part: part.sum(-1, keepdim=True), x)

    def width(self, x: Shared) -> int:
        return x.shape[-1]

    def spread(self, row: Shared, like: Shared) -> Shared:
        return self._p.linear(lambda part: part.expand(like.shape), row)

    # ---- interactive ---------------------------------------------------------------------------------------

    async def mul(self, x: Shared, y: Shared) -> Shared:
        return await self._p.bilinear_truncate(self._fork("mul"), torch.mul, x, y, self.frac)

    async def square(self, x: Shared) -> Shared:
        return await self._p.bilinear_truncate(self._fork("square"), torch.mul, x, x, self.frac)

    async def combine(
        self, terms: Sequence[tuple[Shared, float]], constant: float = 0.0, *, extra: int = 0
    ) -> Shared:
        words = [self._word(c, extra) for _, c in terms]

        def f(*parts: Tensor) -> Tensor:
            total = parts[0] * words[0]
            for part, word in zip(parts[1:], words[1:], strict=True):
                total = total + part * word
            return total

        bits = self.frac + extra
        total = self._p.linear(f, *(x for x, _ in terms), frac=self.frac + bits)
        y = await self._p.truncate(self._fork("scale"), total, bits)
        return self.plus(y, constant) if constant else y

    async def halve(self, x: Shared, times: int) -> Shared:
        return await self._p.truncate(self._fork("halve"), x.viewed(x.frac + times), times)

    async def divide(self, x: Shared, n: int) -> Shared:
        factor = round(2.0**_DIVISOR_BITS / n)
        wide = self._p.linear(lambda part: part * factor, x, frac=x.frac + _DIVISOR_BITS)
        return await self._p.truncate(self._fork("divide"), wide, _DIVISOR_BITS)

    async def below(self, x: Shared, thresholds: Sequence[float]) -> list[Shared]:
        count = len(thresholds)
        levels = torch.tensor([self._word(t) / 2.0**self.frac for t in thresholds], dtype=torch.float64)
        levels = levels.reshape(count, *([1] * len(x.shape)))
        stacked = self._p.linear(lambda part: part.expand(count, *part.shape), x)
        moved = self._p.add_public(self._s, stacked, self._p.encode(stacked, -levels))
        window = Window(0, min(_WINDOW_BITS, x.ring.bits))
        bits = await self._p.less_than_zero(self._fork("compare"), moved, window)

        def one(part: Tensor, i: int) -> Tensor:
            return part[i]

        return [self._p.linear(partial(one, i=i), bits) for i in range(count)]

    async def pick(self, bit: Shared, x: Shared) -> Shared:
        return await self._p.select(self._fork("pick"), bit, x)

    async def magnitude(self, x: Shared, gains: Sequence[Callable[[int], float]]) -> list[Shared]:
        reach = range(1 - self.frac, self.frac + 1)
        low = await self.below(x, [2.0**e for e in reach])
        found = []
        for gain in gains:
            # g(top + 1) and the step down at every threshold that x is below.
            words = [round(gain(e) * 2.0**self.frac) for e in (*reach, reach[-1] + 1)]
            steps = [word - above for word, above in pairwise(words)]

            def f(*parts: Tensor, steps: list[int] = steps) -> Tensor:
                return sum((part * step for part, step in zip(parts, steps, strict=True)), parts[0] * 0)

            total = self._p.linear(f, *low, frac=self.frac)
            found.append(
                self._p.add_public(self._s, total, self._p.encode(total, words[-1] / 2.0**self.frac))
            )
        return found

    async def whole(self, x: Shared, count: int) -> tuple[list[Shared], Shared]:
        bits: list[Shared] = []
        for i in reversed(range(count)):
            (low,) = await self.below(x, [2.0**i])
            bit = self.inverted(low)
            scale = 1 << (i + self.frac)
            x = self._p.sub(x, self._p.linear(lambda part, scale=scale: part * scale, bit, frac=x.frac))
            bits.append(bit)
        return bits[::-1], x

    async def wave(self, x: Shared, wave: Wave) -> Shared:
        period_log2 = math.ceil(math.log2(wave.period) - 1e-9)
        inner = x
        if 2.0**period_log2 != wave.period:
            if wave.linear or wave.quadratic:
                raise RangeError("a series whose period is no power of two may only have sines and cosines")
            inner = await self.combine([(x, 2.0**period_log2 / wave.period)])
        series = _series(wave, period_log2)
        y = await self._p.evaluate(self._fork("wave"), series, inner, frac=self.frac)
        if wave.quadratic:
            # Our opening carries a line, no parabola: one product more than the source needs.
            y = self.add(y, await self.combine([(await self.square(x), wave.quadratic)], extra=10))
        return y

    async def table(
        self, x: Shared, f: Callable[[Any], Any], *, low: float, high: float, frac: int
    ) -> Shared:
        raise RangeError("table look-ups are no move of this protocol; choose another entry of the catalogue")

    async def row_max(self, x: Shared) -> Shared:
        while x.shape[-1] > 1:
            half = x.shape[-1] // 2
            left, right = self._cut_row(x, 0, half), self._cut_row(x, half, 2 * half)
            (loses,) = await self.below(self._p.sub(left, right), [0.0])
            best = await self.choose(loses, right, left)
            if x.shape[-1] % 2:
                last = self._cut_row(x, 2 * half, x.shape[-1])
                best = self._p.linear(lambda *parts: torch.cat(parts, -1), best, last)
            x = best
        return x

    def _cut_row(self, x: Shared, start: int, stop: int) -> Shared:
        return self._p.linear(lambda part: part[..., start:stop], x)


def _series(wave: Wave, period_log2: int) -> Series:
    """The wave as what one opening evaluates: 20 bits for sines, 20 for public factors, a line of 16."""
    grain, count = 2.0**-_LINE_BITS, max(len(wave.sin), len(wave.cos))

    def padded(coefficients: tuple[float, ...]) -> tuple[float, ...]:
        return coefficients + (0.0,) * (count - len(coefficients))

    half = 2.0 ** (period_log2 - 1)
    return Series(
        lo=-half, hi=half, centre=0.0, period_log2=period_log2, multiplier=1, constant=wave.constant,
        linear=round(wave.linear / grain) * grain, linear_frac=_LINE_BITS, cos=padded(wave.cos),
        sin=padded(wave.sin), dealt=_SINE_BITS, public=_SINE_BITS, word=62, error=0.0,
    )  # fmt: skip


async def secure(p: Protocol, s: Session, x: Shared, entry: Entry) -> Shared:
    """The entry's method on a secret, at x's scale. Rows are the last axis.

    Domain, Error: the entry's, at x's fraction bits; products stay below 2^62 (2^(62 - 2 f) in value).
    Cost: measured by :func:`sfumato.catalogue.measure.on_rep3`. Source: ``entry.source``.

    Raises:
        RangeError: the entry needs a table look-up.
    """
    if not entry.secure:
        raise RangeError(f"{entry.name} needs table look-ups, which are no move here; choose another entry")
    machine = Shares(p, s, x.frac, cut_constants=entry.cut_constants)
    found: Shared = await entry.evaluate(machine, x)
    return found
