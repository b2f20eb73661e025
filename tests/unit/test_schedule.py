"""Every affine scheduler of diffusers as coefficients, against the scheduler itself."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.schedule import Schedule, probe_schedule
from sfumato.errors import JobError

# numpy's, about conversions inside diffusers' own set_timesteps.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("DDPMScheduler", {"clip_sample": False}, 0.0),
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, 0.0),
    ("DDIMScheduler", {"clip_sample": False}, 1.0),
    (
        "DDIMScheduler",
        {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        0.0,
    ),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 0.0),
    ("PNDMScheduler", {}, 0.0),
    ("EulerDiscreteScheduler", {}, 0.0),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 0.0),
    ("EulerAncestralDiscreteScheduler", {}, 0.0),
    ("DPMSolverMultistepScheduler", {}, 0.0),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}, 0.0),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, 0.0),
    ("UniPCMultistepScheduler", {}, 0.0),
    ("UniPCMultistepScheduler", {"solver_order": 3}, 0.0),
    ("DEISMultistepScheduler", {}, 0.0),
    ("HeunDiscreteScheduler", {}, 0.0),
    ("KDPM2AncestralDiscreteScheduler", {}, 0.0),
    ("LCMScheduler", {}, 0.0),
    ("TCDScheduler", {}, 0.0),
]
SHAPE = (2, 4, 3, 5)
STEPS = 12


def made(name: str, config: dict[str, Any], prediction: str) -> Any:
    return getattr(diffusers, name)(**BETAS, prediction_type=prediction, **config)


def outputs(count: int, dtype: torch.dtype) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=source, dtype=torch.float64).to(dtype) for _ in range(count)]


def theirs(scheduler: Any, eta: float, first: Tensor, seed: int) -> list[Tensor]:
    """Samples before every step and after the last, by diffusers in float32, with its own noise."""
    scheduler.set_timesteps(STEPS)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"eta": eta} if "eta" in accepted else {}
    if "generator" in accepted:
        extra["generator"] = torch.Generator().manual_seed(seed)
    made, samples = outputs(len(scheduler.timesteps), torch.float32), [first * scheduler.init_noise_sigma]
    for k, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(samples[-1], t)
        samples.append(scheduler.step(made[k], t, samples[-1], return_dict=False, **extra)[0])
    return samples


def ours(schedule: Schedule, first: Tensor, seed: int) -> list[Tensor]:
    """The same by coefficients in float64, noise drawn in float32 from the same generator."""
    source = torch.Generator().manual_seed(seed)
    made = outputs(len(schedule.steps), torch.float64)
    samples = [first.to(torch.float64) * schedule.init_sigma]
    for k, step in enumerate(schedule.steps):
        following = torch.zeros(SHAPE, dtype=torch.float64)
        for age, c in step.samples.items():
            following += c * samples[k - age]
        for age, c in step.outputs.items():
            following += c * made[k - age]
        if step.draws:
            following += step.noise * torch.randn(SHAPE, generator=source).to(torch.float64)
        samples.append(following)
    return samples


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "config", "eta"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_coefficients_are_the_scheduler(
    name: str, config: dict[str, Any], eta: float, prediction: str
) -> None:
    if config.get("rescale_betas_zero_snr"):
        prediction = "v_prediction"  # at zero signal, noise says nothing of the image
    scheduler = made(name, config, prediction)
    schedule = probe_schedule(scheduler, STEPS, eta=eta)  # the probe itself agrees to 1e-8 in float64
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    expected, found = theirs(scheduler, eta, first, 5), ours(schedule, first, 5)
    assert len(expected) == len(found)
    for mine, real in zip(found, expected, strict=True):
        # The reference rounds to float32 at every step; its error grows with the size of what it subtracts.
        size = max(float(x.abs().max()) for x in expected)
        assert float((mine - real).abs().max()) < 3e-5 * size
    folded = schedule.in_input_scale()
    scaled = ours(folded, first, 5)
    assert torch.allclose(scaled[-1], found[-1], rtol=1e-9, atol=1e-9 * float(found[-1].abs().max()))
    for k, step in enumerate(schedule.steps):
        assert torch.allclose(scaled[k], found[k] * step.input_scale, rtol=1e-8, atol=1e-9)


def test_the_scheduler_is_left_alone() -> None:
    scheduler = made("DPMSolverMultistepScheduler", {}, "epsilon")
    scheduler.set_timesteps(7)
    before = {k: v for k, v in vars(scheduler).items() if not isinstance(v, Tensor | list)}
    probe_schedule(scheduler, 20)
    assert len(scheduler.timesteps) == 7
    assert {k: v for k, v in vars(scheduler).items() if not isinstance(v, Tensor | list)} == before


def test_a_ddim_step_is_the_textbook_one() -> None:
    scheduler = made("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, "epsilon")
    schedule = probe_schedule(scheduler, 10)
    step = schedule.steps[0]
    now, then = (float(scheduler.alphas_cumprod[t]) for t in (901, 801))
    assert step.timestep == 901
    assert step.alpha == pytest.approx((then / now) ** 0.5, rel=1e-6)
    assert step.beta == pytest.approx((1 - then) ** 0.5 - (then / now * (1 - now)) ** 0.5, rel=1e-6)
    assert all(set(s.samples) == {0} and set(s.outputs) == {0} and not s.draws for s in schedule.steps)


def test_multistep_schedulers_keep_short_histories() -> None:
    schedule = probe_schedule(made("DPMSolverMultistepScheduler", {}, "epsilon"), 25)
    assert max(age for s in schedule.steps for age in s.outputs) <= 2
    for k in range(25):
        sample, output = schedule.keeps(k)
        assert sample >= k
        assert output >= k - 1


def test_noise_at_the_right_steps() -> None:
    schedule = probe_schedule(made("DDPMScheduler", {"clip_sample": False}, "epsilon"), 5)
    assert [s.draws for s in schedule.steps] == [True] * 4 + [False]
    still = probe_schedule(made("DDIMScheduler", {"clip_sample": False}, "epsilon"), 5)
    assert not any(s.draws for s in still.steps)


def test_custom_timesteps() -> None:
    schedule = probe_schedule(
        made("DDPMScheduler", {"clip_sample": False}, "epsilon"), timesteps=[900, 500, 100]
    )
    assert [s.timestep for s in schedule.steps] == [900, 500, 100]
    with pytest.raises(JobError, match="takes no list of timesteps"):
        probe_schedule(made("DDIMScheduler", {"clip_sample": False}, "epsilon"), timesteps=[900, 500])


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample=False"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding=False"),
    ],
)
def test_what_is_not_affine_is_refused(name: str, config: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        probe_schedule(made(name, config, "epsilon"), 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, None, 2000])
def test_impossible_step_counts_are_one_sentence(steps: int | None) -> None:
    with pytest.raises(JobError) as caught:
        probe_schedule(made("DDIMScheduler", {"clip_sample": False}, "epsilon"), steps)
    assert "\n" not in str(caught.value)
