"""Membership inference on a released model: can its loss tell who was trained on? (papers/dp-latent-diffusion 8.8)"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfumato.dp.data import Records, fit
from sfumato.dp.one_run import Membership, membership
from sfumato.dp.parts import Parts, encode, load_parts, target
from sfumato.errors import JobError

__all__ = ["attack_folder", "record_losses"]


@torch.no_grad()
def record_losses(parts: Parts, records: Records, *, draws: int = 16, seed: int = 0) -> Tensor:
    """Mean loss of each record (N,) over ``draws`` evenly spread timesteps, the same noises for all."""
    latents = encode(parts, fit(records.images, parts.channels, parts.side)).mean
    ids = parts.ids(records.captions)
    model = parts.denoiser().eval()
    generator = torch.Generator().manual_seed(seed)
    signals = parts.scheduler.alphas_cumprod.float()
    losses = torch.zeros(len(records))
    for time in torch.linspace(0, len(signals) - 1, draws + 2)[1:-1].long().tolist():
        noise = torch.randn(1, *latents.shape[1:], generator=generator)
        signal = signals[time].view(1, 1, 1, 1)
        for rows in torch.arange(len(records)).split(500):
            clean = latents[rows]
            same = noise.expand_as(clean)
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * same
            text = None if ids is None else ids[records.labels[rows]]
            guess = model(noisy, torch.full((len(rows),), time), text)
            wanted = target(parts.scheduler, clean, same, signal)
            losses[rows] += (guess - wanted).square().mean((1, 2, 3)) / draws
    return losses


def attack_folder(folder: Path, members: Records, others: Records, *, delta: float = 1e-5) -> Membership:
    """Attack the pipeline in ``folder`` with images it was trained on and others of the same kind; its bound on ε is at
    ``delta``.

    Raises:
        JobError: no such pipeline, or images that do not fit.
    """
    parts = load_parts(folder)
    if members.images.shape[1:] != others.images.shape[1:]:
        raise JobError(
            f"members are {tuple(members.images.shape[1:])} and others {tuple(others.images.shape[1:])}; give one shape"
        )
    return membership(lambda records: record_losses(parts, records), members, others, delta=delta)
