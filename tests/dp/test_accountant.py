"""Both accountants against published and analytic values, and the search for the noise."""

from __future__ import annotations

import math

import pytest
from opacus.accountants import GaussianAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from sfumato.dp import accountant
from sfumato.dp.accountant import Event, Spent, check, noise_multiplier, spent
from sfumato.errors import JobError

DELTA = 1e-5


@pytest.mark.parametrize(
    ("event", "delta", "prv", "pld", "rdp"),
    [
        # The paper's settings; the noise is known to three decimals, so ε to about 0.005.
        (Event(1 / 30, 1.472, 6000), 1e-5, 10.000, 9.989, 10.76),
        (Event(1 / 25, 0.858, 750), 1e-5, 10.000, 9.989, 11.02),
        (Event(1 / 20, 8.062, 1400), 1e-6, 1.000, 0.990, 1.068),
        (Event(1 / 20, 1.245, 1400), 1e-6, 9.999, 9.989, 10.72),
        (Event(0.05, 1.0, 100), 1e-5, 3.512, 3.502, 4.04),
    ],
)
def test_known_values(event: Event, delta: float, prv: float, pld: float, rdp: float) -> None:
    found = spent([event], delta)
    check(found)
    assert found.prv == pytest.approx(prv, abs=0.006)
    assert found.pld == pytest.approx(pld, abs=0.006)
    assert found.rdp == pytest.approx(rdp, abs=0.01)
    assert found.epsilon == max(found.prv, found.pld)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of the Gaussian mechanism with sensitivity over noise ``mu``. Source: Balle and Wang 2018, theorem 8."""

    def over(epsilon: float) -> float:
        left = norm.cdf(mu / 2 - epsilon / mu)
        return float(left - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(over, 0, 50))


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (10.0, 50), (2.5, 3)])
def test_full_batches_against_the_closed_form(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    found = spent([Event(1.0, sigma, steps)], DELTA)
    assert exact <= found.pld <= exact + 0.001
    assert exact <= found.prv <= exact + 0.0105  # its estimate has 0.01 added
    if (sigma, steps) == (1.0, 1):
        assert exact == pytest.approx(4.38, abs=0.005)


def test_composition() -> None:
    whole = spent([Event(0.05, 2.0, 100)], DELTA)
    assert spent([Event(0.05, 2.0, 60), Event(0.05, 2.0, 40), Event(0.1, 1.0, 0)], DELTA) == whole
    parts = [Event(0.05, 2.0, 100), Event(1.0, 5.0, 1), Event(0.02, 2.0, 500)]
    mixed = spent(parts, DELTA)
    check(mixed)
    assert whole.epsilon < mixed.epsilon < sum(spent([part], DELTA).epsilon for part in parts)
    # Full-batch Gaussians compose to one: 1/σ² adds.
    two = spent([Event(1.0, 2.0, 1), Event(1.0, 3.0, 2)], DELTA)
    assert two.pld == pytest.approx(gaussian_epsilon(math.sqrt(1 / 4 + 2 / 9), DELTA), abs=0.002)


def test_no_steps_and_no_noise() -> None:
    assert spent([], DELTA) == spent([Event(0.1, 1.0, 0)], DELTA) == Spent(0.0, 0.0, 0.0)
    open_run = spent([Event(0.1, 0.0, 1), Event(0.1, 1.0, 1)], DELTA)
    assert open_run.epsilon == math.inf
    check(open_run)


def test_gdp_reports_too_little_and_is_not_offered() -> None:
    with pytest.warns(UserWarning, match="GDP"):
        gdp = GaussianAccountant()
    gdp.history = [(1.0, 0.05, 100)]
    assert gdp.get_epsilon(delta=DELTA) < 2.75 < 3.5 < spent([Event(0.05, 1.0, 100)], DELTA).pld
    assert not [name for name in accountant.__all__ if "gdp" in name.lower() or "gaussian" in name.lower()]


def test_check_stops_on_disagreement() -> None:
    check(Spent(prv=1.01, pld=1.0, rdp=1.1))
    check(Spent(prv=9.91, pld=10.0, rdp=11.0))  # one per cent
    for wrong in (
        Spent(1.03, 1.0, 1.1),
        Spent(0.97, 1.0, 1.1),
        Spent(math.nan, 1.0, 1.1),
        Spent(math.inf, 1.0, 2.0),
    ):
        with pytest.raises(JobError, match="accountants disagree"):
            check(wrong)
    with pytest.raises(JobError, match="RDP bound"):
        check(Spent(prv=1.01, pld=1.0, rdp=0.9))


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(1.0, 1 / 30, 900), (3.0, 1 / 30, 300), (4.39, 1.0, 1), (0.05, 0.03, 1000)],
)
def test_the_noise_is_the_smallest(epsilon: float, rate: float, steps: int) -> None:
    noise = noise_multiplier(epsilon, DELTA, rate, steps)
    assert noise == round(noise, 4)
    assert spent([Event(rate, noise, steps)], DELTA).epsilon <= epsilon
    assert spent([Event(rate, round(noise - 1e-4, 4), steps)], DELTA).epsilon > epsilon


def test_the_noise_is_monotone() -> None:
    by_epsilon = [noise_multiplier(epsilon, DELTA, 0.05, 200) for epsilon in (0.5, 1.0, 2.0)]
    assert by_epsilon == sorted(by_epsilon, reverse=True)
    assert len(set(by_epsilon)) == 3
    assert noise_multiplier(1.0, DELTA, 0.05, 201) > by_epsilon[1]
    assert noise_multiplier(1.0, DELTA, 0.051, 200) > by_epsilon[1]
    assert noise_multiplier(1.0, DELTA / 10, 0.05, 200) > by_epsilon[1]


def test_steps_are_counted_not_derived() -> None:
    # Opacus takes int(epochs / q) and q = 1 / batches, which loses a step to rounding for some numbers of batches.
    assert int(1 / (1 / 93)) == 92
    one_less, exact = (spent([Event(1 / 93, 1.0, 93 * 20 - lost)], DELTA).epsilon for lost in (20, 0))
    assert one_less < exact
    for steps in (93.0, True, -1):
        with pytest.raises(JobError, match="whole number"):
            Event(1 / 93, 1.0, steps)  # type: ignore[arg-type]


def test_what_it_refuses() -> None:
    with pytest.raises(
        JobError, match=r"no noise keeps 1000 steps at sample rate 0.03 within epsilon 0.005: .* 0.0100"
    ):
        noise_multiplier(0.005, DELTA, 0.03, 1000)
    for epsilon in (0.0, -1.0, 101.0, math.inf, math.nan):
        with pytest.raises(JobError, match="epsilon is a number"):
            noise_multiplier(epsilon, DELTA, 0.1, 10)
    for delta in (0.0, 1.0, 1e-12, math.nan):
        with pytest.raises(JobError, match="delta is a probability"):
            noise_multiplier(1.0, delta, 0.1, 10)
        with pytest.raises(JobError, match="delta is a probability"):
            spent([], delta)
    with pytest.raises(JobError, match="at least one step"):
        noise_multiplier(1.0, DELTA, 0.1, 0)
    for rate in (0.0, 1.1, math.nan):
        with pytest.raises(JobError, match="sample_rate"):
            noise_multiplier(1.0, DELTA, rate, 10)
    for noise in (-1.0, math.inf, math.nan):
        with pytest.raises(JobError, match="noise_multiplier"):
            Event(0.1, noise, 10)
    with pytest.raises(JobError, match="promises nothing; raise the noise"):
        spent([Event(0.03, 0.1, 1000)], DELTA)
