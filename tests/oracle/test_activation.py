"""Smooth functions by one opening against float64, inside their ranges and clamped beyond them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import RangeError
from sfumato.ops.activation import FUNCTIONS, SmoothPlan, hardsigmoid, hardswish, plan_smooth, smooth
from sfumato.ops.fit import series_bits
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3

ULP = 2.0**-18


def error(run, p, name: str, plan: SmoothPlan, lo: float, hi: float) -> float:
    x = torch.linspace(lo, hi, 1201, dtype=torch.float64)
    found = run(p, lambda q, s, v: smooth(q, s, v, plan), x).value
    return float((found - FUNCTIONS[name].f(x)).abs().max())


@pytest.mark.parametrize("bound", [8.0, 16.0])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "quick_gelu", "mish"])
def test_gated_activations_reach_1e_4(run, name: str, bound: float) -> None:
    plan = plan_smooth(name, -bound, bound)
    for p in (Rep3(), Plain()):
        assert error(run, p, name, plan, -bound, bound) <= 1e-4


@pytest.mark.parametrize("name", ["sigmoid", "logsigmoid", "tanh", "erf", "softplus", "elu", "sin", "cos"])
def test_other_functions_reach_1e_4(protocol, run, name: str) -> None:
    plan = plan_smooth(name, -5.0, 7.0)
    assert error(run, protocol, name, plan, -5.0, 7.0) <= 1e-4


@pytest.mark.parametrize("name", ["log", "sqrt"])
def test_functions_of_positive_values_fit_short_ranges(protocol, run, name: str) -> None:
    plan = plan_smooth(name, 0.5, 4.0)
    assert error(run, protocol, name, plan, 0.5, 4.0) <= 1e-4


@pytest.mark.parametrize("name", [n for n, known in FUNCTIONS.items() if known.tails])
def test_clamped_plans_hold_far_outside_the_fit(protocol, run, name: str) -> None:
    plan = plan_smooth(name, -70.0, 90.0)
    assert plan.method == "clamped"
    assert error(run, protocol, name, plan, -70.0, 90.0) <= 2e-4


def test_ranges_without_a_side_are_not_clamped_there(run) -> None:
    plan = plan_smooth("silu", -0.2, 200.0)
    assert (plan.below, plan.above) == (False, True)
    assert error(run, Rep3(), "silu", plan, -0.2, 200.0) <= 1e-4


def test_one_opening_costs_what_its_fit_says(run) -> None:
    plan, count = plan_smooth("silu", -8.0, 8.0), 1024
    x = torch.linspace(-8, 8, count, dtype=torch.float64)
    found = run(Rep3(), lambda p, s, v: smooth(p, s, v, plan), x)
    assert found.rounds <= 4  # the input reaches one party a round late
    assert found.bits == count * series_bits(plan.series, 18)
    assert found.bits / count <= 1400


def test_silu_on_a_large_odd_shape_runs_in_tiles(protocol, run, normal) -> None:
    x = normal(3, 7, 31, 11).clamp(-5, 5)
    plan = plan_smooth("silu", -5.0, 5.0)
    found = run(protocol, lambda p, s, v: smooth(p, s, v, plan), x).value
    assert float((found - F.silu(x)).abs().max()) <= 1e-4


def test_more_fraction_bits_may_be_asked_of_the_result(run) -> None:
    plan = plan_smooth("sigmoid", -6.0, 6.0)
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    found = run(Rep3(), lambda p, s, v: smooth(p, s, v, plan, frac=26), x).value
    assert float((found - plan.series(x)).abs().max()) <= 6 * plan.series.noise + 2.0**-26


def test_a_loose_fit_sums_up_in_fewer_bits_than_its_result_has(protocol, run) -> None:
    plan = plan_smooth("sigmoid", -6.0, 6.0, tolerance=5e-2, frac=12)
    assert plan.series.scale < 30
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    found = run(protocol, lambda p, s, v: smooth(p, s, v, plan, frac=30), x).value
    assert float((found - torch.sigmoid(x)).abs().max()) <= 6e-2


@pytest.mark.parametrize(("lo", "hi"), [(-8.0, -4.0), (-12.0, -9.0)])
def test_functions_with_small_values_are_fitted(run, lo: float, hi: float) -> None:
    plan = plan_smooth("exp", lo, hi)
    for p in (Rep3(), Plain()):
        assert error(run, p, "exp", plan, lo, hi) <= 6e-5


@pytest.mark.parametrize(("op", "f"), [(hardswish, F.hardswish), (hardsigmoid, F.hardsigmoid)])
def test_hard_gates_are_exact_to_a_few_units(protocol, run, normal, op, f) -> None:
    x = normal(9, 13) * 4
    found = run(protocol, lambda p, s, v: op(p, s, v, 32.0), x).value
    assert float((found - f(x)).abs().max()) <= 40 * ULP + 2.0**-9


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1e-5), (1.0, 1.0 + 2.0**-17), (-3e-4, 3e-4), (5.0, 5.002)])
def test_ranges_of_a_few_units_are_fitted(protocol, run, lo: float, hi: float) -> None:
    plan = plan_smooth("silu", lo, hi)
    assert error(run, protocol, "silu", plan, lo, hi) <= 6e-5


@pytest.mark.parametrize("name", ["elu", "silu", "sigmoid", "softplus"])
@pytest.mark.parametrize(
    ("lo", "hi"), [(0.5, 1.0), (-0.5, 0.25), (16.0, 20.0), (-90.0, -20.0), (-13.0, -11.5)]
)
def test_clamped_ranges_on_one_side_of_a_tail(run, name: str, lo: float, hi: float) -> None:
    plan = plan_smooth(name, lo, hi, method="clamped")
    for p in (Rep3(), Plain()):
        assert error(run, p, name, plan, lo, hi) <= 1e-4 + 2.0**-9


def test_plans_survive_json() -> None:
    for plan in (plan_smooth("silu", -8.0, 8.0), plan_smooth("tanh", -80.0, 8.0)):
        assert SmoothPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(RangeError, match="no smooth function"):
        plan_smooth("nothing", -1.0, 1.0)
    with pytest.raises(RangeError, match="needs a range"):
        plan_smooth("silu", 2.0, 1.0)
    with pytest.raises(RangeError, match="no straight tails"):
        plan_smooth("sin", -1.0, 1.0, method="clamped")
    with pytest.raises(RangeError, match="cannot be fitted"):
        plan_smooth("log", 1e-3, 8.0)
