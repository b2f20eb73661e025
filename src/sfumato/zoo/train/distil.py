"""Distilled guidance, one call of the U-Net in place of two: ``python -m sfumato.zoo.train.distil``.

The student learns ``eps_s(z, t, y) = eps(z, t, 0) + w (eps(z, t, y) - eps(z, t, 0))`` of the embedded pipeline's U-Net
for one scale w, at the points of that U-Net's own guided few-step runs, so without data. (Half of the points on real
latents with noise at uniform times was measured to be worse for 4 and for 5 steps.) At low noise w is 1, as in the
sampler ``auto``, whose last step has no guidance.

Source: Meng et al. 2023, stage one (there with w as an input of the student).
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from .. import embedded_path
from .build import save_pipeline
from .loop import Indices, channels_last, run
from .unet import BATCH, PromptTable

__all__ = ["GUIDANCE", "Points", "Teacher", "on_runs", "save_student", "train_student"]

#: Scale and steps of the sampler ``auto`` for the embedded pipeline (``sfumato.diffusion.samplers.AUTO``).
GUIDANCE, STEPS = 3.5, 5
#: Below this timestep there is no guidance: the last of 5 trailing steps is at 199, of 4 at 249.
UNGUIDED_BELOW = 300
#: Guided runs that points are taken from.
RUNS = 8_000
_TOGETHER = 250


class Points(NamedTuple):
    """Where the student is taught: ``noisy`` latents (N, C, H, W), ``times`` (N,), ``ids`` of the prompt (N, tokens),
    and the ``wanted`` output, shaped like ``noisy``."""

    noisy: Tensor
    times: Tensor
    ids: Tensor
    wanted: Tensor


class Teacher:
    """The guided U-Net of a pipeline, and prompts by class to ask it about."""

    def __init__(self, pipeline: StableDiffusionPipeline, scale: float = GUIDANCE, seed: int = 0) -> None:
        self.pipeline, self.scale = pipeline, scale
        self.prompts = PromptTable(pipeline, seed)
        self.null = self.text(self.prompts.ids[-1:])

    @torch.no_grad()
    def text(self, ids: Tensor) -> Tensor:
        """Embeddings (N, tokens, width) of token ids (N, tokens)."""
        found: Tensor = self.pipeline.text_encoder(ids).last_hidden_state
        return found

    @torch.no_grad()
    def __call__(self, noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        """The guided prediction at ``noisy`` (N, C, H, W), ``times`` (N,), for the prompts ``ids`` (N, tokens)."""
        text = self.text(ids)
        both = torch.cat([self.null.expand_as(text), text])
        output: Tensor = self.pipeline.unet(torch.cat([noisy, noisy]), torch.cat([times, times]), both).sample
        without, towards = output.chunk(2)
        scale = torch.where(times < UNGUIDED_BELOW, 1.0, self.scale)[:, None, None, None]
        return without + scale * (towards - without)


def on_runs(teacher: Teacher, runs: int, steps: int = STEPS) -> Points:
    """The points of so many guided runs of DPM-Solver++ (2M) on trailing timesteps: (runs * steps) of them."""
    config = teacher.pipeline.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    found = []
    for start in range(0, runs, _TOGETHER):
        count = min(_TOGETHER, runs - start)
        ids = teacher.prompts.draw(torch.randint(0, 20, (count,)))
        scheduler = DPMSolverMultistepScheduler.from_config(
            teacher.pipeline.scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(steps)
        noisy = torch.randn(count, *shape) * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            times = time.expand(count)
            wanted = teacher(noisy, times, ids)
            found.append(Points(noisy, times, ids, wanted))
            noisy = scheduler.step(wanted, time, noisy).prev_sample
    return Points(*(torch.cat(column) for column in zip(*found, strict=True)))


def train_student(
    teacher: Teacher, points: Points, out: Path, minutes: float, peak: float = 1e-3
) -> UNet2DConditionModel:
    """A copy of the teacher's U-Net, trained on ``points``: averaged weights. Goes on from a checkpoint in ``out``."""
    student = channels_last(copy.deepcopy(teacher.pipeline.unet)).requires_grad_(True)
    draw = Indices(len(points.times), min(BATCH, len(points.times)), seed=6)

    def step(_: int) -> Tensor:
        noisy, times, ids, wanted = (column[chosen] for chosen in [draw()] for column in points)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return (student(noisy, times, teacher.text(ids)).sample - wanted).square().mean()

    average = run("distil", student, step, out / f"distil-{teacher.scale:g}.ckpt", minutes, peak)
    student.load_state_dict(average.state)
    return student.eval()


def save_student(teacher: Teacher, student: UNet2DConditionModel, folder: Path) -> None:
    """Save the teacher's pipeline with the student as its U-Net, in place of what is in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    made = StableDiffusionPipeline(
        **{**teacher.pipeline.components, "unet": student}, requires_safety_checker=False
    )
    save_pipeline(made, folder)


def _points(teacher: Teacher, out: Path) -> Points:
    """The points of an earlier run with this scale, or new ones."""
    cache = out / f"points-{teacher.scale:g}.pt"
    if not cache.is_file():
        torch.manual_seed(1)
        partial = cache.with_suffix(".part")
        torch.save(on_runs(teacher, RUNS)._asdict(), partial)
        os.replace(partial, cache)
    return Points(**torch.load(cache, weights_only=True))


def main(argv: list[str] | None = None) -> int:
    """Distil guidance into the embedded pipeline's U-Net; what is already there is kept."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.zoo.train.distil", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time in all (default 30)")
    parser.add_argument(
        "--guidance", type=float, default=GUIDANCE, help=f"scale to distil (default {GUIDANCE:g})"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be positive")
    torch.set_num_threads(args.threads)
    diffusers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_path(), local_files_only=True)
    teacher = Teacher(pipeline, args.guidance)
    points = _points(teacher, args.out)
    folder = args.out / f"embedded-distilled-{args.guidance:g}"
    save_student(teacher, train_student(teacher, points, args.out, args.minutes), folder)
    print(
        f'draw with it: sfumato generate "..." --model {folder} --sampler auto --steps {STEPS} --guidance 1'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
