"""The loop's body: one logical batch of records to one private step, on one device or several.

All that is random comes from a `SecretStream`: the noise of the step, and what is drawn for a record (its posterior
sample, timesteps, noises, whether its caption is left out). The latter are drawn one after the other, so who else is in
a batch decides which of them a record gets. That changes nothing about their distribution as long as nobody can predict
them, which is why they are as secret as the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from sfumato.dp.gradients import Gradients
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.parts import Latents, Parts, arithmetic, target
from sfumato.dp.randomness import SecretStream
from sfumato.dp.recipe import Recipe
from sfumato.dp.trainable import Choice
from sfumato.zoo.train.loop import learning_rate, rank

__all__ = ["Trainer", "poisson_batch"]


def poisson_batch(stream: SecretStream, records: int, sample_rate: float) -> Tensor:
    """Indices of a logical batch: an independent coin for every record (papers/dp-latent-diffusion 5). May be empty.

    Where several processes train, rank 0 draws for all, and each gets its stripe.
    """
    chosen = stream.coins(records, sample_rate).nonzero()[:, 0]
    if not (distributed.is_available() and distributed.is_initialized()):
        return chosen
    size = torch.tensor([len(chosen)])
    distributed.broadcast(size, 0)
    shared = chosen if not rank() else torch.empty(int(size), dtype=torch.long)
    distributed.broadcast(shared, 0)
    return shared[rank() :: distributed.get_world_size()]


class Trainer:
    """Model, optimizer and averaged weights of one fine-tuning.

    Args:
        parts: the pipeline, its parameters chosen (`choice`).
        latents, labels: of all private records; ``ids``: token ids of the captions and, last, of the empty one.
        noise_multiplier: σ; 0 trains without noise.
        steps: how many there will be, for the rate's decay.
        stream: of this process alone; noise and draws are children of it.
    """

    def __init__(
        self,
        parts: Parts,
        choice: Choice,
        latents: Latents,
        labels: Tensor,
        ids: Tensor | None,
        recipe: Recipe,
        *,
        noise_multiplier: float,
        steps: int,
        stream: SecretStream,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.steps, self.choice = recipe, steps, choice
        self.latents, self.labels, self.ids = latents, labels, ids
        self.scheduler = parts.scheduler
        self.signal = parts.scheduler.alphas_cumprod.float()
        self.device = device
        self.model = parts.denoiser().to(device).train()
        self.gradients = Gradients(self.model, recipe.draws)
        inner = torch.optim.AdamW(choice.parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)
        # Without a budget nothing is clipped: a bound that no gradient reaches.
        self.optimizer = PrivateOptimizer(
            inner,
            noise_multiplier=noise_multiplier,
            clip=recipe.clip if recipe.private else 1e9,
            expected_batch=recipe.batch,
            stream=stream.child("noise"),
            normalise=recipe.normalise and recipe.private,
        )
        if distributed.is_available() and distributed.is_initialized():
            for p in choice.parameters:  # adapters begin at random, and everywhere at the same place
                distributed.broadcast(p.detach(), 0)
        self.average = [p.detach().clone() for p in choice.parameters]
        self.step_number = 0
        self.draws = stream.child("draws")
        # Until the first step that must change something: not one of nobody without noise.
        self._changed: Callable[[], None] | None = choice.watch()

    def step(self, rows: Tensor) -> None:
        """One logical batch: the records at ``rows``, of all processes together."""
        progress = min(1.0, self.step_number / self.steps)
        for group in self.optimizer.param_groups:
            decayed = learning_rate(progress, self.recipe.rate)
            group["lr"] = decayed if self.recipe.decay == "cosine" else self.recipe.rate
        per = max(1, self.recipe.physical // self.recipe.draws)
        for part in rows.split(per) if len(rows) else ():
            self.gradients.backward(self.losses(part))
            self.optimizer.accumulate()
        self.optimizer.step()
        if self._changed is not None and (len(rows) or self.optimizer.noise_multiplier > 0):
            self._changed()
            self._changed = None
        self.step_number += 1
        self._update_average()

    def verify(self) -> None:
        """Hold the per-record gradients of this model to autograd's, on three records of noise.

        Raises:
            JobError: layers that mix records, or use parameters where no hook sees them.
        """
        private, labels, recipe = self.latents, self.labels, self.recipe
        # In full precision: the comparison is finer than bfloat16's rounding.
        self.recipe = replace(recipe, precision="float32")
        shape = (3, *private.mean.shape[1:])
        self.latents = Latents(self.draws.normal(shape, 1.0), torch.zeros(shape))
        self.labels = torch.zeros(3, dtype=torch.long)
        try:
            self.gradients.verify(lambda: self.losses(torch.arange(3)))
        finally:
            self.latents, self.labels, self.recipe = private, labels, recipe

    def losses(self, rows: Tensor) -> Tensor:
        """Mean squared error of each row's prediction, (len(rows) * draws,), draws of a record together."""
        draws, count = self.recipe.draws, len(rows)
        clean = self.latents.sample(rows, self.draws).repeat_interleave(draws, 0)
        # One timestep from each of `draws` equal spans: uniform for every record, and less alike than free ones.
        span = (self.draws.uniform((count, draws)) + torch.arange(draws)) / draws
        times = (span.flatten() * len(self.signal)).long().clamp(max=len(self.signal) - 1)
        noise = self.draws.normal(clean.shape, 1.0)
        signal = self.signal[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        wanted = target(self.scheduler, clean, noise, signal)
        ids = None
        if self.ids is not None:
            kept = self.draws.uniform((count,)) >= self.recipe.drop
            ids = self.ids[torch.where(kept, self.labels[rows], len(self.ids) - 1)].to(self.device)
        with arithmetic(self.recipe.precision, self.device):
            guess = self.model(noisy.to(self.device), times.to(self.device), ids)
        return functional.mse_loss(guess.float(), wanted.to(self.device), reduction="none").mean((1, 2, 3))

    def _update_average(self) -> None:
        # From a tenth on, so that the public weights do not outweigh the first steps.
        keep = min(self.recipe.average, (1 + self.step_number) / (10 + self.step_number))
        keep = keep if self.recipe.average else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.choice.parameters], 1 - keep)

    def use_average(self) -> None:
        """Put the averaged weights in place, for saving."""
        with torch.no_grad():
            for parameter, value in zip(self.choice.parameters, self.average, strict=True):
                parameter.copy_(value)
        self.model.eval()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: all of it made of noised steps, none of a record's own gradient."""
        return {
            "parameters": [p.detach().cpu() for p in self.choice.parameters],
            "average": [value.cpu() for value in self.average],
            "optimizer": self.optimizer.original_optimizer.state_dict(),
            "step": self.step_number,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with streams under fresh keys."""
        with torch.no_grad():
            for parameter, value in zip(self.choice.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
            for mine, value in zip(self.average, state["average"], strict=True):
                mine.copy_(value)
        self.optimizer.original_optimizer.load_state_dict(state["optimizer"])
        self.step_number = int(state["step"])
        self._changed = self.choice.watch()
