"""ε of a training, by two accountants that share no code: Opacus' PRV and dp-accounting's PLD, with RDP above both.

Every step is a Poisson-subsampled Gaussian mechanism and the adjacency is add-or-remove one record. PRV gives its
upper estimate (0.01 above the truth at most) and PLD its pessimistic one, so they differ by about 0.01; more means that
one of them is wrong. Steps are counted, never derived from epochs: ``int(epochs / q)`` loses one to rounding for some
rates. There is no GDP accountant: a central limit, it reports less than is spent (2.70 for 3.50 in the tests).
Source: Gopi et al. 2021 (PRV); Doroshenko et al. 2022 (PLD); Mironov et al. 2019 (RDP).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq

from sfumato.errors import JobError

__all__ = ["Event", "Spent", "check", "noise_multiplier", "spent"]

#: Additive error of the PRV estimate, which is added to it: no ε below it can be certified.
_PRV_ERROR = 0.01
#: Difference of the two accountants that their discretisations explain: absolute, and as a part of ε.
_TOLERANCE = (0.02, 0.01)
#: Noise multipliers searched. Under ten thousand clip norms of noise no batch that fits a machine leaves a signal; a
#: tenth of one protects no record that is drawn at all.
_NOISE = (0.1, 1e4)
#: A larger ε promises nothing (a ratio of probabilities of e¹⁰⁰), and the discretisations grow with it.
_MOST_EPSILON = 100.0
#: By RDP, which is quick at any size.
_MOST_PRICED = 200.0
#: Below it, rounding in the discretisations is no longer small beside δ.
_LEAST_DELTA = 1e-10
_GRID = 1e-4


@dataclass(frozen=True)
class Event:
    """``steps`` Poisson-subsampled Gaussian steps.

    ``sample_rate``: probability that a record is in a step's batch, in (0, 1]; 1 is a full batch. ``noise_multiplier``:
    standard deviation of the noise on the *sum* of the clipped gradients, in units of the clip norm; 0 is
    training without privacy.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise JobError(f"sample_rate is a probability above 0 and at most 1, not {self.sample_rate}")
        if not 0.0 <= self.noise_multiplier < math.inf:
            raise JobError(f"noise_multiplier is a finite number of at least 0, not {self.noise_multiplier}")
        if type(self.steps) is not int or self.steps < 0:  # neither a bool nor a rounded float
            raise JobError(f"steps is a whole number of at least 0, not {self.steps!r}")


@dataclass(frozen=True)
class Spent:
    """ε by each accountant, at one δ; ``epsilon`` is the one to state."""

    prv: float
    pld: float
    rdp: float

    @property
    def epsilon(self) -> float:
        """The larger of the two exact accountants; RDP is only a bound above them."""
        return max(self.prv, self.pld)


def spent(events: Iterable[Event], delta: float) -> Spent:
    """ε of all ``events`` together at ``delta``; the order does not matter. No step costs nothing.

    *Error*: PRV is at most 0.01 above the truth, PLD at most about 0.0005; neither is below it.

    Raises:
        JobError: δ outside (0, 1), or steps that the accountants cannot price.
    """
    _check_delta(delta)
    merged = _merge(events)
    if not merged:
        return Spent(0.0, 0.0, 0.0)
    if any(event.noise_multiplier == 0 for event in merged):
        return Spent(math.inf, math.inf, math.inf)
    rdp = _rdp(merged, delta)
    if not rdp <= _MOST_PRICED:
        raise JobError(
            f"{_words(merged)} cost an epsilon of about {rdp:.0f}, which promises nothing; raise the noise multiplier "
            "or take fewer steps"
        )
    return Spent(_prv(merged, delta), _pld(merged, delta), rdp)


def check(spent: Spent) -> None:
    """Hold the accountants to each other.

    Raises:
        JobError: PRV and PLD differ by more than 0.02 and 1 % of ε, or RDP, an upper bound, is below PLD.
    """
    if math.inf == spent.prv == spent.pld == spent.rdp:
        return
    absolute, relative = _TOLERANCE
    if not abs(spent.prv - spent.pld) <= max(
        absolute, relative * min(spent.prv, spent.pld)
    ):  # also catches nan
        raise JobError(
            f"the accountants disagree (PRV {spent.prv:.4f}, PLD {spent.pld:.4f}); change the noise, the sample rate "
            "or the steps, and report this"
        )
    if not spent.rdp >= spent.pld:
        raise JobError(
            f"the accountants disagree (the RDP bound {spent.rdp:.4f} is below PLD's {spent.pld:.4f}); change the "
            "noise, the sample rate or the steps, and report this"
        )


def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier, from 0.1 to 10,000 in units of 0.0001, that keeps ``steps`` within ``epsilon``.

    *Cost*: about eight evaluations of PRV: one to five seconds at an ε of at most 10.

    Raises:
        JobError: ε, δ, rate or steps out of range; ε that no noise reaches; accountants that disagree at the result.
    """
    _check_delta(delta)
    if not 0.0 < epsilon <= _MOST_EPSILON:
        raise JobError(f"epsilon is a number above 0 and at most {_MOST_EPSILON:g}, not {epsilon}")
    if steps < 1:
        raise JobError(f"a training has at least one step, not {steps}")

    def events(index: int) -> list[Event]:
        return [Event(sample_rate, round(index * _GRID, 4), steps)]

    # PRV, with its error added, is almost always the larger; where it is not, the last loop moves up.
    index = math.ceil(_root(epsilon, delta, sample_rate, steps) / _GRID)
    while (index - 1) * _GRID >= _NOISE[0] and _prv(events(index - 1), delta) <= epsilon:
        index -= 1
    while (reached := spent(events(index), delta)).epsilon > epsilon:
        index += 1
    check(reached)
    return round(index * _GRID, 4)


def _root(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The noise at which PRV gives ``epsilon``, nearer than the grid; or the least noise, where that is enough.

    ε falls about as a power of the noise, so in logarithms the search is nearly linear. RDP costs a hundredth of PRV
    and asks for 3 to 10 % more noise, so it gives the bracket; at a small ε, where its largest order is a floor, PRV
    doubles from there.
    """

    def over(log_noise: float, price: Callable[[Sequence[Event], float], float], target: float) -> float:
        return math.log(price([Event(rate, math.exp(log_noise), steps)], delta) / target)

    left, right = math.log(_NOISE[0]), math.log(_NOISE[1])
    rough, fine = (_rdp, max(epsilon, 0.2)), (_prv, epsilon)
    high = left
    while high < right and over(high, *rough) > 0:
        high = min(high + math.log(2), right)
    if high > left and over(high, *rough) < 0:
        high = brentq(over, max(high - math.log(2), left), high, args=rough, xtol=1e-3) + 2e-3
    while over(high, *fine) > 0:
        if high >= right:
            raise JobError(
                f"no noise keeps {steps} steps at sample rate {rate:g} within epsilon {epsilon:g}: with a noise "
                f"multiplier of {_NOISE[1]:g} they cost {epsilon * math.exp(over(right, *fine)):.4f}; raise epsilon"
            )
        high = min(high + math.log(2), right)
    low = max(high - 0.15, left)
    while low > left and over(low, *fine) <= 0:
        high, low = low, max(low - 0.5, left)
    if over(low, *fine) <= 0:
        return math.exp(low)
    return math.exp(brentq(over, low, high, args=fine, xtol=_GRID / (4 * math.exp(high))))


def _merge(events: Iterable[Event]) -> list[Event]:
    """Equal steps counted together, in order of first appearance; each accountant pays per distinct mechanism."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.sample_rate, event.noise_multiplier] += event.steps
    return [Event(rate, noise, count) for (rate, noise), count in steps.items() if count]


def _prv(events: Sequence[Event], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = _history(events)
    with _quiet():
        try:
            return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
        except (ValueError, RuntimeError) as error:  # its discretisation does not reach such a delta
            raise JobError(
                f"the PRV accountant cannot price {_words(events)} at delta {delta:g}: {error}"
            ) from error


def _pld(events: Sequence[Event], delta: float) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)  # rounds pessimistically
    for event in events:
        step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(event.sample_rate, step), event.steps)
    return float(accountant.get_epsilon(delta))


def _rdp(events: Sequence[Event], delta: float) -> float:
    accountant = RDPAccountant()
    accountant.history = _history(events)
    with _quiet():
        return float(accountant.get_epsilon(delta))


def _history(events: Sequence[Event]) -> list[tuple[float, float, int]]:
    return [(event.noise_multiplier, event.sample_rate, event.steps) for event in events]


def _words(events: Sequence[Event]) -> str:
    return ", ".join(
        f"{e.steps} steps of noise {e.noise_multiplier:g} at rate {e.sample_rate:g}" for e in events
    )


def _check_delta(delta: float) -> None:
    if not _LEAST_DELTA <= delta < 1.0:
        raise JobError(
            f"delta is a probability from {_LEAST_DELTA:g} to 1, well below one over the records, not {delta}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two things that Opacus' accountants say and that change no bound: that RDP's best order is the largest or
    smallest that it tries (so its bound is loose), and, at rate 1, that log(1 - q) is infinite (as it should be)."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha", UserWarning)
        yield
