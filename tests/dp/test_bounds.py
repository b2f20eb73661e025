"""Lower bounds on ε: exact where they can be, above nothing that is true, and as tight as known values say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sfumato.dp.bounds import (
    Counts,
    best_threshold,
    clopper_pearson_upper,
    epsilon_from_counts,
    epsilon_of_gaussian,
    gaussian_delta,
    gaussian_epsilon_bound,
    one_run_bound,
    one_run_p_value,
    split_bound,
)
from sfumato.errors import JobError

DELTA = 1e-5


def scores(mu: float, trials: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return mu + torch.randn(trials, generator=source), torch.randn(trials, generator=source)


@pytest.mark.parametrize(("errors", "trials"), [(0, 10), (3, 10), (10, 10), (0, 5000), (1543, 5000)])
def test_the_upper_bound_is_the_exact_binomial_one(errors: int, trials: int) -> None:
    bound = clopper_pearson_upper(errors, trials, 0.975)
    if errors == trials:
        assert bound == 1.0
    else:  # the rate at which so few errors have probability 2.5 %
        assert stats.binom.cdf(errors, trials, bound) == pytest.approx(0.025, rel=1e-6)


@pytest.mark.parametrize("rate", [0.003, 0.2, 0.5])
def test_the_upper_bound_covers_with_its_confidence(rate: float) -> None:
    seen = np.arange(201)
    covers = clopper_pearson_upper(seen, 200, 0.975) >= rate
    assert stats.binom.pmf(seen, 200, rate)[covers].sum() >= 0.975


# ε of a step with noise multiplier 1, 0.5, 0.25 and 2; the first two are 4.38 and 9.99 of the accountants.
@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 4.3772), (2.0, 9.9973), (4.0, 24.3816), (0.5, 1.9931)])
def test_the_gaussian_epsilon_is_the_known_one(mu: float, epsilon: float) -> None:
    found = epsilon_of_gaussian(mu, DELTA)
    assert found == pytest.approx(epsilon, abs=5e-5)
    assert gaussian_delta(found, mu) == pytest.approx(DELTA, rel=1e-6)


def test_the_gaussian_delta_is_that_of_the_best_event() -> None:
    # By definition: the largest P[A] - e^ε Q[A], here by a sum over a fine grid.
    mu, epsilon = 1.3, 0.8
    x = np.linspace(-12, 14, 2_000_001)
    gap = stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x)
    assert gaussian_delta(epsilon, mu) == pytest.approx(np.maximum(gap, 0).sum() * (x[1] - x[0]), rel=1e-5)


def test_what_has_no_epsilon_to_show_gets_zero() -> None:
    assert epsilon_of_gaussian(0.0, DELTA) == 0.0
    assert epsilon_of_gaussian(1e-6, DELTA) == 0.0  # δ alone covers it
    chance = Counts(present=1000, absent=1000, false_negatives=500, false_positives=500)
    assert epsilon_from_counts(chance, DELTA) == gaussian_epsilon_bound(chance, DELTA) == 0.0


def test_large_epsilon_does_not_overflow() -> None:
    assert epsilon_of_gaussian(60.0, DELTA) == pytest.approx(2050, rel=0.02)


# Means over seeds of simulations with 10,000 trials a side and the threshold of the Clopper-Pearson bound.
@pytest.mark.parametrize(("mu", "rigorous", "gaussian"), [(1.0, 1.8, 3.3), (2.0, 4.3, 8.4), (4.0, 6.2, 20.8)])
def test_the_bounds_are_as_tight_as_known(mu: float, rigorous: float, gaussian: float) -> None:
    found = []
    for seed in range(6):
        bound, counts = split_bound(*scores(mu, 10_000, seed), DELTA)
        found.append((bound, gaussian_epsilon_bound(counts, DELTA)))
    mean = np.mean(found, axis=0)
    assert mean[0] == pytest.approx(rigorous, abs=0.45)  # one run scatters by up to 0.4
    assert mean[1] == pytest.approx(gaussian, abs=1.0)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_the_bounds_stay_below_the_truth(mu: float) -> None:
    truth = epsilon_of_gaussian(mu, DELTA)
    both = [
        (split_bound(*pair, DELTA)[0], split_bound(*pair, DELTA, gaussian=True)[0])
        for pair in (scores(mu, 2000, seed) for seed in range(40))
    ]
    above = (np.array(both) > truth).sum(0)
    assert (above <= 5).all()  # of 40, where 2 are allowed in the mean
    assert np.median(both, axis=0)[1] > 0.7 * truth  # and it is no bound that is always low


def test_the_threshold_of_its_own_makes_the_gaussian_bound_tighter() -> None:
    mean = np.mean([split_bound(*scores(1.0, 10_000, seed), DELTA, gaussian=True)[0] for seed in range(6)])
    assert 3.95 < mean < 4.3772


def test_two_sides_apart_are_split_in_the_gap() -> None:
    present, absent = torch.linspace(10, 11, 50), torch.linspace(0, 1, 50)
    assert 1.0 <= best_threshold(present, absent, DELTA) < 10.0
    counts = Counts.of(present, absent, best_threshold(present, absent, DELTA, gaussian=True))
    assert (counts.false_negatives, counts.false_positives) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400), st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_more_errors_never_raise_a_bound(missed: int, alarms: int, delta: float) -> None:
    fewer, more = (Counts(500, 500, missed + extra, alarms) for extra in (0, 100))
    # An attack that is worse than chance is not turned round, so up to chance only.
    if missed + 100 + alarms < 500:
        assert epsilon_from_counts(more, delta) <= epsilon_from_counts(fewer, delta) + 1e-12
    assert gaussian_epsilon_bound(more, delta) <= gaussian_epsilon_bound(fewer, delta) + 1e-8
    assert gaussian_epsilon_bound(fewer, 1e-1) <= gaussian_epsilon_bound(fewer, delta) + 1e-8


def test_no_error_bounds_by_the_number_of_trials() -> None:
    for trials in (100, 1000, 10_000):
        perfect = Counts(trials, trials, 0, 0)
        assert epsilon_from_counts(perfect, DELTA) == pytest.approx(math.log(trials / 3.7), abs=0.05)


def test_one_run_without_delta_is_randomised_response() -> None:
    for epsilon, guesses, correct in [(0.0, 10, 8), (1.0, 40, 35), (3.0, 25, 25)]:
        chance = 1 / (1 + math.exp(-epsilon))
        exact = sum(
            math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k)
            for k in range(correct, guesses + 1)
        )
        found = one_run_p_value(epsilon, guesses=guesses, correct=correct, canaries=100, delta=0.0)
        assert found == pytest.approx(exact, rel=1e-9)


def test_one_run_holds_for_a_mechanism_that_tells_all_with_probability_delta() -> None:
    # Randomised response of every coin, except that with probability δ each is told as it is: (ε, δ)-private.
    epsilon, delta, canaries = 1.0, 0.02, 50
    rate = (1 - delta) / (1 + math.exp(-epsilon)) + delta
    for correct in range(canaries // 2, canaries + 1):
        true = stats.binom.sf(correct - 1, canaries, rate)
        bound = one_run_p_value(epsilon, guesses=canaries, correct=correct, canaries=canaries, delta=delta)
        assert true <= bound + 1e-12
    # Without the term for δ the bound would be false.
    assert stats.binom.sf(44, canaries, rate) > one_run_p_value(
        epsilon, guesses=canaries, correct=45, canaries=canaries, delta=0.0
    )


def test_one_run_refutes_rarely_what_is_true() -> None:
    epsilon, guesses = 2.0, 60
    correct = np.arange(guesses + 1)
    bounds = np.array([one_run_bound(guesses, int(v), 200, DELTA) for v in correct])
    wrong = stats.binom.pmf(correct, guesses, 1 / (1 + math.exp(-epsilon)))[bounds > epsilon].sum()
    assert 0.001 < wrong <= 0.05
    assert (np.diff(bounds) >= 0).all()
    assert bounds[0] == 0.0 < epsilon < bounds[-1]


def test_one_run_of_right_guesses_only_is_bounded_by_their_number() -> None:
    for guesses in (30, 300):
        assert one_run_bound(guesses, guesses, guesses, 1e-9) == pytest.approx(
            math.log(guesses / 3), abs=0.05
        )
    assert one_run_bound(100, 95, 1000, 1e-3) < one_run_bound(100, 95, 1000, 1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Counts(10, 10, 11, 0),
        lambda: Counts(0, 10, 0, 0),
        lambda: epsilon_of_gaussian(1.0, 0.0),
        lambda: epsilon_from_counts(Counts(10, 10, 1, 1), DELTA, 1.0),
        lambda: one_run_bound(10, 11, 20, DELTA),
        lambda: one_run_bound(30, 10, 20, DELTA),
        lambda: one_run_bound(10, 9, 20, 1.0),
        lambda: best_threshold(torch.zeros(0), torch.zeros(3), DELTA),
    ],
)
def test_what_cannot_be_is_refused(wrong: object) -> None:
    with pytest.raises(JobError):
        wrong()  # type: ignore[operator]
