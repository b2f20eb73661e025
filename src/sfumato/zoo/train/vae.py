"""Training of the autoencoder, and the latents of the training images."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from .build import make_vae
from .data import load_split, to_signed
from .loop import Indices, channels_last, run

KL_WEIGHT = 1e-6


def train_vae(data: Path, out: Path, minutes: float) -> AutoencoderKL:
    """Autoencoder with a small KL term; its scaling factor is set from the spread of the latents."""
    split = load_split(data, train=True)
    torch.manual_seed(0)
    vae = channels_last(make_vae())
    draw = Indices(len(split.labels), 64, seed=3)

    def step(_: int) -> torch.Tensor:
        images = to_signed(split.images[draw()]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = functional.mse_loss(decoded.float(), images) + 0.3 * functional.l1_loss(
            decoded.float(), images
        )
        return error + KL_WEIGHT * posterior.kl().float().mean()

    average = run("vae", vae, step, out / "vae.ckpt", minutes, peak=2e-3, decay=0.995)
    vae.load_state_dict(average.state)
    vae.eval()
    sample = to_signed(split.images[:: max(1, len(split.labels) // 4000)])
    with torch.no_grad():
        latents = vae.encode(sample).latent_dist.mode()
        error = functional.mse_loss(vae.decode(latents).sample.clamp(-1, 1), sample)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    print(f"vae: mean squared error {float(error):.5f}, latent mean {latents.mean((0, 2, 3)).tolist()}, "
          f"std {latents.std((0, 2, 3)).tolist()}", flush=True)  # fmt: skip
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor, cache: Path) -> None:
    """Write the scaled latents (posterior means) of all images, (N, 4, 8, 8) fp16, to ``cache``."""
    if cache.is_file():
        return
    parts = []
    channels_last(vae)
    for block in images.split(500):
        signed = to_signed(block).contiguous(memory_format=torch.channels_last)
        parts.append((vae.encode(signed).latent_dist.mode() * vae.config.scaling_factor).half())
    partial = cache.with_suffix(".part")
    torch.save(torch.cat(parts).contiguous(), partial)
    os.replace(partial, cache)
