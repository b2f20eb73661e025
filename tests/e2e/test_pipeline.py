"""SecurePipeline on a tiny random pipeline in the hub's folder form, under simulated parties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.errors import JobError
from sfumato.zoo.train.build import save_pipeline

# numpy's, about conversions inside diffusers' own set_timesteps.
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS = 2
#: The fixed point has 18 fraction bits; a random network of two steps keeps more than half of them.
CLOSE = 2e-3


@pytest.fixture(scope="module")
def folder(tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tiny")
    save_pipeline(tiny_pipeline, where)
    return where


@pytest.fixture(scope="module")
def pipe(folder: Path) -> SecurePipeline:
    return opened(folder)


def opened(folder: Path, **options: Any) -> SecurePipeline:
    made = SecurePipeline.from_pretrained(folder, **{"backend": "simulate", **options})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "prompt": "a handwritten seven",
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "output_type": "latent",
        **more,
    }


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_image_and_the_report(pipe: SecurePipeline) -> None:
    given = arguments(output_type="np")
    output = pipe(**given, generator=seeded())
    expected = pipe.plain(**given, generator=seeded()).images
    error = float(((output.images - expected) ** 2).mean())
    assert output.images.shape == expected.shape == (1, 8, 8, 3)
    assert -10 * math.log10(max(error, 1e-12)) > 50
    report = output.report
    assert len(report.steps) == STEPS
    assert len(report.bytes_sent) == 3
    assert min(report.bytes_sent) > 0
    assert max(report.bytes_sent) < 1.5 * min(report.bytes_sent), "parties send alike"
    assert json.loads(report.to_json())["rounds"] == report.rounds
    assert "rounds" in report.table()
    assert pipe.estimate(**given).same_cost(report)


def test_pil_images_and_tuples(pipe: SecurePipeline) -> None:
    given = arguments(output_type="pil", guidance_scale=1.0)
    images, flagged = pipe(**given, generator=seeded(), return_dict=False)
    assert images[0].size == (8, 8)
    assert flagged is None


def test_a_batch_gives_the_single_images(pipe: SecurePipeline) -> None:
    prompts = ["a handwritten seven", "a sneaker"]
    negative = ["", "a bag"]
    both = pipe(
        **arguments(prompt=prompts, negative_prompt=negative), generator=[seeded(1), seeded(2)]
    ).images
    for row, seed in enumerate((1, 2)):
        given = arguments(prompt=prompts[row], negative_prompt=negative[row])
        alone = pipe(**given, generator=seeded(seed)).images
        assert off(both[row : row + 1], alone) < CLOSE
        assert off(alone, pipe.plain(**given, generator=seeded(seed)).images) < CLOSE
    assert off(both[:1], both[1:]) > 0.05


def test_latents_and_callback(pipe: SecurePipeline) -> None:
    latents = torch.randn(1, 4, 4, 4, generator=seeded(3))
    seen: list[tuple[int, int, Tensor]] = []

    def look(_: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep), kwargs["latents"]))
        return kwargs

    blind: list[dict[str, Any]] = []
    given = arguments(latents=latents)
    quiet = pipe(**given, callback_on_step_end=lambda *a: blind.append(a[3]))
    assert blind == [{}] * STEPS
    output = pipe(**given, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["latents"])
    expected = pipe.plain(**given).images
    assert off(quiet.images, expected) < CLOSE
    assert off(output.images, expected) < CLOSE
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert off(seen[-1][2], output.images) < CLOSE
    assert output.report.client_bytes > quiet.report.client_bytes, "what the callback opened is counted"


def test_another_scheduler_and_noise(folder: Path) -> None:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = opened(folder)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    given = arguments(num_inference_steps=3)
    output = pipe(**given, generator=seeded())
    assert off(output.images, pipe.plain(**given, generator=seeded()).images) < 5 * CLOSE
    assert pipe.estimate(**given).same_cost(output.report)


def test_half_precision_folders_are_widened(folder: Path, tmp_path: Path) -> None:
    half = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    for part in (half.unet, half.text_encoder, half.vae):
        part.half()
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half" / "unet").glob("*.fp16.safetensors"))
    pipe = opened(tmp_path / "half", backend="plain")
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.float32}
    given = arguments(num_inference_steps=1)
    found = pipe(**given, generator=seeded()).images
    assert off(found, pipe.plain(**given, generator=seeded()).images) < CLOSE


def test_an_estimate_leaves_no_trace(pipe: SecurePipeline) -> None:
    pipe(**arguments(), generator=seeded())
    left, theirs = pipe.last_shares, seeded()
    given = arguments(cross_attention_kwargs={"scale": 1.0})
    before = torch.get_rng_state(), theirs.get_state()
    pipe.interrupt = True  # as a callback of the last run may have left it
    try:
        reports = [pipe.estimate(**given, generator=drawn) for drawn in (None, [theirs])]
        pipe.plans(**given, generator=theirs)
        assert pipe.interrupt
    finally:
        pipe.interrupt = False
    assert [len(report.steps) for report in reports] == [STEPS] * 2
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(theirs.get_state(), before[1])
    assert pipe.last_shares is left
    assert pipe.last_share is left[0]
    assert pipe.cross_attention_kwargs is None


def own_embeddings(folder: Path, tokens: int) -> dict[str, Tensor]:
    """Texts of the caller's encoder, cut or repeated along the tokens."""
    encoder = opened(folder)
    with torch.no_grad():
        both = encoder.encode_prompt("a small dress", torch.device("cpu"), 1, True)
    fitted = [made.repeat(1, 2, 1)[:, :tokens] for made in both]
    return dict(zip(("prompt_embeds", "negative_prompt_embeds"), fitted, strict=True))


def test_embeddings_of_any_length(folder: Path) -> None:
    pipe = opened(folder, backend="plain")
    for tokens in (5, 24):  # the tokenizer's are 16
        given = arguments(prompt=None, num_inference_steps=1, **own_embeddings(folder, tokens))
        expected = pipe.plain(**given, generator=seeded()).images
        assert off(pipe(**given, generator=seeded()).images, expected) < CLOSE


def test_without_a_text_encoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be measured on prompts of ours, and those of the caller are secret."""
    given = arguments(prompt=None, num_inference_steps=1, **own_embeddings(folder, 16))
    ranges = opened(folder).plan(**given).calibration
    bare = opened(folder, backend="plain", text_encoder=None, calibration=ranges)
    expected = bare.plain(**given, generator=seeded()).images
    assert off(bare(**given, generator=seeded()).images, expected) < CLOSE

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr("sfumato.diffusion.pipeline.open_backend", never)
    with pytest.raises(JobError, match="no text encoder to measure ranges with"):
        opened(folder, backend="plain", text_encoder=None)(**given)
    bare.scheduler = type(bare.scheduler).from_config(bare.scheduler.config, clip_sample=True)
    with pytest.raises(JobError, match="the ranges of the scheduler's clamp"):
        bare(**given)


def test_ranges_are_those_of_the_layer_that_clip_skip_names(folder: Path) -> None:
    pipe, given = opened(folder, backend="plain"), arguments(num_inference_steps=1, guidance_scale=1.0)
    known = pipe.plan(**given).calibration.to_json()
    assert pipe.plan(**given, clip_skip=1).calibration.to_json() != known


def test_calibration_is_kept(pipe: SecurePipeline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pipe.plan(**arguments())

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("sfumato.diffusion.plans.trajectories", never)
    assert opened(folder).plan(**arguments()).digest() == plan.digest()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": None}, "prompt"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"image": object()}, "'image'"),
    ],
)
def test_refusals_come_before_work(
    pipe: SecurePipeline, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], words: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr("sfumato.diffusion.pipeline.open_backend", never)
    monkeypatch.setattr("sfumato.diffusion.plans.capture", never)
    with pytest.raises(JobError, match=words) as caught:
        pipe(**arguments(**given))
    assert "\n" not in str(caught.value)


def test_interrupt_ends_early(pipe: SecurePipeline) -> None:
    steps: list[int] = []

    def stop(running: Any, step: int, timestep: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        running.interrupt = True
        return kwargs

    output = pipe(**arguments(), generator=seeded(), callback_on_step_end=stop)
    assert steps == [0]
    assert len(output.report.steps) == 1
    assert bool(output.images.isfinite().all())


def test_a_scheduler_that_clips(folder: Path) -> None:
    pipe = opened(folder)
    free = pipe.plain(**arguments(), generator=seeded()).images
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=True)
    output = pipe(**arguments(), generator=seeded())
    expected = pipe.plain(**arguments(), generator=seeded()).images
    assert off(output.images, expected) < 5 * CLOSE
    assert off(free, expected) > 0.1, "the clamp bites"
    assert pipe.estimate(**arguments()).same_cost(output.report)
    assert {"unet", "clip"} == set(pipe.plans(**arguments()))


def test_thresholding_is_refused_with_advice(folder: Path) -> None:
    pipe = opened(folder)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, thresholding=True)
    with pytest.raises(JobError, match="thresholding=False"):
        pipe(**arguments())


def test_ranges_from_prompts_of_the_caller(folder: Path) -> None:
    """They are asked for, kept apart from those of the built-in prompts, and at least one is needed."""
    asked: list[str] = []

    def planned(calibration: Any) -> SecurePipeline:
        made = opened(folder, calibration=calibration)
        encode = made._pipe.encode_prompt

        def heard(prompt: Any, *rest: Any, **more: Any) -> Any:
            asked.extend([prompt] if isinstance(prompt, str) else prompt)
            return encode(prompt, *rest, **more)

        made._pipe.encode_prompt = heard
        made.plan(**arguments(num_inference_steps=3))
        return made

    planned(None)
    asked.clear()
    planned(["the digit two", "a coat"])
    assert {"the digit two", "a coat"} <= set(asked)
    assert "a photo of a horse" not in asked
    asked.clear()
    planned(("the digit two", "a coat"))
    assert "a coat" not in asked  # they come from the disk
    with pytest.raises(JobError, match="give at least one"):
        planned([])
    for wrong in ("a coat", ["a coat", 3]):
        with pytest.raises(JobError, match="calibration must be a list of prompts"):
            planned(wrong)
