"""Corrections from offline records: scores of the exact network (SDU, USG), and the measured error of the other one.

Everything here is public and happens before or beside a run; `correction` has the notation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.correction import Correction, Pull
from sfumato.diffusion.planned import PlannedNetwork
from sfumato.diffusion.record import Record
from sfumato.diffusion.sampling import Network
from sfumato.errors import JobError
from sfumato.graph.plan import Plan

__all__ = ["READINGS", "aligned", "deviations", "measured", "rescheduled", "scores"]

#: How the steps of a record between two steps of a run give one score (private-diffusion.md 1.4): A, the one at the
#: same time; B, the one with which the run's step does what the record's steps did together.
READINGS = ("A", "B")


def aligned(scheduler: Any, steps: int, fine: int) -> Any:
    """The scheduler on the grid of ``steps`` that starts where its grid of ``fine`` steps does (981, 881, ..., 81 for
    10 of 50) instead of at its own first step (901).

    Raises:
        JobError: it has no such grid.
    """
    if fine % steps or scheduler.config.get("timestep_spacing") != "leading":
        raise JobError("an aligned grid needs leading spacing, and a record of a multiple of the run's steps")
    moved = scheduler.config.num_train_timesteps
    offset = int(scheduler.config.get("steps_offset", 0)) + moved // steps - moved // fine
    return type(scheduler).from_config({**scheduler.config, "steps_offset": offset})


def scores(
    records: Sequence[Record],
    scheduler: Any,
    times: Sequence[float],
    pull: Pull | None = None,
    reading: str = "A",
) -> Correction:
    """``g_i (E_i - a_i)`` for a run at ``times`` whose images start from the noise of ``records``, one each.

    Raises:
        JobError: a record does not pass these times, or reading B of a network that does not predict noise.
    """
    if reading not in READINGS:
        raise JobError(f"there is no reading {reading!r}; use A or B")
    if reading == "B" and scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise JobError("reading B needs a network that predicts noise; use reading A")
    weigh = pull or Pull()
    abars = [float(scheduler.alphas_cumprod[int(t)]) for t in times]
    pulls = tuple(weigh.at(abar) for abar in abars)
    found = [_of_step(records, scheduler, times, i, reading) for i in range(len(times))]
    return Correction(pulls, tuple(score.double() * g for score, g in zip(found, pulls, strict=True)))


def _of_step(
    records: Sequence[Record], scheduler: Any, times: Sequence[float], i: int, reading: str
) -> Tensor:
    """E_i of each record: (images, channels, height, width)."""
    at = [record.at(times[i]) for record in records]
    if reading == "A":
        return torch.stack([record.outputs[j] for record, j in zip(records, at, strict=True)])
    last = i + 1 == len(times)
    until = [len(record.times) if last else record.at(times[i + 1]) for record in records]
    here = float(scheduler.alphas_cumprod[int(times[i])])
    there = float(scheduler.final_alpha_cumprod if last else scheduler.alphas_cumprod[int(times[i + 1])])
    moved = [
        record.latents[k].double() / math.sqrt(there) - record.latents[j].double() / math.sqrt(here)
        for record, j, k in zip(records, at, until, strict=True)
    ]
    return torch.stack(moved) / (_kappa(there) - _kappa(here))


def _kappa(abar: float) -> float:
    return math.sqrt((1.0 - abar) / abar)


def measured(
    records: Sequence[Record],
    network: Network,
    null: Tensor,
    plan: Plan,
    times: Sequence[float],
    beta: Sequence[float] | float = 1.0,
) -> Correction:
    """``beta_i (eps(u_i) - ehat(u_i))``: the error of the plan's network on each record's trajectory, measured in the
    clear by the plan's own arithmetic (``plain``), without a prompt.

    ``network``: the exact one, without guidance; ``null``: (1, tokens, width), the text of the empty prompt; ``plan``:
    of the denoiser of a run with as many images as there are records. A step's number is one for all of its values.
    """
    betas = [beta] * len(times) if isinstance(beta, float | int) else list(beta)
    off = deviations(records, network, null, plan, times)
    return Correction((0.0,) * len(times), tuple(d * b for d, b in zip(off, betas, strict=True)))


def deviations(
    records: Sequence[Record], network: Network, null: Tensor, plan: Plan, times: Sequence[float]
) -> list[Tensor]:
    """``eps(u_i) - ehat(u_i)`` at each of the times: (images, channels, height, width) in float64."""
    images = len(records)
    halves = plan.program.types["encoder_hidden_states"][0][0] // images
    found = []
    with PlannedNetwork(plan) as approximated, torch.no_grad():
        for time in times:
            u = torch.stack([record.latents[record.at(time)] for record in records])
            at = torch.tensor(float(time))
            wanted = network(u, at, null.expand(images, -1, -1)).double()
            given = approximated(u, at, null.expand(halves * images, -1, -1).contiguous())
            found.append(wanted - given[:images])  # without a prompt both halves are the same
    return found


def rescheduled(pipe: Any, scheduler: Any) -> Any:
    """The pipeline with another scheduler; the given one stays as it is."""
    made = copy.copy(pipe)
    made.scheduler = scheduler
    return made
