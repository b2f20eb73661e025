"""Reciprocal, inverse square root and square root as the papers and libraries compute them."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from sfumato.catalogue.machine import Machine
from sfumato.catalogue.methods.exponential import exp_limit, log_crypten, polynomial

__all__ = [
    "RSQRT_CHEAP",
    "RSQRT_FINE",
    "reciprocal_goldschmidt",
    "reciprocal_log",
    "reciprocal_newton",
    "reciprocal_normalised",
    "reciprocal_scaled",
    "reciprocal_small",
    "reciprocal_table",
    "rsqrt_goldschmidt",
    "rsqrt_newton",
    "rsqrt_normalised",
    "rsqrt_rational",
    "rsqrt_reduced",
    "rsqrt_restarted",
    "rsqrt_scaled",
    "rsqrt_table",
    "rsqrt_taylor",
    "sqrt_newton",
    "sqrt_normalised",
]

V = TypeVar("V")

#: rsqrt on [1/4, 1/2), ascending: SPU's default and its cheap form.
RSQRT_FINE = (4.14285016, -15.47994394, 38.4714796, -49.86605845, 26.02942339)
RSQRT_CHEAP = (3.1855, -5.9417, 4.7979)


async def _scaled_by(m: Machine[V], x: V, d: float) -> V:
    """x / d: a shift for a power of two, else a public product."""
    bits = math.log2(d)
    if bits == 0:
        return x
    return await m.halve(x, int(bits)) if bits.is_integer() and d > 1 else await m.combine([(x, 1.0 / d)])


# ---- reciprocal --------------------------------------------------------------------------------------------


async def reciprocal_newton(m: Machine[V], x: V, *, steps: int = 10, n: int = 8, signed: bool = False) -> V:
    """y = 3 exp(1 - 2x) + 0.003, then y <- 2y - x y^2; the sign is taken off first and put back."""
    sign: V | None = None
    if signed:
        (negative,) = await m.below(x, [0.0])
        sign = negative
        x = m.sub(x, m.times(await m.pick(negative, x), 2))
    y = m.plus(m.times(await exp_limit(m, m.minus_from(1.0, m.times(x, 2)), n=n), 3), 0.003)
    for _ in range(steps):
        y = m.sub(m.times(y, 2), await m.mul(x, await m.square(y)))
    return y if sign is None else m.sub(y, m.times(await m.pick(sign, y), 2))


async def reciprocal_scaled(m: Machine[V], x: V, *, d: float, steps: int = 10, signed: bool = False) -> V:
    """(1 / d) R(x / d) with the same Newton steps."""
    y = await reciprocal_newton(m, await _scaled_by(m, x, d), steps=steps, signed=signed)
    return await _scaled_by(m, y, d)


async def reciprocal_small(m: Machine[V], x: V) -> V:
    """For x in (0, 1]: 64 R(64 x)."""
    return m.times(await reciprocal_newton(m, m.times(x, 64)), 64)


async def reciprocal_log(m: Machine[V], x: V) -> V:
    """exp(-log x), the logarithm with one iteration."""
    return await exp_limit(m, m.times(await log_crypten(m, x, iterations=1), -1), n=8)


async def reciprocal_goldschmidt(
    m: Machine[V], x: V, *, eta: float, steps: int, numerator: V | None = None
) -> V:
    """q = x / eta, p = numerator or 1, then (p, q) <- (p (2 - q), q (2 - q)); p / eta."""
    q = await _scaled_by(m, x, eta)
    p: V | None = numerator
    for i in range(steps):
        factor = m.minus_from(2.0, q)
        if p is None:
            p = factor
        else:
            p = await m.mul(p, factor)
        if i < steps - 1:
            q = await m.mul(q, factor)
    assert p is not None
    return await _scaled_by(m, p, eta)


async def reciprocal_normalised(m: Machine[V], x: V, *, steps: int = 2, signed: bool = True) -> V:
    """c = x 2^-e in [1/2, 1); w = 2.9142 - 2c, e = 1 - c w, r = w; r <- r (1 + e), e <- e^2; r 2^-e."""
    sign: V | None = None
    if signed:
        (negative,) = await m.below(x, [0.0])
        sign = negative
        x = m.sub(x, m.times(await m.pick(negative, x), 2))
    factor = await m.magnitude_of(x, lambda e: 2.0**-e)
    c = await m.mul(x, factor)
    r = m.minus_from(2.9142, m.times(c, 2))
    e = m.minus_from(1.0, await m.mul(c, r))
    for i in range(steps):
        r = await m.mul(r, m.plus(e, 1.0))
        if i < steps - 1:
            e = await m.square(e)
    y = await m.mul(r, factor)
    return y if sign is None else m.sub(y, m.times(await m.pick(sign, y), 2))


async def reciprocal_table(m: Machine[V], x: V, *, frac: int, high: float) -> V:
    """A table of 1 / x on x cut to ``frac`` fraction bits."""
    return await m.table(x, lambda v: 1.0 / np.maximum(v, 2.0**-frac), low=2.0**-frac, high=high, frac=frac)


# ---- inverse square root -----------------------------------------------------------------------------------


async def _newton(m: Machine[V], x: V, y: V, steps: int) -> V:
    """y <- y (3 - x y^2) / 2."""
    for _ in range(steps):
        y = await m.halve(await m.mul(y, m.minus_from(3.0, await m.mul(x, await m.square(y)))), 1)
    return y


async def _start(m: Machine[V], x: V, n: int = 8) -> V:
    """2.2 exp(-(x / 2 + 0.2)) + 0.2 - x / 1024."""
    e = await exp_limit(m, m.times(m.plus(await m.halve(x, 1), 0.2), -1), n=n)
    return m.sub(await m.combine([(e, 2.2)], 0.2), await m.halve(x, 10))


async def rsqrt_newton(m: Machine[V], x: V, *, steps: int = 3) -> V:
    """CrypTen's start, then Newton steps."""
    return await _newton(m, x, await _start(m, x), steps)


async def rsqrt_scaled(m: Machine[V], x: V, *, d: float, steps: int = 3) -> V:
    """S(x / d) / sqrt(d)."""
    y = await rsqrt_newton(m, await _scaled_by(m, x, d), steps=steps)
    return await _scaled_by(m, y, math.sqrt(d))


async def rsqrt_restarted(m: Machine[V], x: V, *, steps: int = 3) -> V:
    """CrypTen's, started from 0.05 at and above 100."""
    (low,) = await m.below(x, [100.0])
    y = await m.choose(low, await _start(m, x), m.constant(x, 0.05))
    return await _newton(m, x, y, steps)


async def rsqrt_reduced(m: Machine[V], x: V, *, steps: int = 3) -> V:
    """CrypTen's on x, x / 100 or x / 10,000, chosen at 100 and at 10,000; the result times 1, 0.1 or 0.01."""
    low, middle = await m.below(x, [100.0, 10_000.0])
    shrunk, least = await m.combine([(x, 0.01)]), await m.combine([(x, 0.0001)])
    inner = await m.choose(low, x, await m.choose(middle, shrunk, least))
    y = await rsqrt_newton(m, inner, steps=steps)
    coarse = await m.choose(middle, await m.combine([(y, 0.1)]), await m.combine([(y, 0.01)]))
    return await m.choose(low, y, coarse)


async def rsqrt_goldschmidt(m: Machine[V], x: V, *, eta: float, steps: int) -> V:
    """q = x / eta, p = 1; m = (3 - q) / 2, p <- p m, q <- q m^2; p / sqrt(eta)."""
    q = await _scaled_by(m, x, eta)
    p: V | None = None
    for i in range(steps):
        factor = await m.halve(m.minus_from(3.0, q), 1)
        if p is None:
            p = factor
        else:
            p = await m.mul(p, factor)
        if i < steps - 1:
            q = await m.mul(q, await m.square(factor))
    assert p is not None
    return await _scaled_by(m, p, math.sqrt(eta))


async def rsqrt_normalised(m: Machine[V], x: V, *, coefficients: tuple[float, ...] = RSQRT_FINE) -> V:
    """u = x 2^-(e + 1) in [1/4, 1/2), a polynomial, times 2^(-(e + 1) / 2)."""
    inner, outer = await m.magnitude(x, [lambda e: 2.0 ** -(e + 1), lambda e: 2.0 ** (-(e + 1) / 2)])
    u = await m.mul(x, inner)
    return await m.mul(await polynomial(m, u, coefficients), outer)


async def rsqrt_table(m: Machine[V], x: V, *, mantissa: int) -> V:
    """A table by ``mantissa`` leading bits and the exponent."""

    def f(v: Any) -> Any:
        fraction, exponent = np.frexp(v)
        cut = np.floor(fraction * 2.0 ** (mantissa + 1)) / 2.0 ** (mantissa + 1)
        return 1.0 / np.sqrt(np.maximum(cut, 0.25) * 2.0**exponent)

    return await m.table(x, f, low=2.0**-m.frac, high=2.0**40, frac=m.frac)


async def rsqrt_taylor(m: Machine[V], x: V, *, a: float, steps: int) -> V:
    """y = a^(-1/2) (3/2 - x / (2 a)), the first-order expansion at a, then Newton steps."""
    root = a**-0.5
    y = await m.combine([(x, -root / (2 * a))], 1.5 * root)
    return await _newton(m, x, y, steps)


async def rsqrt_rational(m: Machine[V], x: V, *, a: float, steps: int, division: int) -> V:
    """y = a^(-1/2) (u + 3) / (3 u + 1) with u = x / a, the division by Goldschmidt, then Newton steps."""
    u = await m.combine([(x, 1.0 / a)])
    quotient = await reciprocal_goldschmidt(
        m, m.plus(m.times(u, 3), 1.0), eta=8.0, steps=division, numerator=m.plus(u, 3.0)
    )
    return await _newton(m, x, await m.combine([(quotient, a**-0.5)]), steps)


# ---- square root -------------------------------------------------------------------------------------------


async def sqrt_newton(m: Machine[V], x: V, *, steps: int = 3) -> V:
    """x rsqrt(x)."""
    return await m.mul(await rsqrt_newton(m, x, steps=steps), x)


async def sqrt_normalised(m: Machine[V], x: V) -> V:
    """SPU's rsqrt and one Goldschmidt step."""
    r = await rsqrt_normalised(m, x)
    g = await m.mul(x, r)
    correction = m.minus_from(0.5, await m.mul(g, await m.halve(r, 1)))
    return m.add(g, await m.mul(g, correction))
