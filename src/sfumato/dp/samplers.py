"""Per-record gradients of one layer from its input and the gradient of its output.

Each sampler takes the layer, `inputs` and `upstream` (rows first; rows = records * n for some n >= 1, the rows of one
record together), the number of records and the names of the parameters wanted, and returns for each of them the sum of
its rows' gradients per record, shape (records, \\*parameter). The sum over a record's rows is taken together with that
over its positions, so that no gradient of a single row is ever stored. Inputs may have any strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import Tensor, nn

__all__ = ["SAMPLERS", "by_rows"]

Sampler = Callable[[nn.Module, Tensor, Tensor, int, set[str]], dict[str, Tensor]]


def linear(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """A linear layer: one product of matrices per record, over all its rows and positions."""
    positions = math.prod(upstream.shape[:-1]) // records
    upstream = upstream.reshape(records, positions, upstream.shape[-1])
    inputs = inputs.reshape(records, positions, inputs.shape[-1])
    found = {}
    if "weight" in want:
        if positions == 1:  # an outer product, which the batched product is slow at
            found["weight"] = upstream.transpose(1, 2) * inputs
        else:
            found["weight"] = torch.bmm(upstream.transpose(1, 2), inputs)
    if "bias" in want:
        found["bias"] = upstream.sum(1)
    return found


def layer_norm(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """Layer normalisation over the last axes."""
    layer = cast(nn.LayerNorm, layer)
    found = {}
    if "weight" in want:
        normal = F.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
        found["weight"] = (normal * upstream).reshape(records, -1, *layer.normalized_shape).sum(1)
    if "bias" in want:
        found["bias"] = upstream.reshape(records, -1, *layer.normalized_shape).sum(1)
    return found


def group_norm(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """Group normalisation; channels on the second axis."""
    layer = cast(nn.GroupNorm, layer)

    def total(of: Tensor) -> Tensor:
        return of.flatten(2).sum(2).reshape(records, -1, layer.num_channels).sum(1)

    # An axis of length one, where there are only rows and channels.
    upstream = upstream.unsqueeze(-1)
    found = {}
    if "weight" in want:
        normal = F.group_norm(inputs, layer.num_groups, eps=layer.eps).unsqueeze(-1)
        found["weight"] = total(normal * upstream)
    if "bias" in want:
        found["bias"] = total(upstream)
    return found


def embedding(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """A table of rows; the padding row gets no gradient, as in autograd."""
    layer = cast(nn.Embedding, layer)
    size, width = layer.weight.shape
    index = inputs.reshape(records, -1)
    upstream = upstream.reshape(-1, width)
    if layer.padding_idx is not None:
        upstream = upstream * (index != layer.padding_idx).reshape(-1, 1)
    offset = torch.arange(records, device=index.device).unsqueeze(1) * size
    table = upstream.new_zeros(records * size, width)
    table.index_add_(0, (index + offset).flatten(), upstream)
    return {"weight": table.reshape(records, size, width)}


def convolution(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """A convolution in one, two or three dimensions, any groups and padding: patches times upstream, row by row."""
    layer = cast(nn.Conv2d, layer)
    rows = len(inputs)
    each = rows // records
    upstream = upstream.reshape(records, each, layer.groups, layer.out_channels // layer.groups, -1)
    found = {}
    if "weight" in want:
        patches = _patches(layer, inputs).reshape(records, each, layer.groups, -1, upstream.shape[-1])
        total = upstream[:, 0] @ patches[:, 0].transpose(-1, -2)
        for row in range(1, each):
            total += upstream[:, row] @ patches[:, row].transpose(-1, -2)
        found["weight"] = total.reshape(records, *layer.weight.shape)
    if "bias" in want:
        found["bias"] = upstream.sum((1, 4)).reshape(records, -1)
    return found


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output position sees, (rows, channels * kernel, positions), as a new or contiguous tensor."""
    spatial = inputs.dim() - 2
    # What the layer itself pads with, both ends of each axis, last axis first.
    around = layer._reversed_padding_repeated_twice
    if any(around):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, around, mode=mode)
    if all(k == 1 for k in layer.kernel_size) and all(s == 1 for s in layer.stride):
        return inputs.reshape(*inputs.shape[:2], -1)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        # `unfold` follows the strides of its input; the kernel's axis is appended at the end.
        inputs = inputs.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (rows, channels, *positions, *kernel) -> (rows, channels, *kernel, *positions)
    order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
    positions = math.prod(inputs.shape[2 : 2 + spatial])
    return inputs.permute(order).reshape(len(inputs), -1, positions)


def by_rows(
    layer: nn.Module, inputs: Tensor, upstream: Tensor, records: int, want: set[str]
) -> dict[str, Tensor]:
    """Any other layer: Opacus' sampler for it, or the layer differentiated row by row; then summed per record."""
    sampler: Callable[..., Any] = OTHERS.get(type(layer), ft_compute_per_sample_gradient)
    gradients = sampler(layer, [inputs.contiguous()], upstream.contiguous())
    found = {}
    for name, parameter in layer.named_parameters():
        if name in want:
            rows = gradients[parameter]
            found[name] = rows.reshape(records, -1, *parameter.shape).sum(1)
    return found


# Opacus' own samplers for the layers that have none here. Exact types: a subclass may compute something else.
OTHERS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: GradSampleHooks.GRAD_SAMPLERS[kind]
    for kind in (nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
}

SAMPLERS: dict[type[nn.Module], Sampler] = {
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Embedding: embedding,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    **dict.fromkeys(OTHERS, by_rows),
}
