"""Offline records: the exact network's unconditional trajectory from a public seed, in the clear, kept on disk.

No secret goes into a record: it depends on the weights, the scheduler, the null prompt and a public seed, so whoever
has the weights makes it before a client asks (private-diffusion.md 1.4, OFFLINE).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.sampling import sample
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import JobError
from sfumato.graph.kept import keep, place, weights_digest

__all__ = ["Record", "record"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One trajectory of T steps.

    ``times``: T timesteps, falling. ``latents``: (T + 1, channels, height, width), from noise to the end, in the
    scheduler's own scale. ``outputs``: (T, channels, height, width), of the network at ``latents[j]``, ``times[j]``.
    """

    times: tuple[float, ...]
    latents: Tensor
    outputs: Tensor

    def at(self, time: float) -> int:
        """The step at this timestep, or at the nearest one, at most half a step away.

        Raises:
            JobError: the trajectory does not come that near.
        """
        off = [abs(t - float(time)) for t in self.times]
        nearest = min(range(len(off)), key=off.__getitem__)
        gaps = [a - b for a, b in pairwise(self.times)]
        if off[nearest] > max(gaps, default=0.0) / 2:
            raise JobError(
                f"a record from timestep {self.times[0]:g} to {self.times[-1]:g} does not pass {time:g}; take more of "
                "its steps, or the grid that is aligned with it"
            )
        return nearest


def record(
    pipe: Any, seed: int, steps: int, *, height: int | None = None, width: int | None = None
) -> Record:
    """The record of ``seed`` over ``steps`` steps of the pipeline's scheduler, from disk or made now.

    Raises:
        JobError: the scheduler draws noise in its steps, or clamps: then its trajectory is not a function of the seed.
    """
    schedule = probe_schedule(pipe.scheduler, steps)
    if any(step.draws or step.clip is not None for step in schedule.steps):
        raise JobError(
            "a record needs a scheduler that neither draws noise in its steps nor clips; use DDIM with eta 0"
        )
    shape = (
        pipe.unet.config.in_channels,
        (height or pipe.unet.config.sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor,
        (width or pipe.unet.config.sample_size * pipe.vae_scale_factor) // pipe.vae_scale_factor,
    )
    with torch.no_grad():
        null = pipe.encode_prompt([""], torch.device("cpu"), 1, False)[0].detach()
    file = _file(pipe, seed, steps, shape, null)
    known = _load(file)
    if known is None:
        known = _made(pipe, seed, schedule, shape, null)
        _save(file, known)
    return known


def _made(pipe: Any, seed: int, schedule: Schedule, shape: tuple[int, ...], null: Tensor) -> Record:
    denoiser, seen = Denoiser(pipe.unet, guided=False).eval(), list[tuple[Tensor, Tensor]]()
    first = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) * schedule.init_sigma
    last = sample(
        lambda z, t, text: denoiser(z, **call_kwargs(t, text, None)),
        schedule,
        first,
        null,
        None,
        watch=lambda latents, output: seen.append((latents, output)),
    )
    return Record(
        tuple(float(t) for t in schedule.timesteps),
        torch.cat([*(latents for latents, _ in seen), last]).float(),
        torch.cat([output for _, output in seen]).float(),
    )


# ---- on disk -----------------------------------------------------------------------------------------------


def _file(pipe: Any, seed: int, steps: int, shape: tuple[int, ...], null: Tensor) -> Path:
    """A name that tells nothing but by its digest."""
    config = {k: str(v) for k, v in dict(pipe.scheduler.config).items() if not k.startswith("_")}
    facts = {
        "format": _FORMAT, "weights": weights_digest(pipe.unet), "scheduler": [type(pipe.scheduler).__name__, config],
        "steps": steps, "seed": seed, "shape": list(shape),
        "null": hashlib.blake2b(null.numpy().tobytes(), digest_size=16).hexdigest(),
    }  # fmt: skip
    return place("records", facts, ".safetensors")


def _load(file: Path) -> Record | None:
    try:
        found = load_file(file)
        return Record(tuple(found["times"].tolist()), found["latents"], found["outputs"])
    except (OSError, KeyError, SafetensorError):
        return None


def _save(file: Path, made: Record) -> None:
    times = torch.tensor(made.times, dtype=torch.float64)
    tensors = {"times": times, "latents": made.latents, "outputs": made.outputs}
    keep(file, lambda scratch: save_file(tensors, scratch))
