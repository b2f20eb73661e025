"""Fits, exp, reciprocal and roots against float64: values, cost, refusals, and JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import RangeError
from sfumato.ops.elementary import (
    ExpPlan,
    InversePlan,
    exp,
    inverse,
    plan_exp,
    plan_inverse,
    reciprocal,
    rsqrt,
    sqrt,
    with_frac,
)
from sfumato.ops.fit import fit_series, series_bits, series_from_dict, series_noise, series_to_dict
from sfumato.protocol.rep3 import Rep3

ULP = 2.0**-18


def spaced(lo: float, hi: float, count: int = 400) -> torch.Tensor:
    """Values from lo to hi, even in the logarithm, that 18 fraction bits hold exactly."""
    x = torch.exp(torch.linspace(math.log(lo), math.log(hi), count, dtype=torch.float64))
    return torch.round(x / ULP) * ULP


@pytest.mark.parametrize("f", [torch.tanh, torch.exp, torch.nn.functional.silu])
def test_a_fit_and_its_rounding_reach_the_tolerance_with_an_exact_line(f) -> None:
    series = fit_series(f, -4.0, 2.0, tolerance=3e-5)
    x = torch.linspace(-4, 2, 999, dtype=torch.float64)
    assert float((series(x) - f(x)).abs().max()) <= series.error * 1.02
    assert series.error + series_noise(series) <= 3.1e-5
    assert (series.linear * 2**series.linear_frac).is_integer()
    assert series_from_dict(json.loads(json.dumps(series_to_dict(series)))) == series


def test_a_looser_tolerance_costs_less() -> None:
    costs = [series_bits(fit_series(torch.tanh, -4.0, 4.0, tolerance=t), 18) for t in (1e-2, 1e-3, 1e-4)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


def test_relative_fits_weigh_the_error() -> None:
    series = fit_series(lambda x: 1 / x, 0.2, 1.0, tolerance=0.02, weight=lambda x: x)
    x = torch.linspace(0.2, 1.0, 999, dtype=torch.float64)
    assert float((series(x) * x - 1).abs().max()) <= 0.02


def test_an_empty_range_or_a_pole_is_refused() -> None:
    with pytest.raises(RangeError, match="nothing to fit"):
        fit_series(torch.tanh, 1.0, 1.0, tolerance=1e-3)
    with pytest.raises(RangeError, match="not finite"):
        fit_series(torch.log, -1.0, 1.0, tolerance=1e-3)


@pytest.mark.parametrize(("lo", "hi"), [(-4.0, 0.0), (-16.0, 0.0), (-40.0, 0.5), (-3.0, 5.0)])
def test_exp_is_relatively_accurate_to_the_end_of_its_range(protocol, run, lo: float, hi: float) -> None:
    plan = plan_exp(lo, hi)
    plan = ExpPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    x = torch.linspace(lo, hi, 401, dtype=torch.float64)
    found = run(protocol, lambda p, s, v: exp(p, s, v, plan), x).value
    grain = 2.0 ** (plan.squarings + 2 - plan.frac)
    assert bool(((found - x.exp()).abs() <= 1.2 * plan.error * x.exp() + grain * (1 + x.exp())).all())
    assert plan.error <= 5e-4


def test_exp_costs_what_its_docstring_says(run) -> None:
    plan, count = plan_exp(-16.0), 512
    found = run(Rep3(), lambda p, s, v: exp(p, s, v, plan), -torch.rand(count, dtype=torch.float64))
    assert (plan.clip, plan.squarings) == (False, 0)
    assert found.rounds <= 4  # the input reaches one party a round late
    assert found.bits == count * plan.bits
    assert plan.bits <= 420


def test_exp_below_its_cut_fades() -> None:
    plan = plan_exp(-40.0, 0.0, cut=-16.0)
    x = torch.linspace(-40, 0, 4001, dtype=torch.float64)
    assert plan.squarings < plan_exp(-40.0, 0.0).squarings
    assert float((plan(x) - x.exp()).abs()[x < -16].max()) <= 3 * math.exp(-16)


@pytest.mark.parametrize("root", [1, 2])
@pytest.mark.parametrize(("lo", "hi"), [(0.3, 2.0), (1.0, 1024.0), (1e-2, 900.0), (3.0, 3.0)])
def test_inverse_is_relatively_accurate_over_its_range(
    protocol, run, root: int, lo: float, hi: float
) -> None:
    plan = InversePlan.from_dict(json.loads(json.dumps(plan_inverse(root, lo, hi).to_dict())))
    x = spaced(lo, hi)
    found = run(protocol, lambda p, s, v: inverse(p, s, v, plan), x).value
    assert float((found * x ** (1 / root) - 1).abs().max()) <= 2e-5 + 2.0**-26


def test_wide_ranges_take_buckets_and_narrow_ones_do_not(run) -> None:
    narrow, wide = plan_inverse(1, 1.0, 8.0), plan_inverse(1, 1.0, 4096.0)
    assert narrow.buckets == 0
    assert wide.buckets >= 3
    x = spaced(1.0, 8.0)
    rounds = [run(Rep3(), lambda p, s, v, q=q: inverse(p, s, v, q), x).rounds for q in (narrow, wide)]
    assert rounds[0] == 4  # the input reaches one party a round late
    assert 8 <= rounds[1] <= 10


@settings(max_examples=8, deadline=None)
@given(low=st.floats(1e-2, 10), ratio=st.floats(1, 1e4))
def test_reciprocals_hold_on_any_range(run, low: float, ratio: float) -> None:
    plan = plan_inverse(1, low, low * ratio)
    x = spaced(low, low * ratio, 40).clamp(low, low * ratio)
    found = run(Rep3(), lambda p, s, v: inverse(p, s, v, plan), x).value
    assert float((found * torch.round(x / ULP) * ULP - 1).abs().max()) <= 3e-5


def test_reciprocal_rsqrt_and_sqrt_keep_the_scale_of_their_input(protocol, run) -> None:
    x = spaced(0.2, 60.0, 301)
    one, two = plan_inverse(1, 0.2, 60.0), plan_inverse(2, 0.2, 60.0)
    for op, plan, expected in ((reciprocal, one, 1 / x), (rsqrt, two, x**-0.5), (sqrt, two, x**0.5)):
        found = run(protocol, lambda p, s, v, f=op, q=plan: f(p, s, v, q), x).value
        assert float(((found - expected).abs() / (2e-5 * expected + 3 * ULP)).max()) <= 1.0


@pytest.mark.parametrize("frac", [7, 18, 25])
def test_with_frac_keeps_the_value(protocol, run, normal, frac: int) -> None:
    x = normal(3, 5)
    found = run(protocol, lambda p, s, v: with_frac(p, s, v, frac), x).value
    assert float((found - x).abs().max()) <= 2.0 ** -min(frac, 18) + ULP


def test_ranges_that_cannot_work_are_refused() -> None:
    for bad in ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (1e-12, 1.0)):
        with pytest.raises(RangeError):
            plan_inverse(1, *bad)
    with pytest.raises(RangeError):
        plan_exp(0.0, 0.0)
    with pytest.raises(RangeError, match="does not fit the ring"):
        plan_exp(0.0, 40.0)


def test_a_plan_for_another_root_is_refused(run) -> None:
    plan = plan_inverse(2, 1.0, 2.0)
    with pytest.raises(RangeError, match="not for"):
        run(Rep3(), lambda p, s, v: reciprocal(p, s, v, plan), torch.ones(3, dtype=torch.float64))
