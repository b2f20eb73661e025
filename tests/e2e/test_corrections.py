"""Public corrections of few-step runs: the same image as in the clear, and no byte more between the parties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from sfumato.diffusion.correction import Correction, Pull
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.record import Record, record
from sfumato.diffusion.samplers import sampler
from sfumato.diffusion.sampling import sample
from sfumato.diffusion.scores import aligned, measured, rescheduled, scores
from sfumato.errors import JobError
from sfumato.zoo.train.build import save_pipeline

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

STEPS, FINE, SEED, GUIDANCE = 2, 10, 5, 3.0
PROMPT = "a handwritten seven"
CLOSE = 2e-3


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> SecurePipeline:
    folder = tmp_path_factory.mktemp("tiny")
    save_pipeline(tiny_pipeline, folder)
    made = SecurePipeline.from_pretrained(folder, backend="simulate")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def known(pipe: SecurePipeline) -> Record:
    return record(pipe._pipe, SEED, FINE)


def times(scheduler: Any, steps: int = STEPS) -> list[float]:
    return [float(t) for t in probe_schedule(scheduler, steps).timesteps]


def arguments(**more: Any) -> dict[str, Any]:
    return {
        "prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent",
        "generator": torch.Generator().manual_seed(SEED), **more,
    }  # fmt: skip


def null(pipe: SecurePipeline) -> Tensor:
    with torch.no_grad():
        text: Tensor = pipe._pipe.encode_prompt([""], torch.device("cpu"), 1, False)[0]
    return text


def in_clear(pipe: SecurePipeline, scheduler: Any, correction: Correction | None) -> Tensor:
    """The same run in float."""
    denoiser = Denoiser(pipe.unet, guided=True).eval()
    with torch.no_grad():
        towards, without = pipe._pipe.encode_prompt([PROMPT], torch.device("cpu"), 1, True)
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(SEED))
    return sample(
        lambda z, t, text: denoiser(z, t.to(torch.float32), text),
        probe_schedule(scheduler, STEPS), latents, torch.cat([without, towards]), GUIDANCE, correction=correction,
    )  # fmt: skip


def test_the_image_of_the_loop_in_the_clear_is_that_of_diffusers(pipe: SecurePipeline) -> None:
    wanted = pipe.plain(**arguments()).images
    assert float((in_clear(pipe, pipe.scheduler, None) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["scores A", "scores B", "measured"])
def test_a_corrected_run(pipe: SecurePipeline, known: Record, kind: str) -> None:
    scheduler = aligned(pipe.scheduler, STEPS, FINE)
    other = SecurePipeline.from_pipe(rescheduled(pipe._pipe, scheduler), backend="simulate")
    other.set_progress_bar_config(disable=True)
    at = times(scheduler)
    correction = (
        measured(
            [known], Denoiser(other.unet, guided=False).eval(), null(other), other.plan(**arguments()), at
        )
        if kind == "measured"
        else scores([known], scheduler, at, Pull(eta=0.3), kind[-1])
    )
    plain, corrected = other(**arguments()), other(**arguments(correction=correction))
    wanted = in_clear(other, scheduler, correction)
    assert float((corrected.images - wanted).abs().max()) < CLOSE
    if kind != "measured":  # which is of the size of the fixed point's errors here
        assert float((corrected.images - plain.images).abs().max()) > 10 * CLOSE
    words = 3 * 8 * 4 * 4 * 4  # to three parties, at each step
    estimate = other.estimate(**arguments(correction=correction))
    for report in (corrected.report, estimate):
        assert report.total_bytes == plain.report.total_bytes
        assert report.rounds == plain.report.rounds
        assert report.client_bytes == plain.report.client_bytes + STEPS * words


def test_a_solver_with_a_memory_carries_the_corrections_of_earlier_steps(
    pipe: SecurePipeline, known: Record
) -> None:
    solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    other = SecurePipeline.from_pipe(rescheduled(pipe._pipe, solver), backend="simulate")
    other.set_progress_bar_config(disable=True)
    at = times(solver)
    additions = torch.randn((STEPS, 1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    correction = Correction((0.2,) * len(at), tuple(additions))
    found = other(**arguments(correction=correction)).images
    assert float((found - in_clear(other, solver, correction)).abs().max()) < CLOSE


def test_a_record_is_kept_and_is_the_unconditional_trajectory(
    pipe: SecurePipeline, known: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pipe.plain(
        "", num_inference_steps=FINE, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
    ).images  # fmt: skip
    assert float((known.latents[-1] - wanted[0]).abs().max()) < 1e-4

    def never(*_: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr("sfumato.diffusion.record._made", never)
    again = record(pipe._pipe, SEED, FINE)
    assert again.times == known.times
    assert torch.equal(again.outputs, known.outputs)
    with pytest.raises(AssertionError, match="made again"):
        record(pipe._pipe, SEED + 1, FINE)


@pytest.mark.parametrize("grid", ["own", "aligned"])
def test_reading_b_does_in_one_step_what_the_record_did(
    pipe: SecurePipeline, known: Record, grid: str
) -> None:
    """DDIM's step from u with the effective score ends where the record is at the next time."""
    scheduler = pipe.scheduler if grid == "own" else aligned(pipe.scheduler, STEPS, FINE)
    at = times(scheduler)
    assert (at[0] == known.times[0]) == (grid == "aligned")
    correction = scores([known], scheduler, at, Pull(eta=1.0, exponent=0.0), "B")
    schedule, start = probe_schedule(scheduler, STEPS), known.at(at[0])
    held = {
        "samples": {0: known.latents[start : start + 1].double()},
        "outputs": {0: correction.additions[0]},
    }
    reached = schedule.steps[0].result.of(held, 0)
    assert float((reached[0] - known.latents[known.at(at[1])]).abs().max()) < 1e-4


def test_weights_of_the_pull() -> None:
    abar = 0.2
    sigma = math.sqrt(1 - abar)
    assert Pull(0.1).at(abar) == pytest.approx(0.1 * sigma / math.sqrt(abar))
    assert Pull(0.1, "sigma/abar").at(abar) == pytest.approx(0.1 * sigma / abar)
    assert Pull(0.1, exponent=2.0).at(abar) == pytest.approx(0.1 * (1 - abar) / abar)
    assert Pull(10.0, cap=0.5).at(abar) == 0.5


def test_what_does_not_fit_is_refused_before_work(pipe: SecurePipeline, known: Record) -> None:
    at = times(pipe.scheduler)
    made = scores([known], pipe.scheduler, at)
    with pytest.raises(JobError, match="for 2 steps, and the run has 3"):
        pipe.plan(**arguments(num_inference_steps=3, correction=made))
    with pytest.raises(JobError, match="for latents"):
        pipe.plan(**arguments(num_images_per_prompt=2, correction=made))
    with pytest.raises(JobError, match="guidance_rescale"):
        pipe.plan(**arguments(guidance_rescale=0.5, correction=made))
    with pytest.raises(JobError, match="must be a Correction"):
        pipe.plan(**arguments(correction="sdu"))
    with pytest.raises(JobError, match="does not pass 999"):
        scores([known], pipe.scheduler, [999.0, 1.0])
    with pytest.raises(JobError, match="reading"):
        scores([known], pipe.scheduler, at, reading="C")
    with pytest.raises(JobError, match="weight"):
        Pull(weight="gamma").at(0.5)
    with pytest.raises(JobError, match="aligned grid"):
        aligned(DDIMScheduler(timestep_spacing="trailing"), 2, 6)
    ancestral = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(JobError, match="neither draws noise"):
        record(rescheduled(pipe._pipe, ancestral), SEED, FINE)


@pytest.mark.parametrize("name", ["sdu", "usg", "dpm++"])
def test_samplers_by_name(pipe: SecurePipeline, name: str) -> None:
    """What `generate --sampler` runs is what it says, and its record is in the run's grid."""
    chosen = sampler(pipe, name, STEPS, SEED)
    scheduler, correction = chosen.scheduler, chosen.correction
    other = SecurePipeline.from_pipe(rescheduled(pipe._pipe, scheduler), backend="plain")
    other.set_progress_bar_config(disable=True)
    found = other(**arguments(correction=correction)).images
    assert float((found - in_clear(other, scheduler, correction)).abs().max()) < CLOSE
    if name == "dpm++":
        assert correction is None
        return
    assert correction is not None
    first = times(scheduler)[0]
    assert first == (times(pipe.scheduler, 50)[0] if name == "sdu" else times(pipe.scheduler)[0])


def test_names_that_are_no_samplers(pipe: SecurePipeline) -> None:
    with pytest.raises(JobError, match="no sampler 'magic'; use one of auto, ddim"):
        sampler(pipe, "magic", STEPS, SEED)
    predicts_v = rescheduled(
        pipe._pipe, DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    )
    with pytest.raises(JobError, match="predicts noise"):
        sampler(predicts_v, "sdu", STEPS, SEED)
