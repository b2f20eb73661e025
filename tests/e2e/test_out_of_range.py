"""Every method is driven out of its calibrated range: the default certificate refuses the result and names the layer.

What the methods themselves compute there is in docs/design/008.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfumato as sf
from sfumato.graph.certificate import watched


class Layer(nn.Module):
    """One function as a layer of its own, so that it has a name."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def normal(seed: int, shape: tuple[int, ...] = (32, 16)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(x: Tensor) -> Tensor:
    return 40 * x


def positive(x: Tensor) -> Tensor:
    return x.abs() + 0.5


def rows_apart(x: Tensor) -> Tensor:
    """Rows whose largest score differs by far more than a public offset can serve."""
    return x + torch.linspace(-30, 30, x.shape[0])[:, None]


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


Move = Callable[[Tensor], Tensor]
#: Function, calibration inputs from normal ones, inputs outside, and the methods that it is planned with.
CASES: dict[str, tuple[Move, Move, Move, str]] = {
    "series": (F.silu, lambda x: x, lambda x: 15 * x, "series"),
    "clamped": (F.silu, wide, lambda x: 10 * wide(x), "clamped"),
    "exp": (torch.exp, lambda x: x, lambda x: x + 9, "exp"),
    "clipped exp": (torch.exp, lambda x: 8 * x - 30, lambda x: 100 + x, "clipped exp"),
    "reciprocal": (torch.reciprocal, positive, lambda x: positive(x) / 20, "buckets"),
    "rsqrt": (torch.rsqrt, positive, lambda x: 30 * positive(x), "series"),
    "root": (torch.sqrt, lambda x: positive(x) ** 4, lambda x: 1e3 * positive(x) ** 4, "buckets"),
    "quotient": (lambda x: 1.0 / x, positive, lambda x: positive(x) / 20, "buckets"),
    "softmax offset": (lambda x: x.softmax(-1), lambda x: x, lambda x: x - 20, "offset"),
    "softmax offset, above": (lambda x: x.softmax(-1), lambda x: x, lambda x: x + 20, "offset"),
    "softmax max": (lambda x: x.softmax(-1), rows_apart, lambda x: 30 * x, "max"),
    "attention": (attend, lambda x: x, lambda x: 5 * x, "max"),
    "attention offset": (attend, lambda x: x / 2, lambda x: 3 * x, "offset"),
    "layer norm": (lambda x: F.layer_norm(x, (16,)), lambda x: x, lambda x: 9 * x, "series"),
    "layer norm, small": (lambda x: F.layer_norm(x, (16,)), lambda x: x, lambda x: x / 9, "series"),
    "rms norm": (lambda x: F.rms_norm(x, (16,)), lambda x: x, lambda x: 9 * x, "series"),
    "relu": (torch.relu, lambda x: x, lambda x: 15 * x, "window"),
    "clamp": (lambda x: x.clamp(-1, 1), lambda x: x, lambda x: 15 * x, "window"),
    "maximum": (lambda x: torch.maximum(x, x.flip(0)), lambda x: x, lambda x: 15 * x, "window"),
    "order": (lambda x: (x > x.flip(0)).to(torch.float32), lambda x: x, lambda x: 15 * x, "window"),
    "tournament": (lambda x: x.amax(-1), lambda x: x, lambda x: 15 * x, "tournament"),
    "linear": (lambda x: x @ torch.ones(16, 4), lambda x: x, lambda x: 100 * x, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_the_certificate_names_what_left_its_range(name: str) -> None:
    f, usual, outside, method = CASES[name]
    module = Model(Layer(f)).eval()
    runs = [((usual(normal(seed)),), {}) for seed in range(12)]
    plan = sf.make_plan(sf.capture(module, runs[0][0]), calibration=runs)
    if method:
        assert method in {choice.get("method") for choice in plan.choices.values()}
    assert watched(plan)
    sf.run(plan, (usual(normal(3)),), backend="simulate")
    with pytest.raises(sf.RangeError, match="at layer"):
        sf.run(plan, (outside(normal(100)),), backend="simulate")


@pytest.mark.parametrize("f", [attend, lambda x: F.layer_norm(x, (16,)), F.silu])
def test_later_runs_like_the_calibration_pass(f: Move) -> None:
    runs = [((normal(seed),), {}) for seed in range(16)]
    module = Model(Layer(f)).eval()
    plan = sf.make_plan(sf.capture(module, runs[0][0]), calibration=runs)
    for seed in range(100, 104):
        x = normal(seed)
        found = sf.run(plan, (x,), backend="plain").outputs
        assert float((found - f(x)).norm() / f(x).norm()) < 2e-4


def test_inner_values_are_watched_by_name() -> None:
    module = Model(Layer(attend)).eval()
    plan = sf.make_plan(sf.capture(module, (normal(0),)), calibration=[((normal(1),), {})])
    parts = {key.partition(".")[2] for key in watched(plan)}
    assert {"scores", "sums"} <= parts
    with pytest.raises(sf.RangeError, match=r"scaled_dot_product_attention\.scores at layer"):
        sf.run(plan, (6 * normal(9),), backend="simulate")
