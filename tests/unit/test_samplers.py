"""Solvers configured from a model that clips."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.samplers import ClippedDPMSolver, solver
from sfumato.diffusion.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

_PIXELS = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True, "timestep_spacing": "trailing"}
_STEPS = 4


def _network(noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """Predicts too little noise, so that the first predictions of the image are far outside [-1, 1]."""
    return 0.8 * noisy + 0.1 * torch.sin(noisy + timestep / 100)


def test_dpm_solver_of_a_model_that_clips_stays_within_its_range_as_diffusers_steps() -> None:
    scheduler = solver("dpm++", _PIXELS)
    assert isinstance(scheduler, ClippedDPMSolver)
    first = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    schedule = probe_schedule(scheduler, _STEPS)
    ours = sample(_network, schedule, first * schedule.init_sigma, torch.zeros(2, 1, 1), None)
    scheduler.set_timesteps(_STEPS)
    stepped = first.double() * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = _network(stepped.float(), timestep, torch.zeros(2, 1, 1)).double()
        stepped = scheduler.step(output, timestep, stepped).prev_sample
    assert torch.allclose(ours, stepped, atol=1e-4)
    assert schedule.clip == (-1.0, 1.0)
    free = diffusers.DPMSolverMultistepScheduler.from_config(_PIXELS)
    assert float(ours.abs().max()) <= 1.0 + 1e-6
    unclipped = sample(_network, probe_schedule(free, _STEPS), first, torch.zeros(2, 1, 1), None)
    assert float(unclipped.abs().max()) > 1.5


def test_a_model_that_does_not_clip_gets_the_solver_as_it_is() -> None:
    assert type(solver("dpm++", {**_PIXELS, "clip_sample": False})) is diffusers.DPMSolverMultistepScheduler


def test_the_range_that_a_scheduler_clips_to_is_kept() -> None:
    wide = solver("dpm++", {**_PIXELS, "clip_sample_range": 2.0})
    assert probe_schedule(wide, _STEPS).clip == (-2.0, 2.0)
