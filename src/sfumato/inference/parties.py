"""The parties of one model: a session that stays open from call to call, with each weight shared once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.graph.plan import Plan, client_side
from sfumato.runtime.backend import Backend
from sfumato.runtime.report import CostReport

__all__ = ["Held", "Loader", "Parties", "Run"]


#: ``load(backend, name, plan)``: the parties have the plan and its weights under this name.
Loader = Callable[[Backend, str, Plan], None]


@dataclass(frozen=True, slots=True)
class Held:
    """A secret that stays with the parties, for a later call of the same run."""

    name: str
    shape: tuple[int, ...]


class Run:
    """Calls of plans on one open session, and what they cost. Close it: what the parties hold of it is then gone."""

    def __init__(self, backend: Backend, loaded: dict[str, Plan], number: int, load: Loader) -> None:
        self.backend, self._load = backend, load
        self._loaded, self._number, self._calls = loaded, number, 0
        self._held = dict[str, None]()
        self._before: CostReport | None = None
        self._started = time.monotonic()

    def load(self, name: str, plan: Plan) -> None:
        """Give the parties a plan, unless they have it under this name; waits for parties that start."""
        if self._before is None:
            self._before = self.backend.report()
        if self._loaded.get(name) is not plan:
            self._load(self.backend, name, plan)
            self._loaded[name] = plan

    def start_clock(self) -> None:
        """Measure seconds from now: set-up is over."""
        self._started = time.monotonic()

    def call(self, name: str, **arguments: Any) -> Any:
        """The module's outputs in its own structure; what is secret as `Held`. An argument may be a `Held`.

        Raises:
            JobError: an argument does not fit.
            RangeError: an argument descends from a call that left its ranges.
        """
        plan, backend = self._loaded[name], self.backend
        call, self._calls = f"run{self._number}.{self._calls}", self._calls + 1
        given = plan.program.matched((), arguments)
        held = {n: value for n, value in given.items() if isinstance(value, Held)}
        plain = {n: torch.zeros(v.shape) if isinstance(v, Held) else v for n, v in arguments.items()}
        values = client_side(plan, (), plain, held=held)
        inputs, put = {n: value.name for n, value in held.items()}, list[str]()
        for n, tensor in values.secrets.items():
            inputs[n] = f"{call}/in/{n}"
            backend.put_input(inputs[n], plan, n, tensor)
            put.append(inputs[n])
        outputs = {n: f"{call}/out/{n}" for n in plan.secret_outputs}
        backend.call(name, call, inputs, values.publics, list(outputs.values()))
        backend.drop(*put)
        self._held |= dict.fromkeys(outputs.values())
        found: dict[str, Any] = dict(values.outputs)
        found |= {n: Held(handle, plan.program.types[n][0]) for n, handle in outputs.items()}
        return plan.program.assemble(found)

    def open(self, value: Any) -> Tensor:
        """A value, in float64, at the client alone; the parties forget it.

        Raises:
            RangeError: a call that it descends from left its ranges.
        """
        if not isinstance(value, Held):
            return value.to(torch.float64) if isinstance(value, Tensor) else torch.as_tensor(value)
        found = self.backend.reveal(value.name)
        self.drop(value)
        return found

    def drop(self, *values: Any) -> None:
        """Let the parties forget values."""
        for value in values:
            if isinstance(value, Held) and value.name in self._held:
                self.backend.drop(value.name)
                del self._held[value.name]

    def report(self, steps: tuple[float, ...] = ()) -> CostReport:
        """What the run has cost so far."""
        now = self.backend.report(steps=steps)
        return now.since(now if self._before is None else self._before, self._seconds)

    @property
    def _seconds(self) -> float | None:
        return None if self.backend.device == "meta" else time.monotonic() - self._started

    def close(self) -> None:
        """Let the parties forget what is left of the run."""
        for name in list(self._held):
            self.backend.drop(name)
        self._held.clear()


class Parties:
    """Opens a session at the first run, and another one after a run that failed. ``load`` gives it a plan."""

    def __init__(self, open: Callable[[], Backend], load: Loader) -> None:
        self._open, self._load = open, load
        self._backend: Backend | None = None
        self._loaded: dict[str, Plan] = {}
        self._runs = 0

    def run(self) -> Run:
        """A run of its own on the open session; parties of this machine begin to start.

        Raises:
            LinkError: the parties of a cluster cannot be reached; the next run tries again.
        """
        if self._backend is None:
            self._backend, self._loaded = self._open(), {}
        self._runs += 1
        return Run(self._backend, self._loaded, self._runs, self._load)

    def close(self) -> None:
        """End the session, and local parties with it; may be called twice."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()
