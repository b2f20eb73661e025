"""Every affine scheduler of diffusers as coefficients, against the scheduler itself."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.schedule import Schedule
from sfumato.errors import JobError

pytestmark = [
    # numpy's, about conversions inside diffusers' own set_timesteps.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # diffusers', about dpmsolver and sde-dpmsolver.
    pytest.mark.filterwarnings("ignore:`algorithm_types:FutureWarning"),
]

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
    ("DDPMScheduler", {"clip_sample": True}, 0.0),
    ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 2.0, "variance_type": "fixed_large"}, 0.0),
    ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}, 0.0),
    ("DDIMScheduler", {"clip_sample": True}, 0.0),
    ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 2.0, "timestep_spacing": "linspace"}, 0.6),
    ("DDIMParallelScheduler", {}, 0.0),
    ("LCMScheduler", {"clip_sample": True}, 0.0),
    ("HeunDiscreteScheduler", {"clip_sample": True}, 0.0),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "trailing"}, 0.0),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, 0.0),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 0.0),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "euler_at_final": True}, 0.0),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        0.0,
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min"},
        0.0,
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++", "lower_order_final": True}, 0.0),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "lower_order_final": True}, 0.0),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 0.0),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, 0.0),
    ("SASolverScheduler", {}, 0.0),
]
#: These start from a table of sigmas of their own, not from betas.
OTHERS = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"]
SHAPE = (2, 4, 3, 5)
STEPS = 12


def made(name: str, config: dict[str, Any], prediction: str = "epsilon") -> Any:
    kind = getattr(diffusers, name)
    given = {**BETAS, "prediction_type": prediction, **config}
    return kind(**{n: v for n, v in given.items() if n in inspect.signature(kind).parameters})


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
    start = first.to(torch.float64) * schedule.init_sigma
    held: dict[str, dict[int, Tensor]] = {
        "samples": {0: start}, "returned": {0: start}, "clipped": {},
        "outputs": dict(enumerate(outputs(len(schedule.steps), torch.float64))),
    }  # fmt: skip
    for k, step in enumerate(schedule.steps):
        if step.clip is not None:
            held["clipped"][k] = step.clip.value.of(held, k).clamp(step.clip.low, step.clip.high)
        following = step.result.of(held, k)
        if step.draws:
            following = following + step.result.noise * torch.randn(SHAPE, generator=source).to(torch.float64)
        held["samples"][k + 1] = held["returned"][k + 1] = following
    return list(held["samples"].values())


#: These know no prediction of the sample.
NO_SAMPLE = ("PNDMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "config", "eta"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_coefficients_are_the_scheduler(
    name: str, config: dict[str, Any], eta: float, prediction: str
) -> None:
    if config.get("rescale_betas_zero_snr"):
        prediction = "v_prediction"  # at zero signal, noise says nothing of the image
    if prediction == "sample" and name.startswith(NO_SAMPLE):
        with pytest.raises(JobError, match="cannot run these steps") as caught:
            probe_schedule(made(name, config, prediction), STEPS)
        assert "\n" not in str(caught.value)
        return
    scheduler = made(name, config, prediction)
    schedule = probe_schedule(scheduler, STEPS, eta=eta)  # the probe itself agrees to 1e-8 in float64
    assert (schedule.clip is not None) == bool(scheduler.config.get("clip_sample"))
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


@pytest.mark.parametrize("name", OTHERS)
def test_schedulers_with_sigmas_of_their_own(name: str) -> None:
    scheduler = made(name, {})
    schedule = probe_schedule(scheduler, STEPS)
    first = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for mine, real in zip(ours(schedule, first, 5), theirs(scheduler, 0.0, first, 5), strict=True):
        assert float((mine - real).abs().max()) < 3e-5 * float(real.abs().max())


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_a_sample_that_is_changed_between_steps(name: str) -> None:
    """What a scheduler remembers is what it returned, not what somebody made of it."""
    scheduler, first = made(name, {}), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(STEPS)
    schedule = probe_schedule(scheduler, STEPS)
    sample = first * scheduler.init_noise_sigma
    held: dict[str, dict[int, Tensor]] = {
        "samples": {},
        "returned": {0: sample},
        "clipped": {},
        "outputs": {},
    }
    for k, t in enumerate(scheduler.timesteps):
        held["samples"][k] = sample.to(torch.float64)
        output = outputs(k + 1, torch.float64)[-1]
        held["outputs"][k] = output
        scheduler.scale_model_input(sample, t)
        returned = scheduler.step(output.to(torch.float32), t, sample, return_dict=False)[0]
        held["returned"][k + 1] = schedule.steps[k].result.of(held, k)
        assert float((held["returned"][k + 1] - returned).abs().max()) < 3e-5 * float(returned.abs().max())
        sample = 0.5 * returned + 0.1 * k


@pytest.mark.parametrize("strength", [1.0, 0.55, 0.3])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": True, "steps_offset": 1}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("EulerDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("LCMScheduler", {}),
    ],
)
def test_a_run_that_starts_at_a_picture(name: str, config: dict[str, Any], strength: float) -> None:
    scheduler = made(name, config)
    schedule = probe_schedule(scheduler, STEPS, strength=strength)
    scheduler.set_timesteps(STEPS)
    whole, order = list(scheduler.timesteps), scheduler.order
    skipped = (STEPS - int(STEPS * strength)) * order
    assert [s.timestep for s in schedule.steps] == [float(t) for t in whole[skipped:]]
    picture, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    a, b = schedule.noised[0]
    expected = scheduler.add_noise(picture, noise, whole[skipped].reshape(1))
    assert torch.allclose(
        a * picture + b * noise, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert schedule.noised[-1] == (1.0, 0.0)
    assert len(schedule.noised) == len(schedule.steps) + 1


def test_a_strength_that_leaves_no_step() -> None:
    with pytest.raises(JobError, match="leaves none to run"):
        probe_schedule(made("DDIMScheduler", {}), 4, strength=0.2)


def test_a_clamp_that_is_not_the_schedulers_own_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, step = diffusers.DDIMScheduler, diffusers.DDIMScheduler.step

    def twice(self: Any, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(self, output.clamp(-1, 1), *args, **kwargs)

    monkeypatch.setattr(kind, "step", twice)
    with pytest.raises(JobError, match="not affine"):
        probe_schedule(made("DDIMScheduler", {"clip_sample": True}), 3)


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
    assert step.result.samples[0] == pytest.approx((then / now) ** 0.5, rel=1e-6)
    assert step.result.outputs[0] == pytest.approx(
        (1 - then) ** 0.5 - (then / now * (1 - now)) ** 0.5, rel=1e-6
    )
    ages = [(kind, age) for s in schedule.steps for kind, age, _ in s.result.terms()]
    assert set(ages) == {("samples", 0), ("outputs", 0)}
    assert not any(s.draws for s in schedule.steps)


def test_multistep_schedulers_keep_short_histories() -> None:
    schedule = probe_schedule(made("DPMSolverMultistepScheduler", {}, "epsilon"), 25)
    assert max(age for s in schedule.steps for age in s.result.outputs) <= 2
    for k in range(25):
        assert min(schedule.keeps(k).values()) >= k - 1


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
        ("DDIMScheduler", {"thresholding": True}, "thresholding=False"),
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
