"""Lower bounds on ε from the errors of an attack, each true with the stated confidence.

An attack says of a release whether one record (the canary) was in the training data. Its *false positives* are
releases without the canary that it takes for releases with it, its *false negatives* the reverse. A mechanism that is
(ε, δ)-private keeps the two rates from being small together, so measured rates bound ε from below. Three bounds:

============================  =====================================  ================================================
bound                         what it needs                          rigorous for
============================  =====================================  ================================================
`epsilon_from_counts`         independent trials                     every mechanism
`gaussian_epsilon_bound`      independent trials                     one Gaussian step without subsampling; for others
                                                                     a heuristic
`one_run_bound`               one training with canaries, each in    every mechanism
                              with probability ½ by its own coin
============================  =====================================  ================================================

A lower bound can refute a claim and never proves one; a bound of 0 says only that the attack was weak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats
from torch import Tensor

from sfumato.errors import JobError

__all__ = [
    "CONFIDENCE",
    "Counts",
    "best_threshold",
    "clopper_pearson_upper",
    "epsilon_from_counts",
    "epsilon_of_gaussian",
    "gaussian_delta",
    "gaussian_epsilon_bound",
    "one_run_bound",
    "one_run_p_value",
    "split_bound",
]

#: Of every bound here unless another is asked for.
CONFIDENCE = 0.95
#: Thresholds that are tried on the tuning half: quantiles of its scores. More would not move a bound by 0.01.
_CANDIDATES = 400


@dataclass(frozen=True, slots=True)
class Counts:
    """Errors of a test: ``false_negatives`` among ``present`` trials with, ``false_positives`` among ``absent`` ones
    without the canary."""

    present: int
    absent: int
    false_negatives: int
    false_positives: int

    def __post_init__(self) -> None:
        for errors, trials in ((self.false_negatives, self.present), (self.false_positives, self.absent)):
            if not 0 <= errors <= trials or trials == 0:
                raise JobError(
                    f"{errors} errors in {trials} trials cannot be; give at least one trial a side"
                )

    @staticmethod
    def of(present: Tensor, absent: Tensor, threshold: float) -> Counts:
        """Of scores (n,) of trials with and without the canary, where a score above ``threshold`` says "present"."""
        return Counts(
            present=len(present),
            absent=len(absent),
            false_negatives=int((present <= threshold).sum()),
            false_positives=int((absent > threshold).sum()),
        )


def clopper_pearson_upper(errors: Any, trials: Any, confidence: float) -> Any:
    """One-sided upper bound of a binomial rate, exact (Clopper and Pearson 1934); numbers or arrays alike.

    *Domain*: 0 ≤ errors ≤ trials, trials ≥ 1, 0 < confidence < 1. *Error*: the true rate is above the bound with
    probability at most 1 - confidence, whatever it is.
    """
    errors, trials = np.asarray(errors), np.asarray(trials)
    with np.errstate(invalid="ignore"):
        found = stats.beta.ppf(confidence, errors + 1, trials - errors)
    return np.where(errors >= trials, 1.0, found)[()]


def epsilon_from_counts(counts: Counts, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound on ε of any (ε, δ)-private mechanism: the larger of ln((1 - δ - FPR)/FNR) and ln((1 - δ - FNR)/FPR)
    at the upper bounds of both rates, and at least 0.

    *Domain*: independent trials; a threshold (and an attack) chosen without looking at these trials. *Error*: above the
    true ε with probability at most 1 - confidence, half of which goes to each rate. Without any error in n trials a
    side it is about ln(n / 3.7) at 95 %, so it cannot reach a large ε. *Source*: [AuditSGD].
    """
    return float(_epsilon(*_upper_rates(counts, confidence), delta))


def gaussian_epsilon_bound(counts: Counts, delta: float, confidence: float = CONFIDENCE) -> float:
    """Lower bound on ε of a Gaussian mechanism: μ ≥ Φ⁻¹(1 - FPR) - Φ⁻¹(FNR) at the upper bounds of both rates, then the
    ε that a Gaussian mechanism of that μ has at ``delta``.

    *Domain*: as `epsilon_from_counts`, and a mechanism whose trade-off curve is a Gaussian's: *one* step of the
    Gaussian mechanism on the whole data (sample rate 1), or several of them. With subsampling it is a heuristic and may
    be above the true ε. *Error*: above the true ε with probability at most 1 - confidence. *Source*: [GDP] for μ;
    [TightAudit] for the audit with it.
    """
    return epsilon_of_gaussian(float(_mu(*_upper_rates(counts, confidence))), delta)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """δ of a Gaussian mechanism of sensitivity ``mu`` standard deviations: Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ).

    *Domain*: ε ≥ 0, μ ≥ 0. *Error*: exact. *Source*: [AnalyticGauss] 3.
    """
    if mu <= 0.0:
        return 0.0
    ratio = epsilon / mu
    # The second term as a sum of logarithms: e^ε overflows where Φ underflows.
    return float(special.ndtr(mu / 2 - ratio) - math.exp(epsilon + special.log_ndtr(-mu / 2 - ratio)))


def epsilon_of_gaussian(mu: float, delta: float) -> float:
    """The ε at which `gaussian_delta` is ``delta``, 0 if it is below that already at ε = 0; to 1e-9.

    Raises:
        JobError: ``delta`` is not strictly between 0 and 1.
    """
    _check_delta(delta)
    if mu <= 0.0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    # Without its second term the formula is larger, and solved in closed form.
    most = mu * mu / 2 + mu * float(-special.ndtri(delta))
    return float(optimize.brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, most, xtol=1e-10))


def best_threshold(
    present: Tensor, absent: Tensor, delta: float, confidence: float = CONFIDENCE, *, gaussian: bool = False
) -> float:
    """The threshold that makes the bound large on these scores; the bound itself must then come from *other* scores.

    Args:
        present: scores (n,) of trials with the canary; they tend to be the larger ones.
        absent: scores (n,) of trials without it.
        gaussian: for `gaussian_epsilon_bound`, whose best threshold is midway between the sides. For
            `epsilon_from_counts` it lies in a tail and is searched.
    """
    with_canary, without = (np.sort(np.asarray(x.detach().double().cpu())) for x in (present, absent))
    if not len(with_canary) or not len(without):
        raise JobError("a threshold needs scores with and without the canary; ask for more trials")
    if gaussian:
        return float(np.median(with_canary) + np.median(without)) / 2
    candidates = np.unique(
        np.quantile(np.concatenate([with_canary, without]), np.linspace(0, 1, _CANDIDATES))
    )
    below = np.searchsorted(with_canary, candidates, side="right")
    above = len(without) - np.searchsorted(without, candidates, side="right")
    each = _each_side(confidence)
    merit = _epsilon(
        clopper_pearson_upper(below, len(with_canary), each),
        clopper_pearson_upper(above, len(without), each),
        delta,
    )
    best = np.flatnonzero(merit == merit.max())
    # Of a plateau its middle: two sides that do not overlap leave a gap, and its edge would be a poor threshold.
    return float(candidates[best[len(best) // 2]])


def one_run_p_value(epsilon: float, *, guesses: int, correct: int, canaries: int, delta: float) -> float:
    """Largest probability that an (ε, δ)-private training lets ``correct`` or more of ``guesses`` guesses be right.

    *Domain*: ``canaries`` records, each in the training with probability ½ by its own coin; the attack guesses of
    ``guesses`` of them whether they were in, and abstains on the rest. *Error*: an upper bound, exact at δ = 0 (every
    guess is right as if by randomised response). *Source*: [OneRun].
    """
    chance = special.expit(epsilon)
    tail = float(stats.binom.sf(correct - 1, guesses, chance))
    if correct == 0:
        return 1.0
    # Mass just below `correct`, per guess that δ would have to turn; the worst number of turned guesses counts.
    turned = np.arange(1, correct + 1)
    mass = np.cumsum(stats.binom.pmf(correct - turned, guesses, chance))
    return min(1.0, tail + 2 * canaries * delta * float((mass / turned).max()))


def one_run_bound(
    guesses: int, correct: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Lower bound on ε of one training: the ε up to which so many right guesses would be too unlikely.

    *Domain*: as `one_run_p_value`; the number of guesses fixed before looking at the coins. *Error*: above the true ε
    with probability at most 1 - confidence, over the coins and the training's randomness. All of r guesses right give
    about ln(r / 3) at 95 %, which is the most that r guesses can show. *Source*: [OneRun].

    Raises:
        JobError: counts that cannot be, or ``delta`` out of range.
    """
    if not 0 <= correct <= guesses <= canaries or guesses == 0:
        raise JobError(
            f"{correct} right of {guesses} guesses on {canaries} canaries cannot be; check the counts"
        )
    _check_delta(delta)
    wrong = 1.0 - confidence

    def margin(epsilon: float) -> float:
        p = one_run_p_value(epsilon, guesses=guesses, correct=correct, canaries=canaries, delta=delta)
        return p - wrong

    if margin(0.0) >= 0.0:
        return 0.0
    # At this ε even guesses that are all right are no surprise.
    most = float(special.logit(wrong ** (1.0 / guesses)))
    return float(optimize.bisect(margin, 0.0, most + 1e-9, xtol=1e-9))


def split_bound(
    present: Tensor, absent: Tensor, delta: float, confidence: float = CONFIDENCE, *, gaussian: bool = False
) -> tuple[float, Counts]:
    """(ε, counts) of `gaussian_epsilon_bound` if ``gaussian``, else of `epsilon_from_counts`.

    The threshold is chosen on the first scores (n,) of each side (a fifth or a half), the counts are those of the rest.

    The order of the scores must tell nothing, as that of independent trials does.
    """
    # A median needs few scores, the search of a tail many.
    tuning = [len(x) // (5 if gaussian else 2) for x in (present, absent)]
    threshold = best_threshold(
        present[: tuning[0]], absent[: tuning[1]], delta, confidence, gaussian=gaussian
    )
    counts = Counts.of(present[tuning[0] :], absent[tuning[1] :], threshold)
    bound = gaussian_epsilon_bound if gaussian else epsilon_from_counts
    return bound(counts, delta, confidence), counts


def _each_side(confidence: float) -> float:
    """Both rates are bounded at once, so each gets half of the doubt."""
    if not 0.0 < confidence < 1.0:
        raise JobError(f"a confidence of {confidence:g} is none; give a number between 0 and 1, such as 0.95")
    return 1.0 - (1.0 - confidence) / 2


def _upper_rates(counts: Counts, confidence: float) -> tuple[float, float]:
    """Upper bounds of (false negative rate, false positive rate), true together with ``confidence``."""
    each = _each_side(confidence)
    return (
        float(clopper_pearson_upper(counts.false_negatives, counts.present, each)),
        float(clopper_pearson_upper(counts.false_positives, counts.absent, each)),
    )


def _epsilon(missed: Any, alarms: Any, delta: float) -> Any:
    _check_delta(delta)
    odds = np.maximum((1 - delta - alarms) / missed, (1 - delta - missed) / alarms)
    return np.log(np.maximum(odds, 1.0))


def _mu(missed: Any, alarms: Any) -> Any:
    return np.maximum(-special.ndtri(alarms) - special.ndtri(missed), 0.0)


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise JobError(f"δ = {delta:g} is out of range; give a number between 0 and 1, such as 1e-5")
