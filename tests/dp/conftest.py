"""Public models of the smallest size, with random weights, to fine-tune: what they draw does not matter here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DConditionModel, UNet2DModel, VQModel

from sfumato.dp import accountant, recipe
from sfumato.dp.accountant import Event, Spent
from sfumato.dp.data import Records
from sfumato.dp.pretrain import WIDTH_TEXT, make_pipeline
from sfumato.dp.public import caption_of_character
from sfumato.dp.sources import Seen, Sources
from sfumato.zoo.train.build import save_pipeline

CAPTIONS = tuple(caption_of_character(digit) for digit in "0123456789")


def images_of(count: int, seed: int, side: int = 28) -> torch.Tensor:
    """Bright blocks on black that differ from seed to seed, (count, 1, side, side) bytes."""
    coarse = torch.rand(count, 1, 7, 7, generator=torch.Generator().manual_seed(seed)) ** 3
    return (torch.nn.functional.interpolate(coarse, size=(side, side)) * 255).to(torch.uint8)


def records_of(count: int, seed: int = 1, classes: int = 10) -> Records:
    return Records(images_of(count, seed), torch.arange(count) % classes, CAPTIONS[:classes])


@pytest.fixture(scope="session")
def remembered() -> Iterator[None]:
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


@pytest.fixture(scope="session")
def public_images() -> torch.Tensor:
    """What the public models say that they have seen."""
    return images_of(50, 1000)


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory, public_images: torch.Tensor) -> Path:
    """A text-to-image folder, 32 x 32 grey pixels to 4 x 4 x 4, two attention modules down and middle, two up."""
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
    folder = tmp_path_factory.mktemp("public") / "model"
    save_pipeline(pipeline, folder)
    Sources((Seen.of("public images", "random", public_images),)).write(folder)
    return folder


@pytest.fixture(scope="session")
def public_unconditional(tmp_path_factory: pytest.TempPathFactory, public_images: torch.Tensor) -> Path:
    """A latent-diffusion folder without prompts, 16 x 16 grey pixels to 3 x 8 x 8, with a quantising autoencoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("public-unconditional") / "model"
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
    Sources((Seen.of("public images", "random", public_images),)).write(folder)
    return folder
