"""The same methods in float with gradients, and networks whose functions they replace: what tuning to them needs.

Rounding is not modelled, and bits (comparisons, exponents) have no gradient, as they are constant almost everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sfumato.catalogue.entry import Entry
from sfumato.catalogue.machine import Machine, Wave
from sfumato.catalogue.words import run

__all__ = ["Approximated", "Tensors", "differentiable"]

#: Values that a method works on at once: what they become in between fits a cache, which is several times faster.
_TOGETHER = 1 << 16
#: Functions of the catalogue by what a network calls. Of one value each, and of rows.
_ACTIVATIONS = {functional.silu: "silu", functional.mish: "mish", functional.gelu: "gelu"}
_SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


class Tensors(Machine[Tensor]):
    """The formula in the tensors' own float type. ``frac``: magnitudes below 2^-frac count as 2^-frac, as in words."""

    def __init__(self, frac: int) -> None:
        self.frac = frac

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def sub(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y

    def times(self, x: Tensor, n: int) -> Tensor:
        return x * n

    def plus(self, x: Tensor, c: float) -> Tensor:
        return x + c

    def constant(self, like: Tensor, c: float) -> Tensor:
        return torch.full_like(like, c)

    def inverted(self, bit: Tensor) -> Tensor:
        return 1.0 - bit

    def row_sum(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def width(self, x: Tensor) -> int:
        return x.shape[-1]

    def spread(self, row: Tensor, like: Tensor) -> Tensor:
        return row.expand_as(like)

    async def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    async def square(self, x: Tensor) -> Tensor:
        return x * x

    async def combine(
        self, terms: Sequence[tuple[Tensor, float]], constant: float = 0.0, *, extra: int = 0
    ) -> Tensor:
        (first, factor), *rest = terms
        total = first * factor
        for x, c in rest:
            total = total.add(x, alpha=c)
        return total + constant if constant else total

    async def halve(self, x: Tensor, times: int) -> Tensor:
        return x * 2.0**-times

    async def divide(self, x: Tensor, n: int) -> Tensor:
        return x / n

    async def below(self, x: Tensor, thresholds: Sequence[float]) -> list[Tensor]:
        return [(x < t).to(x.dtype) for t in thresholds]

    async def pick(self, bit: Tensor, x: Tensor) -> Tensor:
        return torch.where(bit != 0.0, x, torch.zeros((), dtype=x.dtype))

    async def magnitude(self, x: Tensor, gains: Sequence[Callable[[int], float]]) -> list[Tensor]:
        _, exponent = torch.frexp(x.detach().clamp(2.0**-self.frac, 2.0 ** (62 - self.frac)))
        known = range(-self.frac, 64 - self.frac)
        place = (exponent - known.start).long()
        return [torch.tensor([gain(e) for e in known], dtype=x.dtype)[place] for gain in gains]

    async def whole(self, x: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
        whole = x.detach().floor()
        return [(whole / 2.0**i).floor() % 2.0 for i in range(count)], x - whole

    async def wave(self, x: Tensor, wave: Wave) -> Tensor:
        y = wave.constant + wave.linear * x + wave.quadratic * x * x
        for coefficients, f in ((wave.cos, torch.cos), (wave.sin, torch.sin)):
            for k, c in enumerate(coefficients, 1):
                y = y + c * f(2 * math.pi * k / wave.period * x)
        return y

    async def table(
        self, x: Tensor, f: Callable[[Any], Any], *, low: float, high: float, frac: int
    ) -> Tensor:
        index = (x.detach() * 2.0**frac).floor() * 2.0**-frac
        return torch.from_numpy(np.asarray(f(index.clamp(low, high).double().numpy()))).to(x.dtype)

    async def row_max(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)


class _InParts(torch.autograd.Function):
    """A function of rows (N, n), part by part; the way back computes it anew, so that only the argument is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f = f
        return torch.cat([f(part) for part in _parts(x)])

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        found: list[Tensor] = []
        for part, towards in zip(_parts(x), _parts(above[0]), strict=True):
            with torch.enable_grad():
                given = part.detach().requires_grad_()
                found += torch.autograd.grad(ctx.f(given), given, towards)
        return torch.cat(found), None


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, _TOGETHER // rows.shape[-1]))


def differentiable(entry: Entry, *, straight: bool = False) -> Callable[[Tensor], Tensor]:
    """The entry as a function of float tensors, with gradients; entries of rows work on the last axis.

    ``straight``: the gradient is that of the exact softmax (a straight-through estimator).
    """
    machine = Tensors(entry.frac)

    def of_rows(x: Tensor) -> Tensor:
        found: Tensor = run(entry.evaluate(machine, x))
        return found

    def f(x: Tensor) -> Tensor:
        rows = x.detach() if straight else x
        found: Tensor = _InParts.apply(rows.reshape(-1, x.shape[-1]), of_rows)
        found = found.reshape(x.shape)
        if not straight:
            return found
        exact = torch.softmax(x, -1)
        return exact + (found - exact.detach())

    return f


class Approximated(TorchFunctionMode):
    """A context in which a network's functions are these entries', as in a plan with them (`graph.published`).

    Activations of (N, width) stay exact: in the networks here those are of the time and the class, which the client
    computes in the clear. Others than SiLU, Mish, GELU, softmax, attention without a mask, and layer and group
    normalisation stay exact everywhere.

    Gradients are the methods' own, but a softmax's is the exact one's: where a denominator is near zero (CipherDM's
    can be negative) its own is a million times larger, and a training that follows it, even cut to any length, gets
    worse at every step.

    Args:
        entries: by function.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        super().__init__()
        self._methods = {
            name: differentiable(entry, straight=name == "softmax") for name, entry in entries.items()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = self._replaced(func)
        return func(*args, **(kwargs or {})) if found is None else found(*args, **(kwargs or {}))

    def _replaced(self, func: Any) -> Callable[..., Tensor] | None:
        known = self._methods
        name = _ACTIVATIONS.get(func, "")
        if name in known:
            return partial(_activation, func, known[name])
        if "softmax" in known and func in _SOFTMAX:
            return partial(_softmax, known["softmax"])
        if "softmax" in known and func is functional.scaled_dot_product_attention:
            return partial(_attention, known["softmax"])
        if "layer_norm" in known and func is functional.layer_norm:
            return partial(_layer_norm, known["layer_norm"])
        if "layer_norm" in known and func is functional.group_norm:
            return partial(_group_norm, known["layer_norm"])
        return None


def _activation(
    exact: Callable[..., Tensor], method: Callable[[Tensor], Tensor], x: Tensor, **options: Any
) -> Tensor:
    return method(x) if x.dim() > 2 else exact(x, **options)


def _softmax(method: Callable[[Tensor], Tensor], x: Tensor, dim: int, **_: Any) -> Tensor:
    return method(x.movedim(dim, -1)).movedim(-1, dim)


def _attention(method: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return method((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)) @ v


def _layer_norm(
    method: Callable[[Tensor], Tensor],
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = method(x.reshape(*x.shape[: -len(shape)], -1)).reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    method: Callable[[Tensor], Tensor],
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = method(x.reshape(len(x), groups, -1)).reshape(x.shape)
    column = (-1, *([1] * (x.dim() - 2)))
    y = y if weight is None else y * weight.reshape(column)
    return y if bias is None else y + bias.reshape(column)
