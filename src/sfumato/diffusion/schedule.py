"""Any affine diffusers scheduler as public coefficients, found by running the scheduler itself.

The real scheduler (a copy) runs in float64 on a probe whose elements are basis vectors: one for the first
sample, one
for each model output, one for each noise. What comes back are the coefficients of the step; a second run on
random
values shows whether the scheduler is affine at all. Nothing here knows how any scheduler works.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import JobError

__all__ = ["Schedule", "Step", "probe_schedule"]

#: Relative size below which a coefficient is the rounding of a zero.
_EXACT = 1e-11
#: How far the random run may lie from the coefficients' prediction, relative to its largest value.
_AFFINE = 1e-8
_MAX_SAMPLES = 4
_patching = threading.Lock()


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the next sample is a sum of recent samples, recent model outputs and the step's own noise.

    ``samples`` and ``outputs`` map age (0: this step's) to coefficient. The model sees ``input_scale`` times
    the
    sample. ``draws``: whether the scheduler draws noise here, even if ``noise`` (its coefficient) is zero.
    """

    timestep: float
    input_scale: float
    samples: Mapping[int, float]
    outputs: Mapping[int, float]
    noise: float
    draws: bool

    @property
    def alpha(self) -> float:
        """Coefficient of this step's own sample."""
        return self.samples.get(0, 0.0)

    @property
    def beta(self) -> float:
        """Coefficient of this step's own model output."""
        return self.outputs.get(0, 0.0)


@dataclass(frozen=True, slots=True)
class Schedule:
    """All steps; the first sample is ``init_sigma`` times unit noise."""

    steps: tuple[Step, ...]
    init_sigma: float
    timesteps: tuple[Tensor, ...] = field(compare=False, repr=False)

    def in_input_scale(self) -> Schedule:
        """The same trajectory kept as what the model sees (c_k x_k), so that scaling the input costs nothing.

        Only the last sample is in the scheduler's own scale.
        """
        scales = [step.input_scale for step in self.steps] + [1.0]
        folded = []
        for k, step in enumerate(self.steps):
            after = scales[k + 1]
            folded.append(
                replace(
                    step,
                    input_scale=1.0,
                    samples={age: c * after / scales[k - age] for age, c in step.samples.items()},
                    outputs={age: c * after for age, c in step.outputs.items()},
                    noise=step.noise * after,
                )
            )
        return replace(self, steps=tuple(folded), init_sigma=self.init_sigma * scales[0])

    def keeps(self, k: int) -> tuple[int, int]:
        """Index of the oldest sample and of the oldest output that steps after ``k`` still use."""
        later = list(enumerate(self.steps))[k + 1 :]
        oldest_sample = min((i - age for i, s in later for age in s.samples), default=k + 1)
        oldest_output = min((i - age for i, s in later for age in s.outputs), default=k + 1)
        return oldest_sample, oldest_output


def probe_schedule(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
) -> Schedule:
    """The coefficients of ``scheduler`` for a run of so many steps.

    Raises:
        JobError: one sentence: the scheduler refuses these settings, or its step is not affine (what to
        change).
    """
    runner = _Runner(scheduler, num_inference_steps, timesteps, sigmas, eta)
    try:
        basis = runner.basis_run()
        steps = tuple(_solve(basis, k, scheduler) for k in range(len(basis.timesteps)))
        schedule = Schedule(steps, runner.init_sigma, tuple(basis.timesteps))
        deviation = runner.deviation(schedule)
    except JobError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"{runner.title} cannot run these steps: {line[:200]}") from error
    if not deviation < _AFFINE:
        raise JobError(_not_affine(scheduler))
    return schedule


# ---- running the real scheduler ----------------------------------------------------------------------------


class _Exact(Tensor):
    """float64 that stays float64 where a scheduler asks for float32 in passing."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.float64).as_subclass(_Exact)


@dataclass(slots=True)
class _Run:
    """Samples before each step and after the last, model inputs, and which steps drew noise."""

    timesteps: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)


class _Runner:
    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        eta: float,
    ) -> None:
        self.scheduler, self.title, self.eta = scheduler, type(scheduler).__name__, eta
        self.settings: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        accepted = inspect.signature(scheduler.set_timesteps).parameters
        for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None:
                if name not in accepted:
                    raise JobError(f"{self.title} takes no list of {name}; give num_inference_steps instead")
                self.settings = {name: list(values)}
        if timesteps is not None and sigmas is not None:
            raise JobError("give timesteps or sigmas, not both")
        if timesteps is None and sigmas is None and (num_inference_steps is None or num_inference_steps < 1):
            raise JobError(f"num_inference_steps must be at least 1, not {num_inference_steps}")

    @property
    def init_sigma(self) -> float:
        return float(getattr(self._ready(), "init_noise_sigma", 1.0))

    def _ready(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about diffusers' own conversions
            scheduler.set_timesteps(**self.settings)
        return scheduler

    def basis_run(self) -> _Run:
        """The trajectory in the basis: row 0 the first sample, then K outputs, then K noises."""
        steps = len(self._ready().timesteps)
        unit = torch.eye(1 + 2 * steps, dtype=torch.float64)

        def element(index: int) -> Tensor:
            return unit[index].reshape(1, -1, 1, 1)

        return self.run(element(0), lambda k: element(1 + k), lambda k: element(1 + steps + k))

    def run(self, first: Tensor, output: Callable[[int], Tensor], noise: Callable[[int], Tensor]) -> _Run:
        """The scheduler's trajectory from ``first`` with the k-th output and noise given."""
        scheduler, run = self._ready(), _Run()
        parameters = inspect.signature(scheduler.step).parameters
        extra = {"eta": self.eta} if "eta" in parameters else {}
        sample = _exact(first)
        for k, t in enumerate(scheduler.timesteps):
            drawn: list[int] = []

            def draw(*_: Any, k: int = k, drawn: list[int] = drawn, **__: Any) -> Tensor:
                drawn.append(k)
                if len(drawn) > 1:
                    raise JobError(
                        f"{self.title} draws noise twice in a step; use DDPM, DDIM with eta or Euler"
                    )
                return _exact(noise(k))

            run.timesteps.append(t)
            run.samples.append(sample)
            scaled = (
                scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            )
            run.inputs.append(scaled)
            with _noise_from(scheduler, draw):
                sample = scheduler.step(_exact(output(k)), t, sample, return_dict=False, **extra)[0]
            run.draws.append(bool(drawn))
        run.samples.append(sample)
        run.samples = [s.as_subclass(Tensor) for s in run.samples]
        run.inputs = [s.as_subclass(Tensor) for s in run.inputs]
        return run

    def deviation(self, schedule: Schedule) -> float:
        """Largest relative difference between the real scheduler and the coefficients on random values."""
        source = torch.Generator().manual_seed(0)
        count, shape = len(schedule.steps), (2, 3, 4, 4)

        def values(scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=source, dtype=torch.float64)

        outputs, noises = [values(4.0) for _ in range(count)], [values(1.0) for _ in range(count)]
        first = values(4.0) * schedule.init_sigma
        real = self.run(first, outputs.__getitem__, noises.__getitem__)
        samples, worst = [first], 0.0
        for k, step in enumerate(schedule.steps):
            following = sum(
                (c * real.samples[k - age] for age, c in step.samples.items()), torch.zeros(shape)
            )
            following = following + sum(
                (c * outputs[k - age] for age, c in step.outputs.items()), torch.zeros(shape)
            )
            samples.append(following + step.noise * noises[k])
            worst = max(worst, _distance(samples[-1], real.samples[k + 1]))
            worst = max(worst, _distance(step.input_scale * real.samples[k], real.inputs[k]))
        return worst


def _distance(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


@contextlib.contextmanager
def _noise_from(scheduler: Any, draw: Callable[..., Tensor]) -> Iterator[None]:
    """Let the scheduler's modules draw their noise from ``draw``."""
    modules = {
        sys.modules[c.__module__]
        for c in type(scheduler).__mro__
        if hasattr(sys.modules[c.__module__], "randn_tensor")
    }
    with _patching:
        kept = {module: vars(module)["randn_tensor"] for module in modules}
        try:
            for module in modules:
                vars(module)["randn_tensor"] = draw
            yield
        finally:
            for module, original in kept.items():
                vars(module)["randn_tensor"] = original


# ---- coefficients ------------------------------------------------------------------------------------------


def _solve(run: _Run, k: int, scheduler: Any) -> Step:
    """Step ``k`` as the shortest exact sum of recent samples, recent outputs and its noise."""
    count = len(run.timesteps)
    samples = [s.flatten() for s in run.samples]
    following = samples[k + 1]
    if not bool(following.isfinite().all()):
        raise JobError(f"{type(scheduler).__name__} gives values that are not finite at step {k}")
    size = max(float(following.abs().max()), 1e-30)
    outputs, noise = following[1 : 1 + count], following[1 + count + k]
    for used, old in _supports(k):
        rest = torch.ones_like(following, dtype=torch.bool)
        rest[1 + k + 1 - old : 1 + k + 1] = False
        rest[1 + count + k] = False
        recent = (
            torch.stack([samples[k - age] for age in range(used)], 1)
            if used
            else following.new_zeros(len(following), 0)
        )
        target = following[rest]
        weights = (
            torch.linalg.lstsq(recent[rest], target[:, None], driver="gelsd").solution[:, 0]
            if used
            else target[:0]
        )
        if float((recent[rest] @ weights - target).abs().max()) > _EXACT * size or bool(
            (weights.abs() > 1e4).any()
        ):
            continue
        own = outputs - (recent @ weights)[1 : 1 + count]
        return Step(
            timestep=float(run.timesteps[k]),
            input_scale=_scale(run.inputs[k].flatten(), samples[k]),
            samples={age: float(w) for age, w in enumerate(weights) if abs(float(w)) > _EXACT * size},
            outputs={
                age: float(own[k - age]) for age in range(old) if abs(float(own[k - age])) > _EXACT * size
            },
            noise=float(noise),
            draws=run.draws[k],
        )
    raise JobError(_not_affine(scheduler))


def _supports(k: int) -> list[tuple[int, int]]:
    """(samples, outputs) to try, fewest values first."""
    short = [(s, o) for s in range(min(k + 1, _MAX_SAMPLES) + 1) for o in range(min(k + 1, 6) + 1)]
    return [*sorted(short, key=lambda pair: (sum(pair), pair[0])), (1, k + 1)]


def _scale(scaled: Tensor, sample: Tensor) -> float:
    scale = float((scaled @ sample) / (sample @ sample))
    return 1.0 if abs(scale - 1.0) < 1e-12 else scale


def _not_affine(scheduler: Any) -> str:
    title, config = type(scheduler).__name__, scheduler.config
    for option in ("thresholding", "clip_sample"):
        if config.get(option):
            return (
                f"{title} with {option}=True is not affine and would need comparisons of secret latents; use "
                f"pipe.scheduler = {title}.from_config(pipe.scheduler.config, {option}=False)"
            )
    return (
        f"the step of {title} is not affine in sample, output and noise; use DDIM, Euler, DPM++ 2M or UniPC"
    )
