"""Schedules and plans of a setting: probed, captured, and calibrated on runs whose seeds no study uses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.picture import Clamp
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.samplers import solver
from sfumato.diffusion.sampling import sample
from sfumato.diffusion.schedule import Schedule
from sfumato.diffusion.scores import aligned
from sfumato.errors import JobError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.capture import capture
from sfumato.graph.kept import load_cached, place, save_cached, weights_digest
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.study.setting import Setting
from sfumato.study.subject import Subject

__all__ = ["CALIBRATION_SEED", "Course", "Plans", "course", "plans", "ranges"]

#: Seeds of calibration begin here, and those of pilots (`fitted`) at twice that; studies stay below.
CALIBRATION_SEED = 1_000_000
#: Runs that ranges are measured on, and images of each.
_RUNS, _TOGETHER = 12, 10
#: Steps of a run that are measured.
_CALLS = 6
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Course:
    """A setting on a subject: the scheduler, its schedule, and the weight of the prompt at each step (None: the step
    runs without the other half)."""

    scheduler: Any
    schedule: Schedule
    guidance: list[float | None]

    @property
    def times(self) -> list[float]:
        return [float(t) for t in self.schedule.timesteps]

    @property
    def guided(self) -> bool:
        return any(weight is not None for weight in self.guidance)


@lru_cache(maxsize=32)  # probing a scheduler runs it; every chunk asks several times
def course(subject: Subject, setting: Setting) -> Course:
    """
    Raises:
        JobError: no such scheduler, or one that does not do these steps; or steps that a student was not taught.
    """
    if subject.steps is not None and subject.steps != setting.steps:
        raise JobError(
            f"this student of {subject.name} draws in {subject.steps} steps, not {setting.steps}; train another with "
            f"python -m sfumato.zoo.train.few --model {subject.name} --steps {setting.steps}"
        )
    spaced = {} if setting.spacing is None else {"timestep_spacing": setting.spacing}
    scheduler = solver(setting.solver, subject.scheduler.config, **spaced)
    if setting.aligned:
        fine = 50 if setting.offline is None else setting.offline.fine
        scheduler = aligned(scheduler, setting.steps, fine)
    schedule = probe_schedule(scheduler, setting.steps)
    weight = subject.guidance if setting.guidance is None else setting.guidance
    guidance: list[float | None] = [weight] * len(schedule.steps)
    if setting.lowered is not None and weight is not None:
        abars = [float(scheduler.alphas_cumprod[int(t)]) for t in schedule.timesteps]
        guidance = [max(1.0, weight - setting.lowered.at(abar)) for abar in abars]
    for k in range(len(guidance) - setting.unguided, len(guidance)):
        guidance[k] = None
    return Course(scheduler, schedule, guidance)


#: By name, as `Denoising` calls them: the denoiser for both halves, for one half, and the scheduler's clamp.
Plans = dict[str, Plan]


def ranges(subject: Subject, setting: Setting, effort: int = 1) -> dict[str, Calibration]:
    """Ranges of each plan of a setting, from disk or measured along exact runs without a correction. ``effort``: times
    as many runs."""
    going = course(subject, setting)
    files = {
        name: place("study", _facts(subject, setting, name, effort), ".json")
        for name in _names(going, setting)
    }
    known = {name: load_cached(file) for name, file in files.items()}
    if any(found is None for found in known.values()):
        samples = _samples(subject, setting, effort)
        for name, file in files.items():
            module, arguments, options = _captured(subject, going, name, _TOGETHER)
            program = capture(module, *arguments)
            plan = make_plan(
                program, profile=setting.profile or "precise", calibration=samples[name], **options
            )
            known[name] = plan.calibration
            save_cached(file, plan.calibration)
    return {name: found for name, found in known.items() if found is not None}


def plans(subject: Subject, setting: Setting, images: int, measured: Mapping[str, Calibration]) -> Plans:
    """The plans of a run of so many images.

    Raises:
        CaptureError, PlanError: the network has what cannot run under the protocol.
    """
    going = course(subject, setting)
    made: Plans = {}
    for name in _names(going, setting):
        module, arguments, options = _captured(subject, going, name, images)
        made[name] = make_plan(
            capture(module, *arguments),
            profile=setting.profile or "precise",
            calibration=measured[name],
            methods=dict(setting.methods),
            **options,
        )
    return made


def _names(going: Course, setting: Setting) -> list[str]:
    single = going.guided and (None in going.guidance or setting.public_first)
    found = ["unet", *(["unet-single"] if single else [])]
    return found + (["clip"] if going.schedule.clip is not None else [])


def _captured(
    subject: Subject, going: Course, name: str, images: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(module, its arguments, options of its plan) for so many images."""
    zeros = torch.zeros((images, *subject.shape))
    if name == "clip":
        assert going.schedule.clip is not None
        return Clamp(*going.schedule.clip).eval(), ((zeros,),), {}
    both = going.guided and name == "unet"
    text = subject.null.expand((2 if both else 1) * images, -1, -1).contiguous()
    keywords = call_kwargs(going.schedule.timesteps[0], text, None)
    module = subject.guided if both else subject.single
    return module, ((zeros,), keywords), {"client_known": ("encoder_hidden_states",)}


def _facts(subject: Subject, setting: Setting, name: str, effort: int) -> dict[str, Any]:
    """What ranges depend on: of the setting, not the approximations nor the correction, which exact runs without it do
    not have."""
    facts = asdict(replace(setting, name="", profile=None, methods=(), offline=None))
    if setting.aligned:
        facts["fine"] = setting.offline.fine if setting.offline else 50
    return {
        "format": _FORMAT, "weights": weights_digest(subject.single), "part": name, "effort": effort,
        "setting": json.dumps(facts),
        "scheduler": json.dumps(dict(subject.scheduler.config), sort_keys=True, default=str),
    }  # fmt: skip


def _samples(subject: Subject, setting: Setting, effort: int) -> dict[str, list[Any]]:
    """Arguments of each plan along exact runs with seeds of their own; all prompts in turn."""
    going = course(subject, setting)
    found: dict[str, list[Any]] = {name: [] for name in _names(going, setting)}
    for run in range(_RUNS * effort):
        prompts = [(run * _TOGETHER + i) % len(subject.texts) for i in range(_TOGETHER)]
        seeds = [CALIBRATION_SEED + run * _TOGETHER + i for i in range(_TOGETHER)]
        calls: dict[str, list[Any]] = {"unet": [], "unet-single": [], "clip": []}

        def network(z: Tensor, t: Tensor, text: Tensor, calls: dict[str, list[Any]] = calls) -> Tensor:
            kind = "unet-single" if going.guided and len(text) == len(z) else "unet"
            if setting.public_first and kind == "unet" and going.guided and not calls[kind]:
                calls["unet-single"].append(((z,), call_kwargs(t, text.chunk(2)[1], None)))
            calls[kind].append(((z,), call_kwargs(t, text, None)))
            return subject(z, t, text)

        clips: list[Tensor] = []
        sample(
            network, going.schedule, subject.noise(seeds) * going.schedule.init_sigma,
            subject.text(prompts, guided=going.guided), going.guidance if going.guided else None,
            clips=clips,
        )  # fmt: skip
        calls["clip"] = [((value.float(),), {}) for value in clips]
        for kind, known in found.items():
            known.append(_some(calls[kind]))
    return found


def _some(calls: list[Any]) -> list[Any]:
    """At most so many of the calls of a run, evenly: measuring takes longer than the run."""
    if len(calls) <= _CALLS:
        return calls
    return [calls[round(i * (len(calls) - 1) / (_CALLS - 1))] for i in range(_CALLS)]
