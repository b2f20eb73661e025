"""Membership inference on a whole model: found where the images were learnt by heart, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.dp import attack as module
from sfumato.dp.attack import attack_folder, record_losses
from sfumato.dp.data import fit
from sfumato.dp.parts import load_parts
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tuning import records_of

MEMBERS, OTHERS = records_of(120, 1), records_of(120, 2)
SIGNALS = torch.linspace(0.999, 0.02, 40)


def latents_of(pixels: Tensor) -> Tensor:
    """Images (N, 1, 32, 32) in [-1, 1] to latents (N, 1, 8, 8)."""
    return 2 * functional.avg_pool2d(pixels, 4)


class ByHeart(nn.Module):
    """The exact denoiser of a model that knows the members' latents and nothing else."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known

    def forward(self, noisy: Tensor, times: Tensor, ids: Any) -> Tensor:
        assert ids is None
        signal = SIGNALS[times].view(-1, 1, 1, 1)
        far = (noisy[:, None] - signal[:, None].sqrt() * self.known[None]).square().sum((2, 3, 4))
        weights = torch.softmax(-far / (2 * (1 - SIGNALS[times]))[:, None], 1)
        clean = torch.einsum("nm,mchw->nchw", weights, self.known)
        return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()


@pytest.fixture
def by_heart() -> Any:
    known = latents_of(fit(MEMBERS.images, 1, 32).float() / 127.5 - 1)
    return SimpleNamespace(
        vae=SimpleNamespace(encode=lambda pixels: SimpleNamespace(latents=latents_of(pixels))),
        scale=1.0,
        channels=1,
        side=32,
        ids=lambda captions: None,
        denoiser=lambda: ByHeart(known),
        scheduler=SimpleNamespace(alphas_cumprod=SIGNALS, config=SimpleNamespace(prediction_type="epsilon")),
    )


def test_what_was_learnt_by_heart_is_found(by_heart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_parts", lambda folder: by_heart)
    found = attack_folder(Path("nowhere"), MEMBERS, OTHERS)
    assert (found.members, found.non_members) == (120, 120)
    assert found.auc.value > 0.95
    assert found.true_positives.value > 0.5
    # Members and others the other way round: what is found is who the model knows, not who was named first.
    assert attack_folder(Path("nowhere"), OTHERS, MEMBERS).auc.value < 0.05


def test_a_loss_follows_its_seed_and_its_own_image(by_heart: Any) -> None:
    losses = record_losses(by_heart, OTHERS)
    assert torch.equal(losses, record_losses(by_heart, OTHERS))
    assert not torch.equal(losses, record_losses(by_heart, OTHERS, seed=1))
    assert torch.allclose(losses[:7], record_losses(by_heart, OTHERS.first(7)), rtol=1e-4, atol=1e-6)


def test_a_model_that_was_never_trained_knows_nobody(public: Path) -> None:
    found = attack_folder(public, MEMBERS, OTHERS)
    assert found.auc.low < 0.5 < found.auc.high
    assert abs(found.auc.value - 0.5) < 0.1
    assert found.epsilon < 1.0


def test_prompts_are_given(public: Path) -> None:
    parts = load_parts(public)
    few = MEMBERS.first(20)
    same = record_losses(parts, few, draws=2)
    others = few.aligned((few.captions[1], few.captions[0], *few.captions[2:]))
    assert torch.allclose(record_losses(parts, others, draws=2), same)  # the same texts under other numbers
    assert not torch.allclose(record_losses(parts, few.without_captions(), draws=2), same)


def test_shapes_that_differ(public: Path) -> None:
    colours = type(OTHERS)(OTHERS.images.expand(-1, 3, -1, -1), OTHERS.labels, OTHERS.captions)
    with pytest.raises(JobError, match=r"members are \(1, 28, 28\) and others \(3, 28, 28\); give one shape"):
        attack_folder(public, MEMBERS, colours)
