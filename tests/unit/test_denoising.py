"""The denoising loop on handles, with a session that computes in float: the same image as diffusers gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from sfumato.diffusion import loop
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import Denoising
from sfumato.diffusion.request import Prepared, Request, prepare
from sfumato.errors import JobError
from sfumato.runtime.backend import Term
from sfumato.zoo.train.build import make_scheduler, make_text_encoder, make_vae
from sfumato.zoo.train.prompts import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=64,
        attention_head_dim=2,
    )
    made = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


class Floats:
    """Handles that hold floats."""

    def __init__(self, denoiser: Denoiser, limits: tuple[float, float] | None) -> None:
        self.limits = limits
        self.denoiser, self.values = denoiser, dict[str, Tensor]()
        self.names: list[str] = []
        self.most = 0

    def put(self, handle: str, values: Tensor, frac: int = 18) -> None:
        self._keep(handle, values.to(torch.float64))

    def call(
        self,
        name: str,
        path: str,
        inputs: Mapping[str, str],
        publics: Mapping[str, Tensor],
        outputs: Sequence[str],
    ) -> None:
        if name == "clip":
            assert self.limits is not None
            return self._keep(outputs[0], self.values[inputs["value"]].clamp(*self.limits))
        sample = self.values[inputs["sample"]].to(torch.float32)
        with torch.no_grad():
            self._keep(outputs[0], self.denoiser(sample, **publics).to(torch.float64))

    def affine(
        self,
        handle: str,
        terms: Sequence[Term],
        path: str,
        frac: int = 18,
        *,
        constant: Tensor | None = None,
    ) -> None:
        rows = [t.coefficient * self.values[t.handle][t.start : t.stop] for t in terms]
        total = torch.stack(rows).sum(0)
        self._keep(handle, total if constant is None else total + constant)

    def reveal(self, handle: str) -> Tensor:
        return self.values[handle]

    def drop(self, *handles: str) -> None:
        for handle in handles:
            del self.values[handle]

    def _keep(self, handle: str, values: Tensor) -> None:
        assert handle not in self.names, "a handle names one value for the whole session"
        self.names.append(handle)
        self.values[handle] = values
        self.most = max(self.most, len(self.values))


@pytest.fixture
def in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything_public(_: Any, args: Any, kwargs: Mapping[str, Any], *, held: Any) -> Any:
        return SimpleNamespace(secrets={}, publics=dict(kwargs))

    monkeypatch.setattr(loop, "client_side", everything_public)


def drawn(pipe: Any, observe: Any = None, **arguments: Any) -> tuple[Tensor, Floats]:
    prepared: Prepared = prepare(pipe, Request.of(arguments))
    session = Floats(Denoiser(pipe.unet, guided=prepared.guided).eval(), prepared.schedule.clip)
    guidance = prepared.request.guidance_scale if prepared.guided else None
    denoising = Denoising(
        session,  # type: ignore[arg-type]
        {"unet": SimpleNamespace()},  # type: ignore[dict-item]
        prepared.schedule,
        prepared.embeds,
        prepared.condition,
        guidance,
        prepared.request.generator,
    )
    return denoising.run(prepared.latents, observe), session


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("in_float")
@pytest.mark.parametrize(
    ("name", "options", "eta"),
    [
        ("DDIMScheduler", {}, 0.0),
        ("DDIMScheduler", {}, 0.7),
        ("DDPMScheduler", {}, 0.0),
        ("PNDMScheduler", {}, 0.0),
        ("EulerDiscreteScheduler", {}, 0.0),
        ("EulerAncestralDiscreteScheduler", {}, 0.0),
        ("HeunDiscreteScheduler", {}, 0.0),
        ("DPMSolverMultistepScheduler", {}, 0.0),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
        ("UniPCMultistepScheduler", {"prediction_type": "v_prediction"}, 0.0),
        ("DEISMultistepScheduler", {}, 0.0),
        ("LCMScheduler", {}, 0.0),
        ("DDIMScheduler", {"clip_sample": True, "prediction_type": "v_prediction"}, 0.5),
        ("DDIMScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}, 0.0),
        ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}, 0.0),
        ("DDPMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 0.0),
        ("HeunDiscreteScheduler", {"clip_sample": True}, 0.0),
        ("SASolverScheduler", {}, 0.0),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_latents_as_diffusers(
    pipe: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    eta: float,
    guidance: float,
) -> None:
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    arguments = {
        "prompt": ["a handwritten seven", "a sneaker"],
        "negative_prompt": ["a bag", ""],
        "num_inference_steps": 5,
        "guidance_scale": guidance,
        "eta": eta,
        "output_type": "latent",
    }
    expected = pipe(**arguments, generator=seeded()).images
    found, session = drawn(pipe, **arguments, generator=seeded())
    assert float((found - expected).abs().max()) < 2e-4 * float(expected.abs().max())
    assert session.most <= 18, "old values are forgotten"


@pytest.mark.usefixtures("in_float")
def test_a_list_of_generators_gives_the_single_images(pipe: Any) -> None:
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "eta": 1.0}
    prompts = ["a handwritten seven", "a dress"]
    both, _ = drawn(pipe, prompt=prompts, generator=[seeded(4), seeded(5)], **arguments)
    for row, (prompt, seed) in enumerate(zip(prompts, (4, 5), strict=True)):
        alone, _ = drawn(pipe, prompt=prompt, generator=[seeded(seed)], **arguments)
        assert torch.allclose(both[row : row + 1], alone, atol=1e-4)


@pytest.mark.usefixtures("in_float")
def test_the_observer_may_look_and_change(pipe: Any) -> None:
    seen: list[Tensor] = []

    def observe(step: int, latents: Any) -> Tensor | None:
        if step == 0:
            seen.append(latents())
            assert torch.equal(latents(), seen[0])
        return torch.zeros_like(seen[0]) if step == 1 else None

    def callback(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            theirs.append(kwargs["latents"])
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 1 else kwargs

    theirs: list[Tensor] = []
    arguments = {"prompt": "a bag", "num_inference_steps": 4, "output_type": "latent"}
    found, _ = drawn(pipe, observe, generator=seeded(), **arguments)
    expected = pipe(**arguments, generator=seeded(), callback_on_step_end=callback).images
    assert torch.allclose(seen[0].to(torch.float32), theirs[0], atol=1e-4)
    assert torch.allclose(found.to(torch.float32), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"guidance_rescale": "much"}, "guidance_rescale"),
        ({"ip_adapter_image": object()}, "ip_adapter_image"),
        ({"cross_attention_kwargs": {"gain": 1}}, "cross_attention_kwargs"),
        ({"strength": 0.5}, "no argument 'strength'"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"prompt": []}, "at least one"),
        ({"prompt": 5}, "prompt"),
        ({"height": 33, "width": 33}, "divisible"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"latents": torch.zeros(1, 3, 9, 9)}, "shape"),
        ({"generator": [torch.Generator()] * 3}, "3 generators"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "a callback can ask for"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt"),
    ],
)
def test_what_is_not_served_is_one_sentence(pipe: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words) as caught:
        prepare(pipe, Request.of({"prompt": "a bag", **arguments}))
    assert "\n" not in str(caught.value)
