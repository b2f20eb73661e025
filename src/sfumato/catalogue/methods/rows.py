"""Softmax and layer norm over rows as the papers and libraries compute them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from sfumato.catalogue.machine import Machine
from sfumato.catalogue.methods.inverse import (
    reciprocal_goldschmidt,
    reciprocal_newton,
    rsqrt_newton,
    sqrt_newton,
)

__all__ = [
    "layer_norm",
    "rsqrt_by_root",
    "rsqrt_steps",
    "softmax_max",
    "softmax_ode",
    "softmax_quad",
    "softmax_quad_goldschmidt",
    "softmax_relu",
    "softmax_shifted",
]

V = TypeVar("V")
Method = Callable[..., Coroutine[Any, Any, Any]]


async def softmax_max(m: Machine[V], x: V, **options: Any) -> V:
    """exp(x - max) times the reciprocal of its row sum; with the options of :func:`softmax_shifted`."""
    return await softmax_shifted(m, m.sub(x, m.spread(await m.row_max(x), x)), **options)


async def softmax_shifted(
    m: Machine[V],
    moved: V,
    *,
    exp: Method,
    reciprocal: Method,
    exp_options: dict[str, Any],
    reciprocal_options: dict[str, Any],
    epsilon: float = 0.0,
) -> V:
    """exp(x) times the reciprocal of its row sum, of rows whose maximum has been subtracted."""
    if epsilon:
        moved = m.plus(moved, -epsilon)
    e: V = await exp(m, moved, **exp_options)
    inverse: V = await reciprocal(m, m.row_sum(e), **reciprocal_options)
    return await m.mul(e, m.spread(inverse, e))


async def softmax_quad(m: Machine[V], x: V, *, c: float = 5.0) -> V:
    """(x + c)^2 / sum (x + c)^2 with CrypTen's reciprocal."""
    moved = m.plus(x, c)
    q = await m.mul(moved, moved)
    inverse = await reciprocal_newton(m, m.row_sum(q), signed=True)
    return await m.mul(q, m.spread(inverse, q))


async def softmax_quad_goldschmidt(m: Machine[V], x: V, *, eta: float, steps: int, c: float = 5.0) -> V:
    """(x + c)^2 / sum (x + c)^2 by Goldschmidt division with a public deflation."""
    q = await m.square(m.plus(x, c))
    total = m.row_sum(q)
    total = total if eta == 1.0 else await m.combine([(total, 1.0 / eta)])
    y = await m.mul(q, m.spread(await reciprocal_goldschmidt(m, total, eta=1.0, steps=steps), q))
    return y if eta == 1.0 else await m.combine([(y, 1.0 / eta)])


async def softmax_relu(m: Machine[V], x: V) -> V:
    """ReLU(x) / sum ReLU(x) with CrypTen's reciprocal."""
    (negative,) = await m.below(x, [0.0])
    r = m.sub(x, await m.pick(negative, x))
    inverse = await reciprocal_newton(m, m.row_sum(r), signed=True)
    return await m.mul(r, m.spread(inverse, r))


async def softmax_ode(m: Machine[V], x: V, *, steps: int, low: float, high: float) -> V:
    """Euler steps of the softmax ODE from the uniform row, scores clipped to [low, high] first."""
    below, inside = await m.below(x, [low, high])
    under = await m.pick(below, m.minus_from(low, x))
    over = await m.pick(m.inverted(inside), m.plus(x, -high))
    v = await m.divide(m.sub(m.add(x, under), over), steps)
    g = m.constant(x, 1.0 / m.width(x))
    for _ in range(steps):
        inner = m.row_sum(await m.mul(v, g))
        g = m.add(g, await m.mul(m.sub(v, m.spread(inner, v)), g))
    return g


async def layer_norm(
    m: Machine[V],
    x: V,
    *,
    rsqrt: Method,
    options: dict[str, Any],
    exact_mean: bool,
    eps: float = 1e-5,
) -> V:
    """(x - mean) rsqrt(var + eps) over the last axis; the mean divides, or multiplies by a rounded 1 / n."""
    n = m.width(x)

    async def mean(v: V) -> V:
        total = m.row_sum(v)
        return await m.divide(total, n) if exact_mean else await m.combine([(total, 1.0 / n)])

    centred = m.sub(x, m.spread(await mean(x), x))
    variance = m.plus(await mean(await m.square(centred)), eps)
    inverse: V = await rsqrt(m, variance, **options)
    return await m.mul(centred, m.spread(inverse, x))


async def rsqrt_by_root(m: Machine[V], x: V) -> V:
    """The reciprocal of CrypTen's square root."""
    return await reciprocal_newton(m, await sqrt_newton(m, x), signed=True)


async def rsqrt_steps(m: Machine[V], x: V, *, steps: int) -> V:
    """CrypTen's rsqrt with other Newton steps."""
    return await rsqrt_newton(m, x, steps=steps)
