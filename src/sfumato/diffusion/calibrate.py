"""The denoiser's ranges, measured in the clear on a few prompts of our own, once per model and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.request import Prepared
from sfumato.diffusion.schedule import Schedule, probe_schedule
from sfumato.errors import CaptureError
from sfumato.graph.calibrate import Calibration

__all__ = [
    "PROMPTS",
    "Trajectories",
    "cache_file",
    "decoder_samples",
    "load_cached",
    "save_cached",
    "trajectories",
]

#: Various, and short enough for small text encoders.
PROMPTS = (
    "a handwritten seven",
    "a photo of a horse",
    "a small dress",
    "a harbour at sunset",
    "the number 0",
    "an old fisherman",
    "a sneaker",
    "",
)
_BUDGET_S = 60.0
#: Trajectories that tell how runs differ, and calls of all of them that are measured.
_RUNS = 24
_SAMPLES = 240
_SHORTEST = 4
_FORMAT = 3

Sample = tuple[tuple[Tensor], dict[str, Any]]


class Trajectories(NamedTuple):
    """``samples``: arguments of the denoiser, a list for each trajectory, which counts as one run; ``finals``: the
    latents at the end of each."""

    samples: list[list[Sample]]
    finals: list[Tensor]


def trajectories(pipe: Any, denoiser: Denoiser, prepared: Prepared, *, progress: bool = True) -> Trajectories:
    """Arguments of the denoiser along plain trajectories: all timesteps, eight prompts, several noises.

    Slow models get fewer prompts, then shorter trajectories. The caller's own prompt is not used: ranges
    are public.
    """
    one_s = _seconds(denoiser, prepared)
    longest = max(_SHORTEST, int(_BUDGET_S / (3 * one_s)))
    if len(prepared.schedule.steps) > longest:
        prepared = replace(prepared, schedule=probe_schedule(pipe.scheduler, longest))
    steps, batch = len(prepared.schedule.steps), prepared.batch
    # Each trajectory costs its calls, then about twice that again to measure what was recorded.
    wanted = max(-(-len(PROMPTS) // batch), _RUNS)
    runs = max(1, min(wanted, int(_BUDGET_S / (3 * steps * one_s))))
    kept = max(2, min(steps, _SAMPLES // runs))
    recorded = {round(i * (steps - 1) / max(kept - 1, 1)) for i in range(kept)}
    found = Trajectories([], [])
    with tqdm(total=runs * steps, desc="calibrating", delay=2.0, disable=not progress, leave=False) as bar:
        for run in range(runs):
            start = _sample(pipe, prepared, run)
            found.samples.append([])
            for k, sample in enumerate(_trajectory(denoiser, prepared, start, found.finals)):
                if k in recorded:
                    found.samples[-1].append(sample)
                bar.update()
    return found


def decoder_samples(vae: Any, finals: list[Tensor]) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    """Arguments of the image decoder: so many of the last latents as there is time for."""
    weights = sum(p.numel() for p in vae.decoder.parameters())
    pixels = finals[0].shape[0] * finals[0].shape[-2] * finals[0].shape[-1]
    # Most of a decoder works at several times the latents' resolution.
    one_s = max(0.005, 12 * weights * pixels / 40e9)
    return [((latents,), {}) for latents in finals[: max(1, int(_BUDGET_S / (3 * one_s)))]]


def _seconds(denoiser: Denoiser, prepared: Prepared) -> float:
    """Rough time of one call by the model's size alone, so that the same model always gets the same ranges."""
    weights = sum(p.numel() for p in denoiser.parameters())
    pixels = prepared.latents.shape[0] * prepared.latents.shape[-2] * prepared.latents.shape[-1]
    products = weights * pixels / 8 * (2 if prepared.guided else 1)
    return max(0.02, products / 40e9)


def _sample(pipe: Any, prepared: Prepared, run: int) -> Sample:
    """The first step's arguments for the ``run``-th group of prompts, with noise of its own."""
    batch = prepared.batch
    prompts = [PROMPTS[(run * batch + i) % len(PROMPTS)] for i in range(batch)]
    embeds, negative = pipe.encode_prompt(prompts, torch.device("cpu"), 1, prepared.guided)
    text = torch.cat([negative, embeds]) if prepared.guided else embeds
    source = torch.Generator().manual_seed(7_000 + run)
    schedule = prepared.schedule.in_input_scale()
    latents = torch.randn(prepared.latents.shape, generator=source) * schedule.init_sigma
    return (latents,), call_kwargs(schedule.timesteps[0], text.detach(), prepared.condition)


def _trajectory(
    denoiser: Denoiser, prepared: Prepared, start: Sample, finals: list[Tensor]
) -> Iterator[Sample]:
    """The float trajectory of one start, step by step, in the scale that the model sees; its end goes to
    ``finals``."""
    schedule: Schedule = prepared.schedule.in_input_scale()
    guidance, (latents,) = prepared.request.guidance_scale, start[0]
    source = torch.Generator().manual_seed(1)
    samples, outputs = [latents], []
    for k, step in enumerate(schedule.steps):
        kwargs = {
            **start[1],
            **call_kwargs(schedule.timesteps[k], start[1]["encoder_hidden_states"], prepared.condition),
        }
        yield (samples[k],), kwargs
        with torch.no_grad():
            output = denoiser(samples[k], **kwargs)
        if prepared.guided:
            without, towards = output.chunk(2)
            output = without + guidance * (towards - without)
        outputs.append(output)
        following = sum((c * samples[k - age] for age, c in step.samples.items()), torch.zeros_like(latents))
        following = sum((c * outputs[k - age] for age, c in step.outputs.items()), following)
        if step.noise:
            following = following + step.noise * torch.randn(latents.shape, generator=source)
        samples.append(following)
    finals.append(samples[-1])


# ---- on disk -----------------------------------------------------------------------------------------------


def cache_file(weights: str, prepared: Prepared, profile: str, secret: str, part: str = "unet") -> Path:
    """Where the ranges of one part of a model (by the digest of its weights) for these settings are kept."""
    own = _of_text(prepared) if part == "text" else _of_denoising(prepared)
    settings = {"format": _FORMAT, "release": _release(), "weights": weights, **own}
    settings |= {"profile": profile, "secret": secret, "part": part}
    name = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / "calibration"
    return folder / f"{name}.json"


def _of_text(prepared: Prepared) -> dict[str, Any]:
    request, ids = prepared.request, prepared.ids
    return {
        "ids": None if ids is None else list(ids.shape),
        "guided": prepared.guided,
        "clip_skip": request.clip_skip,
        "repeats": request.num_images_per_prompt,
    }


def _of_denoising(prepared: Prepared) -> dict[str, Any]:
    schedule = prepared.schedule
    return {
        "shape": list(prepared.latents.shape),
        "guidance": prepared.request.guidance_scale
        if prepared.guided or prepared.condition is not None
        else None,
        "steps": [
            [s.timestep, s.input_scale, *s.samples.items(), *s.outputs.items(), s.noise]
            for s in schedule.steps
        ],
    }


def load_cached(path: Path) -> Calibration | None:
    """The ranges kept in a file, if it is there and whole."""
    try:
        return Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, CaptureError):
        return None


def save_cached(path: Path, calibration: Calibration) -> None:
    """Keep ranges; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.part")
        scratch.write_text(json.dumps(calibration.to_json()), encoding="utf-8")
        scratch.replace(path)
    except OSError:
        return


def _release() -> str:
    try:
        return version("sfumato")
    except PackageNotFoundError:
        return "source"
