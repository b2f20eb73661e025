"""Corrections of many images at once: records by the batch, and weights fitted on images that no study uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.planned import PlannedNetwork
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.record import Record
from sfumato.diffusion.sampling import guided, sample
from sfumato.diffusion.scores import deviations, measured, scores
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.study.plans import CALIBRATION_SEED, course
from sfumato.study.setting import Offline, Setting
from sfumato.study.subject import Subject

__all__ = ["Fit", "correction", "fitted", "records"]

_OTHERS = 10_000_000  # seeds of records that are independent of their images


def records(model: Subject, seeds: Sequence[int], fine: int) -> list[Record]:
    """The exact unconditional DDIM trajectories of these seeds over ``fine`` steps."""
    return _records(model, tuple(seeds), fine)


@lru_cache(maxsize=4)
def _records(model: Subject, seeds: tuple[int, ...], fine: int) -> list[Record]:
    schedule, seen = probe_schedule(model.scheduler, fine), list[tuple[Tensor, Tensor]]()
    last = sample(
        model, schedule, model.noise(seeds) * schedule.init_sigma, model.null.expand(len(seeds), -1, -1), None,
        watch=lambda latents, output: seen.append((latents.float(), output.float())),
    )  # fmt: skip
    times = tuple(float(t) for t in schedule.timesteps)
    latents = torch.stack([*(z for z, _ in seen), last.float()], 1)
    outputs = torch.stack([e for _, e in seen], 1)
    return [Record(times, latents[i], outputs[i]) for i in range(len(seeds))]


@dataclass(frozen=True, slots=True)
class Fit:
    """Weights of the blend at each step: ``beta`` of the measured error, ``pull`` of the scores; ``correlation`` of the
    error that the run makes with the measured one, which says how much of it a correction can take out."""

    beta: tuple[float, ...]
    pull: tuple[float, ...]
    correlation: tuple[float, ...]


def correction(
    model: Subject, setting: Setting, seeds: Sequence[int], plan: Plan | None, fit: Fit | None = None
) -> Correction | None:
    """What this setting adds for images of these seeds. ``plan``: of its denoiser, for as many images.

    Raises:
        JobError: a measured error of an exact network.
    """
    offline = setting.offline
    if offline is None:
        return None
    going = course(model, setting)
    own = [seed + _OTHERS for seed in seeds] if offline.independent else list(seeds)
    known = records(model, own, offline.fine)
    if offline.kind == "scores":
        return scores(known, going.scheduler, going.times, offline.pull, offline.reading)
    if plan is None:
        raise JobError("the measured error is that of approximations; give the setting a profile")
    if offline.kind == "measured":
        return measured(known, model, model.null, plan, going.times, offline.beta)
    if fit is None:
        raise JobError("a blend needs weights; fit them first")
    off = measured(known, model, model.null, plan, going.times, fit.beta)
    score = _scores(known, going.scheduler, going.times, offline)
    parts = zip(off.additions, score, fit.pull, strict=True)
    return Correction(fit.pull, tuple(error + e * g for error, e, g in parts))


def _scores(
    known: Sequence[Record], scheduler: object, times: Sequence[float], offline: Offline
) -> list[Tensor]:
    """E_i themselves: a correction of weight one everywhere."""
    unit = type(offline.pull)(eta=1.0, exponent=0.0)
    return list(scores(known, scheduler, times, unit, offline.reading).additions)


def fitted(model: Subject, setting: Setting, plan: Plan, images: int) -> Fit:
    """Least squares, step by step, on a pilot of ``images`` (the plan's batch): which weights of measured error and
    score bring the approximated network's guided output nearest to the exact one's on the same samples.
    """
    offline = setting.offline or Offline(kind="blend")
    going = course(model, setting)
    seeds = [2 * CALIBRATION_SEED + i for i in range(images)]
    known = records(model, seeds, offline.fine)
    off = deviations(known, model, model.null, plan, going.times)
    score = _scores(known, going.scheduler, going.times, offline)
    beta, pull, correlation = list[float](), list[float](), list[float]()
    with PlannedNetwork(plan) as approximated:

        def network(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
            k = len(beta)
            given, exact = approximated(z, t, text), model(z, t, text).double()
            weight = going.guidance[k]
            towards = given if weight is None else given.chunk(2)[1]
            wanted = exact - given if weight is None else guided(exact, weight) - guided(given, weight)
            basis = torch.stack([off[k].flatten(), (score[k].double() - towards).flatten()], 1)
            solved = torch.linalg.lstsq(basis, wanted.flatten()[:, None]).solution.flatten()
            beta.append(float(solved[0]))
            pull.append(float(solved[1].clamp(0.0, 1.0)))
            pair = torch.stack([off[k].flatten(), wanted.flatten()])
            correlation.append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
            return given

        text = model.text([i % len(model.texts) for i in range(images)], guided=going.guided)
        first = model.noise(seeds) * going.schedule.init_sigma
        sample(network, going.schedule, first, text, going.guidance if going.guided else None)
    return Fit(tuple(beta), tuple(pull), tuple(correlation))
