"""Norms against float64: public, secret and no affine part, residuals, odd sizes, all sizes of variance."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.norm import NormPlan, group_norm, layer_norm, plan_norm, rms_norm
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3

ULP = 2.0**-18


def planned(square: torch.Tensor, count: int, eps: float, gain: float = 4.0) -> NormPlan:
    plan = plan_norm(count, float(square.min()) / 1.6, float(square.max()) * 1.6, eps, gain=gain)
    return NormPlan.from_dict(json.loads(json.dumps(plan.to_dict())))


def bound(size: float, reach: float = 8.0) -> float:
    """What 18 fraction bits of x allow when the standard deviation is ``size``."""
    return reach * (1e-5 + 4 * ULP / size) + 8 * ULP


@pytest.mark.parametrize("affine", ["none", "public", "secret"])
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_group_norm(protocol, run, normal, size: float, affine: str) -> None:
    x = normal(2, 12, 5, 7) * size + 0.3 * size
    gamma, beta = normal(12) * 0.4 + 1, normal(12)
    plan = planned(x.reshape(2, 4, -1).var(-1, unbiased=False), 3 * 35, 1e-5)
    if affine == "none":
        found = run(protocol, lambda p, s, v: group_norm(p, s, v, 4, None, None, plan), x)
        expected = F.group_norm(x, 4)
    elif affine == "public":
        found = run(protocol, lambda p, s, v: group_norm(p, s, v, 4, gamma, beta, plan), x)
        expected = F.group_norm(x, 4, gamma, beta)
    else:
        found = run(protocol, lambda p, s, v, g, b: group_norm(p, s, v, 4, g, b, plan), x, gamma, beta)
        expected = F.group_norm(x, 4, gamma, beta)
    assert float((found.value - expected).abs().max()) <= bound(size)


@pytest.mark.parametrize("affine", ["none", "public", "secret"])
@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_layer_norm_with_a_residual(protocol, run, normal, size: float, affine: str) -> None:
    x, y = normal(2, 3, 77) * size - size, normal(2, 3, 77)
    gamma, beta = normal(77) * 0.4 + 1, normal(77)
    plan = planned(x.var(-1, unbiased=False), 77, 1e-5)
    if affine == "none":
        found = run(protocol, lambda p, s, v, w: layer_norm(p, s, v, 1, None, None, plan, plus=w), x, y)
        expected = F.layer_norm(x, (77,)) + y
    elif affine == "public":
        found = run(protocol, lambda p, s, v, w: layer_norm(p, s, v, 1, gamma, beta, plan, plus=w), x, y)
        expected = F.layer_norm(x, (77,), gamma, beta) + y
    else:
        found = run(
            protocol,
            lambda p, s, v, w, g, b: layer_norm(p, s, v, 1, g, b, plan, plus=w),
            x,
            y,
            gamma,
            beta,
        )
        expected = F.layer_norm(x, (77,), gamma, beta) + y
    assert float((found.value - expected).abs().max()) <= bound(size)


def test_rms_norm_with_rows_of_very_different_size(protocol, run, normal) -> None:
    x = normal(4, 96) * torch.tensor([[0.1], [1.0], [6.0], [30.0]], dtype=torch.float64)
    gamma = normal(96) * 0.3 + 1
    plan = planned(x.square().mean(-1), 96, 1e-6)
    assert plan.inverse.buckets > 0
    found = run(protocol, lambda p, s, v: rms_norm(p, s, v, 1, gamma, plan), x).value
    assert float((found - F.rms_norm(x, (96,), gamma, 1e-6)).abs().max()) <= bound(0.1)


def test_norm_over_two_axes(protocol, run, normal) -> None:
    x, gamma, beta = normal(3, 4, 5), normal(4, 5), normal(4, 5)
    plan = planned(x.flatten(1).var(-1, unbiased=False), 20, 1e-5)
    found = run(protocol, lambda p, s, v: layer_norm(p, s, v, 2, gamma, beta, plan), x).value
    assert float((found - F.layer_norm(x, (4, 5), gamma, beta)).abs().max()) <= bound(0.5)


@pytest.mark.parametrize("p", [Rep3(), Plain()], ids=["rep3", "plain"])
def test_the_mean_of_many_equal_values_is_exact(run, p) -> None:
    # A constant 1/n rounded to 18 bits would miss by 16 % here.
    x = torch.ones(1, 1, 40960, dtype=torch.float64)
    x[..., ::2] = -1.0
    plan = plan_norm(40960, 0.5, 2.0, 1e-5)
    found = run(p, lambda q, s, v: group_norm(q, s, v, 1, None, None, plan), x + 3.0).value
    assert float((found - x).abs().max()) <= 1e-4


def test_long_groups_of_large_values_are_summed_in_parts(run) -> None:
    plan = plan_norm(1 << 20, 900.0, 4000.0, 1e-5)
    assert plan.chunks > 1
    short = plan_norm(100, 900.0, 4000.0, 1e-5)
    parts = NormPlan(short.count, short.eps, short.inverse, 8, short.reach, short.gain)
    x = torch.randn(2, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 45
    for p in (Rep3(), Plain()):
        found = run(p, lambda q, s, v: layer_norm(q, s, v, 1, None, None, parts), x).value
        assert float((found - F.layer_norm(x, (100,))).abs().max()) <= bound(45.0)


def test_a_norm_costs_one_product_per_element(run, normal) -> None:
    x = normal(1, 8, 64, 64)
    plan = planned(x.reshape(1, 2, -1).var(-1, unbiased=False), 4 * 4096, 1e-5)
    found = run(Rep3(), lambda p, s, v: group_norm(p, s, v, 2, None, None, plan), x)
    assert found.bits / x.numel() <= 3 * 64 + 30 + 2
    assert plan.inverse.buckets == 0
    assert found.rounds <= 13


def test_refusals(run, normal) -> None:
    for bad in ((0, 1.0, 2.0, 1e-5), (4, 2.0, 1.0, 1e-5), (4, 0.0, 1e9, 1e-5)):
        with pytest.raises(RangeError):
            plan_norm(*bad)
    plan = plan_norm(8, 0.5, 2.0, 1e-5)
    with pytest.raises(TypeMismatch, match="groups of 8"):
        run(Rep3(), lambda p, s, v: layer_norm(p, s, v, 1, None, None, plan), normal(2, 9))
    with pytest.raises(TypeMismatch, match="do not split"):
        run(Rep3(), lambda p, s, v: group_norm(p, s, v, 4, None, None, plan), normal(2, 9, 3))
