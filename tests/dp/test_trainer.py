"""The step that fine-tuning really runs: its noise is the ledger's, and nothing in it follows a seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sfumato.dp import finetune as module
from sfumato.dp import trainer as trainer_module
from sfumato.dp.data import fit
from sfumato.dp.finetune import finetune
from sfumato.dp.ledger import Ledger
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.parts import encode, load_parts
from sfumato.dp.randomness import SecretStream
from sfumato.dp.recipe import Recipe
from sfumato.dp.trainable import choose
from sfumato.dp.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))
from tuning import RECIPE, records_of

pytestmark = pytest.mark.usefixtures("remembered")

RECORDS = records_of(64)
ROWS = torch.arange(4)


def trainer_of(public: Path, key: bytes | None = None, recipe: Recipe = RECIPE) -> Trainer:
    """Without noise."""
    parts = load_parts(public)
    choice = choose(parts.unet, parts.text_encoder, what=recipe.what)
    latents = encode(parts, fit(RECORDS.images, parts.channels, parts.side))
    ids = parts.ids([*RECORDS.captions, ""])
    return Trainer(
        parts, choice, latents, RECORDS.labels, ids, recipe, noise_multiplier=0.0, steps=4, stream=SecretStream(key)
    )  # fmt: skip


@contextmanager
def stepped_on() -> Iterator[list[Tensor]]:
    """The flat gradient that AdamW gets in each step."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if isinstance(optimizer, torch.optim.AdamW):
            held = [p.grad for group in optimizer.param_groups for p in group["params"]]
            seen.append(torch.cat([g.detach().flatten().double() for g in held]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


# ---- draws -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_seed_decides_what_is_drawn_for_a_record(public: Path) -> None:
    losses = []
    for _ in range(2):
        trainer = trainer_of(public)
        torch.manual_seed(0)
        losses.append(trainer.losses(ROWS))
    assert losses[0].shape == (len(ROWS) * RECIPE.draws,)
    assert (losses[0] != losses[1]).all()


@torch.no_grad()
def test_the_key_decides_what_is_drawn_for_a_record(public: Path) -> None:
    first, second, other = (trainer_of(public, bytes([k]) * 32) for k in (1, 1, 2))
    once = first.losses(ROWS)
    torch.rand(3)  # torch's generator has no part in it
    assert torch.equal(once, second.losses(ROWS))
    assert (once != other.losses(ROWS)).all()
    assert (once != first.losses(ROWS)).all()  # fresh at every visit
    # The noise of the step is another stream, under the same key.
    assert torch.equal(first.optimizer.stream.normal((9,), 1.0), second.optimizer.stream.normal((9,), 1.0))


# ---- clip and noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_one_record_moves_the_step_by_one_clip(public: Path, normalise: bool) -> None:
    recipe = replace(RECIPE, clip=1e-3, normalise=normalise)
    trainer = trainer_of(public, recipe=recipe)
    private = trainer.optimizer
    assert (private.max_grad_norm, private.normalise) == (recipe.clip, normalise)
    assert private.expected_batch_size == recipe.batch
    with stepped_on() as seen:
        trainer.step(ROWS[:1])
    moved = float(seen[0].norm()) * recipe.batch / (1.0 if normalise else recipe.clip)
    assert moved <= 1 + 1e-5
    assert moved > (0.9 if normalise else 0.999)  # and its gradient was above the bound


def noise_of(public: Path, out: Path, recipe: Recipe) -> tuple[Ledger, list[Tensor]]:
    """What AdamW gets in each step of a whole run to whose batches nobody comes, and that run's ledger."""
    with pytest.MonkeyPatch.context() as patch, stepped_on() as seen:
        patch.setattr(module, "poisson_batch", lambda *_: torch.arange(0))
        ledger = finetune(public, RECORDS, recipe, out).ledger
    assert len(seen) == ledger.event.steps
    return ledger, seen


def is_the_ledger_s(noise: Tensor, ledger: Ledger) -> bool:
    """Whether it is N(0, (σC/B)² I), or in units of C if the run normalises, with σ, C and B as the ledger says."""
    std = ledger.event.noise_multiplier / ledger.expected_batch
    std *= 1.0 if ledger.recipe["normalise"] else ledger.clip
    # Four standard errors of a standard deviation are 4 / sqrt(2 n).
    near = abs(float(noise.std()) / std - 1) < max(0.005, 4 / math.sqrt(2 * len(noise)))
    few = noise[torch.randperm(len(noise), generator=torch.Generator().manual_seed(0))[:5000]]
    return near and bool(stats.kstest((few / std).numpy(), "norm").pvalue > 1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_noise_is_what_the_ledger_says(public: Path, tmp_path: Path, normalise: bool) -> None:
    recipe = replace(RECIPE, epochs=1, clip=0.3, normalise=normalise)
    ledger, (first, second) = noise_of(public, tmp_path / "out", recipe)
    assert ledger.spent().epsilon <= recipe.epsilon
    assert (ledger.clip, ledger.expected_batch) == (0.3, 32.0)
    assert len(first) > 5000
    assert is_the_ledger_s(first, ledger)
    assert is_the_ledger_s(second, ledger)
    # Another one in each step.
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / math.sqrt(len(first))


@pytest.mark.parametrize("fault", ["half the noise", "three times the divisor", "no clip in the noise"])
def test_noise_that_is_not_the_ledger_s_is_noticed(
    public: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(inner: torch.optim.Optimizer, **given: Any) -> PrivateOptimizer:
        if fault == "half the noise":
            given["noise_multiplier"] /= 2
        elif fault == "three times the divisor":
            given["expected_batch"] *= 3
        else:
            given["clip"] = 1.0
        return PrivateOptimizer(inner, **given)

    monkeypatch.setattr(trainer_module, "PrivateOptimizer", faulty)
    recipe = replace(RECIPE, epochs=0.5, clip=0.3, normalise=False)
    ledger, (noise,) = noise_of(public, tmp_path / "out", recipe)
    assert not is_the_ledger_s(noise, ledger)
