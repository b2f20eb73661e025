"""The cases that SPU and CrypTen are measured on, as plain torch modules with the same weights and inputs.

Weights and inputs come from NumPy's seeded generator in a fixed order, so every system computes the same
function of the same float32 numbers. The reference is the module itself in float64. Without a twin in the
peers' own list: ``exp_negative``, ``quick_gelu`` and ``less``.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import JobError

__all__ = ["Case", "all_cases", "reference", "select"]

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Case:
    """A module in evaluation mode and its float32 arguments, made on demand.

    ``has_weights``: it is also of interest with public ones. ``long``: takes minutes, so only when it is named.
    """

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    has_weights: bool = False
    long: bool = False

    def built(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The module, without gradients, and its arguments."""
        module, inputs = self.make()
        return module.eval().requires_grad_(False), inputs


def reference(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The module's output in float64."""
    exact = copy.deepcopy(module).double()
    with torch.inference_mode():
        found: Tensor = exact(*(x.double() for x in inputs))
    return found


class Draw:
    """Layers and tensors drawn from one seeded stream."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.from_numpy((self._rng.standard_normal(shape) * scale).astype(np.float32))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(self._rng.uniform(low, high, shape).astype(np.float32))

    def linear(self, fan_in: int, fan_out: int, scale: float | None = None) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        weight = self.normal(fan_in, fan_out, scale=scale or fan_in**-0.5).T.contiguous()
        return _filled(layer, weight, self.normal(fan_out, scale=0.02))

    def conv(self, c_in: int, c_out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
        layer = nn.utils.skip_init(nn.Conv2d, c_in, c_out, size, stride=stride, padding=size // 2)
        weight = self.normal(c_out, c_in, size, size, scale=(c_in * size * size) ** -0.5)
        return _filled(layer, weight, self.normal(c_out, scale=0.02))

    def layer_norm(self, width: int) -> nn.LayerNorm:
        gain = 1 + self.normal(width, scale=0.1)
        return _filled(nn.LayerNorm(width), gain, self.normal(width, scale=0.1))

    def group_norm(self, width: int, groups: int = 8) -> nn.GroupNorm:
        gain = 1 + self.normal(width, scale=0.1)
        return _filled(nn.GroupNorm(groups, width), gain, self.normal(width, scale=0.1))


def _filled(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias)
    return layer


# ---- transformers ------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention of (tokens, width) tensors."""
    tokens, width = q.shape
    q, k, v = (x.reshape(tokens, heads, width // heads).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.squeeze(0).transpose(0, 1).reshape(tokens, width)


class TransformerLayer(nn.Module):
    """BERT's (post-norm, exact GELU) or GPT-2's (pre-norm, causal, tanh GELU); width 768, 12 heads."""

    def __init__(self, draw: Draw, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v, self.o = (draw.linear(768, 768, 0.02) for _ in range(4))
        self.up, self.down = draw.linear(768, 3072, 0.02), draw.linear(3072, 768, 0.02)
        self.ln1, self.ln2 = draw.layer_norm(768), draw.layer_norm(768)

    def forward(self, x: Tensor) -> Tensor:
        if not self.causal:
            x = self.ln1(x + self.o(attention(self.q(x), self.k(x), self.v(x), 12)))
            return self.ln2(x + self.down(F.gelu(self.up(x))))
        h = self.ln1(x)
        x = x + self.o(attention(self.q(h), self.k(h), self.v(h), 12, causal=True))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


# ---- a DDPM UNet for 28x28 images --------------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(self, draw: Draw, c_in: int, c_out: int, t_width: int = 128) -> None:
        super().__init__()
        self.n1, self.c1 = draw.group_norm(c_in), draw.conv(c_in, c_out)
        self.t = draw.linear(t_width, c_out)
        self.n2, self.c2 = draw.group_norm(c_out), draw.conv(c_out, c_out)
        self.skip = draw.conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.c1(F.silu(self.n1(x))) + self.t(t)[:, :, None, None]
        return self.skip(x) + self.c2(F.silu(self.n2(h)))


class AttentionBlock(nn.Module):
    def __init__(self, draw: Draw, width: int) -> None:
        super().__init__()
        self.n = draw.group_norm(width)
        self.q, self.k, self.v, self.o = (draw.linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        tokens = self.n(x).reshape(c, h * w).transpose(0, 1)
        y = self.o(attention(self.q(tokens), self.k(tokens), self.v(tokens), 4))
        return x + y.transpose(0, 1).reshape(1, c, h, w)


class MnistUNet(nn.Module):
    """Widths 32, 64, 64 at 28, 14 and 7 pixels, attention at 14 and 7."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.t1, self.t2 = draw.linear(32, 128), draw.linear(128, 128)
        self.into, self.d0 = draw.conv(1, 32), ResBlock(draw, 32, 32)
        self.down0, self.d1 = draw.conv(32, 32, stride=2), ResBlock(draw, 32, 64)
        self.da1, self.down1 = AttentionBlock(draw, 64), draw.conv(64, 64, stride=2)
        self.m0, self.ma, self.m1 = ResBlock(draw, 64, 64), AttentionBlock(draw, 64), ResBlock(draw, 64, 64)
        self.up1, self.u1, self.ua1 = draw.conv(64, 64), ResBlock(draw, 128, 64), AttentionBlock(draw, 64)
        self.up0, self.u0 = draw.conv(64, 64), ResBlock(draw, 96, 32)
        self.n, self.out = draw.group_norm(32), draw.conv(32, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = F.silu(self.t2(F.silu(self.t1(t))))
        a = self.d0(self.into(x), t)
        b = self.da1(self.d1(self.down0(a), t))
        x = self.m1(self.ma(self.m0(self.down1(b), t)), t)
        x = self.up1(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.ua1(self.u1(torch.cat([x, b], 1), t))
        x = self.up0(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.u0(torch.cat([x, a], 1), t)
        return self.out(F.silu(self.n(x)))


# ---- single operations -------------------------------------------------------------------------------------


class Function(nn.Module):
    """A function of the inputs as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(*inputs)


class Weighted(nn.Module):
    """A function of the input and one weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self.weight)


_RANGES: dict[str, tuple[float, float, Callable[[Tensor], Tensor]]] = {
    "relu": (-5, 5, torch.relu),
    "exp": (-6, 3, torch.exp),
    "exp_negative": (-14, 0, torch.exp),
    "reciprocal": (0.2, 20, torch.reciprocal),
    "rsqrt": (0.1, 50, torch.rsqrt),
    "sigmoid": (-6, 6, torch.sigmoid),
    "tanh": (-4, 4, torch.tanh),
    "gelu": (-5, 5, F.gelu),
    "gelu_tanh": (-5, 5, lambda x: F.gelu(x, approximate="tanh")),
    "quick_gelu": (-5, 5, lambda x: x * torch.sigmoid(1.702 * x)),
    "silu": (-6, 6, F.silu),
    "mish": (-5, 5, F.mish),
}


def _matmul(m: int, k: int, n: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    draw = Draw()
    x = draw.normal(m, k)
    return Weighted(torch.matmul, draw.normal(k, n, scale=k**-0.5)), (x,)


def _conv(c: int, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    draw = Draw()
    layer = draw.conv(c, c)
    layer.bias = None
    return layer, (draw.normal(1, c, size, size),)


def _elementwise(name: str, count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    low, high, function = _RANGES[name]
    return Function(function), (Draw().uniform(low, high, count),)


def _product(count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Function(torch.mul), (Draw(1).normal(count), Draw(2).normal(count))


def _less(count: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    values = Draw(1).uniform(-5, 5, count), Draw(2).uniform(-5, 5, count)
    return Function(lambda x, y: (x < y).to(x.dtype)), values


def _softmax(rows: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Function(lambda x: torch.softmax(x, -1)), (Draw().normal(rows, rows, scale=2.0),)


def _norm(groups: int | None, *shape: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    draw = Draw()
    layer = draw.layer_norm(shape[1]) if groups is None else draw.group_norm(shape[1], groups)
    return layer, (draw.normal(*shape),)


def _transformer(causal: bool, layers: int = 1) -> tuple[nn.Module, tuple[Tensor, ...]]:
    draw = Draw()
    x = draw.normal(128, 768)
    stack = [TransformerLayer(draw, causal) for _ in range(layers)]
    return (nn.Sequential(*stack) if layers > 1 else stack[0]), (x,)


def _unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    draw = Draw()
    x = draw.normal(1, 1, 28, 28)
    angle = 500 * np.exp(-math.log(10000) * np.arange(16) / 16)
    t = np.concatenate([np.sin(angle), np.cos(angle)])[None].astype(np.float32)
    return MnistUNet(draw), (x, torch.from_numpy(t))


def all_cases() -> Iterator[Case]:
    """Every case, cheap ones first."""
    for m, k, n in ((512, 512, 512), (128, 768, 3072), (1024, 1024, 1024)):
        yield Case(f"matmul_{m}x{k}x{n}", partial(_matmul, m, k, n), True)
    for c in (64, 320):
        yield Case(f"conv3x3_{c}x32x32", partial(_conv, c, 32), True)
    for count, label in ((100_000, "1e5"), (1_000_000, "1e6")):
        yield Case(f"mul_{label}", partial(_product, count))
        for name in _RANGES:
            yield Case(f"{name}_{label}", partial(_elementwise, name, count))
        yield Case(f"less_{label}", partial(_less, count))
    for rows in (256, 1024):
        yield Case(f"softmax_{rows}x{rows}", partial(_softmax, rows))
    yield Case("layernorm_128x768", partial(_norm, None, 128, 768))
    yield Case("groupnorm32_320x32x32", partial(_norm, 32, 1, 320, 32, 32))
    yield Case("unet_mnist_28", _unet, True)
    yield Case("bert_layer_128", partial(_transformer, False), True)
    yield Case("gpt2_layer_128", partial(_transformer, True), True)
    yield Case("bert_base_12_128", partial(_transformer, False, 12), True, long=True)


def select(patterns: Sequence[str], *, public: bool = False) -> list[Case]:
    """Cases by name or shell pattern (``*_1e5``), each once, in the order of the list; all short ones without patterns.
    ``public``: those that have weights.

    Raises:
        JobError: a pattern that no case matches, with the names there are.
    """
    cases = list(all_cases())
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise JobError(f"there is no case {pattern!r}; use {', '.join(case.name for case in cases)}")
    chosen = [
        case
        for case in cases
        if (any(fnmatch.fnmatchcase(case.name, p) for p in patterns) if patterns else not case.long)
    ]
    if public:
        chosen = [case for case in chosen if case.has_weights]
        if not chosen:
            raise JobError("none of these cases has weights that could be public; leave --public out")
    return chosen
