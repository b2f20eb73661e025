"""Sketches are functions of the values alone, however they are merged; margins follow from the tail that was seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.graph.calibrate import Calibration
from sfumato.graph.handlers import Options, Stats
from sfumato.graph.handlers.nonlinear_ranges import log_range, widened, window_bits
from sfumato.graph.tails import FEW_RUNS, Histogram, Sketch
from sfumato.ops.compare import band

VALUES = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)
RUNS = st.lists(st.lists(VALUES, min_size=1, max_size=20), min_size=1, max_size=6)


def seen(runs: list[Tensor], key: str = "in") -> Stats:
    """What calibration keeps of one quantity over these runs."""
    numbers = {
        f"lo_{key}": min(float(r.min()) for r in runs),
        f"hi_{key}": max(float(r.max()) for r in runs),
    }
    return Stats(numbers, {key: reduce(Sketch.merge, map(Sketch.of, runs))})


def calibration(run: list[float]) -> Calibration:
    x = torch.tensor(run, dtype=torch.float64)
    stats = seen([x])
    return Calibration({"silu": dict(stats.numbers)}, 1, {"silu": dict(stats.sketches)})


@given(RUNS, st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_merging_is_exact_in_any_order_and_grouping(runs: list[list[float]], order: Random) -> None:
    parts = [calibration(run) for run in runs]
    whole = reduce(Calibration.merge, parts)
    order.shuffle(parts)
    cut = order.randint(0, len(parts))
    groups = [reduce(Calibration.merge, group, Calibration()) for group in (parts[:cut], parts[cut:])]
    assert groups[0].merge(groups[1]) == whole
    values = torch.tensor([v for run in runs for v in run], dtype=torch.float64)
    assert whole.sketches["silu"]["in"].values == Histogram.of(values)
    assert Calibration.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_histograms_are_as_fine_as_their_values() -> None:
    """Equal or tiny values do not get the bins of large ones: small quantities would lose their margins."""
    for x in (torch.tensor([0.01]), torch.tensor([0.0, 1e-6]), 1e-3 + 1e-6 * torch.rand(9)):
        assert Histogram.of(x).width <= max(float(x.max() - x.min()) / 16, 2.0**-23 * float(x.max()))
    assert Histogram.of(torch.zeros(3)).exponent == -60


def test_histograms_are_small_whatever_is_counted() -> None:
    for x in (torch.randn(10_000), torch.randn(100) * 1e-6, 1e5 + torch.randn(500), torch.zeros(3)):
        h = Histogram.of(x)
        assert 1 <= len(h.counts) <= 48
        assert h.total == x.numel()
        assert h.first * h.width <= float(x.min())
        assert (h.first + len(h.counts)) * h.width > float(x.max())


def margins(make: Callable[[], Tensor], runs: int, risk: float = 1e-4) -> tuple[float, float]:
    """What each side is widened by, as a share of the range."""
    stats = seen([make() for _ in range(runs)])
    lo, hi = widened(stats, "in", Options(risk=risk))
    size = stats["hi_in"] - stats["lo_in"]
    return (stats["lo_in"] - lo) / size, (hi - stats["hi_in"]) / size


@pytest.mark.parametrize("runs", [1, FEW_RUNS, 24])
def test_bounded_inputs_get_a_small_margin(runs: int) -> None:
    torch.manual_seed(0)
    assert all(0.02 <= m <= 0.07 for m in margins(lambda: 12 * torch.rand(20_000) - 6, runs))


def test_normal_inputs_get_more_and_few_runs_the_old_margin() -> None:
    torch.manual_seed(0)
    assert all(0.05 <= m <= 0.25 for m in margins(lambda: torch.randn(20_000), 24))
    assert margins(lambda: torch.randn(400), 2) == pytest.approx((0.25, 0.25), abs=0.02)
    assert margins(lambda: torch.rand(20_000), 24, risk=0.0) == pytest.approx((0.25, 0.25), abs=0.02)


@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.randn(n) * (1 + 0.2 * torch.rand(1))])
def test_the_modelled_risk_bounds_what_later_runs_do(draw: Callable[[int], Tensor]) -> None:
    """At a risk of 2 percent a run, sides together, 40 calibrations of 24 runs each, and 50 later runs for each."""
    torch.manual_seed(1)
    outside = 0
    for _ in range(40):
        lo, hi = widened(seen([draw(2_000) for _ in range(24)]), "in", Options(risk=0.02))
        later = torch.stack([draw(2_000) for _ in range(50)])
        outside += int(((later.amin(1) < lo) | (later.amax(1) > hi)).sum())
    assert outside / 2_000 <= 0.04


def test_a_positive_range_never_reaches_zero() -> None:
    torch.manual_seed(0)
    logs = [torch.randn(50).exp().log2().to(torch.float64) for _ in range(12)]
    stats = seen(logs, "log_in")
    for options in (Options(risk=1e-4), Options(margin=1.5)):
        lo, hi = log_range(stats, "log_in", options)
        assert 0.0 < lo < 2.0 ** stats["lo_log_in"] < 2.0 ** stats["hi_log_in"] < hi


def test_calls_of_one_run_count_once() -> None:
    steps = [calibration([0.0, float(i)]) for i in range(1, 6)]
    run = reduce(Calibration.merge, steps).as_one_run()
    assert run.samples == 1
    sketch = run.sketches["silu"]["in"]
    assert (sketch.runs, sketch.values.total) == (1, 10)
    assert sketch.highs == Histogram.of(torch.tensor([5.0]))


def test_comparisons_look_at_as_many_bits_as_the_budget_asks_for() -> None:
    for wanted in (0.1, 1e-3, 1e-4):
        bits = window_bits(8.0, wanted, 18)
        assert 8 <= bits <= 20
        assert band(8.0, 18, bits) <= wanted
    assert window_bits(8.0, 10.0, 18) == 8
    assert window_bits(1e4, 1e-9, 18) == 20
