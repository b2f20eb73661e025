"""Sampling: which images a seed gives, what is called how often, and where they go."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sfumato.dp.attack import attack_folder, record_losses
from sfumato.dp.data import Records, read_records
from sfumato.dp.parts import Parts, load_parts
from sfumato.dp.sample import draw, grid, save_samples
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tuning import CAPTIONS, images_of, records_of


@pytest.fixture(scope="module")
def parts(public: Path) -> Parts:
    return load_parts(public)


def labels(count: int) -> torch.Tensor:
    return torch.arange(count) % 10


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding of a byte: batches of other sizes add up in another order."""
    return bool((one.int() - other.int()).abs().max() <= 1)


def test_a_seed_fixes_the_images(parts: Parts) -> None:
    made = draw(parts, CAPTIONS, labels(12), steps=3, seed=4)
    assert made.images.shape == (12, 1, 32, 32)
    assert made.captions == CAPTIONS
    assert torch.equal(made.labels, labels(12))
    torch.manual_seed(99)
    assert torch.equal(draw(parts, CAPTIONS, labels(12), steps=3, seed=4).images, made.images)
    assert not near(draw(parts, CAPTIONS, labels(12), steps=3, seed=5).images, made.images)
    assert len(made.images.flatten(1).unique(dim=0)) == 12


def test_a_longer_run_begins_with_a_shorter_one(parts: Parts) -> None:
    """Whatever the batches, and though every step adds noise."""
    long = draw(parts, CAPTIONS, labels(12), steps=3, seed=4).images
    assert near(draw(parts, CAPTIONS, labels(5), steps=3, seed=4).images, long[:5])
    assert near(draw(parts, CAPTIONS, labels(12), steps=3, seed=4, batch=5).images, long)


def test_stochastic_or_not(parts: Parts) -> None:
    found = [draw(parts, CAPTIONS, labels(4), steps=3, eta=eta).images for eta in (0.0, 1.0)]
    assert not near(*found)


def test_guidance_calls_the_model_on_both_texts(parts: Parts) -> None:
    seen: list[int] = []
    hook = parts.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        plain = draw(parts, CAPTIONS, labels(4), steps=3).images
        guided = draw(parts, CAPTIONS, labels(4), steps=3, guidance=2.0).images
    finally:
        hook.remove()
    assert seen == [4, 4, 4, 8, 8, 8]
    assert not torch.equal(plain, guided)
    # No caption against no caption: nothing to guide to.
    assert near(
        draw(parts, ("",), torch.zeros(4, dtype=torch.long), steps=3, guidance=5.0).images,
        draw(parts, ("",), torch.zeros(4, dtype=torch.long), steps=3).images,
    )


@pytest.mark.filterwarnings(
    "ignore:__array_:DeprecationWarning"
)  # diffusers turns tensors to arrays the old way
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_any_scheduler_of_the_folder(parts: Parts, kind: Any) -> None:
    other = replace(parts, scheduler=kind.from_config(parts.scheduler.config))
    long = draw(other, CAPTIONS, labels(6), steps=4, seed=1).images
    assert near(draw(other, CAPTIONS, labels(3), steps=4, seed=1).images, long[:3])
    assert long.float().std() > 0


def test_without_prompts(public_unconditional: Path) -> None:
    parts = load_parts(public_unconditional)
    made = draw(parts, ("",), torch.zeros(3, dtype=torch.long), steps=2, guidance=3.0)
    assert made.images.shape == (3, 1, 16, 16)


def test_progress_and_no_images(parts: Parts) -> None:
    told: list[tuple[int, int]] = []
    draw(parts, CAPTIONS, labels(5), steps=1, batch=2, progress=lambda *at: told.append(at))
    assert told == [(2, 5), (4, 5), (5, 5)]
    narrow = draw(parts, CAPTIONS, labels(5), steps=2, precision="bfloat16").images
    full = draw(parts, CAPTIONS, labels(5), steps=2).images
    assert (narrow.float() - full.float()).abs().mean() < 5


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"steps": 0}, r"steps \(0\) and guidance"),
        ({"guidance": 0.0}, r"guidance \(0.0\) are positive"),
        ({"labels": torch.tensor([0, 10])}, "a label is 10, but there are 10 captions"),
        ({"device": "abacus"}, "torch cannot compute on 'abacus' here; name another"),
    ],
)
def test_what_cannot_be_drawn(parts: Parts, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        draw(parts, CAPTIONS, **{"labels": labels(2), **more})


def test_files_are_read_again(tmp_path: Path) -> None:
    for captions, channels in ((CAPTIONS, 1), (("",), 3)):
        made = Records(
            images_of(7, 3).expand(-1, channels, -1, -1), torch.arange(7) % len(captions), captions
        )
        found = read_records(save_samples(made, tmp_path / "samples.npz"))
        assert torch.equal(found.images, made.images)
        assert torch.equal(found.labels, made.labels)
        assert found.captions == captions


def test_grids() -> None:
    images = images_of(7, 5)
    picture = grid(images, 3)
    assert picture.size == (3 * 28, 3 * 28)
    assert picture.mode == "L"
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[28:56, 56:84], images[5, 0].numpy())
    assert not pixels[56:, 28:].any()  # where there are no more
    assert grid(images.expand(-1, 3, -1, -1), 7, scale=2).size == (14 * 28, 2 * 28)
    assert grid(images.expand(-1, 3, -1, -1), 7).mode == "RGB"


def test_membership_of_what_was_never_trained_on(public: Path, parts: Parts) -> None:
    inside, outside = records_of(120, 1), records_of(120, 2)
    losses = record_losses(parts, inside, draws=3)
    assert losses.shape == (120,)
    assert losses.isfinite().all()
    assert torch.allclose(losses, record_losses(parts, inside, draws=3))
    # Each record's own: another order gives the same losses in that order.
    turned = Records(inside.images.flip(0), inside.labels.flip(0), inside.captions)
    assert torch.allclose(record_losses(parts, turned, draws=3).flip(0), losses, atol=1e-5)
    found = attack_folder(public, inside, outside)
    assert 0.3 < found.auc.value < 0.7
    with pytest.raises(JobError, match=r"members are \(1, 28, 28\) and others \(1, 16, 16\)"):
        attack_folder(
            public, inside, Records(images_of(5, 1, 16), torch.zeros(5, dtype=torch.long), CAPTIONS)
        )
