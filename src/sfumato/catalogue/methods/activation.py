"""Sigmoid, tanh, erf, GELU, SiLU and Mish as the papers and libraries compute them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from sfumato.catalogue.machine import Machine, Wave
from sfumato.catalogue.methods.exponential import chebyshev, exp_limit, exp_pade, horner, polynomial, powers
from sfumato.catalogue.methods.inverse import reciprocal_normalised, rsqrt_newton

__all__ = [
    "absolute",
    "bolt_gelu",
    "erf_rational",
    "erf_taylor",
    "even_piece",
    "gelu_erf",
    "gelu_erf_wave",
    "gelu_residual",
    "gelu_tanh",
    "half_plus_even",
    "middle_even",
    "middle_only",
    "mirrored",
    "odd_polynomial",
    "pieces",
    "power_released",
    "relu_polynomial",
    "relu_wave",
    "sigmoid_chebyshev",
    "sigmoid_crypten",
    "sigmoid_exp",
    "sigmoid_line",
    "sigmoid_pieces",
    "silu_pieces",
    "silu_product",
    "smooth_maximum",
    "tanh_chebyshev",
    "tanh_clipped_chebyshev",
    "tanh_coefficients",
    "tanh_crypten",
    "two_products",
    "wave_clipped",
    "wave_of",
    "whole_line",
]

V = TypeVar("V")


async def absolute(m: Machine[V], x: V) -> tuple[V, V]:
    """|x| and the bit [x < 0]."""
    (negative,) = await m.below(x, [0.0])
    return m.sub(x, m.times(await m.pick(negative, x), 2)), negative


async def pieces(m: Machine[V], bits: Sequence[V], values: Sequence[V]) -> V:
    """values[i] between the cuts that gave ``bits``, left to right: one product a cut."""
    y = values[-1]
    for bit, left, right in zip(bits, values, values[1:], strict=False):
        y = m.add(y, await m.pick(bit, m.sub(left, right)))
    return y


# ---- sigmoid, tanh, erf ------------------------------------------------------------------------------------


async def sigmoid_crypten(m: Machine[V], x: V) -> V:
    """1 / (1 + exp(-|x|)) by three Newton steps from 0.75, mirrored for negative x."""
    a, negative = await absolute(m, x)
    d = m.plus(await exp_limit(m, m.times(a, -1), n=8), 1.0)
    # The first step starts from a public number: 1.5 - 0.5625 d, no product of secrets.
    y = m.minus_from(1.5, await m.combine([(d, 0.5625)]))
    for _ in range(2):
        y = m.sub(m.times(y, 2), await m.mul(d, await m.square(y)))
    positive = await m.pick(m.inverted(negative), y)
    return m.add(positive, await m.pick(negative, m.minus_from(1.0, y)))


async def tanh_crypten(m: Machine[V], x: V) -> V:
    """2 sigmoid(2x) - 1."""
    return m.plus(m.times(await sigmoid_crypten(m, m.times(x, 2)), 2), -1.0)


def tanh_coefficients(terms: int = 32) -> tuple[float, ...]:
    """The Chebyshev series of tanh on [-1, 1], of odd terms below ``terms``."""
    k = np.arange(terms)
    nodes = np.cos((k + 0.5) * np.pi / terms)
    found = [2.0 / terms * float(np.sum(np.tanh(nodes) * np.cos(j * (k + 0.5) * np.pi / terms))) for j in k]
    return tuple(c if j % 2 else 0.0 for j, c in enumerate(found))


async def tanh_chebyshev(m: Machine[V], x: V, *, terms: int = 32) -> V:
    """That series by T_k+2 = 2 T_2 T_k - T_k-2, then clipped to [-1, 1]."""
    coefficients = tanh_coefficients(terms)
    twice = m.plus(m.times(await m.square(x), 4), -2.0)
    known = [x, await m.mul(m.plus(twice, -1.0), x)]
    for _ in range(terms // 2 - 2):
        known.append(m.sub(await m.mul(twice, known[-1]), known[-2]))
    y = await m.combine([(known[i], coefficients[2 * i + 1]) for i in range(terms // 2)])
    low, high = await m.below(y, [-1.0, 1.0])
    return await pieces(m, (low, high), (m.constant(x, -1.0), y, m.constant(x, 1.0)))


async def sigmoid_chebyshev(m: Machine[V], x: V) -> V:
    """tanh(x / 2) / 2 + 1 / 2 by that series."""
    return m.plus(await m.halve(await tanh_chebyshev(m, await m.halve(x, 1)), 1), 0.5)


async def sigmoid_exp(m: Machine[V], x: V, *, pade: bool = False) -> V:
    """1 / (1 + exp(-x)), the division normalised."""
    e = m.times(x, -1)
    e = await exp_pade(m, e) if pade else await exp_limit(m, e, n=8)
    return await reciprocal_normalised(m, m.plus(e, 1.0))


async def sigmoid_line(m: Machine[V], x: V, *, slope: float, clip: float | None) -> V:
    """1/2 + slope x, and 0 and 1 beyond ``clip``."""
    y = await m.combine([(x, slope)], 0.5)
    if clip is None:
        return y
    bits = await m.below(x, [-clip, clip])
    return await pieces(m, bits, (m.constant(x, 0.0), y, m.constant(x, 1.0)))


async def odd_polynomial(m: Machine[V], x: V, *, coefficients: Sequence[float], constant: float) -> V:
    """constant + c_0 x + c_1 x^3 + c_2 x^5 + ..."""
    degrees = [2 * i + 1 for i in range(len(coefficients))]
    known = await powers(m, x, degrees)
    return await m.combine([(known[d], c) for d, c in zip(degrees, coefficients, strict=True)], constant)


async def sigmoid_pieces(
    m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float, extra: int = 0
) -> V:
    """A polynomial in |x| below ``reach``, mirrored for negative x; 0 and 1 beyond."""
    low, negative, high = await m.below(x, [-reach, 0.0, reach])
    a = m.sub(x, m.times(await m.pick(negative, x), 2))
    s = await polynomial(m, a, coefficients, extra=extra)
    return await pieces(
        m, (low, negative, high), (m.constant(x, 0.0), m.minus_from(1.0, s), s, m.constant(x, 1.0))
    )


async def tanh_clipped_chebyshev(m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float) -> V:
    """Odd Chebyshev terms of x / reach, x clipped to the reach."""
    low, high = await m.below(x, [-reach, reach])
    inner = await pieces(m, (low, high), (m.constant(x, -reach), x, m.constant(x, reach)))
    v = await m.combine([(inner, 1.0 / reach)])
    full = [0.0] * (2 * len(coefficients))
    full[1::2] = coefficients
    return await chebyshev(m, v, full)


async def mirrored(
    m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float, tail: float = 1.0
) -> V:
    """An odd function: a polynomial in |x| up to ``reach``, then ``tail``; the sign put back."""
    a, negative = await absolute(m, x)
    (near,) = await m.below(a, [reach])
    y = await m.choose(near, await polynomial(m, a, coefficients), m.constant(x, tail))
    return m.sub(y, m.times(await m.pick(negative, y), 2))


async def wave_of(m: Machine[V], x: V, *, wave: Wave) -> V:
    """A sine series by one opening, wherever x lies."""
    return await m.wave(x, wave)


async def wave_clipped(m: Machine[V], x: V, *, wave: Wave, reach: float) -> V:
    """A sine series inside ``reach``, -1 and 1 beyond."""
    low, high = await m.below(x, [-reach, reach])
    return await pieces(m, (low, high), (m.constant(x, -1.0), await m.wave(x, wave), m.constant(x, 1.0)))


async def _odd_power_released(m: Machine[V], x: V, p: int) -> V:
    """CrypTen's pow as released: x^p for odd p above 3 becomes (x^3)^((p - 1) / 2)."""
    if p == 1:
        return x
    if p == 2:
        return await m.square(x)
    if p % 2 == 0:
        return await _odd_power_released(m, await m.square(x), p // 2)
    cube = await m.mul(await m.square(x), x)
    return await _odd_power_released(m, cube, (p - 1) // 2)


async def _odd_power(m: Machine[V], x: V, p: int) -> V:
    """x (x^2)^((p - 1) / 2): the same with the power mended."""
    if p == 1:
        return x
    if p == 2:
        return await m.square(x)
    if p % 2 == 0:
        return await _odd_power(m, await m.square(x), p // 2)
    return await m.mul(x, await _odd_power(m, await m.square(x), (p - 1) // 2))


async def power_released(m: Machine[V], x: V, *, p: int) -> V:
    """CrypTen's pow(p) as released."""
    return await _odd_power_released(m, x, p)


async def erf_taylor(m: Machine[V], x: V, *, terms: int = 8, released: bool) -> V:
    """2 / sqrt(pi) sum (-1)^n x^(2n + 1) / (n! (2n + 1)), with CrypTen's power as released or mended."""
    total = x
    for n in range(1, terms + 1):
        power = _odd_power_released if released else _odd_power
        c = (-1) ** n / (math.factorial(n) * (2 * n + 1))
        total = m.add(total, await m.combine([(await power(m, x, 2 * n + 1), c)]))
    return await m.combine([(total, 2.0 / math.sqrt(math.pi))])


async def erf_rational(m: Machine[V], x: V) -> V:
    """1 - (1 + .278393 a + .230389 a^2 + .000972 a^3 + .078108 a^4)^-4 for a = |x| < 3, else 1; odd."""
    a, negative = await absolute(m, x)
    (near,) = await m.below(a, [3.0])
    q = await polynomial(m, a, (1.0, 0.278393, 0.230389, 0.000972, 0.078108))
    fourth = await m.square(await m.square(await reciprocal_normalised(m, q, signed=False)))
    y = await m.choose(near, m.minus_from(1.0, fourth), m.constant(x, 1.0))
    return m.sub(y, m.times(await m.pick(negative, y), 2))


# ---- GELU --------------------------------------------------------------------------------------------------


async def _gate(m: Machine[V], x: V, y: V) -> V:
    """x (1 + y) / 2."""
    return await m.mul(await m.halve(x, 1), m.plus(y, 1.0))


async def gelu_erf(m: Machine[V], x: V, *, released: bool) -> V:
    """x (1 + erf(x / sqrt 2)) / 2 by CrypTen's series."""
    inner = await m.combine([(x, math.sqrt(0.5))])
    return await _gate(m, x, await erf_taylor(m, inner, released=released))


async def gelu_erf_wave(m: Machine[V], x: V, *, wave: Wave, reach: float) -> V:
    """The same with erf by a sine series inside ``reach``."""
    inner = await m.combine([(x, math.sqrt(0.5))])
    return await _gate(m, x, await wave_clipped(m, inner, wave=wave, reach=reach))


async def _tanh_argument(m: Machine[V], x: V) -> V:
    cube = await m.mul(await m.square(x), x)
    root = math.sqrt(2.0 / math.pi)
    return await m.combine([(x, root), (cube, 0.044715 * root)])


async def gelu_tanh(m: Machine[V], x: V, *, how: str, coefficients: Sequence[float] = ()) -> V:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 with the tanh of CrypTen, of SPU, or of a table."""
    inner = await _tanh_argument(m, x)
    if how == "crypten":
        y = await tanh_crypten(m, inner)
    elif how == "spu":
        y = await tanh_clipped_chebyshev(m, inner, coefficients=coefficients, reach=5.0)
    else:
        y = await m.table(inner, np.tanh, low=-8.0, high=8.0, frac=m.frac)
    return await _gate(m, x, y)


async def even_piece(
    m: Machine[V],
    x: V,
    *,
    cuts: Sequence[float],
    left: Sequence[float],
    middle: Sequence[float],
    extra: int = 0,
) -> V:
    """0, a polynomial ``left``, a polynomial ``middle``, then x, between the cuts; one product a cut."""
    bits = await m.below(x, cuts)
    wanted = sorted({i for c in (left, middle) for i, value in enumerate(c) if i and value})
    known = await powers(m, x, wanted)

    async def value(coefficients: Sequence[float]) -> V:
        terms = [(known[i], c) for i, c in enumerate(coefficients) if i and c]
        return await m.combine(terms, coefficients[0], extra=extra)

    values = [m.constant(x, 0.0), *([await value(left)] if left else []), await value(middle), x]
    return await pieces(m, bits, values)


async def half_plus_even(
    m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float, scale: float = 1.0
) -> V:
    """x / 2 + g(|x| / scale) for |x| up to ``reach``, else ReLU."""
    low, negative, high = await m.below(x, [-reach, 0.0, reach])
    a = m.sub(x, m.times(await m.pick(negative, x), 2))
    if scale != 1.0:
        a = await m.combine([(a, 1.0 / scale)])
    y = m.add(await m.halve(x, 1), await polynomial(m, a, coefficients))
    return await pieces(m, (low, high), (m.constant(x, 0.0), y, x))


async def two_products(
    m: Machine[V],
    x: V,
    *,
    g: Sequence[float],
    reach: float,
    scale: float = 1.0,
    miswired: bool = False,
) -> V:
    """p = (g0 a + g1) a + g2; (p + g0 a + g3) p + g4 + x / 2, a = |x| / scale; ReLU beyond ``reach``.

    ``miswired`` multiplies the second bracket by a instead of p.
    """
    low, negative, high = await m.below(x, [-reach, 0.0, reach])
    a = m.sub(x, m.times(await m.pick(negative, x), 2))
    if scale != 1.0:
        a = await m.combine([(a, 1.0 / scale)])
    line = await m.combine([(a, g[0])])
    p = m.plus(await m.mul(m.plus(line, g[1]), a), g[2])
    bracket = m.plus(m.add(p, line), g[3])
    y = m.plus(await m.mul(bracket, a if miswired else p), g[4])
    return await pieces(m, (low, high), (m.constant(x, 0.0), m.add(y, await m.halve(x, 1)), x))


async def bolt_gelu(m: Machine[V], x: V, *, miswired: bool = False) -> V:
    """BOLT's form with two products."""
    g = (0.14439048359960427, -0.7077117131613893, 4.5702822654246535, -8.15444702051307, 16.382265425072532)
    return await two_products(m, x, g=g, reach=2.7, miswired=miswired)


async def relu_wave(m: Machine[V], x: V, *, wave: Wave, reach: float) -> V:
    """ReLU(x) + [|x| < reach] times a sine series of |x|."""
    (negative,) = await m.below(x, [0.0])
    relu = m.sub(x, await m.pick(negative, x))
    a = m.sub(m.times(relu, 2), x)
    (near,) = await m.below(a, [reach])
    return m.add(relu, await m.pick(near, await m.wave(a, wave)))


async def relu_polynomial(m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float) -> V:
    """ReLU(x) + [|x| < reach] times a polynomial in |x|."""
    (negative,) = await m.below(x, [0.0])
    relu = m.sub(x, await m.pick(negative, x))
    a = m.sub(m.times(relu, 2), x)
    (near,) = await m.below(a, [reach])
    return m.add(relu, await m.pick(near, await polynomial(m, a, coefficients)))


async def middle_only(
    m: Machine[V], x: V, *, cuts: tuple[float, float], coefficients: Sequence[float], extra: int = 0
) -> V:
    """0, a polynomial, x, between two cuts."""
    bits = await m.below(x, cuts)
    y = await polynomial(m, x, coefficients, extra=extra)
    return await pieces(m, bits, (m.constant(x, 0.0), y, x))


async def middle_even(m: Machine[V], x: V, *, cuts: tuple[float, float], coefficients: Sequence[float]) -> V:
    """0, x / 2 + a polynomial in x^2, x, between two cuts."""
    bits = await m.below(x, cuts)
    y = m.add(await m.halve(x, 1), await horner(m, await m.square(x), coefficients))
    return await pieces(m, bits, (m.constant(x, 0.0), y, x))


async def whole_line(m: Machine[V], x: V, *, coefficients: Sequence[float]) -> V:
    """One polynomial, wherever x lies."""
    return await polynomial(m, x, coefficients)


def _residual(name: str, a: Any) -> Any:
    t = torch.from_numpy(np.asarray(a, dtype=np.float64))
    f = torch.nn.functional.gelu if name == "gelu" else torch.nn.functional.silu
    return (torch.relu(t) - f(t)).numpy()


async def gelu_residual(
    m: Machine[V], x: V, *, name: str, reach: float, frac: int, straight: bool = False
) -> V:
    """ReLU(x) - T[|x|], T the residual in a table; ``straight`` interpolates between its entries."""
    (negative,) = await m.below(x, [0.0])
    relu = m.sub(x, await m.pick(negative, x))
    a = m.sub(m.times(relu, 2), x)
    step = 2.0**-frac
    t = await m.table(a, lambda v: _residual(name, v), low=0.0, high=reach - step, frac=frac)
    if straight:
        slope = await m.table(
            a,
            lambda v: (_residual(name, v + step) - _residual(name, v)) / step,
            low=0.0, high=reach - step, frac=frac,
        )  # fmt: skip
        start = await m.table(a, lambda v: v, low=0.0, high=reach - step, frac=frac)
        t = m.add(t, await m.mul(slope, m.sub(a, start)))
    return m.sub(relu, t)


async def smooth_maximum(m: Machine[V], x: V, *, mu: float) -> V:
    """(x + sqrt(x^2 + mu^2)) / 2, the root as r rsqrt(r)."""
    r = m.plus(await m.square(x), mu * mu)
    root = await m.mul(r, await rsqrt_newton(m, r, steps=5))
    return await m.halve(m.add(x, root), 1)


# ---- SiLU --------------------------------------------------------------------------------------------------


async def silu_product(m: Machine[V], x: V, *, how: str) -> V:
    """x sigmoid(x) with the sigmoid of CrypTen or of SPU."""
    s = await (sigmoid_crypten(m, x) if how == "crypten" else sigmoid_exp(m, x, pade=how == "spu-pade"))
    return await m.mul(x, s)


async def silu_pieces(
    m: Machine[V], x: V, *, coefficients: Sequence[float], reach: float, extra: int = 0
) -> V:
    """x times a sigmoid of pieces; 0 and x beyond ``reach``."""
    low, negative, high = await m.below(x, [-reach, 0.0, reach])
    a = m.sub(x, m.times(await m.pick(negative, x), 2))
    s = await polynomial(m, a, coefficients, extra=extra)
    y = await m.mul(x, await m.choose(negative, m.minus_from(1.0, s), s))
    return await pieces(m, (low, high), (m.constant(x, 0.0), y, x))
