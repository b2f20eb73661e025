"""SecurePipeline with secret weights: text encoder, U-Net and image decoder under simulated parties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sfumato.diffusion.parts import TextEncoder
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.errors import JobError
from sfumato.graph.places import Place

# numpy's, about conversions inside diffusers' own set_timesteps.
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS = 2
#: dB over the image's range, against float32.
CLOSE = 40.0
#: Largest difference of latents, relative to the largest.
CLOSE_LATENTS = 4e-3


def opened(tiny_pipeline: StableDiffusionPipeline, **options: Any) -> SecurePipeline:
    made = SecurePipeline.from_pipe(
        tiny_pipeline, **{"secret": "inputs+weights", "backend": "simulate", **options}
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: StableDiffusionPipeline) -> SecurePipeline:
    return opened(tiny_pipeline)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "prompt": "a handwritten seven",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "output_type": "np",
        **more,
    }


def psnr(found: Any, expected: Any) -> float:
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()), 1e-12))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_nothing_but_the_image_is_opened(pipe: SecurePipeline) -> None:
    given = arguments(negative_prompt="a bag")
    output = pipe(**given, generator=seeded())
    expected = pipe.plain(**given, generator=seeded()).images
    assert output.images.shape == expected.shape == (1, 8, 8, 3)
    assert psnr(output.images, expected) > CLOSE
    other = pipe.plain(**arguments(prompt="a sneaker"), generator=seeded()).images
    assert psnr(output.images, other) < psnr(output.images, expected) - 6, "the text matters"
    assert pipe.last_share is not None
    assert tuple(pipe.last_share.shape) == (1, 3, 8, 8)

    report, estimate = output.report, pipe.estimate(**given)
    assert estimate.same_cost(report)
    assert estimate.setup_bytes == report.setup_bytes
    calls = {path.split("/")[1] for path in report.by_path}
    assert {"text", "step0", "step1", "vae"} <= calls
    parts = [*pipe.text_encoder.parameters(), *pipe.unet.parameters(), *pipe.vae.decoder.parameters()]
    # The owner sends the third component of every weight to two parties; seeds stand for the others.
    assert report.setup_bytes > 2 * 8 * sum(p.numel() for p in parts)


def test_every_weight_and_all_embeddings_are_secret(pipe: SecurePipeline) -> None:
    plans = pipe.plans(**arguments())
    assert list(plans) == ["text", "unet", "vae"]
    assert plans["unet"].client_inputs == ("sample", "encoder_hidden_states")
    assert plans["vae"].client_inputs == ("latents",)
    for plan in plans.values():
        floats = [i for i in plan.program.inputs if i.kind == "parameter" and i.dtype.is_floating_point]
        assert floats
        assert {plan.places[i.name] for i in floats} == {Place.OWNER}
    for name in plans["text"].client_inputs:
        assert plans["text"].index_type(name) is not None or plans["text"].secret_type(name).frac == 0, (
            "tokens alone"
        )


def test_latents_a_batch_and_no_guidance(tiny_pipeline: StableDiffusionPipeline) -> None:
    pipe = opened(tiny_pipeline, backend="plain")
    given = arguments(
        prompt=["a sneaker", "the number 0"],
        num_images_per_prompt=2,
        guidance_scale=1.0,
        output_type="latent",
    )
    output = pipe(**given, generator=seeded())
    assert off(output.images, pipe.plain(**given, generator=seeded()).images) < CLOSE_LATENTS
    assert not any(path.startswith("/vae") for path in output.report.by_path)


def test_own_embeddings_are_client_values(tiny_pipeline: StableDiffusionPipeline) -> None:
    pipe = opened(tiny_pipeline, backend="plain")
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a small dress", torch.device("cpu"), 1, True)
    given = arguments(
        prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, num_inference_steps=1
    )
    output = pipe(**given, generator=seeded())
    assert psnr(output.images, pipe.plain(**given, generator=seeded()).images) > CLOSE
    assert not any(path.startswith("/text") for path in output.report.by_path)
    with pytest.raises(JobError, match="both, or neither"):
        pipe(**arguments(prompt=None, prompt_embeds=embeds))


def test_an_interrupted_run_of_a_scaling_scheduler(tiny_pipeline: StableDiffusionPipeline) -> None:
    from diffusers import EulerDiscreteScheduler

    pipe = opened(tiny_pipeline, public_components=("text_encoder",), backend="plain")
    kept = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(kept.config)
    seen: list[Tensor] = []

    def stop(running: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(kwargs["latents"])
        running.interrupt = step == 0
        return kwargs

    # After one step the latents are in a scale of their own, which the parties undo before they decode.
    with torch.no_grad():
        found = pipe(
            **arguments(),
            generator=seeded(),
            callback_on_step_end=stop,
            callback_on_step_end_tensor_inputs=["latents"],
        )
        image = pipe.vae.decode(seen[0] / pipe.vae.config.scaling_factor).sample
    pipe.scheduler = kept
    expected = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert len(seen) == 1
    assert psnr(found.images, expected) > CLOSE


@pytest.mark.parametrize("public", [("text_encoder", "vae"), ("text_encoder",), ("vae",)])
def test_public_components(tiny_pipeline: StableDiffusionPipeline, public: tuple[str, ...]) -> None:
    pipe = opened(tiny_pipeline, public_components=public)
    given = arguments(num_inference_steps=1)
    output = pipe(**given, generator=seeded())
    assert psnr(output.images, pipe.plain(**given, generator=seeded()).images) > CLOSE
    assert pipe.estimate(**given).same_cost(output.report)
    calls = {path.split("/")[1] for path in output.report.by_path}
    assert ("text" in calls) == ("text_encoder" not in public)
    assert ("vae" in calls) == ("vae" not in public)


def test_unknown_components_are_refused(tiny_pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(JobError, match="no component 'unet'"):
        opened(tiny_pipeline, public_components=("unet",))


def test_calibration_is_kept(
    pipe: SecurePipeline, tiny_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = pipe.plans(**arguments())

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("sfumato.diffusion.plans.trajectories", never)
    monkeypatch.setattr("sfumato.diffusion.plans.text_samples", never)
    again = opened(tiny_pipeline).plans(**arguments())
    assert {n: p.digest() for n, p in again.items()} == {n: p.digest() for n, p in plans.items()}


def test_clip_skip_is_that_of_diffusers(pipe: SecurePipeline) -> None:
    """diffusers' formula; its own code looks for a module that transformers 5 no longer has."""
    encoder, ids = pipe.text_encoder, torch.randint(40, (4, 16), generator=seeded())
    with torch.no_grad():
        found = TextEncoder(encoder, guided=True, clip_skip=1, repeats=2)(ids)
        outputs = encoder(ids, output_hidden_states=True)
        skipped = encoder.final_layer_norm(outputs.hidden_states[-2])
    expected = torch.cat([outputs.last_hidden_state[:2], skipped[2:]]).repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected)
    assert pipe.plans(**arguments(clip_skip=1))["text"].digest() != pipe.plans(**arguments())["text"].digest()
    with pytest.raises(JobError, match="more than this text encoder has layers"):
        pipe.plans(**arguments(clip_skip=7))
