"""Every argument of a diffusers call on the embedded model: the same image as diffusers, or one sentence."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.errors import JobError
from sfumato.runtime.backend import Backend
from sfumato.runtime.commands import Command, Reveal
from sfumato.zoo import embedded_path

# numpy's, about conversions inside diffusers' own set_timesteps.
pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS = 2
#: dB, against diffusers in float32; and by how much nearer the image is than to the one without the argument.
CLOSE, NEARER = 40.0, 15.0


@pytest.fixture(scope="module")
def reference() -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(embedded_path(), local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe(own_cache: None) -> SecurePipeline:
    """Fixed point and truncation errors as in real runs, in one process; ranges are measured once for all tests."""
    measured = opened().plan(**arguments(num_inference_steps=8)).calibration
    return opened(calibration=measured)


def opened(**options: Any) -> SecurePipeline:
    made = SecurePipeline.from_pretrained("embedded", **{"backend": "plain", **options})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(5))


def arguments(**more: Any) -> dict[str, Any]:
    given = {"prompt": "a handwritten seven", "num_inference_steps": STEPS, "guidance_scale": 4.0}
    return {**given, "output_type": "np", "generator": seeded(), **more}


def psnr(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    peak = max(1.0, float(expected.max() - expected.min()))
    return -10 * math.log10(max(float(((found - expected) ** 2).mean()) / peak**2, 1e-12))


def embeds(reference: StableDiffusionPipeline, text: str) -> Tensor:
    with torch.no_grad():
        made: Tensor = reference.encode_prompt(text, torch.device("cpu"), 1, False)[0]
    return made


# ---- the same image ----------------------------------------------------------------------------------------

#: Arguments, made anew for each pipeline (generators have a state), and whether they change the base image.
CASES: dict[str, tuple[Callable[[], dict[str, Any]], bool]] = {
    "nothing more": (dict, False),
    "negative_prompt": (lambda: {"negative_prompt": "a sneaker"}, True),
    "lists of prompts": (
        lambda: {"prompt": ["a bag", "the number 0"], "negative_prompt": ["", "a dress"]},
        True,
    ),
    "num_images_per_prompt": (lambda: {"num_images_per_prompt": 2}, True),
    "prompts, images and generators": (
        lambda: {
            "prompt": ["a bag", "a boot"],
            "num_images_per_prompt": 2,
            "generator": [seeded(i) for i in range(4)],
        },
        True,
    ),
    "one generator for a batch": (lambda: {"prompt": ["a bag"] * 2, "generator": seeded(3)}, True),
    "latents": (lambda: {"latents": noise(1, 4, 8, 8)}, True),
    "latents in half precision": (lambda: {"latents": noise(1, 4, 8, 8).half().float()}, True),
    "guidance_scale 1": (lambda: {"guidance_scale": 1.0, "negative_prompt": "ignored"}, True),
    "guidance_scale 0": (lambda: {"guidance_scale": 0}, True),
    "eta": (lambda: {"eta": 0.8}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_image(pipe: SecurePipeline, reference: StableDiffusionPipeline, case: str) -> None:
    make, changes = CASES[case]
    found = pipe(**arguments(**make())).images
    expected = reference(**arguments(**make())).images
    assert psnr(found, expected) >= CLOSE
    base = reference(**arguments()).images
    assert (
        not changes or expected.shape != base.shape or psnr(found, expected) > psnr(base, expected) + NEARER
    )


def test_a_lora_scale_without_lora(pipe: SecurePipeline) -> None:
    given = arguments(cross_attention_kwargs={"scale": 0.5})
    assert psnr(pipe(**given).images, pipe(**arguments()).images) >= CLOSE


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "latent"])
def test_output_types(pipe: SecurePipeline, reference: StableDiffusionPipeline, kind: str) -> None:
    found, flagged = pipe(**arguments(output_type=kind), return_dict=False)
    expected = reference(**arguments(output_type=kind)).images
    assert type(found) is type(expected)
    assert flagged is None
    if kind == "pil":
        assert found[0].mode == expected[0].mode
        found, expected = np.asarray(found[0]) / 255, np.asarray(expected[0]) / 255
    assert psnr(found, expected) >= CLOSE


@pytest.mark.parametrize("negative", [True, False])
def test_own_embeddings(pipe: SecurePipeline, reference: StableDiffusionPipeline, negative: bool) -> None:
    given = {"prompt": None, "prompt_embeds": embeds(reference, "a small dress")}
    if negative:
        given["negative_prompt_embeds"] = embeds(reference, "a sneaker")
    found, expected = pipe(**arguments(**given)).images, reference(**arguments(**given)).images
    assert psnr(found, expected) >= max(CLOSE, psnr(reference(**arguments()).images, expected) + NEARER)


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 120]}, {"sigmas": [2.5, 0.8, 0.1]}])
def test_own_timesteps_and_sigmas(
    pipe: SecurePipeline, reference: StableDiffusionPipeline, given: dict[str, Any]
) -> None:
    kept = pipe.scheduler
    scheduler = EulerDiscreteScheduler.from_config(kept.config)
    other = StableDiffusionPipeline(
        **{**reference.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = scheduler
        output = pipe(**arguments(**given, num_inference_steps=None))
    finally:
        pipe.scheduler = kept
    assert len(output.report.steps) == (3 if "timesteps" in given else 2), (
        "the last sigma is where the run ends"
    )
    assert psnr(output.images, other(**arguments(**given, num_inference_steps=None)).images) >= CLOSE
    with pytest.raises(JobError, match="takes no list of"):
        pipe(**arguments(**given))


def test_guidance_rescale(reference: StableDiffusionPipeline) -> None:
    pipe, given = opened(), {"guidance_rescale": 0.7}
    found, expected = pipe(**arguments(**given)).images, reference(**arguments(**given)).images
    assert psnr(found, expected) >= max(CLOSE, psnr(reference(**arguments()).images, expected) + NEARER)
    targets = [node.target for node in pipe.plan(**arguments(**given)).program.nodes]
    assert "aten.rsqrt.default" in targets, "the spread is computed on shares"


def test_sizes(pipe: SecurePipeline, reference: StableDiffusionPipeline) -> None:
    # As in diffusers, one of the two alone is ignored.
    assert pipe(**arguments(height=48)).images.shape == reference(**arguments(height=48)).images.shape
    pipe, given = opened(), {"height": 48, "width": 40}
    found, expected = pipe(**arguments(**given)).images, reference(**arguments(**given)).images
    assert found.shape == (1, 48, 40, 1)
    assert psnr(found, expected) >= CLOSE
    # And own latents bring their size.
    own = {"latents": noise(1, 4, 12, 10)}
    assert psnr(pipe(**arguments(**own)).images, reference(**arguments(**own)).images) >= CLOSE


def test_clip_skip(pipe: SecurePipeline, reference: StableDiffusionPipeline) -> None:
    """diffusers looks for a part of the text encoder that transformers 5 no longer has, so its formula is here."""
    encoder, tokenizer = reference.text_encoder, reference.tokenizer
    ids = tokenizer(["a handwritten seven"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        skipped = encoder(ids, output_hidden_states=True).hidden_states[-2]
        own = getattr(encoder, "text_model", encoder).final_layer_norm(skipped)
    expected = reference(**arguments(prompt=None, prompt_embeds=own)).images
    base = psnr(reference(**arguments()).images, expected)
    assert psnr(pipe(**arguments(clip_skip=1)).images, expected) >= max(CLOSE, base + NEARER)
    assert psnr(pipe.plain(**arguments(clip_skip=1)).images, expected) >= max(CLOSE, base + NEARER)


# ---- callbacks ---------------------------------------------------------------------------------------------


def test_a_callback_is_given_the_clients_own_tensors(
    pipe: SecurePipeline, reference: StableDiffusionPipeline
) -> None:
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def run(running: Any) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []

        def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append({"step": step, "timestep": int(timestep), **tensors})
            return tensors

        running(**arguments(), callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
        return seen

    found, expected = run(pipe), run(reference)
    assert [list(seen) for seen in found] == [list(seen) for seen in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["step"], ours["timestep"]) == (theirs["step"], theirs["timestep"])
        assert all(psnr(ours[name], theirs[name]) >= CLOSE for name in names)


def _tint(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] + 0.3}


def _turn(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}


def _paint(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["latents"][..., :4] = 0.5
    return tensors


def _overwrite(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    tensors["prompt_embeds"].copy_(tensors["prompt_embeds"].flip(0))
    return {}


def _weigh(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    running._guidance_scale = 1.5
    return tensors


def _stop(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    running._interrupt = True
    return tensors


@pytest.mark.parametrize(
    ("callback", "names"),
    [
        (_tint, ["latents"]),
        (_turn, ["prompt_embeds"]),
        (_paint, ["latents"]),
        (_overwrite, ["prompt_embeds", "latents"]),
        (_weigh, []),
        (_stop, []),
        (SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0), None),
    ],
    ids=["latents", "prompt_embeds", "in place", "in place, not returned", "guidance", "interrupt", "cutoff"],
)
def test_what_a_callback_changes(
    pipe: SecurePipeline, reference: StableDiffusionPipeline, callback: Any, names: list[str] | None
) -> None:
    asked = {} if names is None else {"callback_on_step_end_tensor_inputs": names}
    given = {"num_inference_steps": 3, "callback_on_step_end": callback, **asked}
    found, expected = pipe(**arguments(**given)).images, reference(**arguments(**given)).images
    base = reference(**arguments(num_inference_steps=3)).images
    assert psnr(found, expected) >= max(CLOSE, psnr(base, expected) + NEARER)


def test_latents_are_opened_on_request_alone(pipe: SecurePipeline, commands: list[Command]) -> None:
    own = opened(
        backend="simulate",
        calibration=pipe.plan(**arguments()).calibration,
        options={"certificate": False},  # one more for each opening
    )

    def run(**more: Any) -> tuple[int, Any]:
        commands.clear()
        report = own(**arguments(), callback_on_step_end=lambda *given: given[3], **more).report
        return sum(isinstance(command, Reveal) for command in commands), report

    quiet, first = run()
    clear, second = run(callback_on_step_end_tensor_inputs=["prompt_embeds", "negative_prompt_embeds"])
    opening, third = run(callback_on_step_end_tensor_inputs=["latents"])
    assert (quiet, clear, opening) == (1, 1, 1 + STEPS)
    assert first.client_bytes == second.client_bytes
    words = 3 * 8 * 4 * 8 * 8  # each party sends the client one component of latents (1, 4, 8, 8)
    assert third.client_bytes == first.client_bytes + STEPS * words
    assert own.estimate(**arguments(), callback_on_step_end_tensor_inputs=["latents"]).same_cost(third)


# ---- sentences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"height": 30, "width": 32}, "divisible by 8"),
        ({"height": -8, "width": 32}, "height"),
        ({"prompt": None}, "give a prompt, or prompt_embeds"),
        ({"prompt": 7}, "prompt must be a text"),
        ({"prompt": []}, "list of prompts is empty"),
        ({"prompt": "a secret", "prompt_embeds": torch.zeros(1, 16, 64)}, "not both"),
        ({"prompt": None, "prompt_embeds": torch.zeros(16, 64)}, "prompts, tokens, width"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 8)}, "embeddings of width 64"),
        ({"negative_prompt": ["a secret"]}, "a list where prompt is a list"),
        (
            {"prompt": ["a secret"] * 2, "negative_prompt": ["a secret"]},
            "1 negative prompts were given for 2",
        ),
        ({"generator": [seeded(), seeded()]}, "2 generators were given for 1 images"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents must have the shape \(1, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 40, "width": 40}, "latents must have the shape"),
        ({"num_images_per_prompt": 0.5}, "num_images_per_prompt"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": "20"}, "num_inference_steps must be a whole number of at least 1, not '20'"),
        ({"num_inference_steps": [20]}, "num_inference_steps must be a whole number"),
        ({"height": "32", "width": 32}, "height must be a whole number of pixels"),
        ({"guidance_scale": None}, "guidance_scale must be a finite number, not None"),
        ({"guidance_scale": "7.5"}, "guidance_scale must be a finite number"),
        ({"negative_prompt_embeds": torch.zeros(1, 9, 64)}, "must be of one shape"),
        ({"timesteps": [9, 5], "sigmas": [1.0]}, "takes no list of timesteps"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
        ({"clip_skip": 9}, "more than this text encoder has layers"),
        ({"clip_skip": -1}, "clip_skip must be"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "'scale'"),
        ({"cross_attention_kwargs": {"scale": "half"}}, "finite number"),
        ({"ip_adapter_image": np.zeros((8, 8, 3))}, "image prompts are not served yet"),
        ({"ip_adapter_image_embeds": [torch.zeros(1, 1, 8)]}, "image prompts are not served yet"),
        ({"callback": print}, "use callback_on_step_end"),
        ({"callback_steps": 1}, "use callback_on_step_end"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, "not for 'noise_pred'"),
        ({"image": object()}, "takes no argument 'image'"),
    ],
)
def test_sentences(
    pipe: SecurePipeline, given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setattr("sfumato.diffusion.pipeline.open_backend", never)
    with pytest.raises(JobError, match=words) as caught:
        pipe(**arguments(**given))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value), "a prompt is quoted"


@pytest.mark.parametrize(
    ("callback", "names", "words"),
    [
        (lambda *_: {"latents": torch.zeros(1, 4, 8, 8)}, [], "does not name"),
        (lambda *_: {"prompt_embeds": torch.zeros(3, 16, 64)}, ["prompt_embeds"], "prompt_embeds of"),
        (lambda *_: {"latents": torch.zeros(1, 4, 4, 4)}, ["latents"], "latents of"),
        (lambda *_: {"latents": None}, ["latents"], "no tensor"),
    ],
)
def test_what_a_callback_cannot_return(
    pipe: SecurePipeline, callback: Any, names: list[str], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        pipe(**arguments(), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


def test_guidance_cannot_begin_in_a_run(pipe: SecurePipeline) -> None:
    with pytest.raises(JobError, match="cannot change guidance_scale"):
        pipe(**arguments(guidance_scale=1.0), callback_on_step_end=_weigh)


def test_a_long_prompt_is_not_quoted_in_a_log(pipe: SecurePipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe(**arguments(prompt="a handwritten seven " * 20 + "zebra"))
    assert "the rest is cut off" in caplog.text
    assert "seven" not in caplog.text
    assert "zebra" not in caplog.text


# ---- around the call ---------------------------------------------------------------------------------------


def test_pasted_lines_change_nothing(pipe: SecurePipeline) -> None:
    before = pipe(**arguments()).images
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.float16) is pipe
    assert pipe.to(device="cpu", dtype=torch.bfloat16) is pipe
    processors = dict(pipe.unet.attn_processors)
    pipe.enable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    pipe.enable_model_cpu_offload()
    pipe.enable_sequential_cpu_offload()
    pipe.disable_attention_slicing()
    pipe.vae.enable_slicing()
    assert pipe.unet.attn_processors == processors
    assert next(pipe.unet.parameters()).dtype is torch.float32
    after = pipe(**arguments()).images
    pipe.vae.disable_slicing()
    assert psnr(before, after) >= 60
    with pytest.raises(JobError, match="the client's part runs on the CPU"):
        pipe.to("cuda")
    with pytest.raises(JobError, match="enable_freeu cannot be used"):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(JobError, match="image prompts are not served yet"):
        pipe.load_ip_adapter("somewhere")


def test_no_method_hands_out_the_pipeline_in_the_clear(pipe: SecurePipeline) -> None:
    inner = pipe._pipe
    for name in dir(type(inner)):
        method = getattr(pipe, name, None)
        assert method is not inner
    assert pipe.to("cpu") is pipe
    assert pipe.components["unet"] is inner.unet


def test_attributes_are_the_pipelines(pipe: SecurePipeline) -> None:
    kept, processor = pipe.scheduler, pipe.image_processor
    other = EulerDiscreteScheduler.from_config(kept.config)
    try:
        pipe.scheduler = other
        assert pipe._pipe.scheduler is other
        assert pipe.config["scheduler"][1] == "EulerDiscreteScheduler"
        pipe.image_processor = None
        assert pipe._pipe.image_processor is None
    finally:
        pipe.scheduler, pipe.image_processor = kept, processor
    assert pipe.vae_scale_factor == 4
    with pytest.raises(AttributeError):
        pipe.no_such_attribute  # noqa: B018


def test_progress_bar(pipe: SecurePipeline) -> None:
    where = io.StringIO()
    try:
        pipe.set_progress_bar_config(file=where, desc="denoising", delay=0.0, mininterval=0.0)
        pipe(**arguments())
        assert re.search(rf"denoising: 100%.*{STEPS}/{STEPS}", where.getvalue())
        where.seek(0)
        where.truncate()
        pipe.set_progress_bar_config(file=where, disable=True)
        pipe(**arguments())
        assert where.getvalue() == ""
    finally:
        pipe.set_progress_bar_config(disable=True)


# ---- who knows the noise -----------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    """Every command that reaches the parties."""
    seen: list[Command] = []
    real = Backend._command

    def spy(self: Backend, command: Command, *args: Any, **kwargs: Any) -> Any:
        seen.append(command)
        return real(self, command, *args, **kwargs)

    monkeypatch.setattr(Backend, "_command", spy)
    return seen


def public(value: Any) -> Any:
    """What a party sees of a command, as something that can be compared: tensors by their bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *((f.name, public(getattr(value, f.name))) for f in fields(value))
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return value


def test_noise_is_the_clients_and_nothing_public_depends_on_it(
    pipe: SecurePipeline, reference: StableDiffusionPipeline, commands: list[Command]
) -> None:
    kept = pipe.scheduler
    ancestral = EulerAncestralDiscreteScheduler.from_config(kept.config)
    other = StableDiffusionPipeline(
        **{**reference.components, "scheduler": ancestral}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = ancestral
        runs = []
        for seed in (1, 2):
            commands.clear()
            given = {"generator": seeded(seed), "num_inference_steps": 3}
            found = pipe(**arguments(**given)).images
            runs.append(public(commands))
            expected = other(**arguments(generator=seeded(seed), num_inference_steps=3)).images
            assert psnr(found, expected) >= CLOSE, "drawn from the caller's generator, in diffusers' order"
    finally:
        pipe.scheduler = kept
    assert [c for c in runs[0] if c[0] == "Put" and "noise" in c[1][1]], (
        "noise of steps is shared like any secret"
    )
    assert runs[0] == runs[1]
