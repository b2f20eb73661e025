"""Pre-training on public images: an autoencoder, then a latent diffusion model with its text encoder.

The first two of DP-LDM's three steps (papers/dp-latent-diffusion 1.1). No private image is read here, so nothing here
costs privacy; what was read is written beside the model (`sources`), and fine-tuning refuses private data that occurs
in it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from sfumato.dp.data import fit, read_records
from sfumato.dp.glyphs import Glyphs, glyphs_of_drawings, glyphs_of_fonts, system_fonts, with_habits
from sfumato.dp.parts import Denoiser, target
from sfumato.dp.public import Characters, Mixture, Source, Stills
from sfumato.dp.sources import Seen, Sources
from sfumato.errors import JobError
from sfumato.zoo.train.build import WIDTH_TEXT, assembled, make_text_encoder, make_vae, save_pipeline
from sfumato.zoo.train.loop import channels_last, run
from sfumato.zoo.train.prompts import make_tokenizer

__all__ = [
    "Public", "make_autoencoder", "make_pipeline", "make_unet", "pretrain_folder", "train_autoencoder",
    "train_denoiser",
]  # fmt: skip

KL_WEIGHT = 1e-5
SNR_LIMIT = 5.0


def make_autoencoder(channels: int) -> AutoencoderKL:
    """Autoencoder of ``channels`` x 32 x 32 to 4 x 4 x 4 without attention, 0.8 M parameters."""
    return make_vae((16, 32, 48, 64), channels)


def make_unet() -> UNet2DConditionModel:
    """U-Net on 4 x 4 x 4, 64 channels, a transformer block (self-, cross-attention, GEGLU) after each residual one:
    1.0 M parameters, 0.37 M of them attention modules."""
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH_TEXT,
        attention_head_dim=2,
        act_fn="silu",
        use_linear_projection=True,
    )


def make_pipeline(vae: AutoencoderKL, captions: tuple[str, ...]) -> StableDiffusionPipeline:
    """Untrained pipeline around a trained autoencoder. Predicts v (Salimans and Ho 2022): at every noise level a target
    of one size, so that no timestep's gradients fill the clip alone."""
    tokenizer = make_tokenizer(captions)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    return assembled(vae, make_text_encoder(tokenizer, layers=1), tokenizer, make_unet(), scheduler)


def train_autoencoder(
    public: Mixture, checkpoint: Path, minutes: float, *, batch: int = 64, channels: int = 1
) -> AutoencoderKL:
    """Squared and absolute error and a KL term, for ``minutes`` of a core; the scaling factor from *public* latents."""
    torch.manual_seed(0)
    vae = channels_last(make_autoencoder(channels))
    generator = torch.Generator().manual_seed(1)

    def step(number: int) -> Tensor:
        generator.manual_seed(1_000_000 + number)
        images = _signed(public.draw(batch, generator)[0])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        error = functional.mse_loss(decoded, images) + 0.3 * functional.l1_loss(decoded, images)
        return error + KL_WEIGHT * posterior.kl().float().mean()

    average = run("autoencoder", vae, step, checkpoint, minutes, peak=2e-3, decay=0.995)
    vae.load_state_dict(average.state)
    vae.eval()
    with torch.no_grad():
        images = _signed(public.draw(2000, generator.manual_seed(5))[0])
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in images.split(250)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return vae


def _signed(images: Tensor) -> Tensor:
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last)


def train_denoiser(
    pipeline: StableDiffusionPipeline,
    public: Mixture,
    checkpoint: Path,
    minutes: float,
    *,
    batch: int = 256,
    pool: int = 120_000,
    peak: float = 2e-3,
    drop: float = 0.1,
) -> None:
    """Train U-Net and text encoder in place on ``pool`` latents, for ``minutes`` of a core; ``drop``: share of empty
    prompts, for guidance."""
    latents, labels = _pool(pipeline.vae, public, pool)
    captions = [*public.captions, ""]
    ids = torch.tensor(
        pipeline.tokenizer(
            captions, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True
        ).input_ids
    )
    model = Denoiser(pipeline.unet, pipeline.text_encoder)
    alphas = pipeline.scheduler.alphas_cumprod
    generator = torch.Generator()

    def step(number: int) -> Tensor:
        generator.manual_seed(2_000_000 + number)
        rows = torch.randint(0, len(latents), (batch,), generator=generator)
        times = torch.randint(0, len(alphas), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        kept = torch.rand(batch, generator=generator) >= drop
        a = alphas[times][:, None, None, None]
        clean = latents[rows]
        guess = model(a.sqrt() * clean + (1 - a).sqrt() * noise, times,
                      ids[torch.where(kept, labels[rows], len(captions) - 1)])  # fmt: skip
        return functional.mse_loss(guess, target(pipeline.scheduler, clean, noise, a))

    average = run("denoiser", model, step, checkpoint, minutes, peak=peak, decay=0.999)
    model.load_state_dict(average.state)
    model.eval()


@torch.no_grad()
def _pool(vae: Any, public: Mixture, count: int) -> tuple[Tensor, Tensor]:
    """Scaled latents, one posterior sample of each of ``count`` public images, and their captions."""
    generator = torch.Generator().manual_seed(3)
    parts, labels = [], []
    for start in range(0, count, 500):
        images, captions = public.draw(min(500, count - start), generator)
        posterior = vae.encode(_signed(images)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        parts.append((posterior.mean + posterior.std * noise) * vae.config.scaling_factor)
        labels.append(captions)
    return torch.cat(parts).contiguous(), torch.cat(labels)


@dataclass(frozen=True)
class Public:
    """What a public model is made from.

    ``fonts``: folders of font files, empty for the system's, None for no rendered characters; ``drawings``: Omniglot as
    an ``.npz`` of packed 105 x 105 masks (``bits105``) and ``labels``; ``images``: files or folders that
    `data.read_records` reads with captions of their own; ``words``: captions of the private data to come, so that the
    tokenizer has their words.
    """

    fonts: tuple[Path, ...] | None = ()
    drawings: Path | None = None
    images: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()
    channels: int = 1

    def mixtures(self) -> tuple[Mixture, Mixture, Sources]:
        """What the autoencoder and what the denoiser see, and the record of it. Digits are drawn more often than other
        characters by the denoiser, since they are what most small private sets hold.

        Raises:
            JobError: nothing to learn from, or files that cannot be read.
        """
        if self.channels not in (1, 3):
            raise JobError(f"channels is {self.channels}; images are grey (1) or coloured (3)")
        parts: list[tuple[Source, float, float]] = []
        seen: list[Seen] = []
        if self.fonts is not None:
            files = system_fonts(self.fonts)
            glyphs = with_habits(glyphs_of_fonts(files))
            digits = tuple(k for k, name in enumerate(glyphs.names) if name.isdigit())
            parts.append((Characters("fonts: all characters", glyphs, None, self.channels), 0.55, 0.2))
            parts.append((Characters("fonts: digits", glyphs, digits, self.channels), 0.0, 0.45))
            families = len(glyphs.groups.unique())
            seen.append(Seen.declared("rendered fonts", f"{families} families, files {_digest(files)}"))
        if self.drawings is not None:
            glyphs, masks = _drawings(self.drawings)
            parts.append((Characters("drawings", glyphs, None, self.channels), 0.3, 0.25))
            seen.append(Seen.of(self.drawings.stem, "drawn characters", masks))
        for path in self.images:
            records = read_records(path, unlabelled="a photo")
            # Larger ones stay so: of them a square is cut out anew each time.
            side = max(32, min(records.images.shape[2:]))
            images = fit(records.images, self.channels, side)
            stills = Stills(path.stem, images, records.labels, records.captions)
            parts.append((stills, 0.15, 0.1))
            seen.append(Seen.of(path.stem, "images", records.images))
        if not parts:
            raise JobError("a public model needs something to learn from; give fonts, drawings or images")
        sources = tuple(part[0] for part in parts)
        return (
            Mixture(sources, tuple(part[1] for part in parts)),
            Mixture(sources, tuple(part[2] for part in parts)),
            Sources(tuple(seen)),
        )


def pretrain_folder(public: Public, out: Path, minutes: float) -> None:
    """Train both networks, half of ``minutes`` of a core each, and save a pipeline with its sources.

    An interrupted run goes on where it was (``out`` with ``.work`` at its end keeps the checkpoints).

    Raises:
        JobError: nothing to learn from.
    """
    if (out / "model_index.json").is_file():
        raise JobError(f"{out} holds a model already; name a new folder")
    first, second, sources = public.mixtures()
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    if (work / "sources.json").is_file() and Sources.read(work).digests() != sources.digests():
        raise JobError(
            f"{work} holds networks that were trained on other images; remove it, or name a new --out"
        )
    sources.write(work)
    vae = train_autoencoder(first, work / "autoencoder.ckpt", minutes / 2, channels=public.channels)
    captions = tuple(dict.fromkeys([*second.captions, *public.words]))
    torch.manual_seed(0)
    pipeline = make_pipeline(vae, captions)
    train_denoiser(pipeline, second, work / "denoiser.ckpt", minutes / 2)
    save_pipeline(pipeline, out)
    sources.write(out)
    shutil.rmtree(work)


def _drawings(path: Path) -> tuple[Glyphs, Tensor]:
    """Distance fields of packed masks, and the masks as bytes (N, 1, 105, 105)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            bits, labels = arrays["bits105"], arrays["labels"]
    except (OSError, KeyError, ValueError) as error:
        raise JobError(f"{path} is no .npz with bits105 and labels, as Omniglot's is here: {error}") from None
    masks = torch.from_numpy(
        np.unpackbits(bits, axis=1)[:, : 105 * 105].reshape(-1, 1, 105, 105) * np.uint8(255)
    )
    return glyphs_of_drawings(masks[:, 0] > 0, torch.from_numpy(labels.astype(np.int64))), masks


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over the fonts' files, short."""
    total = hashlib.sha256()
    for path in files:
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]
