"""Any affine diffusers scheduler as public coefficients, found by running the scheduler itself.

The real scheduler (a copy) runs in float64 on a probe whose elements are basis vectors: one for each sample it is
given, one for each model output, one for each noise, and one for each result of a clamp. What comes back are the
coefficients of the step; a second run on random values shows whether they are the scheduler at all. Nothing here
knows how any scheduler works.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sfumato.diffusion.schedule import Clip, Schedule, Step, Sum
from sfumato.errors import JobError

__all__ = ["probe_schedule"]

#: Relative size below which a coefficient is the rounding of a zero.
_EXACT = 1e-11
#: How far the random run may lie from the coefficients' prediction, relative to its largest value.
_AFFINE = 1e-8
_MAX_RETURNED, _MAX_HISTORY = 3, 6
_patching = threading.Lock()


def probe_schedule(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float = 0.0,
    strength: float | None = None,
) -> Schedule:
    """The coefficients of ``scheduler`` for a run of so many steps.

    ``strength``: of a run that starts at a picture, which skips the first 1 - strength of the steps.

    Raises:
        JobError: one sentence: the scheduler refuses these settings, or its step is no such sum (what to change).
    """
    runner = _Runner(scheduler, num_inference_steps, timesteps, sigmas, eta, strength)
    try:
        basis = runner.basis_run()
        schedule = Schedule(
            tuple(_solve(basis, k, scheduler) for k in range(len(basis.timesteps))),
            runner.init_sigma,
            tuple(basis.timesteps),
            tuple(basis.noised),
        )
        deviation = runner.deviation(schedule)
    except JobError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"{runner.title} cannot run these steps: {line[:200]}") from error
    if not deviation < _AFFINE:
        raise JobError(_not_affine(scheduler))
    if len({(s.clip.low, s.clip.high) for s in schedule.steps if s.clip}) > 1:
        raise JobError(f"{runner.title} clips at limits that change from step to step, which is not served")
    return schedule


# ---- running the real scheduler ----------------------------------------------------------------------------


#: What a clamp of a probe is told to: it takes the value and the limits, and gives what the clamp returns.
_clamping: ContextVar[Callable[[Tensor, Any, Any], Tensor] | None] = ContextVar("clamping", default=None)
_CLAMPS = (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip)


class _Exact(Tensor):
    """float64 that stays float64 where a scheduler asks for float32 in passing, and whose clamps are noticed."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.to, Tensor.type, Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0]
        clamping = _clamping.get()
        if func in _CLAMPS and clamping is not None:
            given = dict(zip(("input", "min", "max"), args, strict=False)) | (kwargs or {})
            return clamping(given["input"], given.get("min"), given.get("max"))
        return super().__torch_function__(func, types, args, kwargs or {})


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.float64).as_subclass(_Exact)


def _plain(values: Tensor) -> Tensor:
    return values.as_subclass(Tensor)


@dataclass(slots=True)
class _Run:
    """Samples given to each step, and what came of them; ``returned[k]`` is what step k - 1 returned."""

    timesteps: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    returned: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)
    clips: list[tuple[Tensor, float, float] | None] = field(default_factory=list)
    noised: list[tuple[float, float]] = field(default_factory=list)


class _Runner:
    def __init__(
        self,
        scheduler: Any,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        sigmas: Sequence[float] | None,
        eta: float,
        strength: float | None,
    ) -> None:
        self.scheduler, self.title, self.eta = scheduler, type(scheduler).__name__, eta
        self.strength = strength
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
        return float(getattr(self._ready()[0], "init_noise_sigma", 1.0))

    def _ready(self) -> tuple[Any, Tensor]:
        """A copy of the scheduler, set, and its timesteps; of a picture's run as diffusers' ``get_timesteps`` has
        them."""
        scheduler = copy.deepcopy(self.scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about diffusers' own conversions
            scheduler.set_timesteps(**self.settings)
        timesteps: Tensor = scheduler.timesteps
        if self.strength is not None:
            count = self.settings.get("num_inference_steps") or len(timesteps)
            skipped = max(count - min(int(count * self.strength), count), 0) * getattr(scheduler, "order", 1)
            timesteps = timesteps[skipped:]
            if len(timesteps) == 0:
                raise JobError(
                    f"strength={self.strength} of {count} steps leaves none to run; raise strength or "
                    "num_inference_steps"
                )
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(skipped)
        return scheduler, timesteps

    def basis_run(self) -> _Run:
        """The trajectory in the basis: samples, outputs, noises and results of clamps, K of each."""
        steps = len(self._ready()[1])
        unit = torch.eye(4 * steps, dtype=torch.float64)

        def element(kind: int, k: int) -> Tensor:
            return _exact(unit[kind * steps + k].reshape(1, -1, 1, 1))

        def clip(k: int, value: Tensor) -> Tensor:
            if value.shape != element(3, k).shape:
                raise JobError(_not_affine(self.scheduler))
            return element(3, k)

        sample, output, noise = (partial(element, kind) for kind in range(3))
        return self.run(sample, output, noise, clip)

    def run(
        self,
        sample: Callable[[int], Tensor],
        output: Callable[[int], Tensor],
        noise: Callable[[int], Tensor],
        clip: Callable[[int, Tensor], Tensor] | None = None,
    ) -> _Run:
        """The scheduler's steps with the k-th sample, output and noise given, and what it is told a clamp returns."""
        (scheduler, timesteps), run = self._ready(), _Run()
        extra = {"eta": self.eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
        if self.strength is not None:
            run.noised.append(_noised(scheduler, timesteps[0]))
        for k, t in enumerate(timesteps):
            run.clips.append(None)

            def draw(*_: Any, k: int = k, **__: Any) -> Tensor:
                if run.draws[k]:
                    raise JobError(
                        f"{self.title} draws noise twice in a step; use DDPM, DDIM with eta or Euler"
                    )
                run.draws[k] = True
                return noise(k)

            def clamp(value: Tensor, low: Any, high: Any, k: int = k) -> Tensor:
                if run.clips[k] is not None or any(isinstance(limit, Tensor) for limit in (low, high)):
                    raise JobError(_not_affine(self.scheduler))
                run.clips[k] = _plain(value), float(low), float(high)
                return _exact(_plain(value).clamp(low, high)) if clip is None else clip(k, value)

            given = sample(k)
            scaled = (
                scheduler.scale_model_input(given, t) if hasattr(scheduler, "scale_model_input") else given
            )
            run.timesteps.append(t)
            run.draws.append(False)
            with _noise_from(scheduler, draw), _clamps_by(clamp):
                returned = scheduler.step(output(k), t, given, return_dict=False, **extra)[0]
            run.samples.append(_plain(given))
            run.inputs.append(_plain(scaled))
            run.returned.append(_plain(returned))
            if self.strength is not None:
                last = k + 1 == len(timesteps)
                run.noised.append((1.0, 0.0) if last else _noised(scheduler, timesteps[k + 1]))
        run.returned.insert(0, run.samples[0])
        return run

    def deviation(self, schedule: Schedule) -> float:
        """Largest relative difference between the real scheduler and the coefficients on random values.

        Infinite where no value was clamped at one of the limits, or none was left alone.
        """
        source = torch.Generator().manual_seed(0)
        count, sizes = len(schedule.steps), torch.tensor([4.0, 0.02], dtype=torch.float64).reshape(2, 1, 1, 1)

        def values(scale: Tensor | float = 1.0) -> list[Tensor]:
            shape = (2, 3, 4, 4)
            return [
                _exact(scale * torch.randn(shape, generator=source, dtype=torch.float64))
                for _ in range(count)
            ]

        samples, outputs, noises = values(sizes), values(sizes), values()
        real = self.run(samples.__getitem__, outputs.__getitem__, noises.__getitem__)
        held: dict[str, dict[int, Tensor]] = {
            "samples": dict(enumerate(real.samples)), "returned": dict(enumerate(real.returned)),
            "outputs": {k: _plain(x) for k, x in enumerate(outputs)}, "clipped": {},
        }  # fmt: skip
        worst, below, inside, above = 0.0, False, False, False
        for k, step in enumerate(schedule.steps):
            if step.clip is not None:
                value, (low, high) = step.clip.value.of(held, k), (step.clip.low, step.clip.high)
                held["clipped"][k] = value.clamp(low, high)
                below, above = below or bool((value < low).any()), above or bool((value > high).any())
                inside = inside or bool(((value > low) & (value < high)).any())
            result = step.result.of(held, k) + step.result.noise * _plain(noises[k])
            worst = max(worst, _distance(result, real.returned[k + 1]))
            worst = max(worst, _distance(step.input_scale * real.samples[k], real.inputs[k]))
        if schedule.clip is not None and not (below and inside and above):
            return float("inf")
        return worst


def _noised(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """Coefficients of picture and noise in what the scheduler makes of them at its present step."""
    unit = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2, 1, 1)
    made = scheduler.add_noise(_exact(unit[0]), _exact(unit[1]), timestep.reshape(1))
    picture, noise = _plain(made).flatten().tolist()
    return picture, noise


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Of the two rows of the random run, each relative to its own size."""
    size = theirs.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    return float(((ours - theirs) / size).abs().max().nan_to_num(nan=float("inf")))


@contextlib.contextmanager
def _clamps_by(clamp: Callable[[Tensor, Any, Any], Tensor]) -> Iterator[None]:
    token = _clamping.set(clamp)
    try:
        yield
    finally:
        _clamping.reset(token)


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
    """Step ``k`` in coefficients."""
    clip = run.clips[k]
    return Step(
        timestep=float(run.timesteps[k]),
        input_scale=_scale(run.inputs[k].flatten(), k),
        result=_sum(run, k, run.returned[k + 1], scheduler),
        draws=run.draws[k],
        clip=None if clip is None else Clip(_sum(run, k, clip[0], scheduler), clip[1], clip[2]),
    )


def _sum(run: _Run, k: int, value: Tensor, scheduler: Any) -> Sum:
    """A value of step ``k`` as the shortest exact sum: of recent values, and of earlier results where a scheduler
    remembers its own."""
    count, value = len(run.timesteps), value.flatten()
    if not bool(value.isfinite().all()):
        raise JobError(f"{type(scheduler).__name__} gives values that are not finite at step {k}")
    size = max(float(value.abs().max()), 1e-30)
    for used, old in _supports(k):
        rest = torch.ones(4, count, dtype=torch.bool)
        rest[[0, 1, 3], k + 1 - old : k + 1] = False
        rest[2, k] = False
        rest, weights = rest.flatten(), value.new_zeros(0)
        explained = torch.zeros_like(value)
        if used:
            recent = torch.stack([run.returned[k - age].flatten() for age in range(used)], 1)
            weights = torch.linalg.lstsq(recent[rest], value[rest, None], driver="gelsd").solution[:, 0]
            explained = recent @ weights
        own = value - explained
        left = float(own[rest].abs().max()) if bool(rest.any()) else 0.0
        if left > _EXACT * size or bool((weights.abs() > 1e4).any()):
            continue

        def recent_of(kind: int, own: Tensor = own, old: int = old) -> dict[int, float]:
            found = {age: float(own[kind * count + k - age]) for age in range(old)}
            return {age: c for age, c in found.items() if abs(c) > _EXACT * size}

        returned = {age: float(w) for age, w in enumerate(weights) if abs(float(w)) > _EXACT * size}
        return Sum(recent_of(0), returned, recent_of(1), recent_of(3), float(own[2 * count + k]))
    raise JobError(_not_affine(scheduler))


def _supports(k: int) -> list[tuple[int, int]]:
    """(results, history) to try, fewest first; everything at last."""
    short = [
        (used, old)
        for used in range(min(k, _MAX_RETURNED) + 1)
        for old in range(min(k + 1, _MAX_HISTORY) + 1)
    ]
    return [*sorted(short, key=lambda pair: (sum(pair), pair[0])), (0, k + 1)]


def _scale(scaled: Tensor, k: int) -> float:
    scale = float(scaled[k])
    return 1.0 if abs(scale - 1.0) < 1e-12 else scale


def _not_affine(scheduler: Any) -> str:
    title = type(scheduler).__name__
    if scheduler.config.get("thresholding"):
        return (
            f"{title} with thresholding=True clips at a quantile of secret latents, which is not served; use "
            f"pipe.scheduler = {title}.from_config(pipe.scheduler.config, thresholding=False)"
        )
    return (
        f"the step of {title} is not affine in sample, output and noise; use DDIM, Euler, DPM++ 2M or UniPC"
    )
