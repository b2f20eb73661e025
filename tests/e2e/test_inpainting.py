"""Inpainting: the image that diffusers makes of the same picture, mask and seed, and what the parties see of them."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

import sfumato as sf
from sfumato.errors import JobError
from sfumato.runtime.backend import Backend

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
    """The embedded model: its U-Net knows no masks."""
    made = sf.SecureInpaintPipeline.from_pretrained("embedded", backend="simulate")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def nine(own_cache: None, few_runs: None, tiny_pipeline: StableDiffusionPipeline) -> Any:
    """A random U-Net of nine channels, as those trained for inpainting have."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(tiny_pipeline.unet.config, in_channels=9)
    parts = {**tiny_pipeline.components, "unet": unet}
    theirs = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    made = sf.SecureInpaintPipeline.from_pipe(theirs, backend="simulate")
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def psnr(found: Any, expected: Any) -> float:
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()), 1e-12))


def picture(row: float = 0.5, size: int = 32, mode: str = "L") -> PIL.Image.Image:
    """A bright disc on a dark gradient."""
    y, x = np.mgrid[:size, :size] / size
    values = np.where((x - 0.4) ** 2 + (y - row) ** 2 < 0.09, 220, 60 * y)
    return PIL.Image.fromarray(values.astype(np.uint8)).convert(mode)


def mask(left: int = 4, size: int = 32) -> PIL.Image.Image:
    values = np.zeros((size, size), np.uint8)
    values[size // 4 : 3 * size // 4, left : left + size // 2] = 255
    return PIL.Image.fromarray(values)


def arguments(**more: Any) -> dict[str, Any]:
    given = {"prompt": "a sneaker", "image": picture(), "mask_image": mask(), "num_inference_steps": 3}
    return {**given, "guidance_scale": 4.0, "output_type": "np", **more}


def tiny(**more: Any) -> dict[str, Any]:
    given = {"image": picture(size=8, mode="RGB"), "mask_image": mask(1, 8), "num_inference_steps": 2}
    return arguments(**{**given, **more})


def plain(pipe: Any, **given: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe.plain(**given).images


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_text_to_image_model(pipe: Any, strength: float) -> None:
    seen: list[Tensor] = []

    def look(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    watching = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents"]}
    given = arguments(strength=strength)
    output = pipe(**given, **watching, generator=seeded())
    mine = seen.copy()
    expected = plain(pipe, **given, **watching, generator=seeded())
    assert psnr(output.images, expected) >= 40
    for found, theirs in zip(mine, seen[len(mine) :], strict=True):
        assert torch.allclose(found, theirs, atol=2e-3 * float(theirs.abs().max()))
    assert pipe.estimate(**given, **watching).same_cost(output.report)
    assert psnr(plain(pipe, **{**given, "mask_image": mask(12)}, generator=seeded()), expected) < 30


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedulers_that_remember(pipe: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put back between steps is not what the scheduler returned."""
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe._pipe, "scheduler", scheduler)
    monkeypatch.setattr(pipe, "backend", "plain")
    given = arguments(num_inference_steps=4)
    found = pipe(**given, generator=seeded()).images
    assert psnr(found, plain(pipe, **given, generator=seeded())) >= 40


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_inpainting_model(nine: Any, strength: float) -> None:
    given = tiny(strength=strength, generator=None)
    output = nine(**{**given, "generator": seeded()})
    expected = plain(nine, **{**given, "generator": seeded()})
    assert psnr(output.images, expected) >= 40
    assert nine.estimate(**given).same_cost(output.report)
    other = plain(nine, **{**given, "mask_image": mask(4, 8), "generator": seeded()})
    assert psnr(other, expected) < 60, "the mask matters"


def test_batches_latents_and_masked_latents(nine: Any) -> None:
    given = tiny(
        prompt=["a sneaker", "a dress"],
        image=[picture(size=8, mode="RGB"), picture(0.2, 8, "RGB")],
        mask_image=[mask(1, 8), mask(3, 8)],
        latents=torch.randn(2, 4, 4, 4, generator=seeded(4)),
        masked_image_latents=torch.randn(2, 4, 4, 4, generator=seeded(5)),
        output_type="latent",
    )
    found, expected = nine(**given, generator=seeded()).images, plain(nine, **given, generator=seeded())
    assert torch.allclose(found, expected, atol=5e-3 * float(expected.abs().max()))


def test_a_crop_around_the_mask(nine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nine, "backend", "plain")
    small = np.zeros((16, 16), np.uint8)
    small[5:9, 6:10] = 255
    given = tiny(padding_mask_crop=1) | {
        "image": picture(size=16, mode="RGB"), "mask_image": PIL.Image.fromarray(small), "output_type": "pil",
    }  # fmt: skip
    found, expected = nine(**given, generator=seeded()).images[0], plain(nine, **given, generator=seeded())[0]
    assert found.size == expected.size == (16, 16)
    assert psnr(np.asarray(found) / 255.0, np.asarray(expected) / 255.0) >= 40


# ---- what the parties see ----------------------------------------------------------------------------------


def public_record(pipe: Any, given: dict[str, Any]) -> list[Any]:
    """All that every party sees of a call: the commands, the values in clear among them, and weights in clear."""
    seen: list[Any] = []
    sent = Backend._command

    def recorded(self: Backend, command: Any, attachments: Any = None, **options: Any) -> Any:
        seen.append(
            [type(command).__name__, *(getattr(command, f.name) for f in dataclasses.fields(command))]
        )
        if type(command).__name__ == "Load":
            seen.append(attachments)
        return sent(self, command, attachments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "_command", recorded)
        pipe(**given, generator=seeded())
    return seen


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("kind", ["blended", "nine channels", "image to image"])
def test_neither_picture_nor_mask_travels_in_the_clear(pipe: Any, nine: Any, kind: str) -> None:
    if kind == "image to image":
        runs = sf.SecureImg2ImgPipeline.from_pipe(pipe._pipe, backend="simulate")
        runs.set_progress_bar_config(disable=True)
        one, other = arguments(), arguments(image=picture(0.2))
        del one["mask_image"], other["mask_image"]
    elif kind == "blended":
        runs, one, other = (
            pipe,
            arguments(strength=0.7),
            arguments(strength=0.7, image=picture(0.2), mask_image=mask(12)),
        )
    else:
        runs, one = nine, tiny()
        other = tiny() | {"image": picture(0.2, 8, "RGB"), "mask_image": mask(3, 8)}
    first = public_record(runs, one)
    assert {row[0] for row in first if row and isinstance(row[0], str)} >= {"Put", "Call", "Affine", "Reveal"}
    assert same(first, public_record(runs, other))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask_image": None}, "mask_image must be a PIL image"),
        ({"mask_image": [mask(), mask()]}, "2 masks were given for 1"),
        ({"image": np.full((32, 32, 1), 200.0)}, "between 0 and 1"),
        ({"image": torch.zeros(1, 4, 8, 8)}, "masked_image_latents"),
        ({"strength": 0.0}, "leaves none to run"),
        ({"strength": 2.0}, "strength must lie between 0 and 1"),
        ({"height": 30, "width": 32}, "divisible"),
        ({"latents": torch.zeros(1, 4, 9, 9)}, "latents must have the shape"),
        ({"padding_mask_crop": 4, "output_type": "np"}, "PIL"),
        ({"guidance_rescale": 0.5}, "takes no argument 'guidance_rescale'"),
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


def test_each_model_in_its_own_pipeline(nine: Any, pipe: Any) -> None:
    for kind in (sf.SecurePipeline, sf.SecureImg2ImgPipeline):
        with pytest.raises(JobError, match="SecureInpaintPipeline") as caught:
            kind.from_pipe(nine._pipe, backend="plain")
        assert "\n" not in str(caught.value)
    hidden = sf.SecureInpaintPipeline.from_pipe(pipe._pipe, secret="inputs+weights", backend="plain")
    with pytest.raises(JobError, match=r"public_components=\('vae',\)"):
        hidden(**arguments())
