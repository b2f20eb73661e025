"""Where other frameworks lose accuracy: each case is one that SPU or CrypTen gets wrong, and that must be right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ops import basic
from sfumato.ops.activation import FUNCTIONS, plan_smooth, smooth
from sfumato.ops.attention import attention
from sfumato.ops.elementary import exp, plan_exp
from sfumato.ops.norm import group_norm, plan_norm
from sfumato.ops.softmax import SoftmaxPlan, plan_softmax, softmax
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3

ULP = 2.0**-18
PROTOCOLS = [
    pytest.param(Rep3(), id="rep3"),
    pytest.param(Rep3(two_way=True), id="two-way"),
    pytest.param(Plain(), id="plain"),
]


def planned(scores: Tensor, *, reach: float = 1.0, method: str | None = None) -> SoftmaxPlan:
    rows = scores.amax(-1)
    lo, hi = float(scores.min()) - 1, float(scores.max()) + 1
    return plan_softmax(
        scores.shape[-1], lo, hi, float(rows.min()) - 0.5, float(rows.max()) + 0.5, reach=reach, method=method
    )


def variation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().sum(-1).max()) / 2


@pytest.mark.parametrize("p", PROTOCOLS)
def test_exp_of_5_of_10_and_of_minus_600_in_one_range(run, p) -> None:
    """A limit (1 + x / 2^8)^(2^8) is 5 % low at 5 and garbage at -600; ours is relative above exp(-10)."""
    x = torch.tensor([-600.0, -300.0, -20.0, -5.0, 0.0, 1.0, 5.0, 10.0], dtype=torch.float64)
    plan = plan_exp(-600.0, 10.0)
    found = run(p, lambda q, s, v: exp(q, s, v, plan), x).value
    assert bool(((found - x.exp()).abs() <= 1.1 * plan.error * x.exp() + 6e-5).all())
    assert float((found / x.exp() - 1)[3:].abs().max()) <= 6e-4


@pytest.mark.parametrize("p", PROTOCOLS)
def test_exp_is_relatively_right_at_5_and_10(run, p) -> None:
    plan = plan_exp(5.0, 10.0)
    x = torch.linspace(5, 10, 501, dtype=torch.float64)
    found = run(p, lambda q, s, v: exp(q, s, v, plan), x).value
    assert float((found / x.exp() - 1).abs().max()) <= 5.1e-4


@pytest.mark.parametrize("p", PROTOCOLS)
def test_exps_far_below_one_unit_are_nothing(run, p) -> None:
    for lo, hi in ((-400.0, -200.0), (-40.0, -30.0), (-2000.0, -1.0)):
        plan = plan_exp(lo, hi)
        x = torch.linspace(lo, hi, 200, dtype=torch.float64)
        for frac in (None, 18, 8):
            found = run(p, lambda q, s, v, plan=plan, frac=frac: exp(q, s, v, plan, frac=frac), x).value
            unit = 2.0 ** -(plan.frac if frac is None else frac)
            assert float((found - x.exp()).abs().max()) <= max(unit, 1e-3 * float(x[-1].exp())) * 1.1


@pytest.mark.parametrize("p", PROTOCOLS)
@pytest.mark.parametrize("method", ["offset", "max"])
def test_an_additive_mask_of_minus_ten_thousand(run, normal, p, method: str) -> None:
    """Added to a score it wraps a 32-bit word and shifts a Newton reciprocal out of its range; both peers fail."""
    q, k, v = normal(1, 2, 12, 16) * 2, normal(1, 2, 20, 16), normal(1, 2, 20, 8)
    mask = torch.zeros(1, 1, 12, 20, dtype=torch.float64)
    mask[..., 7:] = -1e4
    scores = q @ k.mT / 4
    plan = planned(scores, reach=4.0, method=method)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if method == "offset":
        rows = scores[..., :7].amax(-1)
        plan = plan_softmax(
            20, plan.lo, plan.hi, float(rows.min()) - 0.5, plan.hi, reach=4.0, method="offset"
        )
    found = run(p, lambda r, s, a, b, c: attention(r, s, a, b, c, plan, mask=mask), q, k, v).value
    assert float((found - expected).abs().max()) <= 4e-3


@pytest.mark.parametrize("p", PROTOCOLS)
def test_the_mean_of_40960_ones(run, p) -> None:
    """A constant 1 / 40,960 rounded to 18 bits is 6 / 2^18: 6 % off."""
    x = torch.ones(1, 40960, dtype=torch.float64)

    async def mean(q, s, v):
        total = q.linear(lambda part: part.sum(-1, keepdim=True), v)
        return await basic.scale(q, s, total, 1.0 / 40960)

    found = run(p, mean, x).value
    # A factor of 30 fraction bits has 14 significant ones: a sum's own relative error is 2^-16.
    assert abs(float(found) - 1.0) <= 5 * ULP
    y = torch.ones(1, 40960, dtype=torch.float64)
    y[:, ::2] = -1.0
    plan = plan_norm(40960, 0.5, 2.0, 0.0)
    normed = run(
        p, lambda q, s, v: group_norm(q, s, v.viewed(v.frac), 1, None, None, plan), (y + 1.0).unsqueeze(1)
    ).value
    assert float((normed[0, 0] - y).abs().max()) <= 1e-4


@pytest.mark.parametrize("p", PROTOCOLS)
def test_negative_values_just_above_a_whole_number(run, p) -> None:
    """A decode that splits off the fraction before the sign turns -2.99997 into -1.99997 or -3.99997."""
    x = torch.tensor([-2.99997, -3.00003, -0.00001, -1.0 + ULP, -1.0, -5.0 + 3 * ULP], dtype=torch.float64)
    same = run(p, lambda q, s, v: _identity(v), x).value
    assert float((same - x).abs().max()) <= ULP / 2
    scaled = run(p, lambda q, s, v: basic.scale(q, s, v, 0.25), x).value
    assert float((scaled - x / 4).abs().max()) <= 2 * ULP


async def _identity(v):
    return v


@pytest.mark.parametrize("p", [Rep3(), Plain()], ids=["rep3", "plain"])
@pytest.mark.parametrize("method", ["offset", "max"])
def test_softmax_over_4096_keys_at_deviation_3(run, normal, p, method: str) -> None:
    """Weights of 1e-6 vanish at 18 fraction bits, and a sum of 4,096 of them with them."""
    x = normal(2, 4096) * 3
    plan = planned(x, method=method)
    found = run(p, lambda q, s, v: softmax(q, s, v, -1, plan), x).value
    # Each weight is rounded to 2^-18 at the end, at most one unit each; attention divides later and does not.
    assert variation(found, x.softmax(-1)) <= 1e-2
    v = normal(1, 1, 4096, 4)
    q = torch.zeros(1, 1, 2, 1, dtype=torch.float64) + 1.0
    rows = x[:1].reshape(1, 1, 4096, 1)
    near = planned((q @ rows.mT), reach=5.0, method=method)
    mixed = run(p, lambda r, s, a, b, c: attention(r, s, a, b, c, near, scale=1.0), q, rows, v).value
    expected = F.scaled_dot_product_attention(q, rows, v, scale=1.0)
    assert float((mixed - expected).abs().max()) <= 5e-3


@pytest.mark.parametrize("p", PROTOCOLS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "mish", "sigmoid", "tanh", "softplus"])
def test_activations_with_outliers_above_100(run, normal, p, name: str) -> None:
    """A residual stream: mostly within 3, a few channels beyond 100."""
    x = normal(64, 16)
    x[::9] = x[::9] * 60
    assert float(x.abs().max()) > 100
    reach = float(x.abs().max()) * 1.1
    plan = plan_smooth(name, -reach, reach)
    found = run(p, lambda q, s, v: smooth(q, s, v, plan), x).value
    assert float((found - FUNCTIONS[name].f(x)).abs().max()) <= 5e-5 + 2 * reach * 2.0**-14 + 2 * ULP
    small = x.abs() < 4
    assert float((found - FUNCTIONS[name].f(x)).abs()[small].max()) <= 1e-4


@pytest.mark.parametrize("p", PROTOCOLS)
def test_attention_with_logits_above_20(run, normal, p) -> None:
    q, k, v = normal(1, 2, 16, 8) * 6, normal(1, 2, 16, 8) * 4, normal(1, 2, 16, 8)
    scores = q @ k.mT / 8**0.5
    assert float(scores.max()) > 20
    plan = planned(scores, reach=4.0)
    expected = F.scaled_dot_product_attention(q, k, v)
    found = run(p, lambda r, s, a, b, c: attention(r, s, a, b, c, plan), q, k, v).value
    assert float((found - expected).abs().max()) <= 4e-3
