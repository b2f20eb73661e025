"""Cost cuts that keep the image: the image of the same loop in the clear, for the bytes that were promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.cuts import CutNetwork, ways
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.samplers import AUTO, sampler
from sfumato.diffusion.sampling import sample
from sfumato.diffusion.scores import rescheduled
from sfumato.errors import JobError
from sfumato.zoo import DISTILLED
from sfumato.zoo.train.build import save_pipeline

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS, SEED, GUIDANCE, PROMPT = 4, 5, 3.0, "a handwritten seven"
#: dB
CLOSE = 40.0
CUTS = {
    "unguided": {"unguided_steps": 2},
    "public noise": {"public_noise": True},
    "reuse": {"reuse_features": 2},
    "all": {"unguided_steps": 2, "public_noise": True, "reuse_features": 2},
}


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> SecurePipeline:
    """With a solver that takes up earlier outputs."""
    folder = tmp_path_factory.mktemp("tiny")
    save_pipeline(tiny_pipeline, folder)
    solver = DPMSolverMultistepScheduler.from_config(tiny_pipeline.scheduler.config)
    loaded = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, scheduler=solver)
    made = SecurePipeline.from_pipe(loaded, backend="simulate")
    made.set_progress_bar_config(disable=True)
    return made


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent",
        "generator": torch.Generator().manual_seed(SEED), **more,
    }  # fmt: skip


def in_clear(pipe: SecurePipeline, correction: Correction | None = None, **cuts: Any) -> Tensor:
    """The same run in float."""
    with torch.no_grad():
        towards, without = pipe._pipe.encode_prompt([PROMPT], torch.device("cpu"), 1, True)
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(SEED))
    steps = ways(
        STEPS, guided=True, unguided=cuts.get("unguided_steps", 0),
        known=cuts.get("public_noise", False), reuse=cuts.get("reuse_features", 1),
    )  # fmt: skip
    weights = [None if way.single and not way.known else GUIDANCE for way in steps]
    return sample(
        CutNetwork(pipe.unet, steps), probe_schedule(pipe.scheduler, STEPS), latents,
        torch.cat([without, towards]), weights, correction=correction,
    )  # fmt: skip


def psnr(found: Tensor, wanted: Tensor) -> float:
    peak = float(wanted.max() - wanted.min())
    return -10 * math.log10(max(float(((found - wanted) ** 2).mean()) / peak**2, 1e-12))


def bytes_of_steps(report: Any) -> list[int]:
    """Bytes between the parties in the network of each step."""
    found = [0] * STEPS
    for path, cost in report.by_path.items():
        head = path.strip("/").split("/")[0]
        if head.startswith("step"):
            found[int(head.removeprefix("step"))] += sum(cost.bytes_sent)
    return found


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_gives_the_image_of_the_loop_in_the_clear(pipe: SecurePipeline, name: str) -> None:
    cuts = CUTS[name]
    output, whole = pipe(**arguments(**cuts)), pipe.estimate(**arguments())
    assert psnr(output.images, in_clear(pipe, **cuts)) >= CLOSE
    estimate = pipe.estimate(**arguments(**cuts))
    assert output.report.same_cost(estimate)
    assert estimate.total_bytes < whole.total_bytes
    if name == "public noise":  # changes who computes what, and nothing else
        assert psnr(output.images, in_clear(pipe)) >= CLOSE
    else:
        assert psnr(output.images, in_clear(pipe)) < psnr(output.images, in_clear(pipe, **cuts))


def test_a_step_without_guidance_costs_what_one_of_an_unguided_run_costs(pipe: SecurePipeline) -> None:
    guided, single = (bytes_of_steps(pipe.estimate(**arguments(guidance_scale=w))) for w in (GUIDANCE, 1.0))
    # Each plan has ranges of its own, which decide on a few bits.
    found = bytes_of_steps(pipe.estimate(**arguments(unguided_steps=2)))
    assert found == pytest.approx([*guided[:2], *single[2:]], rel=0.01)
    found = bytes_of_steps(pipe.estimate(**arguments(public_noise=True)))
    assert found == pytest.approx([single[0], *guided[1:]], rel=0.01)
    found = bytes_of_steps(pipe.estimate(**arguments(reuse_features=2)))
    assert [found[0], found[2]] == pytest.approx([guided[0], guided[2]], rel=0.01)
    assert max(found[1], found[3]) < 0.7 * guided[1]


def test_a_corrected_run_with_cuts(pipe: SecurePipeline) -> None:
    additions = torch.randn((STEPS, 1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    correction = Correction((0.2,) * STEPS, tuple(additions))
    found = pipe(**arguments(correction=correction, **CUTS["all"])).images
    assert psnr(found, in_clear(pipe, correction, **CUTS["all"])) >= CLOSE


def test_secret_weights(pipe: SecurePipeline) -> None:
    """The parties hold the text, and take the prompt's half of it by themselves."""
    other = SecurePipeline.from_pipe(pipe._pipe, secret="inputs+weights", backend="plain")
    other.set_progress_bar_config(disable=True)
    cuts = {"unguided_steps": 2, "reuse_features": 2}
    assert psnr(other(**arguments(**cuts)).images, in_clear(pipe, **cuts)) >= CLOSE
    with pytest.raises(JobError, match="public weights"):
        other.estimate(**arguments(public_noise=True))


def test_keys_and_values_of_the_prompt_are_shared_once(pipe: SecurePipeline) -> None:
    """With public weights: what the client sends grows with the number of steps by nothing but public values."""
    plan = pipe.plan(**arguments())
    assert len(plan.client_inputs) > 1
    publics = 4 * sum(math.prod(plan.program.types[n][0]) for n in plan.public_inputs)
    few, many = (pipe.estimate(**arguments(num_inference_steps=n)).client_bytes for n in (4, 5))
    assert many - few == 3 * publics


def test_what_cannot_be_cut_is_one_sentence(pipe: SecurePipeline) -> None:
    for wrong, words in (
        ({"unguided_steps": -1}, "unguided_steps must be a whole number"),
        ({"unguided_steps": STEPS}, "guidance_scale=1"),
        ({"reuse_features": 0}, "reuse_features must be a whole number"),
        ({"public_noise": 1}, "True or False"),
        ({"public_noise": True, "negative_prompt": "a bag"}, "negative prompt"),
        ({"public_noise": True, "latents": torch.zeros(1, 4, 4, 4)}, "latents public"),
        ({"unguided_steps": 1, "guidance_rescale": 0.5}, "guidance_rescale"),
    ):
        with pytest.raises(JobError, match=words):
            pipe.estimate(**arguments(**wrong))


def test_outer_blocks_of_another_kind(pipe: SecurePipeline) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4, block_out_channels=(8, 8), down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=64, attention_head_dim=2,
    )  # fmt: skip
    other = SecurePipeline.from_pipe(pipe._pipe, backend="plain")
    other.unet = unet
    with pytest.raises(JobError, match="reuse_features needs"):
        other.estimate(**arguments(reuse_features=2))


@pytest.mark.parametrize("steps", [None, 7])
def test_the_automatic_sampler(pipe: SecurePipeline, steps: int | None) -> None:
    found = sampler(pipe, "auto", steps, SEED)
    assert found.steps == (steps or AUTO[""].steps)
    assert isinstance(found.scheduler, DPMSolverMultistepScheduler)
    assert found.scheduler.config.timestep_spacing == "trailing"
    embedded = sampler(SecurePipeline.from_pretrained("embedded", backend="plain"), "auto", steps, SEED)
    assert (embedded.steps, embedded.guidance) == (steps or AUTO["embedded"].steps, AUTO["embedded"].guidance)
    distilled = sampler(SecurePipeline.from_pretrained(DISTILLED, backend="plain"), "auto", steps, SEED)
    assert (distilled.steps, distilled.guidance) == (steps or AUTO[DISTILLED].steps, 1.0)
    other = SecurePipeline.from_pipe(rescheduled(pipe._pipe, found.scheduler), backend="plain")
    assert other.estimate(**arguments(num_inference_steps=found.steps, **found.arguments)).total_bytes > 0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["full"] * 4),
        ({"unguided": 2}, ["full", "full", "single", "single"]),
        ({"known": True}, ["known", "full", "full", "full"]),
        ({"reuse": 3}, ["full", "partial", "partial", "full"]),
        ({"reuse": 2, "known": True}, ["known", "full", "partial", "full"]),
        ({"reuse": 2, "unguided": 1}, ["full", "partial", "full", "single partial"]),
        ({"reuse": 9, "unguided": 2}, ["full", "partial", "single partial", "single partial"]),
    ],
)
def test_ways(options: dict[str, Any], wanted: Sequence[str]) -> None:
    def said(way: Any) -> str:
        return (
            "known" if way.known else " ".join(n for n in ("single", "partial") if getattr(way, n)) or "full"
        )

    assert [said(way) for way in ways(4, guided=True, **options)] == wanted
