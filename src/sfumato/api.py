"""The calls of a user: capture, make_plan, estimate, run, deploy, share."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sfumato.errors import JobError, RangeError
from sfumato.graph.places import Place
from sfumato.graph.plan import ClientValues, Plan, client_side
from sfumato.runtime.backend import Backend
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.names import shared_name
from sfumato.runtime.offered import caller_of
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport
from sfumato.runtime.sharing import ModelToShare, share_model

__all__ = ["Deployment", "Handle", "Result", "deploy", "estimate", "run", "share"]

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
    deployment: str

    def __repr__(self) -> str:
        return f"Handle({self.name}, {list(self.shape)})"


class Deployment:
    """A plan whose weights the parties hold: loaded once, called many times. Close it (or use ``with``).

    ``load(name)`` has the parties load it; by default the weights come from the plan.
    """

    def __init__(self, plan: Plan, backend: Backend, load: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self._backend = backend
        self._calls = 0
        self._id = secrets.token_hex(8)
        if load is None:
            backend.load(_PLAN, plan)
        else:
            load(_PLAN)
        backend.start_clock()

    def __call__(self, *args: Any, reveal: bool = True, **kwargs: Any) -> Any:
        """The module's outputs; or, with ``reveal=False``, the same structure of :class:`Handle`.

        A tensor argument may be a Handle of this deployment: its value never leaves the parties. What a revealed value
        descends from is certified before it is returned: one certificate for a chain of calls.

        Raises:
            RangeError: a layer of this call, or of one that a handle comes from, left its calibrated range.
        """
        number, program = self._calls, self.plan.program
        self._calls += 1
        handles = {n: a for n, a in program.matched(args, kwargs).items() if isinstance(a, Handle)}
        for name, handle in handles.items():
            if handle.deployment != self._id:
                raise JobError(f"the handle given for {name} belongs to another deployment")
            if self.plan.places[name] is not Place.SECRET:
                raise JobError(f"the argument {name} is not secret in this plan; give its value")
            if handle.shape != program.types[name][0]:
                raise JobError(
                    f"the handle has shape {list(handle.shape)}, the argument {name} {list(program.types[name][0])}"
                )
        args, kwargs = tree_map(_stand_in, (args, kwargs))
        values = client_side(self.plan, args, kwargs, held=handles)
        return self._run(number, values, handles, reveal)

    def _run(self, number: int, values: ClientValues, handles: Mapping[str, Handle], reveal: bool) -> Any:
        names = {n: handle.name for n, handle in handles.items()}
        temporary = []
        for name, tensor in values.secrets.items():
            names[name] = f"in{number}/{name}"
            self._backend.put_input(names[name], self.plan, name, tensor)
            temporary.append(names[name])
        outputs = {n: f"out{number}/{n}" for n in self.plan.secret_outputs}
        self._backend.call(_PLAN, f"call{number}", names, values.publics, list(outputs.values()))
        self._backend.drop(*temporary)
        if reveal:
            try:
                self._backend.certify(*outputs.values())
            except RangeError:
                self._backend.drop(*outputs.values())
                raise
        found: dict[str, Any] = dict(values.outputs)
        for name, handle_name in outputs.items():
            shape, dtype = self.plan.program.types[name]
            if reveal:
                found[name] = self._backend.reveal(handle_name).to(dtype)
                self._backend.drop(handle_name)
            else:
                found[name] = Handle(handle_name, shape, self._id)
        return self.plan.program.assemble(found)

    def drop(self, handle: Handle) -> None:
        """Let the parties forget a value.

        Raises:
            JobError: the handle belongs to another deployment, or was dropped before.
        """
        if handle.deployment != self._id:
            raise JobError("the handle belongs to another deployment")
        self._backend.drop(handle.name)

    def call_on_shapes(self) -> None:
        """One call with zeros for every value that comes from outside: what a run on shapes needs."""
        plan = self.plan

        def zeros(names: Iterable[str]) -> dict[str, Tensor]:
            types = plan.program.types
            return {n: torch.zeros(types[n][0], dtype=types[n][1]) for n in names}

        values = ClientValues(
            zeros(plan.client_inputs), zeros(plan.public_inputs), zeros(plan.program.output_names)
        )
        self._run(self._calls, values, {}, True)
        self._calls += 1

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


def _stand_in(value: Any) -> Any:
    return torch.zeros(value.shape) if isinstance(value, Handle) else value


def deploy(
    plan: Plan | str,
    cluster: str | Path | None = None,
    *,
    backend: str = "local",
    protocol: str = "rep3",
    keys: str | Path | None = None,
    fused: bool = True,
    certificate: bool | str = True,
) -> Deployment:
    """Load a plan and its weights at the parties, for many calls.

    ``plan``: your own, or ``"cluster:NAME"`` for one whose owner shared it with the cluster: the parties have its
    weights, and this client never sees them. What its outputs are made of may stay closed by the owner's policy.

    ``cluster``: path of a cluster file (with the client's keys beside it, or in ``keys``); else ``backend``:
    ``"local"`` starts three processes over mTLS, ``"simulate"`` one thread, ``"plain"`` no secrecy.

    ``certificate``: check a few elements of every layer against the calibrated range, for the client alone; ``"all"``
    checks every element of every value that was planned for a range.

    Raises:
        JobError: there is no such shared model for this client, or it is a pipeline.
        LinkError: the parties cannot be reached.
    """
    shared = shared_name(plan) if isinstance(plan, str) else None
    if isinstance(plan, str) and (shared is None or cluster is None):
        raise JobError("give a plan of make_plan, or 'cluster:NAME' and the file of that cluster")
    opened = open_backend(
        backend,
        protocol=protocol,
        cluster=cluster,
        keys=keys,
        options={"fused": fused, "certificate": certificate},
    )
    try:
        if isinstance(plan, Plan):
            return Deployment(plan, opened)
        return _shared(opened, str(shared))
    except BaseException:
        opened.close()
        raise


def _shared(backend: Backend, model: str) -> Deployment:
    """A deployment of what an owner has shared."""
    description = backend.describe(model)
    digest = next((offer["parts"][_PLAN] for offer in description.offers if _PLAN in offer["parts"]), None)
    if digest is None:
        raise JobError(f"cluster:{model} has several parts; use {caller_of(description)}")
    plan = description.plans[digest]
    return Deployment(plan, backend, lambda name: backend.load_shared(name, description, digest))


def share(
    plan: Plan,
    name: str,
    cluster: str | Path,
    *,
    keys: str | Path | None = None,
    clients: Sequence[str] | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Give the parties of a cluster a plan and its weights to keep; clients then use it as ``"cluster:NAME"``.

    Clients learn the plan and what of its weights is public; they may have its outputs opened to them, and nothing
    that is computed on the way. A pipeline is shared by ``sfumato model share``.

    ``cluster``: its file, beside the owner's keys (or these in ``keys``). ``clients``: names of those who may use
    it; None for all of the cluster. ``replace``: an own model of this name. ``progress(done, all)``: bytes.

    Returns:
        The share's id, common to the three parties.

    Raises:
        JobError: not an owner's certificate, a name that is taken, or parties that refuse.
        LinkError: a party cannot be reached, or is lost; then no party keeps anything.
    """
    path, digest = Path(cluster), plan.digest()
    offer = {"settings": {"title": plan.program.title}, "parts": {_PLAN: digest}, "reveal": [_PLAN]}
    model = ModelToShare(
        name=name, plans={digest: plan}, offers=[offer], files={}, clients=clients, replace=replace
    )
    return share_model(Cluster.load(path), Path(keys or path.parent), model, progress=progress)


def run(
    plan: Plan,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    backend: str = "local",
    protocol: str = "rep3",
    cluster: str | Path | None = None,
    fused: bool = True,
    certificate: bool | str = True,
) -> Result:
    """Run a plan once on the client's arguments and reveal the outputs to the client alone.

    Raises:
        JobError: arguments that do not fit the captured shapes, named.
        LinkError: a party was lost; nothing is left behind.
        RangeError: a layer left its calibrated range; names it.
    """
    with deploy(
        plan, cluster, backend=backend, protocol=protocol, fused=fused, certificate=certificate
    ) as deployment:
        outputs = deployment(*args, **(kwargs or {}))
        return Result(outputs, deployment.cost)


def estimate(
    plan: Plan, protocol: str = "rep3", *, fused: bool = True, certificate: bool | str = True
) -> CostReport:
    """The exact cost of one :func:`run`, from a run on shapes: rounds, bytes per party and by path."""
    if protocol == "plain":
        raise JobError("plain sends nothing; estimate rep3")
    with deploy(plan, backend="meta", protocol=protocol, fused=fused, certificate=certificate) as deployment:
        deployment.call_on_shapes()
        return deployment.cost
