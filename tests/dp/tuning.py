"""What tests of fine-tunings share: public models of the smallest size, records, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import load_file

from sfumato.dp import accountant, recipe
from sfumato.dp.accountant import Event, Spent
from sfumato.dp.data import Records
from sfumato.dp.finetune import finetune
from sfumato.dp.pretrain import WIDTH_TEXT, make_pipeline
from sfumato.dp.public import caption_of_character
from sfumato.dp.recipe import Recipe
from sfumato.dp.sources import Seen, Sources
from sfumato.dp.trainer import Trainer
from sfumato.errors import JobError
from sfumato.zoo.train.build import save_pipeline

RECIPE = Recipe(epsilon=8.0, delta=1e-3, epochs=3, batch=32, draws=2, interval=2, physical=32)
STEPS = 6  # of 64 records
CAPTIONS = tuple(caption_of_character(digit) for digit in "0123456789")


def images_of(count: int, seed: int, side: int = 28) -> torch.Tensor:
    """Bright blocks on black that differ from seed to seed, (count, 1, side, side) bytes."""
    coarse = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(seed)) ** 3
    return (torch.nn.functional.interpolate(coarse, size=(side, side)) * 255).to(torch.uint8)


def records_of(count: int, seed: int = 1, classes: int = 10) -> Records:
    return Records(images_of(count, seed), torch.arange(count) % classes, CAPTIONS[:classes])


def save_public(folder: Path) -> torch.Tensor:
    """A text-to-image folder of random weights, 32 x 32 grey pixels to 4 x 4 x 4, with three attention modules; what
    it says that it has seen."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    pipeline = make_pipeline(vae, CAPTIONS)
    pipeline.register_modules(
        unet=UNet2DConditionModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH_TEXT,
            attention_head_dim=2,
            use_linear_projection=True,
        )
    )
    save_pipeline(pipeline, folder)
    return say_seen(folder)


def say_seen(folder: Path) -> torch.Tensor:
    seen = images_of(50, 1000)
    Sources((Seen.of("public images", "random", seen),)).write(folder)
    return seen


def save_unconditional(folder: Path) -> None:
    """A folder without prompts, 16 x 16 grey pixels to 3 x 8 x 8, with a quantising autoencoder."""
    torch.manual_seed(0)
    LDMPipeline(
        VQModel(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=3,
            num_vq_embeddings=16,
            norm_num_groups=4,
            sample_size=16,
        ),
        UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            layers_per_block=1,
            norm_num_groups=4,
        ),
        DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False),
    ).save_pretrained(folder)
    say_seen(folder)


@contextmanager
def remembering() -> Iterator[None]:
    """Prices and noise found once for each plan: they are the same every time, and cost seconds."""
    noise, price = cache(accountant.noise_multiplier), accountant.spent

    @cache
    def priced(events: tuple[Event, ...], delta: float) -> Spent:
        return price(events, delta)

    def spent(events: Iterable[Event], delta: float) -> Spent:
        return priced(tuple(events), delta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "noise_multiplier", noise)
        patch.setattr(accountant, "spent", spent)
        yield


class Stopped(Exception):
    """What ends a run in the middle."""


def stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, of: int) -> None:
        if what == "steps" and done == step:
            raise Stopped

    return progress


def refused(sentence: str, *given: Any, **more: Any) -> None:
    """`finetune` says so, in one line, and takes no step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: pytest.fail("a step ran"))
        with pytest.raises(JobError, match=sentence) as raised:
            finetune(*given, **more)
    assert "\n" not in str(raised.value)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pipeline folder, by part and name."""
    return {
        f"{file.parent.name}.{name}": value
        for file in sorted(folder.glob("*/*.safetensors"))
        for name, value in load_file(file).items()
    }


def changed(one: Path, other: Path) -> set[str]:
    before, after = weights(one), weights(other)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
