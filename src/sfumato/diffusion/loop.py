"""The denoising loop on handles: shares stay with the parties from the first latents to the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato.diffusion.correction import Correction
from sfumato.diffusion.cuts import Way
from sfumato.diffusion.picture import Picture
from sfumato.diffusion.request import Generators
from sfumato.diffusion.schedule import KINDS, Schedule, Step, Sum
from sfumato.graph.plan import Plan, client_side
from sfumato.runtime.backend import Backend, Term

__all__ = ["Denoising", "call_kwargs", "guided_terms"]

#: ``observe(step, latents)``: ``latents()`` opens them to the client; a tensor in return replaces them.
Observe = Callable[[int, Callable[[], Tensor]], Tensor | None]


def call_kwargs(
    timestep: Tensor, embeds: Tensor, condition: Tensor | None, extra: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments of the captured denoiser beside the sample."""
    given = {"timestep": timestep.to(torch.float32), "encoder_hidden_states": embeds}
    given |= {} if condition is None else {"timestep_cond": condition}
    return given if extra is None else {**given, "extra": extra}


def guided_terms(
    handle: str,
    coefficient: float,
    batch: int,
    guidance: float | None,
    pull: float = 0.0,
    *,
    single: bool = False,
) -> list[Term]:
    """coefficient * (u + g (c - u) - pull c) of an output that holds u, then c; of the output c itself without
    guidance. ``single``: the output is c, and u comes from elsewhere."""
    if guidance is None or single:
        return [Term(handle, coefficient * ((1.0 if guidance is None else guidance) - pull))]
    return [
        Term(handle, coefficient * (1.0 - guidance), 0, batch),
        Term(handle, coefficient * (guidance - pull), batch, 2 * batch),
    ]


@dataclass(slots=True)
class Denoising:
    """One run of a schedule in one session of the parties.

    ``guidance``: the weight, one for all steps or one for each, None for a step that runs without the unconditional
    half; None alone where the plan's batch is that of the latents.
    ``embeds``: the text's embeddings, or the handle under which the parties hold them. Values of the client (text keys
    and values) are shared when they change, so once for each plan that needs them.

    ``correction``: public, and so known to the parties. ``ways``: how each step runs the network, by default all in
    full; ``known``: at the steps whose way says so, the unconditional output, which is public.

    The parties run ``plans`` by the ways' names (``unet`` where there is one plan), ``clip`` where the schedule clamps,
    and ``blend`` where a ``picture`` has a mask.
    """

    backend: Backend
    plans: Plan | Mapping[str, Plan]
    schedule: Schedule
    embeds: Tensor | str
    condition: Tensor | None
    guidance: float | Sequence[float | None] | None
    generator: Generators = None
    picture: Picture | None = None
    correction: Correction | None = None
    ways: Sequence[Way] = ()
    known: Mapping[int, Tensor] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    _features: tuple[str, bool] | None = None
    _single: dict[str, str] = field(default_factory=dict)
    _put: dict[tuple[str, str], tuple[str, Tensor]] = field(default_factory=dict)
    _count: int = 0
    _shape: tuple[int, ...] = ()
    _weights: dict[int, float | None] = field(default_factory=dict)
    _held: dict[str, dict[int, str]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

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
        self._shape, held = tuple(latents.shape), self._held
        first = self._share("sample0", latents.to(torch.float64) * self._scale(0))
        held["samples"][0] = held["returned"][0] = first
        self._share_picture()
        for k, step in enumerate(schedule.steps):
            started = time.monotonic()
            self._network(k, schedule.timesteps[k])
            self._sampler(k, step)
            self._blend(schedule, k)
            self._forget(schedule.keeps(k))
            self.seconds.append(time.monotonic() - started)
            if observe is not None:
                self._observed(observe, k)
            if stop is not None and stop():
                return held["samples"][k + 1], k + 1
        return held["samples"][len(schedule.steps)], len(schedule.steps)

    def _way(self, k: int) -> Way:
        if self.ways:
            return self.ways[k]
        return Way(isinstance(self.guidance, Sequence) and self.guidance[k] is None)

    def _network(self, k: int, timestep: Tensor) -> None:
        """The output of step ``k``, and the features that later steps take up."""
        way, held = self._way(k), self._held
        inputs, publics = self._arguments(way, timestep, held["samples"][k])
        held["outputs"][k], self._weights[k] = f"output{k}", self._weight(k, way)
        names = [held["outputs"][k], *([f"features{k}"] if way.keeps else [])]
        self.backend.call(way.plan, f"step{k}", inputs, publics, names)
        if way.keeps:
            if self._features is not None:
                self.backend.drop(self._features[0])
            self._features = names[1], way.single

    def _weight(self, k: int, way: Way) -> float | None:
        if way.single and not way.known:
            return None
        return self.guidance[k] if isinstance(self.guidance, Sequence) else self.guidance

    def _sampler(self, k: int, step: Step) -> None:
        """The next sample from what the parties hold, and from noise that the client draws."""
        held = self._held
        if step.clip is not None:
            value = step.clip.value
            self.backend.affine(
                f"estimate{k}", self._terms(k, value), f"estimate{k}", constant=self._added(k, value)
            )
            held["clipped"][k] = f"clipped{k}"
            self.backend.call("clip", f"clip{k}", {"value": f"estimate{k}"}, {}, [held["clipped"][k]])
            self.backend.drop(f"estimate{k}")
        terms, noised = self._terms(k, step.result), []
        if step.draws:
            noise = randn_tensor(self._shape, generator=self.generator, dtype=torch.float32).to(torch.float64)
            if step.result.noise:
                noised.append(self._share(f"noise{k}", noise * step.result.noise))
        terms += [Term(handle, 1.0) for handle in noised]
        held["samples"][k + 1] = held["returned"][k + 1] = f"sample{k + 1}"
        self.backend.affine(f"sample{k + 1}", terms, f"sampler{k}", constant=self._added(k, step.result))
        self.backend.drop(*noised)

    def _terms(self, k: int, total: Sum) -> list[Term]:
        terms: list[Term] = []
        for kind, age, c in total.terms():
            handle = self._held[kind][k - age]
            if kind == "outputs":
                pull = 0.0 if self.correction is None else self.correction.pulls[k - age]
                weight, single = self._weights[k - age], self._way(k - age).single
                terms += guided_terms(handle, c, self._shape[0], weight, pull, single=single)
            else:
                terms.append(Term(handle, c))
        return terms

    def _added(self, k: int, total: Sum) -> Tensor | None:
        """What the correction and public halves add to a sum, through each of the outputs in it."""
        parts = []
        for age, c in total.outputs.items():
            if self.correction is not None:
                parts.append(self.correction.additions[k - age].to(torch.float64) * c)
            weight = self._weights[k - age]
            if self._way(k - age).known and weight is not None:
                parts.append(self.known[k - age] * (c * (1.0 - weight)))
        return torch.stack(parts).sum(0) if parts else None

    def _share_picture(self) -> None:
        """What the picture's kept part needs, once."""
        if self.picture is not None and self.picture.mask is not None:
            latents, noise = self.picture.kept()
            self._share("mask", self.picture.mask)
            self._share("kept", latents)
            self._share("keptnoise", noise)

    def _blend(self, schedule: Schedule, k: int) -> None:
        """Make the sample after step ``k`` the noised picture again where the mask is 0."""
        if self.picture is None or self.picture.mask is None:
            return
        part, blended = f"painted{k}", f"blended{k + 1}"
        inputs = {"sample": self._held["samples"][k + 1], "mask": "mask"}
        self.backend.call("blend", f"blend{k}", inputs, {}, [part])
        latents, noise = schedule.noised[k + 1]
        terms = [Term(part, 1.0), Term("kept", latents)]
        self.backend.affine(blended, [*terms, *([Term("keptnoise", noise)] if noise else [])], blended)
        self.backend.drop(part)
        self._held["samples"][k + 1] = blended

    def _scale(self, k: int) -> float:
        steps = self.schedule.steps
        return steps[k].input_scale if k < len(steps) else 1.0

    def _share(self, handle: str, values: Tensor) -> str:
        self.backend.put(handle, values)
        return handle

    def _open(self, handle: str, k: int) -> Tensor:
        return self.backend.reveal(handle) / self._scale(k)

    def _arguments(
        self, way: Way, timestep: Tensor, sample: str
    ) -> tuple[dict[str, str], Mapping[str, Tensor]]:
        """Handles by input name, and the public values of this step."""
        inputs, embeds = {"sample": sample}, self.embeds
        plan = self.plans if isinstance(self.plans, Plan) else self.plans[way.plan]
        if isinstance(embeds, str):
            inputs["encoder_hidden_states"] = self._prompts_half(embeds) if way.single else embeds
            embeds = torch.zeros(plan.program.types["encoder_hidden_states"][0])
        elif way.single:
            embeds = embeds.chunk(2)[1]
        extra = None if self.picture is None else self.picture.extra
        kwargs = call_kwargs(timestep, embeds, self.condition, extra)
        if way.partial:
            assert self._features is not None
            handle, single = self._features
            inputs["features"] = self._prompts_half(handle) if way.single and not single else handle
            kwargs["features"] = torch.zeros(plan.program.types["features"][0])
        values = client_side(plan, (torch.zeros(self._shape),), kwargs, held=tuple(inputs))
        for name, tensor in values.secrets.items():
            known = self._put.get((way.plan, name))
            if known is None or not torch.equal(known[1], tensor):
                if known is not None:
                    self.backend.drop(known[0])
                self._count += 1
                handle = f"client{self._count}"
                self.backend.put_input(handle, plan, name, tensor)
                known = self._put[way.plan, name] = (handle, tensor)
            inputs[name] = known[0]
        return inputs, values.publics

    def _prompts_half(self, handle: str) -> str:
        """The second half of what the parties hold of both: theirs to take, without a byte."""
        if handle not in self._single:
            batch, name = self._shape[0], f"{handle}.prompt"
            self.backend.affine(name, [Term(handle, 1.0, batch, 2 * batch)], name)
            self._single[handle] = name
        return self._single[handle]

    def _observed(self, observe: Observe, k: int) -> None:
        handle, opened = self._held["samples"][k + 1], [0]

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
            self._held["samples"][k + 1] = self._share(
                f"{handle}.changed", changed.to(torch.float64) * self._scale(k + 1)
            )
            if handle not in self._handles():
                self.backend.drop(handle)

    def _forget(self, oldest: Mapping[str, int]) -> None:
        """Drop what no later step uses."""
        before, held = self._handles(), self._held
        for kind, known in held.items():
            for i in [i for i in known if i < oldest[kind]]:
                del known[i]
        self.backend.drop(*sorted(before - self._handles()))

    def _handles(self) -> set[str]:
        return {handle for known in self._held.values() for handle in known.values()}
