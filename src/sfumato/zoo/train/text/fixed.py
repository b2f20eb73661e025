"""Fake quantization: a float model computes with the numbers that the secure run's fixed point has.

Symmetric, at the fixed scale 2^-f, rounded to the nearest (ties to even, as ``sfumato.ring.fixed.encode`` does),
clamped below 2^(bits - 2), where that function refuses; the gradient goes straight through. Nothing is dynamic, so
nothing of it costs anything in a secure run: it only tells the training what that run rounds. The truncation of the
protocol may differ from the nearest by one unit in the last place, which is not imitated.

Source: Ditto, sections 2.2 (layer to type) and 2.6 of the digest, D-kd. There the training used f = 10 and 20 and the
runtime 8 and 18; here both use the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sfumato.errors import JobError

__all__ = ["LEVELS", "FakeEmbedding", "FakeLinear", "FakeNorm", "Level", "Levels", "quantize"]


class _Straight(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, limit: float) -> Tensor:
        return (x * scale).round_().clamp_(-limit, limit).div_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


@dataclass(frozen=True, slots=True)
class Level:
    """A fixed-point type: ``frac`` fraction bits in a ring of ``bits``."""

    bits: int
    frac: int

    def __call__(self, x: Tensor) -> Tensor:
        """x rounded to this type, any shape; float32. The product with a power of two is exact."""
        top = 2.0 ** (self.bits - 2)
        limit = top - max(1.0, top * 2.0**-24)  # float32 has no number between this and the top
        found: Tensor = _Straight.apply(x, 2.0**self.frac, limit)
        return found


@dataclass(frozen=True, slots=True)
class Levels:
    """The types of a model: of linear layers, products and residuals; of softmax, norms and embedding tables."""

    linear: Level
    wide: Level

    @property
    def bias(self) -> Level:
        """A bias joins a product before its truncation: the product of two scales."""
        return Level(self.linear.bits, 2 * self.linear.frac)


#: By name of the profile whose types they are.
LEVELS = {
    "ditto": Levels(Level(32, 8), Level(64, 18)),
    "puma": Levels(Level(64, 18), Level(64, 18)),
}


class FakeLinear(nn.Module):
    """A linear layer (of torch, or GPT-2's transposed one) with input, weight, bias and output rounded.

    The parameters are those of ``layer``, under the same names.
    """

    def __init__(self, layer: nn.Linear | Any, levels: Levels) -> None:
        super().__init__()
        self.levels, self.transposed = levels, isinstance(layer, Conv1D)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.levels.linear(self.weight.T if self.transposed else self.weight)
        bias = None if self.bias is None else self.levels.bias(self.bias)
        return self.levels.linear(functional.linear(self.levels.linear(x), weight, bias))


class FakeNorm(nn.Module):
    """A LayerNorm in the wide type, its result cast down."""

    def __init__(self, layer: nn.LayerNorm, levels: Levels) -> None:
        super().__init__()
        self.levels, self.shape, self.eps = levels, layer.normalized_shape, layer.eps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        wide = self.levels.wide
        y = functional.layer_norm(wide(x), list(self.shape), wide(self.weight), wide(self.bias), self.eps)
        return self.levels.linear(y)


class FakeEmbedding(nn.Module):
    """A table in the wide type. ``down``: the rows are cast to the type of the linear layers (no norm follows)."""

    def __init__(self, layer: nn.Embedding, levels: Levels, *, down: bool) -> None:
        super().__init__()
        self.levels, self.down, self.weight = levels, down, layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = functional.embedding(ids, self.levels.wide(self.weight))
        return self.levels.linear(rows) if self.down else rows


class FakeActivation(nn.Module):
    """An activation whose result is rounded."""

    def __init__(self, inner: nn.Module, levels: Levels) -> None:
        super().__init__()
        self.inner, self.levels = inner, levels

    def forward(self, x: Tensor) -> Tensor:
        return self.levels.linear(self.inner(x))


def _faked(module: nn.Module, levels: Levels, *, down: bool) -> nn.Module | None:
    if isinstance(module, nn.Embedding):
        return FakeEmbedding(module, levels, down=down)
    if isinstance(module, nn.LayerNorm):
        return FakeNorm(module, levels)
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return FakeLinear(module, levels)
    if isinstance(module, nn.Linear):
        raise JobError(
            "LoRA and fake quantization are not trained together; choose a recipe with one of them"
        )
    return None


def quantize(
    model: Any, levels: Levels, activations: list[tuple[nn.Module, str]], skipped: Sequence[nn.Module] = ()
) -> None:
    """Put the fake types into a BERT- or GPT-2-type model, in place; its state dict keeps its names.

    Residual sums need nothing: both sides are on the grid. ``activations``: module and attribute of each.
    ``skipped``: what stays in float, with all that is in it.

    Raises:
        JobError: the model has LoRA layers.
    """
    down = model.config.model_type == "gpt2"  # there no norm follows the sum of embeddings
    outside = {module for part in skipped for module in part.modules()}
    for parent in [module for module in model.modules() if module not in outside]:
        for name, child in list(parent.named_children()):
            faked = None if child in outside else _faked(child, levels, down=down)
            if faked is not None:
                setattr(parent, name, faked)
    for parent, name in activations:
        setattr(parent, name, FakeActivation(getattr(parent, name), levels))
