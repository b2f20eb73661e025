"""Sampling many images from a latent-diffusion folder: post-processing of its weights, which costs no privacy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.dp.data import Records
from sfumato.dp.parts import Parts, arithmetic, check_device, decode
from sfumato.errors import JobError

__all__ = ["draw", "grid", "save_samples"]


@torch.no_grad()
def draw(
    parts: Parts,
    captions: Sequence[str],
    labels: Tensor,
    *,
    steps: int = 25,
    guidance: float = 1.0,
    eta: float = 1.0,
    seed: int = 0,
    batch: int = 500,
    precision: str = "float32",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Records:
    """One image for each of ``labels`` (N,), which index ``captions``.

    Args:
        steps: of the folder's own scheduler (DDIM: ``eta`` 1 is stochastic, as DP-LDM samples; papers 1.3).
        guidance: weight of the caption; 1 samples without guidance and calls the U-Net once a step.
        seed: same seed, same images (on one machine, up to rounding of a byte for other ``batch``); more of them
            begin with the same ones.
        precision: of the U-Net's and decoder's arithmetic, "float32" or "bfloat16".
        device: where the models compute; noise is drawn on the CPU whatever it is.

    Raises:
        JobError: a label without a caption, a step count below 1, or a device that is not there.
    """
    if steps < 1 or guidance <= 0:
        raise JobError(f"steps ({steps}) and guidance ({guidance}) are positive")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < max(1, len(captions)):
        raise JobError(f"a label is {int(labels.max())}, but there are {len(captions)} captions")
    check_device(device)
    for model in (parts.unet, parts.vae, parts.text_encoder):
        if model is not None:
            model.to(device).eval()
    denoiser = parts.denoiser().eval()
    texts = _texts(parts, [*captions, ""])
    scheduler = parts.scheduler
    taken = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": eta} if "eta" in taken else {}
    images = []
    for number, part in enumerate(labels.split(batch)):
        # A generator of each image by itself: a longer run begins with the images of a shorter one.
        first = seed * 1_000_003 + number * batch
        generators = [torch.Generator().manual_seed(first + k) for k in range(len(part))]
        if "generator" in taken:
            extra["generator"] = generators
        scheduler.set_timesteps(steps)
        x = torch.stack([torch.randn(parts.latent_shape, generator=g) for g in generators])
        x = x.to(device) * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, time)
            with arithmetic(precision, device):
                guess = _guess(denoiser, seen, time, texts, part.to(device), guidance)
            x = scheduler.step(guess.float(), time, x, **extra).prev_sample
        with arithmetic(precision, device):
            images.append(decode(parts, x).cpu())
        if progress is not None:
            progress(min(len(labels), (number + 1) * batch), len(labels))
    none = torch.empty(0, parts.channels, parts.side, parts.side, dtype=torch.uint8)
    return Records(torch.cat([none, *images]), labels, tuple(captions))


def _texts(parts: Parts, captions: Sequence[str]) -> Tensor | None:
    """Text embeddings (len(captions), tokens, width), once for all images."""
    ids = parts.ids(captions)
    return None if ids is None else parts.text_encoder(ids.to(parts.text_encoder.device)).last_hidden_state


def _guess(
    denoiser: Any, x: Tensor, time: Tensor, texts: Tensor | None, labels: Tensor, guidance: float
) -> Tensor:
    if texts is None:
        return denoiser.unet(x, time).sample
    own = texts[labels]
    if guidance == 1.0:
        return denoiser.unet(x, time, own).sample
    both = torch.cat([own, texts[-1:].expand(len(own), -1, -1)])
    with_text, without = denoiser.unet(torch.cat([x, x]), time, both).sample.chunk(2)
    return without + guidance * (with_text - without)


def grid(images: Tensor, columns: int, scale: int = 1) -> Image.Image:
    """Bytes (N, C, H, W) as one picture, row by row, ``columns`` a row."""
    count, channels, high, wide = images.shape
    rows = -(-count // columns)
    canvas = torch.zeros(rows * columns, channels, high, wide, dtype=torch.uint8)
    canvas[:count] = images
    joined = (
        canvas.view(rows, columns, channels, high, wide)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * high, columns * wide, channels)
    )
    array = joined.numpy()
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    return (
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        if scale > 1
        else picture
    )


def save_samples(samples: Records, path: Path) -> Path:
    """As an .npz that `data.read_records` reads: ``images`` (N, H, W[, C]) bytes, ``labels``, ``captions``."""
    images = samples.images.permute(0, 2, 3, 1).numpy()
    np.savez_compressed(
        path,
        images=images[..., 0] if images.shape[-1] == 1 else images,
        labels=samples.labels.numpy(),
        captions=np.array(samples.captions, dtype=np.str_),
    )
    return path
