"""exp and log as the papers and libraries compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from sfumato.catalogue.machine import Machine, Wave

__all__ = [
    "LOG_MINMAX",
    "LOG_P",
    "LOG_Q",
    "PADE",
    "chebyshev",
    "exp_chebyshev",
    "exp_even_power",
    "exp_limit",
    "exp_pade",
    "exp_polynomial",
    "exp_tables",
    "exp_wave",
    "horner",
    "log_crypten",
    "log_minmax",
    "log_pade",
    "log_small",
    "polynomial",
    "powers",
]

V = TypeVar("V")

#: 2^t on [0, 1).
PADE = (1.00000007744302, 0.693147180426163, 0.240226510710170, 0.0555040686204663, 0.00961834122588046,
        0.00133273035928143)  # fmt: skip
#: log(1 + t) on [0, 1).
LOG_MINMAX = (0.0, 0.9999964239, -0.4998741238, 0.3317990258, -0.2407338084, 0.1676540711, -0.0953293897,
              0.0360884937, -0.0064535442)  # fmt: skip
LOG_P = (-2.05466671951, -8.8626599391, 6.10585199015, 4.81147460989)
LOG_Q = (0.353553425277, 4.54517087629, 6.42784209029, 1.0)


async def powers(m: Machine[V], x: V, wanted: Sequence[int]) -> dict[int, V]:
    """The wanted powers of x, even ones as squares, each from two that are known."""
    known = {1: x}

    async def power(n: int) -> V:
        if n not in known:
            half = n // 2
            if n % 2 == 0:
                known[n] = await m.square(await power(half))
            else:
                known[n] = await m.mul(await power(half + 1), await power(half))
        return known[n]

    for n in sorted(wanted):
        await power(n)
    return known


async def polynomial(m: Machine[V], x: V, coefficients: Sequence[float], *, extra: int = 0) -> V:
    """sum c_i x^i, ascending; ``extra`` fraction bits for the coefficients."""
    wanted = [i for i, c in enumerate(coefficients) if i and c]
    known = await powers(m, x, wanted)
    return await m.combine([(known[i], coefficients[i]) for i in wanted], coefficients[0], extra=extra)


async def horner(m: Machine[V], x: V, coefficients: Sequence[float]) -> V:
    """The same from the highest coefficient down: no power of x is larger than it has to be."""
    y = await m.combine([(x, coefficients[-1])], coefficients[-2])
    for c in reversed(coefficients[:-2]):
        y = m.plus(await m.mul(y, x), c)
    return y


async def chebyshev(m: Machine[V], v: V, coefficients: Sequence[float]) -> V:
    """sum a_k T_k(v) by T_2n = 2 T_n^2 - 1 and T_2n+1 = 2 T_n T_n+1 - v."""
    known = {1: v}

    async def term(k: int) -> V:
        if k not in known:
            half = k // 2
            if k % 2 == 0:
                known[k] = m.plus(m.times(await m.square(await term(half)), 2), -1.0)
            else:
                known[k] = m.sub(m.times(await m.mul(await term(half), await term(half + 1)), 2), v)
        return known[k]

    wanted = [k for k, a in enumerate(coefficients) if k and a]
    terms = [(await term(k), coefficients[k]) for k in wanted]
    return await m.combine(terms, coefficients[0])


async def exp_limit(m: Machine[V], x: V, *, n: int, cut: float | None = None) -> V:
    """(1 + x / 2^n)^(2^n), and 0 below ``cut``."""
    y = m.plus(await m.halve(x, n), 1.0)
    for _ in range(n):
        y = await m.square(y)
    return y if cut is None else await _above(m, x, cut, y)


async def _above(m: Machine[V], x: V, cut: float, y: V) -> V:
    (low,) = await m.below(x, [cut])
    return await m.pick(m.inverted(low), y)


async def exp_chebyshev(
    m: Machine[V], x: V, *, coefficients: Sequence[float], cut: float, clamped: bool = False
) -> V:
    """A Chebyshev series of x / 7 + 1 on [-14, 0], and 0 below ``cut``, and where it is negative if ``clamped``."""
    v = await m.combine([(x, 2.0 / 14.0)], 1.0)
    y = await _above(m, x, cut, await chebyshev(m, v, coefficients))
    return await _above(m, y, 0.0, y) if clamped else y


async def exp_polynomial(m: Machine[V], x: V, *, coefficients: Sequence[float], cut: float) -> V:
    """One polynomial, and 0 below ``cut``."""
    return await _above(m, x, cut, await horner(m, x, coefficients))


async def exp_even_power(m: Machine[V], x: V, *, coefficients: Sequence[float], cut: float) -> V:
    """p(x / 8)^8, and 0 below ``cut``: never negative."""
    y = await polynomial(m, await m.halve(x, 3), coefficients)
    for _ in range(3):
        y = await m.square(y)
    return await _above(m, x, cut, y)


async def exp_pade(m: Machine[V], x: V) -> V:
    """2^(x log2 e): five whole bits and a sign, and a polynomial on the fraction; x clipped to 32 log 2."""
    reach = 32.0 * math.log(2.0) - 2.0**-8
    low, high = await m.below(x, [-reach, reach])
    clipped = m.add(await m.pick(high, m.plus(x, -reach)), m.constant(x, reach))
    clipped = m.sub(clipped, await m.pick(low, m.plus(clipped, reach)))
    y = await m.combine([(clipped, math.log2(math.e))], 32.0)
    bits, fraction = await m.whole(y, 6)
    z = await polynomial(m, fraction, PADE)
    for i, bit in enumerate(bits[:5]):
        z = m.add(z, m.times(await m.pick(bit, z), 2 ** (2**i) - 1))
    return await m.choose(bits[5], z, await m.halve(z, 32))


async def exp_tables(m: Machine[V], x: V, *, reach: float, frac: int) -> V:
    """The product of two tables of 8 bits, one for each half of a 16-bit index of -x."""
    coarse = reach / 256.0

    def high(v: Any) -> Any:
        return np.exp(np.floor(v / coarse) * coarse)

    def low(v: Any) -> Any:
        return np.exp(v - np.floor(v / coarse) * coarse)

    limit = -reach + 2.0**-frac
    a = await m.table(x, high, low=limit, high=0.0, frac=frac)
    b = await m.table(x, low, low=limit, high=0.0, frac=frac)
    return await m.mul(a, b)


async def exp_wave(m: Machine[V], x: V, *, wave: Wave) -> V:
    """A sine series by one opening."""
    return await m.wave(x, wave)


# ---- log ---------------------------------------------------------------------------------------------------


async def log_crypten(m: Machine[V], x: V, *, iterations: int = 2, order: int = 8, n: int = 8) -> V:
    """y = x / 120 - 20 exp(-2x - 1) + 3, then y - sum_k (1 - x exp(-y))^k / k."""
    start = await exp_limit(m, m.plus(m.times(x, -2), -1.0), n=n)
    y = m.plus(m.sub(await m.divide(x, 120), m.times(start, 20)), 3.0)
    for _ in range(iterations):
        e = await exp_limit(m, m.times(y, -1), n=n)
        h = m.minus_from(1.0, await m.mul(x, e))
        y = m.sub(y, await polynomial(m, h, (0.0, *(1.0 / k for k in range(1, order + 1)))))
    return y


async def log_small(m: Machine[V], x: V) -> V:
    """For x in (0, 1]: log(100 x) - log 100."""
    return m.plus(await log_crypten(m, m.times(x, 100)), -4.605170)


async def log_minmax(m: Machine[V], x: V) -> V:
    """(e - 1) log 2 + log(1 + t) for x = 2^(e - 1) (1 + t)."""
    factor, exponent = await m.magnitude(x, [lambda e: 2.0 ** (1 - e), lambda e: e - 1.0])
    t = m.plus(await m.mul(x, factor), -1.0)
    return m.add(await polynomial(m, t, LOG_MINMAX), await m.combine([(exponent, math.log(2.0))]))


async def log_pade(m: Machine[V], x: V) -> V:
    """log 2 (e + P(u) / Q(u)) for x = 2^e u with u in [1/2, 1)."""
    from sfumato.catalogue.methods.inverse import reciprocal_normalised

    factor, exponent = await m.magnitude(x, [lambda e: 2.0**-e, float])
    u = await m.mul(x, factor)
    known = await powers(m, u, [2, 3])
    numerator = await m.combine([(known[i], LOG_P[i]) for i in (1, 2, 3)], LOG_P[0])
    denominator = await m.combine([(known[i], LOG_Q[i]) for i in (1, 2, 3)], LOG_Q[0])
    ratio = await m.mul(numerator, await reciprocal_normalised(m, denominator, signed=False))
    return await m.combine([(m.add(exponent, ratio), math.log(2.0))])
