"""Audits that need no more than one training: canaries put in by coin, and members told from non-members afterwards.

`audit_run` is white box and rigorous for any mechanism: each of m canaries is in the training or not by a coin of its
own, so one run holds m trials. `membership` is black box: it sees the released model only, as anybody may. Both bound ε
from below and are loose for a subsampled training; the tight test of the step itself is `sfumato.dp.audit.audit_step`.
Source: [OneRun]; [LiRA] for true positives at few false positives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
from scipy import stats
from torch import Tensor

from sfumato.dp.bounds import CONFIDENCE, one_run_bound, split_bound
from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError
from sfumato.quality import Interval

__all__ = ["Membership", "OneRun", "audit_run", "membership"]

Records = TypeVar("Records")

#: False positive rate at which true positives are told.
_FALSE_POSITIVES = 0.01
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class OneRun:
    """What one training with canaries showed: ``correct`` of ``guesses`` guesses on ``canaries`` canaries were right,
    so ε ≥ ``bound`` with the stated confidence; ``most`` is the bound had all of them been right."""

    claim: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    bound: float
    most: float
    verdict: Literal["consistent", "refuted"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        said = (
            "THE TRAINING LEAKS MORE THAN IT CLAIMS"
            if self.verdict == "refuted"
            else f"the claim is not refuted (at most {self.most:.2f} could have been shown)"
        )
        return (
            f"{self.correct} of {self.guesses} guesses on {self.canaries} canaries were right, so ε ≥ {self.bound:.2f} "
            f"at δ = {self.delta:g}, {self.confidence:.0%} confidence; the claim is {self.claim:.2f}: {said}."
        )


def audit_run(
    step: Callable[[Tensor], Tensor],
    directions: Callable[[], Tensor],
    *,
    records: Tensor,
    canaries: Tensor,
    steps: int,
    sample_rate: float,
    claim: float,
    delta: float = 1e-5,
    guesses: int | None = None,
    confidence: float = CONFIDENCE,
    stream: SecretStream | None = None,
) -> OneRun:
    """Train once with about half of the canaries, guess from the noised updates which half, and bound ε from below.

    A canary's score is the sum over steps of the noised update times its clipped gradient, over the root of the summed
    squares of the latter. The highest half of the guesses says "in", the lowest "out"; the rest is not guessed.

    Args:
        step: trains on the records of a Poisson batch, indices (n,) where n may be 0, and answers with the noised mean
            gradient (d,) of all trained parameters, flat. It must add noise on its own, as in a real training.
        directions: clipped gradients (m, d) of the canaries at the present weights; asked before every step, may always
            be the same. Any choice gives a valid bound, a poor one a small bound.
        records: indices (n,) of ordinary records, always in the data.
        canaries: indices (m,) of the canaries: records with gradients as unlike as possible, as of mislabelled images.
        steps, sample_rate: of the training, as claimed.
        claim: ε of the training at ``delta``.
        guesses: fixed beforehand; None takes half of the canaries.
        stream: source of the coins; None draws a fresh key.

    *Error*: the bound is above the true ε with probability at most 1 - confidence.

    Raises:
        JobError: fewer than 2 canaries, more guesses than canaries, or a training that ran into infinities.
    """
    count = len(canaries)
    asked = count // 2 if guesses is None else guesses
    if not 2 <= asked <= count:
        raise JobError(
            f"{asked} guesses on {count} canaries cannot be; make at least 2 and at most as many as canaries"
        )
    stream = SecretStream() if stream is None else stream
    inside = stream.child("audit-inclusion").coins(count, 0.5)
    coins = stream.child("audit-batches")
    pool = torch.cat([records, canaries[inside]])
    score, squares = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    for _ in range(steps):
        along = directions()  # (m, d)
        moved = step(pool[coins.coins(len(pool), sample_rate)])
        score += (along @ moved).double().cpu()
        squares += along.square().sum(1).double().cpu()
    score /= squares.clamp(min=1e-30).sqrt()
    if not bool(score.isfinite().all()):
        raise JobError(
            "the scores of the canaries are not finite; lower the learning rate of the audited training"
        )
    order = score.argsort()
    low = asked // 2
    correct = int((~inside[order[:low]]).sum()) + int(inside[order[count - (asked - low) :]].sum())
    bound = one_run_bound(asked, correct, count, delta, confidence)
    most = one_run_bound(asked, asked, count, delta, confidence)
    return OneRun(
        claim,
        delta,
        confidence,
        count,
        asked,
        correct,
        bound,
        most,
        "refuted" if bound > claim else "consistent",
    )


@dataclass(frozen=True, slots=True)
class Membership:
    """How well the losses of a released model tell members of its training data from others.

    Attributes:
        auc: probability that a member's loss is the smaller one of a pair; 0.5 is chance.
        true_positives: share of members found at 1 % false positives; 0.01 is chance.
        epsilon: lower bound on ε. Records of *one* model are not independent trials, so it is indicative.
    """

    members: int
    non_members: int
    auc: Interval
    true_positives: Interval
    epsilon: float
    delta: float
    confidence: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.members} members and {self.non_members} others: AUC {self.auc}, {self.true_positives.value:.1%} of "
            f"the members found at 1 % false positives, ε bound {self.epsilon:.2f} at δ = {self.delta:g} (indicative)."
        )


def membership(
    loss_fn: Callable[[Records], Tensor],
    members: Records,
    non_members: Records,
    *,
    delta: float = 1e-5,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Membership:
    """Membership inference by the loss: who was trained on tends to have the smaller one.

    Args:
        loss_fn: losses (n,) of records; for a diffusion model an average over timesteps and draws, as
            `attack.record_losses` makes. The difference to the public start's loss is a sharper test, if that is known.
        members: records of the training data.
        non_members: records of the same kind that were not in it, chosen by chance from one pool with the members; any
            other difference between the two sets would pass for membership.
        seed: of the split into scores that choose the threshold and scores that count.

    *Error*: the intervals are 95 % ones (Hanley and McNeil 1982 for the area, Clopper and Pearson for the rate).

    Raises:
        JobError: fewer than 100 records a side, or a loss that is not finite.
    """
    inside, outside = (-loss_fn(x).detach().double().cpu().flatten() for x in (members, non_members))
    least = round(1 / _FALSE_POSITIVES)
    if min(len(inside), len(outside)) < least:
        raise JobError(
            f"{len(inside)} members and {len(outside)} others show nothing at 1 % false positives; "
            f"give at least {least} of each"
        )
    if not bool(inside.isfinite().all() and outside.isfinite().all()):
        raise JobError(
            "the model's loss is not finite on some records; give images in the range it was trained on"
        )
    source = torch.Generator().manual_seed(seed)
    mixed_in, mixed_out = (x[torch.randperm(len(x), generator=source)] for x in (inside, outside))
    epsilon, _ = split_bound(mixed_in, mixed_out, delta, confidence)
    threshold = outside.sort(descending=True).values[math.floor(_FALSE_POSITIVES * len(outside))]
    found = int((inside > threshold).sum())
    exact = stats.binomtest(found, len(inside)).proportion_ci(0.95)
    rate = Interval(found / len(inside), float(exact.low), float(exact.high))
    return Membership(len(inside), len(outside), _auc(inside, outside), rate, epsilon, delta, confidence)


def _auc(inside: Tensor, outside: Tensor) -> Interval:
    """Area under the curve of scores (n,) and (m,), ties counted half, with its 95 % interval."""
    n, m = len(inside), len(outside)
    ranks = stats.rankdata(torch.cat([inside, outside]).numpy())
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    twice_in, twice_out = area / (2 - area), 2 * area * area / (1 + area)
    variance = area * (1 - area) + (n - 1) * (twice_in - area * area) + (m - 1) * (twice_out - area * area)
    spread = _Z * math.sqrt(max(variance, 0.0) / (n * m))
    return Interval(area, max(area - spread, 0.0), min(area + spread, 1.0))
