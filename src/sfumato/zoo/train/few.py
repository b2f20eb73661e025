"""A student that draws in a few steps, one call each: ``python -m sfumato.zoo.train.few``.

The teacher is a model that draws by class, its guided runs of many deterministic DDIM steps are recorded once, and the
student, which starts from its weights, learns to land on every k-th point of a run with one DDIM step of its own:
fewer steps and guidance are taught at once, without data. It is taught where its own steps have led it, too. It
predicts what the teacher does (noise or v) and clips where the teacher does: without a clip, small errors of noise that
the first steps predict add up to noise in the image.

Source: Salimans and Ho 2022, Algorithm 2 (the output with which a DDIM step lands on a point; there by halving, on
noised data); Meng et al. 2023 (guidance in the student); Ross et al. 2011 (teaching where the student's steps lead).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from sfumato.errors import JobError
from sfumato.zoo.classes import (
    FEW,
    NAMES,
    ClassModel,
    Kind,
    load_class_model,
    save_class_model,
    student_kind,
    weights_path,
)

from .classes import Labelled
from .loop import channels_last, run

__all__ = ["Grid", "Runs", "grid_of", "kind_of", "main", "recorded", "record_runs", "train_student"]

#: Runs of the teacher, steps of each, and steps of the student.
RUNS, FINE, STEPS = 3_000, 50, 10
#: Runs that the student goes through at the same time, for each image of a batch.
_AHEAD = 10
_TOGETHER, _BATCH, _PEAK = 200, 32, 1e-3


@dataclass(frozen=True, slots=True)
class Grid:
    """The student's DDIM steps: ``times`` (N,), cumulative alphas ``before`` and ``after`` each (N,), whether outputs
    are v instead of noise, and whether images that they predict are clipped, as the teacher's are."""

    times: Tensor
    before: Tensor
    after: Tensor
    velocity: bool
    clipped: bool

    def step(self, k: Tensor, sample: Tensor, output: Tensor) -> Tensor:
        """Samples (B, C, H, W) after the steps ``k`` (B,)."""
        now, then = _wide(self.before[k]), _wide(self.after[k])
        if self.velocity:
            image = now.sqrt() * sample - (1 - now).sqrt() * output
            noise = now.sqrt() * output + (1 - now).sqrt() * sample
        else:
            image, noise = (sample - (1 - now).sqrt() * output) / now.sqrt(), output
        return then.sqrt() * (image.clamp(-1, 1) if self.clipped else image) + (1 - then).sqrt() * noise


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def kind_of(kind: Kind, steps: int, fine: int) -> Kind:
    """The kind of a student whose steps are those of ``fine`` DDIM steps, each as long as several: of 10 for 50 at 981,
    881, ..., 81.

    Raises:
        JobError: ``fine`` is not a multiple of ``steps``.
    """
    if fine % steps:
        raise JobError(f"--fine must be a multiple of --steps, and {fine} is none of {steps}")
    training = kind.scheduler["num_train_timesteps"]
    return student_kind(kind, kind.scheduler["steps_offset"] + training // steps - training // fine)


def grid_of(kind: Kind, steps: int) -> Grid:
    """The DDIM steps of a student's kind."""
    scheduler = DDIMScheduler(**kind.scheduler)
    scheduler.set_timesteps(steps)
    alphas, times = scheduler.alphas_cumprod, scheduler.timesteps
    after = torch.cat([alphas[times[1:]], scheduler.final_alpha_cumprod[None]])
    velocity = kind.scheduler.get("prediction_type") == "v_prediction"
    return Grid(times, alphas[times], after, velocity, kind.scheduler["clip_sample"])


@dataclass(frozen=True, slots=True)
class Runs:
    """``points`` (runs, N + 1, C, H, W) of runs of ``fine`` steps, from noise to image, and ``labels`` (runs,), indices
    of classes."""

    points: Tensor
    labels: Tensor
    fine: int


@torch.no_grad()
def record_runs(model: ClassModel, runs: int, steps: int, fine: int, guidance: float | None) -> Runs:
    """Every (fine / steps)-th point of so many guided runs of ``fine`` DDIM steps, a multiple of ``steps``."""
    scheduler = DDIMScheduler(**model.kind.scheduler)
    scheduler.set_timesteps(fine)
    network = channels_last(model.network)
    labels = torch.arange(runs) % len(model.embeddings)
    points = torch.empty(runs, steps + 1, *model.kind.shape)
    for start in range(0, runs, _TOGETHER):
        own = slice(start, min(start + _TOGETHER, runs))
        text = model.embeddings[labels[own]]
        sample = points[own, 0] = torch.randn(len(text), *model.kind.shape)
        for k, time in enumerate(scheduler.timesteps):
            sample = sample.contiguous(memory_format=torch.channels_last)
            output = network(sample, time, text)
            if guidance is not None:
                without = network(sample, time, model.null.expand_as(text))
                output = without + guidance * (output - without)
            sample = scheduler.step(output, time, sample).prev_sample
            if (k + 1) % (fine // steps) == 0:
                points[own, (k + 1) * steps // fine] = sample
        print(f"recorded {own.stop} of {runs} runs", flush=True)
    return Runs(points, labels, fine)


class _Course:
    """Endless batches of runs, each at a step of its own, which the student goes through by its own steps or not."""

    def __init__(self, runs: Runs, grid: Grid, batch: int, own: float, seed: int) -> None:
        self.runs, self.grid, self.batch, self.own = runs, grid, batch, own
        self.generator = torch.Generator().manual_seed(seed)
        count, steps = len(runs.labels), len(grid.times)
        self.at = torch.randint(0, count, (_AHEAD * batch,), generator=self.generator)
        self.k = torch.randint(0, steps, (_AHEAD * batch,), generator=self.generator)
        self.sample = runs.points[self.at, self.k]

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(which of them, step of each, sample, where it is to land, class)."""
        chosen = torch.randperm(len(self.at), generator=self.generator)[: self.batch]
        at, k = self.at[chosen], self.k[chosen]
        return chosen, k, self.sample[chosen], self.runs.points[at, k + 1], self.runs.labels[at]

    def go_on(self, chosen: Tensor, landed: Tensor) -> None:
        """The next step of these, from where the student landed or the teacher's point; after the last, new runs."""
        k, at = self.k[chosen] + 1, self.at[chosen]
        over = k == len(self.grid.times)
        fresh = torch.randint(0, len(self.runs.labels), at.shape, generator=self.generator)
        at, k = torch.where(over, fresh, at), torch.where(over, 0, k)
        kept = (torch.rand(at.shape, generator=self.generator) < self.own) & ~over
        self.sample[chosen] = torch.where(_wide(kept), landed, self.runs.points[at, k])
        self.at[chosen], self.k[chosen] = at, k


def train_student(
    model: ClassModel, runs: Runs, out: Path, minutes: float, peak: float = _PEAK, own: float = 0.5
) -> ClassModel:
    """A copy of the network and its classes, trained for ``minutes`` to make the steps of ``runs``: averaged weights.

    Goes on from a checkpoint in ``out``. ``own``: chance that a run goes on from where the student's step landed,
    instead of from the teacher's point.
    """
    steps = runs.points.shape[1] - 1
    kind = kind_of(model.kind, steps, runs.fine)
    grid, student = grid_of(kind, steps), channels_last(Labelled(kind).copying(model))
    for part in student.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the teacher's answer is one, not a distribution
    course = _Course(runs, grid, min(_BATCH, len(runs.labels)), own, seed=7)

    def step(_: int) -> Tensor:
        chosen, k, sample, landing, labels = course()
        given = sample.contiguous(memory_format=torch.channels_last)
        output = student(given, grid.times[k], labels, torch.ones(len(k)))
        landed = grid.step(k, sample, output)
        course.go_on(chosen, landed.detach())
        # In the sample, not in the output: an error of the first output is 130 times as large in the image.
        return (landed - landing).square().mean()

    average = run("few", student, step, out / f"{model.name}-{FEW}-{steps}.ckpt", minutes, peak, decay=0.995)
    student.load_state_dict(average.state)
    return replace(
        model, kind=kind, network=student.network.eval(), variant=FEW, steps=steps,
        embeddings=student.table.weight[:, None].detach(),
    )  # fmt: skip


def recorded(model: ClassModel, out: Path, runs: int, steps: int, fine: int, guidance: float | None) -> Runs:
    """The runs of an earlier command with these numbers, or new ones."""
    scale = "none" if guidance is None else f"{guidance:g}"
    cache = out / f"{model.name}-runs-{runs}-{steps}-{fine}-{scale}.pt"
    if not cache.is_file():
        torch.manual_seed(2)
        made = record_runs(model, runs, steps, fine, guidance)
        partial = cache.with_suffix(".part")
        torch.save({"points": made.points, "labels": made.labels, "fine": fine}, partial)
        os.replace(partial, cache)
    return Runs(**torch.load(cache, weights_only=True))


def main(argv: list[str] | None = None) -> int:
    """Teach a model that draws by class to do it in a few steps, one call each; what is already there is kept."""
    parser = argparse.ArgumentParser(prog="python -m sfumato.zoo.train.few", description=main.__doc__)
    parser.add_argument("--model", choices=NAMES, required=True, help=f"the teacher: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, checkpoints and weights")
    parser.add_argument("--weights", type=Path, help="folder of weights that do not come with sfumato")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the student (default {STEPS})")
    parser.add_argument("--fine", type=int, default=FINE, help=f"steps of the teacher (default {FINE})")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of the teacher (default {RUNS})")
    parser.add_argument("--guidance", type=float, help="the teacher's (default: the model's own)")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time in all (default 30)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args = parser.parse_args(argv)
    if min(args.minutes, args.runs, args.steps, args.fine) <= 0:
        parser.error("--minutes, --runs, --steps and --fine must be positive")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    own = args.weights is not None and weights_path(args.model, args.weights).is_file()
    try:
        model = load_class_model(args.model, args.weights if own else None)
        kind_of(model.kind, args.steps, args.fine)  # says what does not fit before the runs
        scale = model.kind.guidance if args.guidance is None else args.guidance
        runs = recorded(model, args.out, args.runs, args.steps, args.fine, scale)
        student = train_student(model, runs, args.out, args.minutes)
    except (JobError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"saved {save_class_model(student, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
