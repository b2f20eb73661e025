"""Samplers by name: diffusers' schedulers, and the corrected few-step runs of the papers."""

from __future__ import annotations

from typing import Any

import diffusers

from sfumato.diffusion.correction import Correction, Pull
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.record import record
from sfumato.diffusion.scores import aligned, rescheduled, scores
from sfumato.diffusion.settings import SCHEDULERS
from sfumato.errors import JobError

__all__ = ["CORRECTED", "SAMPLERS", "sampler"]

#: Steps of the original run that a record follows.
_FINE = 50
#: Those with a record, which start from its noise.
CORRECTED = ("sdu", "usg")
SAMPLERS = (*SCHEDULERS, *CORRECTED)


def sampler(
    pipe: Any, name: str, steps: int, seed: int, *, height: int | None = None, width: int | None = None
) -> tuple[Any, Correction | None]:
    """(scheduler, correction) of one image of ``steps`` steps whose generator is seeded with ``seed``.

    ``"sdu"`` (private-diffusion.md 1): DDIM on a grid that is aligned with a record of 50 steps, or the next multiple,
    reading B, eta 0.1 times kappa. ``"usg"`` (2.3): DDIM and a record of as many steps, reading A, the same weight.
    What the papers leave open is chosen here; `scores` takes every other choice.

    Raises:
        JobError: there is no such sampler, or the checkpoint does not predict noise on leading timesteps, which a
            corrected one needs.
    """
    own = pipe.scheduler
    if name in SCHEDULERS:
        return getattr(diffusers, SCHEDULERS[name]).from_config(own.config), None
    if name not in CORRECTED:
        raise JobError(f"there is no sampler {name!r}; use one of {', '.join(SAMPLERS)}")
    if own.config.get("prediction_type", "epsilon") != "epsilon":
        raise JobError(
            f"{name} needs a model that predicts noise; this one predicts {own.config.prediction_type}"
        )
    ddim = diffusers.DDIMScheduler.from_config(own.config)
    fine = steps if name == "usg" else steps * max(1, -(-_FINE // steps))
    scheduler = aligned(ddim, steps, fine) if name == "sdu" else ddim
    times = [float(t) for t in probe_schedule(scheduler, steps).timesteps]
    known = record(rescheduled(pipe, ddim), seed, fine, height=height, width=width)
    return scheduler, scores([known], scheduler, times, Pull(), "B" if name == "sdu" else "A")
