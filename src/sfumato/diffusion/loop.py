"""The denoising loop on handles: shares stay with the parties from the first latents to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato.diffusion.request import Generators
from sfumato.diffusion.schedule import Schedule
from sfumato.graph.plan import Plan, client_side
from sfumato.runtime.backend import Backend, Term

__all__ = ["Denoising", "call_kwargs", "guided_terms"]

#: ``observe(step, latents)``: ``latents()`` opens them to the client; a tensor in return replaces them.
Observe = Callable[[int, Callable[[], Tensor]], Tensor | None]


def call_kwargs(timestep: Tensor, embeds: Tensor, condition: Tensor | None) -> dict[str, Any]:
    """Keyword arguments of the captured denoiser beside the sample."""
    given = {"timestep": timestep.to(torch.float32), "encoder_hidden_states": embeds}
    return given if condition is None else {**given, "timestep_cond": condition}


def guided_terms(handle: str, coefficient: float, batch: int, guidance: float | None) -> list[Term]:
    """coefficient * (u + g (c - u)) of an output that holds u, then c; the output itself without guidance."""
    if guidance is None:
        return [Term(handle, coefficient)]
    return [
        Term(handle, coefficient * (1.0 - guidance), 0, batch),
        Term(handle, coefficient * guidance, batch, 2 * batch),
    ]


@dataclass(slots=True)
class Denoising:
    """One run of a schedule in one session of the parties.

    ``guidance``: None where the plan's batch is that of the latents. ``embeds``: the text's embeddings, or the
    handle under which the parties hold them. Values of the client (text keys and values) are shared when they
    change, so once.
    """

    backend: Backend
    plan: Plan
    schedule: Schedule
    embeds: Tensor | str
    condition: Tensor | None
    guidance: float | None
    generator: Generators = None
    seconds: list[float] = field(default_factory=list)
    _put: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    _count: int = 0

    def run(
        self, latents: Tensor, observe: Observe | None = None, stop: Callable[[], bool] | None = None
    ) -> Tensor:
        """The last latents, in float64, at the client alone. ``latents`` include the first sigma.

        ``stop()`` is asked after each step and ends the run early.
        """
        return self._open(*self._steps(latents, observe, stop))

    def run_held(
        self, latents: Tensor, observe: Observe | None = None, stop: Callable[[], bool] | None = None
    ) -> str:
        """The same, with the last latents left at the parties: their handle."""
        handle, k = self._steps(latents, observe, stop)
        if self._scale(k) == 1.0:
            return handle
        self.backend.affine("latents", [Term(handle, 1.0 / self._scale(k))], "latents")
        return "latents"

    def _steps(
        self, latents: Tensor, observe: Observe | None, stop: Callable[[], bool] | None
    ) -> tuple[str, int]:
        """Handle of the last latents, in the scale that a model would see, and how many steps were done."""
        schedule = self.schedule.in_input_scale()
        shape, batch = tuple(latents.shape), latents.shape[0]
        samples = {0: self._share("sample0", latents.to(torch.float64) * self._scale(0))}
        outputs: dict[int, str] = {}
        for k, step in enumerate(schedule.steps):
            started = time.monotonic()
            inputs, publics = self._arguments(schedule.timesteps[k], samples[k], shape)
            outputs[k] = f"output{k}"
            self.backend.call("unet", f"step{k}", inputs, publics, [outputs[k]])
            terms = [Term(samples[k - age], c) for age, c in step.samples.items()]
            for age, c in step.outputs.items():
                terms += guided_terms(outputs[k - age], c, batch, self.guidance)
            if step.draws:
                noise = randn_tensor(shape, generator=self.generator, dtype=torch.float32).to(torch.float64)
                if step.noise:
                    terms.append(Term(self._share(f"noise{k}", noise * step.noise), 1.0))
            samples[k + 1] = f"sample{k + 1}"
            self.backend.affine(samples[k + 1], terms, f"sampler{k}")
            self._forget(schedule, k, samples, outputs, terms)
            self.seconds.append(time.monotonic() - started)
            if observe is not None:
                self._observed(observe, k, samples)
            if stop is not None and stop():
                return samples[k + 1], k + 1
        return samples[len(schedule.steps)], len(schedule.steps)

    def _scale(self, k: int) -> float:
        steps = self.schedule.steps
        return steps[k].input_scale if k < len(steps) else 1.0

    def _share(self, handle: str, values: Tensor) -> str:
        self.backend.put(handle, values)
        return handle

    def _open(self, handle: str, k: int) -> Tensor:
        return self.backend.reveal(handle) / self._scale(k)

    def _arguments(
        self, timestep: Tensor, sample: str, shape: tuple[int, ...]
    ) -> tuple[dict[str, str], Mapping[str, Tensor]]:
        """Handles by input name, and the public values of this step."""
        inputs, embeds = {"sample": sample}, self.embeds
        if isinstance(embeds, str):
            inputs["encoder_hidden_states"] = embeds
            embeds = torch.zeros(self.plan.program.types["encoder_hidden_states"][0])
        kwargs = call_kwargs(timestep, embeds, self.condition)
        values = client_side(self.plan, (torch.zeros(shape),), kwargs, held=tuple(inputs))
        for name, tensor in values.secrets.items():
            known = self._put.get(name)
            if known is None or not torch.equal(known[1], tensor):
                if known is not None:
                    self.backend.drop(known[0])
                self._count += 1
                handle = f"client{self._count}"
                self.backend.put(handle, tensor, self.plan.secret_type(name).frac)
                known = self._put[name] = (handle, tensor)
            inputs[name] = known[0]
        return inputs, values.publics

    def _observed(self, observe: Observe, k: int, samples: dict[int, str]) -> None:
        handle, opened = samples[k + 1], [0]

        def latents() -> Tensor:
            # A value is opened under a name of its own: each opening has its own masks.
            opened[0] += 1
            name = f"{handle}.seen{opened[0]}"
            self.backend.affine(name, [Term(handle, 1.0)], name)
            found = self._open(name, k + 1)
            self.backend.drop(name)
            return found

        changed = observe(k, latents)
        if changed is not None:
            self.backend.drop(handle)
            samples[k + 1] = self._share(f"{handle}.changed", changed.to(torch.float64) * self._scale(k + 1))

    def _forget(
        self, schedule: Schedule, k: int, samples: dict[int, str], outputs: dict[int, str], terms: list[Term]
    ) -> None:
        """Drop what no later step uses."""
        oldest_sample, oldest_output = schedule.keeps(k)
        gone = [samples.pop(i) for i in list(samples) if i < min(oldest_sample, k + 1)]
        gone += [outputs.pop(i) for i in list(outputs) if i < oldest_output]
        gone += [t.handle for t in terms if t.handle.startswith("noise")]
        self.backend.drop(*gone)
