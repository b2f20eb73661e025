"""Float evaluation of a program's nodes by the ATen call itself: at the client, at the owner, and for
calibration."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.program import Node, map_refs
from sfumato.ops.activation import FUNCTIONS
from sfumato.ops.masks import FORBIDDEN, score_masks

__all__ = ["call", "evaluate", "resolve"]

Visit = Callable[[Node, tuple[Any, ...], Mapping[str, Any], Tensor], None]


def resolve(target: str) -> Callable[..., Any]:
    """The function behind a target.

    Raises:
        CaptureError: this installation has no such operation, or it is not one that a plan may name.
    """
    if target in _OURS:
        return _OURS[target]
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
    found = getattr(packet, overload, None)
    if not callable(found):
        raise CaptureError(
            f"there is no operation {target} in this installation of torch ({torch.__version__})"
        )
    return found


def call(node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """One node in float32; half-precision weights are widened on the way in."""
    return resolve(node.target)(*(_widen(a) for a in args), **{k: _widen(v) for k, v in kwargs.items()})


def evaluate(
    nodes: Iterable[Node], values: Mapping[str, Tensor], keep: Collection[str], visit: Visit | None = None
) -> dict[str, Tensor]:
    """Run ``nodes`` in order from ``values``; what ``keep`` names is returned, everything else freed after
    its last use."""
    nodes = list(nodes)
    last: dict[str, int] = {name: i for i, node in enumerate(nodes) for name in node.refs()}
    live: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        return live[name] if name in live else values[name]

    with torch.inference_mode():
        for i, node in enumerate(nodes):
            args = map_refs(node.args, value)
            kwargs = {k: map_refs(v, value) for k, v in node.kwargs.items()}
            out = call(node, args, kwargs)
            if visit is not None:
                visit(node, args, kwargs, out)
            live[node.name] = out
            del args, kwargs, out
            for name in node.refs():
                if last[name] == i and name not in keep:
                    live.pop(name, None)
    return {name: value(name) for name in keep}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return [_widen(v) for v in value]
    return value


# ---- our own targets ---------------------------------------------------------------------------------------


def _one_hot(ids: Tensor, size: int) -> Tensor:
    """ids (...) -> (..., size), one 1 in each row."""
    return F.one_hot(ids.to(torch.int64), size).to(torch.float32)


def _positions_one_hot(indices: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Rows that pick ``x[indices]`` out of x's leading axes ``shape``, flattened: (n, prod(shape))."""
    return _one_hot(_row_positions(indices, shape), math.prod(shape))


def _row_numbers(ids: Tensor, size: int) -> Tensor:
    """ids (...) as int64.

    Raises:
        JobError: an id is no row of a table of ``size`` rows.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise JobError(f"an id lies outside the {size} rows of its table; use ids from 0 to {size - 1}")
    return ids.to(torch.int64)


def _row_positions(indices: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """Places of ``x[indices]`` among x's leading axes ``shape``, flattened: (n,)."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))[tuple(indices)].reshape(-1)


def _look_up(numbers: Tensor, table: Tensor) -> Tensor:
    """Rows of a table (rows, ...)."""
    return table[numbers]


def _resample_matrix(target: str, size: tuple[int, ...], args: tuple[Any, ...]) -> Tensor:
    """The matrix (prod(size), prod(out)) of a linear map of the last axes, from what it makes of each
    unit."""
    count = math.prod(size)
    units = torch.eye(count).reshape(count, 1, *size)
    return resolve(target)(units, *args).reshape(count, -1)


def _to_float(mask: Tensor) -> Tensor:
    return mask.to(torch.float32)


def _norm_scale(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(variance + eps)
    return scale if weight is None else scale * weight


def _norm_shift(bias: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    return -mean * scale if bias is None else bias - mean * scale


def _scale_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """weight (O, ...) with row o times scale[o]."""
    return weight * scale.reshape(-1, *([1] * (weight.dim() - 1)))


def _scale_bias(bias: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    return shift if bias is None else bias * scale + shift


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _same(x: Tensor, ring: str, frac: int) -> Tensor:
    """A change of words: no reals change."""
    return x


def _masked_scores(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scores (..., L, S) plus a finite additive mask; what a mask forbids becomes :data:`FORBIDDEN`."""
    allowed, bias = score_masks((scores.shape[-2], scores.shape[-1]), mask, causal)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    return scores if allowed is None else torch.where(allowed, scores, FORBIDDEN)


def _lowered_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (..., L, S), lowered by so much as :data:`FORBIDDEN` says where ``mask`` is 0."""
    return scores + (1.0 - mask) * FORBIDDEN


def _argmax_one_hot(x: Tensor, dim: int) -> Tensor:
    """1 where x is largest along ``dim``, at the first such place."""
    places = x.argmax(dim, keepdim=True)
    return torch.zeros_like(x).scatter(dim, places, 1.0)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Attention where ``mask`` is 1."""
    return F.scaled_dot_product_attention(q, k, v, mask > 0.5, scale=scale, enable_gqa=enable_gqa)


def _quad(x: Tensor) -> Tensor:
    return 0.125 * x * x + 0.25 * x + 0.5


def _getitem(values: Any, index: int) -> Tensor:
    found: Tensor = operator.getitem(values, index)
    return found


def _activated_linear(x: Tensor, w: Tensor, bias: Tensor | None, *, function: str, turned: bool) -> Tensor:
    return FUNCTIONS[function].f(F.linear(x, w if turned else w.T, bias))


def _linear_plus(x: Tensor, w: Tensor, bias: Tensor | None, n: Tensor, gamma: Tensor) -> Tensor:
    return F.linear(x, w, bias) + n * gamma


_OURS: dict[str, Callable[..., Any]] = {
    "aten.getitem.int": _getitem,
    "sfumato.activated_linear": _activated_linear,
    "sfumato.argmax_one_hot": _argmax_one_hot,
    "sfumato.masked_attention": _masked_attention,
    "sfumato.one_hot": _one_hot,
    "sfumato.positions_one_hot": _positions_one_hot,
    "sfumato.row_numbers": _row_numbers,
    "sfumato.row_positions": _row_positions,
    "sfumato.linear_plus": _linear_plus,
    "sfumato.look_up": _look_up,
    "sfumato.quick_gelu": _quick_gelu,
    "sfumato.quad": _quad,
    "sfumato.resample_matrix": _resample_matrix,
    "sfumato.to_float": _to_float,
    "sfumato.shorten": _same,
    "sfumato.widen": _same,
    "sfumato.lowered_scores": _lowered_scores,
    "sfumato.masked_scores": _masked_scores,
    "sfumato.norm_scale": _norm_scale,
    "sfumato.norm_shift": _norm_shift,
    "sfumato.scale_rows": _scale_rows,
    "sfumato.scale_bias": _scale_bias,
}
