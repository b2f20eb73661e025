"""Samplers by name: diffusers' schedulers, and the corrected few-step runs of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from sfumato.diffusion.correction import Correction, Pull
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.record import record
from sfumato.diffusion.scores import aligned, rescheduled, scores
from sfumato.diffusion.settings import SCHEDULERS
from sfumato.errors import JobError
from sfumato.zoo import DISTILLED, embedded_path

__all__ = ["AUTO", "CORRECTED", "SAMPLERS", "Auto", "ClippedDPMSolver", "Sampling", "sampler", "solver"]

#: Steps of the original run that a record follows.
_FINE = 50
#: Those with a record, which start from its noise.
CORRECTED = ("sdu", "usg")
SAMPLERS = ("auto", *SCHEDULERS, *CORRECTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """What ``"auto"`` chooses for a checkpoint. ``guidance``: None for the checkpoint's usual one."""

    steps: int
    guidance: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


#: DPM-Solver++ (2M) on trailing timesteps, by checkpoint. The first two were measured (docs/corrections.md); for
#: others it is the solver's usual number of steps, which nobody measured here.
AUTO = {
    "embedded": Auto(steps=5, guidance=3.5, arguments={"unguided_steps": 1}),
    DISTILLED: Auto(steps=4, guidance=1.0),
    "": Auto(steps=10),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw: the scheduler, and arguments of the call. ``guidance``: None where any will do."""

    scheduler: Any
    steps: int
    correction: Correction | None = None
    guidance: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class ClippedDPMSolver(diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ whose predictions of the image are clipped to [-1, 1] (or ``clip_sample_range``), as DDIM's are.

    diffusers' own drops ``clip_sample`` when it is configured from a scheduler that clips. In pixels few steps need it:
    at the first one a prediction is the sample less its noise, divided by 0.006. Source: static thresholding, Saharia
    et al. 2022, 2.3.
    """

    def convert_model_output(self, *args: Any, **kwargs: Any) -> Tensor:
        limit = float(self.config.get("clip_sample_range", 1.0))
        image: Tensor = super().convert_model_output(*args, **kwargs)
        return image.clamp(-limit, limit)


def solver(name: str, config: Mapping[str, Any], **changed: Any) -> Any:
    """The diffusers scheduler of this name, configured as another one or by keyword; ``"dpm++"`` keeps the clipping of
    a model in pixels (`ClippedDPMSolver`).

    Raises:
        JobError: there is no such scheduler.
    """
    if name not in SCHEDULERS:
        raise JobError(f"there is no solver {name!r}; use one of {', '.join(SCHEDULERS)}")
    chosen = getattr(diffusers, SCHEDULERS[name])
    if name == "dpm++" and config.get("clip_sample"):
        chosen = ClippedDPMSolver
    return chosen.from_config(config, **changed)


def sampler(
    pipe: Any,
    name: str,
    steps: int | None,
    seed: int,
    *,
    height: int | None = None,
    width: int | None = None,
) -> Sampling:
    """How a sampler of this name draws one image of ``steps`` steps, by default what diffusers or `AUTO` takes, whose
    generator is seeded with ``seed``.

    ``"auto"``: few steps that keep the quality of many, from `AUTO`.

    ``"sdu"`` (private-diffusion.md 1): DDIM on a grid that is aligned with a record of 50 steps, or the next multiple,
    reading B, eta 0.1 times kappa. ``"usg"`` (2.3): DDIM and a record of as many steps, reading A, the same weight.
    What the papers leave open is chosen here; `scores` takes every other choice.

    Raises:
        JobError: there is no such sampler, or the checkpoint does not predict noise on leading timesteps, which a
            corrected one needs.
    """
    own = pipe.scheduler
    if name == "auto":
        chosen = AUTO[_known(pipe)]
        return Sampling(
            scheduler=solver("dpm++", own.config, timestep_spacing="trailing"),
            steps=steps or chosen.steps,
            guidance=chosen.guidance,
            arguments=chosen.arguments,
        )
    steps = steps or _FINE
    if name in SCHEDULERS:
        return Sampling(scheduler=solver(name, own.config), steps=steps)
    if name not in CORRECTED:
        raise JobError(f"there is no sampler {name!r}; use one of {', '.join(SAMPLERS)}")
    if own.config.get("prediction_type", "epsilon") != "epsilon":
        raise JobError(
            f"{name} needs a model that predicts noise; this one predicts {own.config.prediction_type}"
        )
    ddim = solver("ddim", own.config)
    fine = steps if name == "usg" else steps * max(1, -(-_FINE // steps))
    scheduler = aligned(ddim, steps, fine) if name == "sdu" else ddim
    times = [float(t) for t in probe_schedule(scheduler, steps).timesteps]
    known = record(rescheduled(pipe, ddim), seed, fine, height=height, width=width)
    correction = scores([known], scheduler, times, Pull(), "B" if name == "sdu" else "A")
    return Sampling(scheduler=scheduler, steps=steps, correction=correction)


def _known(pipe: Any) -> str:
    """A checkpoint's key in `AUTO`."""
    path = str(pipe.name_or_path)
    return DISTILLED if path == DISTILLED else "embedded" if Path(path) == embedded_path() else ""
