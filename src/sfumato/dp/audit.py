"""An audit of the private step itself: many independent steps with and without one extreme record.

White box and in the worst case: the auditor knows weights, other records and the canary, and sees the whole noised
update. One *full-batch* step (sample rate 1) is a plain Gaussian mechanism, for which the Gaussian bound is rigorous
and close to the truth, so a fault that doubles what a step leaks is seen; an audit of many subsampled steps misses it.
Source: [TightAudit]; one training run is the business of `sfumato.dp.one_run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sfumato.dp.bounds import CONFIDENCE, Counts, epsilon_of_gaussian, split_bound
from sfumato.dp.gradients import Gradients
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError

__all__ = ["Audit", "FullBatchStep", "Trial", "Verdict", "audit_step"]

#: One private step with (True) or without (False) the canary; answers with a score that tends to be larger with it.
Trial = Callable[[bool], float]

Verdict = Literal["consistent", "refuted", "too weak"]

#: The least Gaussian bound, as a part of the claim, that an audit of correct code must reach: 2.5 of 4.38. Correct code
#: reaches 0.94 of it with 10,000 trials a side and 0.8 with 1,500; twice the noise that was claimed reaches 0.4.
_FLOOR = 0.57


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit of the step found.

    Attributes:
        claim: ε that one step promises at ``delta``.
        clopper_pearson: lower bound on ε that holds for any mechanism.
        gaussian: lower bound on ε that holds since the step is one Gaussian mechanism.
        floor: a ``gaussian`` below it says that the audit was too weak, or the noise larger than claimed.
        trials: steps a side; some of them chose the thresholds.
        counts: errors behind ``gaussian``.
        verdict: ``refuted`` when a bound is above the claim; ``too weak`` when ``gaussian`` is below the floor.
    """

    claim: float
    delta: float
    noise_multiplier: float
    confidence: float
    trials: int
    clopper_pearson: float
    gaussian: float
    floor: float
    counts: Counts
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        found = (
            f"{self.trials:,} steps with and {self.trials:,} without the canary bound ε from below by "
            f"{self.gaussian:.2f} (Gaussian) and {self.clopper_pearson:.2f} (Clopper-Pearson) "
            f"at δ = {self.delta:g}, {self.confidence:.0%} confidence; the claim is {self.claim:.2f}: "
        )
        says = {
            "consistent": "the step leaks no more than it claims, as far as this can be seen",
            "refuted": "THE STEP LEAKS MORE THAN IT CLAIMS",
            "too weak": f"below {self.floor:.2f} nothing is shown, so more trials are needed or the noise is too large",
        }
        return found + says[self.verdict] + "."


def audit_step(
    make_step: Callable[[], Trial] | None = None,
    *,
    trials: int = 10_000,
    noise_multiplier: float = 1.0,
    delta: float = 1e-5,
    confidence: float = CONFIDENCE,
    floor: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Run one full-batch step ``trials`` times with and ``trials`` times without a canary, and bound ε from below.

    Args:
        make_step: makes the trial; None audits the shipped code, `FullBatchStep` at this ``noise_multiplier``.
        trials: steps a side, at least 100. At 10,000 the Gaussian bound of correct code is about 4.1 of 4.38.
        noise_multiplier: the σ that is claimed; the claim is the exact ε of one Gaussian step of it.
        floor: least Gaussian bound that counts as a result; None takes 0.57 of the claim.
        progress: called with (trials done, trials in all) now and then.

    *Error*: correct code is refuted with probability at most 1 - confidence for each of the two bounds (in fact about
    0.3 % at 95 %, since both rates would have to err at once). *Cost*: about a minute of one core at 10,000.

    Raises:
        JobError: too few trials, or δ or the noise multiplier out of range.
    """
    if trials < 100:
        raise JobError(f"{trials} trials a side bound nothing; ask for at least 100")
    if not noise_multiplier > 0.0:
        raise JobError("without noise there is no claim to audit; give a noise multiplier above 0")
    claim = epsilon_of_gaussian(1.0 / noise_multiplier, delta)
    step = FullBatchStep(noise_multiplier=noise_multiplier) if make_step is None else make_step()
    scores = torch.empty(trials, 2, dtype=torch.float64)
    # With and without take turns, so that a drift of the code under audit cannot pass for a difference.
    for index in range(trials):
        scores[index, 0] = step(True)
        scores[index, 1] = step(False)
        if progress is not None and (index + 1) % 100 == 0:
            progress(index + 1, trials)
    present, absent = scores.unbind(1)
    rigorous, _ = split_bound(present, absent, delta, confidence)
    gaussian, counts = split_bound(present, absent, delta, confidence, gaussian=True)
    least = _FLOOR * claim if floor is None else floor
    verdict: Verdict = "consistent" if gaussian >= least else "too weak"
    if max(rigorous, gaussian) > claim:
        verdict = "refuted"
    return Audit(
        claim, delta, noise_multiplier, confidence, trials, rigorous, gaussian, least, counts, verdict
    )


class FullBatchStep:
    """A trial of the shipped private step on a small attention block with a class embedding.

    Every call runs the whole path anew from the same weights: coins at sample rate 1, forward and backward in physical
    batches through `Gradients` with several draws a record, clipping and summing, noise of its own, SGD step. The score
    is what the weights moved along the canary's gradient, in units of the clip norm.

    The canary's loss is so large that its gradient is cut to the clip norm exactly; the other records shift both sides
    alike. So the scores of the two sides are Gaussians 1 apart with standard deviation σ if the code is right.

    ``gradients``, ``optimizer`` and ``update`` are methods of their own, so that a test can plant a fault in one.

    Args:
        noise_multiplier: σ of the step.
        clip: clip norm C.
        draws: rows of one record (noise multiplicity).
        physical: records in a physical batch.
        normalise: records brought to the clip norm and the step in its units, as `finetune` does by default.
        stream: source of coins and noise; None draws a fresh key.
    """

    #: Records besides the canary.
    others = 2
    _width, _tokens, _classes = 8, 4, 3

    def __init__(
        self,
        *,
        noise_multiplier: float = 1.0,
        clip: float = 1.0,
        draws: int = 2,
        physical: int = 2,
        normalise: bool = True,
        stream: SecretStream | None = None,
    ) -> None:
        self.noise_multiplier, self.clip, self.draws, self.physical = noise_multiplier, clip, draws, physical
        self.normalise = normalise
        self.stream = SecretStream() if stream is None else stream
        self.coins = self.stream.child("coins")
        source = torch.Generator().manual_seed(0)  # of public things only: weights and records
        self.block = _Block(self._width, self._classes, source)
        shape = (self.others + 1, draws, self._tokens, self._width)
        self.inputs = torch.randn(shape, generator=source)
        self.wanted = torch.randn(shape, generator=source)
        # The draws of the canary agree up to a little, as those of one image do, and ask for what cannot be had.
        self.inputs[-1] = self.inputs[-1, :1] + 0.01 * self.inputs[-1]
        self.wanted[-1] = 1e4 * self.wanted[-1, :1]
        self.labels = torch.arange(self.others + 1) % self._classes
        self.start = [p.detach().clone() for p in self.block.parameters()]
        self.direction = self._direction()
        self.model = self.gradients()
        self.private = self.optimizer()

    def gradients(self) -> Gradients:
        """The module with per-record gradients."""
        return Gradients(self.block, self.draws)

    def optimizer(self) -> PrivateOptimizer:
        """The private optimizer; plain SGD of rate 1 inside, so that a step moves the weights by the noised mean."""
        return PrivateOptimizer(
            torch.optim.SGD(self.block.parameters(), lr=1.0),
            noise_multiplier=self.noise_multiplier,
            clip=self.clip,
            expected_batch=self.others,
            stream=self.stream.child("noise"),
            normalise=self.normalise,
        )

    def update(self, batch: Tensor) -> None:
        """One logical step on the records ``batch`` (n,)."""
        for part in batch.split(self.physical):
            self.model.backward(self.losses(part))
            self.private.accumulate()
        self.private.step()

    def losses(self, part: Tensor) -> Tensor:
        """Loss of each row, (n · draws,), of the records ``part`` (n,)."""
        said = self.model(self.inputs[part].flatten(0, 1), self.labels[part].repeat_interleave(self.draws))
        return (said - self.wanted[part].flatten(0, 1)).square().flatten(1).mean(1)

    def __call__(self, present: bool) -> float:
        chosen = self.coins.coins(self.others + present, 1.0).nonzero()[:, 0]
        self.update(chosen)
        moved = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for now, before, along in zip(self.block.parameters(), self.start, self.direction, strict=True):
                moved += ((before - now).double() * along).sum()
                now.copy_(before)
        return float(moved) * self.others / (1.0 if self.private.normalise else self.clip)

    def _direction(self) -> list[Tensor]:
        """The canary's gradient, scaled to length 1, by plain autograd: the audit must not trust what it audits."""
        said = self.block(self.inputs[-1], self.labels[-1:].expand(self.draws))
        loss = torch.nn.functional.mse_loss(said, self.wanted[-1])
        found = [g.double() for g in torch.autograd.grad(loss, list(self.block.parameters()))]
        length = torch.stack([g.square().sum() for g in found]).sum().sqrt()
        return [g / length for g in found]


class _Block(nn.Module):
    """Normalisation, attention over tokens and one class token, residual: (B, T, width), (B,) -> (B, T, width)."""

    def __init__(self, width: int, classes: int, source: torch.Generator) -> None:
        super().__init__()
        self.classes = nn.Embedding(classes, width)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, cross_attention_dim=width, heads=2, dim_head=width // 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=source) / width**0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        tokens = self.norm(x)
        context = torch.cat([tokens, self.classes(labels)[:, None]], 1)
        return x + self.attention(tokens, encoder_hidden_states=context)
