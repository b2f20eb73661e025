"""Image to image on the embedded model: the image that diffusers makes of the same picture and seed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import sfumato as sf
from sfumato.errors import JobError

pytestmark = [
    pytest.mark.usefixtures("own_cache", "few_runs"),
    # numpy's, about conversions inside diffusers' own set_timesteps.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def few_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.diffusion.calibrate._RUNS", 8)
        yield


@pytest.fixture(scope="module")
def pipe(own_cache: None, few_runs: None) -> Any:
    made = sf.SecureImg2ImgPipeline.from_pretrained("embedded", backend="simulate")
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def psnr(found: Any, expected: Any) -> float:
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()), 1e-12))


def drawn(row: float = 0.5) -> PIL.Image.Image:
    """A bright disc on a dark gradient."""
    y, x = np.mgrid[:32, :32] / 32
    values = np.where((x - 0.4) ** 2 + (y - row) ** 2 < 0.09, 220, 60 * y)
    return PIL.Image.fromarray(values.astype(np.uint8))


def arguments(**more: Any) -> dict[str, Any]:
    given = {"prompt": "a sneaker", "image": drawn(), "strength": 0.5, "num_inference_steps": 4}
    return {**given, "guidance_scale": 4.0, "output_type": "np", **more}


def plain(pipe: Any, **given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers', on one picture for several prompts
        return pipe.plain(**given).images


def test_the_image_that_diffusers_makes(pipe: Any) -> None:
    seen: list[Tensor] = []

    def look(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    watching = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents"]}
    given = arguments()
    output = pipe(**given, **watching, generator=seeded())
    mine = seen.copy()
    expected = plain(pipe, **given, **watching, generator=seeded())
    assert len(output.report.steps) == 2, "half of the steps"
    assert psnr(output.images, expected) >= 50
    for found, theirs in zip(mine, seen[len(mine) :], strict=True):
        assert torch.allclose(found, theirs, atol=1e-3 * float(theirs.abs().max()))
    theirs = seeded()
    assert pipe.estimate(**given, **watching, generator=theirs).same_cost(output.report)
    assert torch.equal(theirs.get_state(), seeded().get_state()), "an estimate draws nothing of the caller's"
    other = plain(pipe, **{**given, "image": drawn(0.2)}, generator=seeded())
    assert psnr(other, expected) < 30, "the picture matters"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DDIMScheduler", {"clip_sample": True}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_other_schedulers(
    pipe: Any, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    monkeypatch.setattr(pipe._pipe, "scheduler", scheduler)
    given = arguments(num_inference_steps=5, strength=0.7)
    output = pipe(**given, generator=seeded())
    assert psnr(output.images, plain(pipe, **given, generator=seeded())) >= 40
    assert pipe.estimate(**given).same_cost(output.report)


def test_forms_of_a_picture(pipe: Any) -> None:
    array = np.asarray(drawn(), np.float32)[..., None] / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = pipe(**arguments(), generator=seeded()).images
    for image in (array, tensor, tensor[None], [drawn()], [array], [tensor], drawn().convert("RGB")):
        assert psnr(pipe(**arguments(image=image), generator=seeded()).images, expected) > 50
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1))
    given = arguments(image=latents)
    assert psnr(pipe(**given, generator=seeded()).images, plain(pipe, **given, generator=seeded())) >= 40


def test_pictures_and_generators_in_lists(pipe: Any) -> None:
    given = arguments(prompt=["a sneaker", "a dress"], image=[drawn(), drawn(0.3)], output_type="latent")
    found = pipe(**given, generator=[seeded(1), seeded(2)]).images
    expected = plain(pipe, **given, generator=[seeded(1), seeded(2)])
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))
    one = {**given, "image": drawn()}
    found, expected = pipe(**one, generator=seeded(1)).images, plain(pipe, **one, generator=seeded(1))
    assert torch.allclose(found, expected, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": None}, "image must be a PIL image"),
        ({"image": []}, "empty"),
        ({"image": "photo.png"}, "not str"),
        ({"image": np.zeros((32, 32, 1), np.uint8)}, "divide bytes by 255"),
        ({"image": np.full((32, 32, 1), 200.0)}, "between 0 and 1"),
        ({"image": torch.full((1, 32, 32), float("nan"))}, "not finite"),
        ({"image": torch.zeros(3, 32, 32)}, "1 channels"),
        ({"image": torch.zeros(1, 2, 2)}, "at least 4 pixels"),
        ({"image": [torch.zeros(1, 32, 32), torch.zeros(1, 24, 24)]}, "image"),
        ({"image": [drawn()] * 2}, "2 images were given for 1"),
        ({"strength": 1.5}, "strength must lie between 0 and 1"),
        ({"strength": "much"}, "strength must lie between 0 and 1"),
        ({"strength": 0.1}, "leaves none to run"),
        ({"height": 64}, "takes no argument 'height'"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "takes no argument 'latents'"),
        ({"mask_image": drawn()}, "takes no argument 'mask_image'"),
        ({"generator": [seeded(), seeded()]}, "generators"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals_are_one_sentence(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr("sfumato.diffusion.pipeline.open_backend", never)
    with pytest.raises(JobError, match=words) as caught:
        pipe(**arguments(**given))
    assert "\n" not in str(caught.value)


def test_a_secret_encoder_names_what_to_change(pipe: Any) -> None:
    hidden = sf.SecureImg2ImgPipeline.from_pipe(pipe._pipe, secret="inputs+weights", backend="simulate")
    with pytest.raises(JobError, match=r"public_components=\('vae',\)"):
        hidden(**arguments())
    open_vae = sf.SecureImg2ImgPipeline.from_pipe(
        pipe._pipe, secret="inputs+weights", backend="plain", public_components=("vae",)
    )
    open_vae.set_progress_bar_config(disable=True)
    given = arguments()
    expected = plain(pipe, **given, generator=seeded())
    assert psnr(open_vae(**given, generator=seeded()).images, expected) >= 40


def test_the_caller_s_pipeline_stays_as_it_is(pipe: Any) -> None:
    theirs = diffusers.StableDiffusionPipeline(
        **{k: v for k, v in pipe._pipe.components.items() if k != "scheduler"},
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
    )
    theirs.scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=True)
    made = sf.SecureImg2ImgPipeline.from_pipe(theirs, backend="plain")
    assert theirs.scheduler.config.clip_sample
    assert made.scheduler.config.clip_sample
