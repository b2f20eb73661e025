"""The audits pass the shipped step and catch every planted fault; a bound that shows nothing is no pass."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from sfumato.dp.accountant import Event, spent
from sfumato.dp.audit import FullBatchStep, Trial, audit_step
from sfumato.dp.gradients import Gradients
from sfumato.dp.one_run import OneRun, audit_run, membership
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError

#: Fixed, so that a test says the same every time; with fresh keys the verdicts hold but for about 1 in 1,000.
KEY = bytes(range(32))
DELTA = 1e-5


class Shipped(FullBatchStep):
    def __init__(self, *, draws: int = 2, physical: int = 2, normalise: bool = True) -> None:
        super().__init__(draws=draws, physical=physical, normalise=normalise, stream=SecretStream(KEY))

    def private_of(self, *, noise_multiplier: float, clip: float) -> PrivateOptimizer:
        return PrivateOptimizer(
            torch.optim.SGD(self.block.parameters(), lr=1.0),
            noise_multiplier=noise_multiplier,
            clip=clip,
            expected_batch=self.others,
            stream=self.stream.child("noise"),
            normalise=self.normalise,
        )


class HalfNoise(Shipped):
    def optimizer(self) -> PrivateOptimizer:
        return self.private_of(noise_multiplier=self.noise_multiplier / 2, clip=self.clip)


class DoubleNoise(Shipped):
    def optimizer(self) -> PrivateOptimizer:
        return self.private_of(noise_multiplier=self.noise_multiplier * 2, clip=self.clip)


class NoClipping(Shipped):
    def __init__(self) -> None:
        super().__init__(normalise=False)  # normalised records are small whatever the bound

    def optimizer(self) -> PrivateOptimizer:
        # The noise keeps its size, the norm bound does not.
        return self.private_of(noise_multiplier=self.noise_multiplier / 1e9, clip=self.clip * 1e9)


class UnmergedRows(Shipped):
    """Every draw of a record is clipped on its own, so a record has four times its share."""

    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__(draws=4, normalise=normalise)

    def gradients(self) -> Gradients:
        return Gradients(self.block, 1)


class NoiseInParts(Shipped):
    """Each physical batch gets its part of the standard deviation; but variances add up, not deviations."""

    others = 3

    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__(draws=1, physical=1, normalise=normalise)
        self.parts = self.stream.child("parts")

    def optimizer(self) -> PrivateOptimizer:
        return self.private_of(noise_multiplier=0.0, clip=self.clip)

    def update(self, batch: Tensor) -> None:
        parts = batch.split(self.physical)
        for part in parts:
            self.model.backward(self.losses(part))
            self.private.accumulate()
            for p in self.block.parameters():
                p.summed_grad += self.parts.normal(p.shape, self.noise_multiplier * self.clip / len(parts))
        self.private.step()


class KnownSeed(Shipped):
    """The same noise in every run: whoever knows it subtracts it."""

    def update(self, batch: Tensor) -> None:
        self.private.stream = SecretStream(KEY)
        super().update(batch)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_shipped_step_passes_and_the_audit_shows_something(normalise: bool) -> None:
    audit = audit_step(lambda: Shipped(normalise=normalise), trials=400)
    assert audit.claim == pytest.approx(4.3772, abs=1e-4)
    assert audit.verdict == "consistent"
    assert 2.5 <= audit.gaussian < audit.claim
    assert 0.0 < audit.clopper_pearson < audit.claim
    written = json.loads(json.dumps(audit.to_json()))
    assert (written["verdict"], written["counts"]["present"]) == ("consistent", 320)
    assert "the claim is 4.38: the step leaks no more" in str(audit)


@pytest.mark.slow
def test_the_shipped_step_passes_with_more_trials() -> None:
    # Ten thousand a side, and the faults beside them: benchmarks/dp_audit.py.
    audit = audit_step(Shipped, trials=2_500)
    assert audit.verdict == "consistent"
    assert 3.4 <= audit.gaussian < audit.claim
    assert 0.8 <= audit.clopper_pearson < audit.claim


@pytest.mark.parametrize(
    ("fault", "trials", "given"),
    [
        *[
            (fault, trials, {"normalise": normalise})
            for fault, trials in (
                (HalfNoise, 200),
                (NoiseInParts, 200),
                (UnmergedRows, 120),
                (KnownSeed, 100),
            )
            for normalise in (True, False)
        ],
        (NoClipping, 100, {}),
    ],
)
def test_a_planted_fault_is_caught(fault: type[Shipped], trials: int, given: dict[str, bool]) -> None:
    audit = audit_step(lambda: fault(**given), trials=trials)
    assert audit.verdict == "refuted"
    assert audit.gaussian > audit.claim
    assert "LEAKS MORE" in str(audit)


def test_the_fault_of_unmerged_rows_is_the_rows_not_their_number() -> None:
    audit = audit_step(lambda: Shipped(draws=4), trials=120)
    assert audit.gaussian < audit.claim


def test_too_much_noise_is_no_pass() -> None:
    audit = audit_step(DoubleNoise, trials=150)
    assert audit.verdict == "too weak"
    assert "nothing is shown" in str(audit)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_canary_moves_the_weights_by_the_clip_norm(normalise: bool) -> None:
    # Without noise, and in the metric of the score: the canary adds exactly 1, whatever the clip norm.
    class Noiseless(Shipped):
        def optimizer(self) -> PrivateOptimizer:
            return self.private_of(noise_multiplier=0.0, clip=self.clip)

    trial = Noiseless(normalise=normalise)
    assert trial.private.normalise == normalise
    assert trial(True) - trial(False) == pytest.approx(1.0, abs=1e-3)
    assert trial(True) == trial(True)  # the weights are put back


def test_a_trial_has_its_own_noise_each_time() -> None:
    trial = FullBatchStep()
    scores = torch.tensor([trial(False) for _ in range(200)])
    assert len(scores.unique()) == 200
    assert float(scores.std()) == pytest.approx(1.0, abs=0.2)  # σ; 4 standard errors


def test_any_trial_can_be_audited_and_bad_requests_are_refused() -> None:
    def none() -> Trial:
        return lambda present: float(present)

    seen: list[tuple[int, int]] = []
    audit = audit_step(none, trials=200, progress=lambda done, of: seen.append((done, of)))
    assert audit.verdict == "refuted"
    assert seen == [(100, 200), (200, 200)]
    with pytest.raises(JobError, match="at least 100"):
        audit_step(none, trials=99)
    with pytest.raises(JobError, match="noise multiplier"):
        audit_step(none, noise_multiplier=0.0)


class Training:
    """A small classifier trained privately; the canaries are noise images with wrong labels."""

    records, canaries, width, classes = 100, 200, 512, 4
    rate, steps = 0.25, 20

    def __init__(self, *, noise_multiplier: float, clip: float = 1.0) -> None:
        source = torch.Generator().manual_seed(0)
        count = self.records + self.canaries
        self.images = torch.randn(count, self.width, generator=source)
        self.images[: self.records] *= 0.3
        self.labels = torch.randint(self.classes, (count,), generator=source)
        self.model = nn.Linear(self.width, self.classes)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.wrapped = Gradients(self.model)
        self.private = PrivateOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.5),
            noise_multiplier=noise_multiplier,
            clip=clip,
            expected_batch=self.rate * count,
            stream=SecretStream(KEY).child("noise"),
        )

    def backward(self, batch: Tensor) -> None:
        said = self.wrapped(self.images[batch])
        self.wrapped.backward(nn.functional.cross_entropy(said, self.labels[batch], reduction="none"))

    def step(self, batch: Tensor) -> Tensor:
        before = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        if len(batch):
            self.backward(batch)
            self.private.accumulate()
        self.private.step()
        return (before - nn.utils.parameters_to_vector(self.model.parameters()).detach()) / 0.5

    def directions(self) -> Tensor:
        self.backward(torch.arange(self.records, self.records + self.canaries))
        rows = torch.cat([g.flatten(1) for _, _, g in self.wrapped.records()], 1).clone()
        self.wrapped.clear()
        return rows / rows.norm(dim=1, keepdim=True).clamp(min=1.0)

    def audited(self, claim: float, **other: int) -> OneRun:
        return audit_run(
            self.step,
            self.directions,
            records=torch.arange(self.records),
            canaries=torch.arange(self.records, self.records + self.canaries),
            steps=self.steps,
            sample_rate=self.rate,
            claim=claim,
            delta=DELTA,
            stream=SecretStream(KEY),
            **other,
        )


SIGMA = 4.0


@pytest.fixture(scope="module")
def claim() -> float:
    return spent([Event(Training.rate, SIGMA, Training.steps)], DELTA).epsilon


def test_one_run_of_the_shipped_training_is_below_the_claim(claim: float) -> None:
    found = Training(noise_multiplier=SIGMA).audited(claim)
    assert found.verdict == "consistent"
    assert found.bound < claim < found.most  # what was broken would have been seen
    assert json.loads(json.dumps(found.to_json()))["guesses"] == 100
    assert "not refuted" in str(found)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Training(noise_multiplier=SIGMA / 10),
        lambda: Training(noise_multiplier=SIGMA / 1e6, clip=1e6),
    ],
    ids=["a tenth of the noise", "no clipping"],
)
def test_one_run_of_a_broken_training_is_above_the_claim(broken: object, claim: float) -> None:
    found = broken().audited(claim)  # type: ignore[operator]
    assert found.verdict == "refuted"
    assert found.bound > claim
    assert "LEAKS MORE" in str(found)


def test_one_run_guesses_nothing_where_the_canaries_are_not_trained_on() -> None:
    # Scores without information: about half of the guesses are right.
    source = torch.Generator().manual_seed(1)
    found = audit_run(
        lambda batch: torch.randn(8, generator=source),
        lambda: torch.ones(400, 8) + torch.randn(400, 8, generator=source),
        records=torch.arange(10),
        canaries=torch.arange(10, 410),
        steps=3,
        sample_rate=0.5,
        claim=1.0,
    )
    assert found.guesses == 200
    assert 60 < found.correct < 140
    assert found.bound < 1.0


def test_one_run_refuses_what_cannot_be() -> None:
    training = Training(noise_multiplier=1.0)
    with pytest.raises(JobError, match="201 guesses on 200 canaries"):
        training.audited(1.0, guesses=201)
    training.step = lambda batch: torch.full((2052,), torch.inf)  # type: ignore[method-assign]
    with pytest.raises(JobError, match="not finite"):
        training.audited(1.0)


def losses(shift: float, count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) - shift


def test_membership_of_equal_losses_is_chance() -> None:
    found = membership(lambda x: x, losses(0.0, 2000, 1), losses(0.0, 2000, 2))
    assert found.auc.low <= 0.5 <= found.auc.high < found.auc.low + 0.05
    assert found.true_positives.low <= 0.01 <= found.true_positives.high
    assert found.epsilon < 0.5
    assert "AUC 0.5" in str(found) or "AUC 0.4" in str(found)
    assert json.loads(json.dumps(found.to_json()))["members"] == 2000


def test_membership_of_shifted_losses_is_the_known_curve() -> None:
    found = membership(lambda x: x, losses(1.0, 4000, 1), losses(0.0, 4000, 2))
    # Φ(1/√2), and Φ(1 - 2.326) at 1 % false positives.
    assert found.auc.value == pytest.approx(0.7602, abs=0.02)
    assert found.true_positives.value == pytest.approx(0.0924, abs=0.03)
    assert 0.8 < found.epsilon < 4.3772


def test_membership_counts_ties_half() -> None:
    found = membership(lambda x: x, torch.ones(200), torch.ones(300))
    assert (found.auc.value, found.true_positives.value, found.epsilon) == (0.5, 0.0, 0.0)


def test_membership_refuses_what_shows_nothing() -> None:
    with pytest.raises(JobError, match="at least 100"):
        membership(lambda x: x, torch.zeros(99), torch.zeros(500))
    with pytest.raises(JobError, match="not finite"):
        membership(lambda x: x, torch.full((100,), torch.nan), torch.zeros(100))
