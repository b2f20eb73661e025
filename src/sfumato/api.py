"""The calls of a user: capture, make_plan, estimate, run, deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sfumato.errors import JobError
from sfumato.graph.plan import ClientValues, Plan, client_side
from sfumato.runtime.backend import Backend, open_backend
from sfumato.runtime.report import CostReport

__all__ = ["Deployment", "Handle", "Result", "deploy", "estimate", "run"]

_PLAN = "model"


@dataclass(frozen=True, slots=True)
class Result:
    """``outputs``: the module's own output structure, float32. ``cost``: what the run took."""

    outputs: Any
    cost: CostReport


@dataclass(frozen=True, slots=True)
class Handle:
    """A secret that stays with the parties; a later call of the same deployment takes it as an argument."""

    name: str
    shape: tuple[int, ...]
    frac: int

    def __repr__(self) -> str:
        return f"Handle({self.name}, {list(self.shape)})"


class Deployment:
    """A plan whose weights the parties hold: loaded once, called many times. Close it (or use ``with``)."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self.plan = plan
        self._backend = backend
        self._calls = 0
        backend.load(_PLAN, plan)
        backend.start_clock()

    def __call__(self, *args: Any, reveal: bool = True, **kwargs: Any) -> Any:
        """The module's outputs; or, with ``reveal=False``, the same structure of :class:`Handle`.

        A tensor argument may be a Handle of this deployment: its value never leaves the parties.
        """
        number = self._calls
        self._calls += 1
        return self._run(number, client_side(self.plan, args, kwargs), reveal)

    def _run(self, number: int, values: ClientValues, reveal: bool) -> Any:
        names: dict[str, str] = {}
        temporary = []
        for name, tensor in values.secrets.items():
            if isinstance(tensor, Handle):
                names[name] = tensor.name
                continue
            names[name] = f"in{number}/{name}"
            self._backend.put(names[name], tensor, self.plan.frac_of(name))
            temporary.append(names[name])
        outputs = [f"out{number}/{i}" for i in range(len(self.plan.outputs))]
        self._backend.call(_PLAN, f"call{number}", names, values.publics, outputs)
        self._backend.drop(*temporary)
        found: list[Any] = []
        for name, output in zip(outputs, self.plan.outputs, strict=True):
            if reveal:
                found.append(self._backend.reveal(name, self.plan.frac).to(dtype=output.dtype))
                self._backend.drop(name)
            else:
                found.append(Handle(name, tuple(output.shape), self.plan.frac))
        return self.plan.restructured(found, values)

    @property
    def cost(self) -> CostReport:
        """Cost so far."""
        return self._backend.report()

    def close(self) -> None:
        """End the session; the parties forget everything."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def deploy(
    plan: Plan,
    cluster: str | Path | None = None,
    *,
    backend: str = "local",
    protocol: str = "rep3",
    keys: str | Path | None = None,
    fused: bool = True,
) -> Deployment:
    """Load a plan and its weights at the parties, for many calls.

    ``cluster``: path of a cluster file (with the client's keys beside it, or in ``keys``); else ``backend``:
    ``"local"`` starts three processes over mTLS, ``"simulate"`` one thread, ``"plain"`` no secrecy.

    Raises:
        LinkError: the parties cannot be reached.
    """
    opened = open_backend(backend, protocol=protocol, cluster=cluster, keys=keys, options={"fused": fused})
    try:
        return Deployment(plan, opened)
    except BaseException:
        opened.close()
        raise


def run(
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "local",
    protocol: str = "rep3",
    cluster: str | Path | None = None,
    fused: bool = True,
) -> Result:
    """Run a plan once on the client's arguments and reveal the outputs to the client alone.

    Raises:
        JobError: arguments that do not fit the captured shapes, named.
        LinkError: a party was lost; nothing is left behind.
    """
    with deploy(plan, cluster, backend=backend, protocol=protocol, fused=fused) as deployment:
        outputs = deployment(*args, **(kwargs or {}))
        return Result(outputs, deployment.cost)


def estimate(plan: Plan, protocol: str = "rep3", *, fused: bool = True) -> CostReport:
    """The exact cost of one :func:`run`, from a run on shapes: rounds, bytes per party, by path. Nothing is computed."""
    if protocol == "plain":
        raise JobError("plain sends nothing; estimate rep3")
    with deploy(plan, backend="meta", protocol=protocol, fused=fused) as deployment:
        args, kwargs = plan.example_arguments()
        deployment(*args, **kwargs)
        return deployment.cost

