"""diffusers' schedulers on the embedded model: the image that diffusers draws from the same seed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.plans import Planner
from sfumato.errors import JobError
from sfumato.graph.calibrate import Calibration

pytestmark = [
    pytest.mark.usefixtures("own_cache", "one_plan"),
    # numpy's, about conversions inside diffusers' own set_timesteps.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS = 4
WIDEST: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 2.0}),
    ("KDPM2AncestralDiscreteScheduler", {}),
]
CALL: dict[str, Any] = {"prompt": "a handwritten seven", "guidance_scale": 4.0, "output_type": "np"}
#: Of the embedded model's own scheduler.
NOISE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
#: Name, options, arguments of the call.
RUN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIMScheduler", {"timestep_spacing": "linspace"}, {"eta": 0.7}),
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, {}),
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", {}, {"timesteps": [900, 600, 300, 50]}),
    ("PNDMScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    ("EulerDiscreteScheduler", {}, {"sigmas": [10.0, 4.0, 1.5, 0.5]}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("KDPM2DiscreteScheduler", {}, {}),
    ("KDPM2AncestralDiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, {}),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, {}),
    ("DPMSolverSinglestepScheduler", {"lower_order_final": True, "algorithm_type": "sde-dpmsolver++"}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("DEISMultistepScheduler", {}, {}),
    ("LCMScheduler", {}, {}),
    ("TCDScheduler", {}, {}),
    ("SASolverScheduler", {}, {}),
]


@pytest.fixture(scope="module")
def one_plan(own_cache: None) -> Iterator[None]:
    """The U-Net is planned once for all schedulers, on trajectories of the most different ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.diffusion.calibrate._RUNS", 8)
        pipe, seen = opened(), Calibration()
        for name, options in WIDEST:
            set_scheduler(pipe, name, **options)
            seen = seen.merge(pipe.plan(**CALL, num_inference_steps=8).calibration)
        plan = opened(calibration=seen).plan(**CALL, num_inference_steps=8)
        patch.setattr(Planner, "_unet", lambda *_: plan)
        yield


def opened(**options: Any) -> SecurePipeline:
    pipe = SecurePipeline.from_pretrained("embedded", backend="plain", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(one_plan: None) -> SecurePipeline:
    return opened()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def psnr(found: Any, expected: Any) -> float:
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()), 1e-12))


def set_scheduler(pipe: SecurePipeline, name: str, **options: Any) -> None:
    kind = getattr(diffusers, name)
    known = set(inspect.signature(kind).parameters)
    pipe.scheduler = kind(**{n: v for n, v in {**NOISE, **options}.items() if n in known})


@pytest.mark.parametrize(("name", "options", "given"), RUN, ids=lambda v: v if isinstance(v, str) else str(v))
def test_the_image_that_diffusers_draws(
    pipe: SecurePipeline, name: str, options: dict[str, Any], given: dict[str, Any]
) -> None:
    set_scheduler(pipe, name, **options)
    arguments = {**CALL, "num_inference_steps": STEPS, **given}
    expected = pipe.plain(**arguments, generator=seeded()).images
    output = pipe(**arguments, generator=seeded())
    assert psnr(output.images, expected) >= 40
    assert float(expected.std()) > 0.02, "an empty image says nothing"


@pytest.mark.parametrize("limit", [1.0, 2.0])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "HeunDiscreteScheduler"])
def test_a_clamp_of_secret_latents(pipe: SecurePipeline, name: str, limit: float) -> None:
    set_scheduler(pipe, name)
    arguments = {**CALL, "num_inference_steps": STEPS}
    free = pipe.plain(**arguments, generator=seeded()).images
    set_scheduler(pipe, name, clip_sample=True, clip_sample_range=limit)
    expected = pipe.plain(**arguments, generator=seeded()).images
    output = pipe(**arguments, generator=seeded())
    assert psnr(output.images, expected) >= 40
    assert psnr(free, expected) < 30, "the clamp bites"


def test_schedulers_that_clip_at_a_quantile_are_one_sentence(pipe: SecurePipeline) -> None:
    set_scheduler(pipe, "DPMSolverMultistepScheduler", thresholding=True)
    with pytest.raises(JobError, match="thresholding=False") as caught:
        pipe(**CALL, num_inference_steps=STEPS)
    assert "\n" not in str(caught.value)
