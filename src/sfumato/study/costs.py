"""What transformers of published sizes cost under a paper's profile and under ours: bytes, rounds, agreement, time."""

from __future__ import annotations

import json
import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.api import Deployment, deploy
from sfumato.bench.emulated import NETWORKS, Emulated, Network
from sfumato.bench.machine import machine
from sfumato.errors import JobError, RangeError, SfumatoError
from sfumato.graph.capture import capture
from sfumato.graph.memory import peak_memory
from sfumato.graph.plan import Plan, client_side
from sfumato.graph.planning import make_plan
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend
from sfumato.study.profiles import ROWS, Profile, public_weights
from sfumato.types import Ring
from sfumato.zoo.shapes import SHAPES, Shape, change

__all__ = ["ROOM", "CostRow", "cost_rows", "memory_of", "records"]

_CALIBRATION = (1, 2)  # seeds of the ids that ranges come from; others are run
_RUN = 9
#: Share of the machine's memory that a run may take.
ROOM = 0.75


@dataclass(frozen=True, slots=True)
class CostRow:
    """Bytes of all parties and of the client's own link, exact; rounds; ``error``: relative L2 error of the result
    against the same model, changed as the row says, in float, by the plan's arithmetic in the clear (None: the result
    is a token's id, and ``same`` says whether it is the same). ``seconds`` by network: of one call with its
    certificate, three threads on emulated links, and ``least``, what that network allows; ``client_s``: what the client
    computes by itself before it. ``memory_bytes``: estimate for the three parties in one process. A row that was not
    run has neither error nor seconds; ``skipped`` says why. ``refused``: why there is no plan. ``outside``: what the
    certificate refuses the run for; error and seconds are then of a run without it."""

    model: str
    tokens: int
    label: str
    bytes_sent: tuple[int, ...] = ()
    client_bytes: int = 0
    setup_bytes: int = 0
    rounds: int = 0
    memory_bytes: int = 0
    error: float | None = None
    same: bool | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    client_s: float | None = None
    against: str = ""
    printed: str = ""
    skipped: str = ""
    refused: str = ""
    outside: str = ""

    @property
    def total_gb(self) -> float:
        """GB (1e9 bytes) of all parties and of the client's link."""
        return (sum(self.bytes_sent) + self.client_bytes) / 1e9

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)


def cost_rows(
    paper: str,
    models: Sequence[tuple[str, int]],
    networks: Sequence[str] = (),
    *,
    run: Sequence[tuple[str, int]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[CostRow]:
    """The paper's rows for each (model, tokens), weights secret but for what a row makes public.

    ``run``: models that are also run, for errors and seconds (None: all); what would take more than :data:`ROOM` of the
    machine's memory is counted on shapes alone all the same.

    Raises:
        JobError: an unknown paper, model or network, or a model to run that is not among the models.
    """
    if paper not in ROWS:
        raise JobError(f"costs are told for {', '.join(ROWS)}, not for {paper!r}")
    for name, _ in models:
        if name not in SHAPES:
            raise JobError(f"there is no model {name!r}; there are {', '.join(SHAPES)}")
    for network in networks:
        if network not in NETWORKS:
            raise JobError(f"there is no network {network!r}; use {', '.join(NETWORKS)}")
    for name, tokens in () if run is None else run:
        if (name, tokens) not in models:
            raise JobError(f"{name}:{tokens} cannot be run, as it is not counted; name it with --model, too")
    work = [(SHAPES[name], tokens, profile) for name, tokens in models for profile in ROWS[paper]]
    rows = []
    for done, (shape, tokens, profile) in enumerate(work):
        if progress is not None:
            progress("costs", done, len(work))
        asked = run is None or (shape.name, tokens) in run
        rows.append(_row(shape, tokens, profile, networks, "" if asked else "were not asked for"))
    if progress is not None:
        progress("costs", len(work), len(work))
    return rows


def memory_of(plan: Plan) -> int:
    """Bytes that a run of all three parties in one process takes, by estimate: their working sets, and two components
    of every secret weight at each."""
    words = sum(
        math.prod(plan.program.types[name][0]) * Ring.named(plan.format_of(name).ring).bits // 8
        for name in plan.secret_weights
    )
    return 3 * (peak_memory(plan) + 2 * words)


def _row(shape: Shape, tokens: int, profile: Profile, networks: Sequence[str], skipped: str) -> CostRow:
    ids = shape.ids(tokens, _RUN)
    row = CostRow(shape.name, tokens, profile.label, against=profile.against, printed=profile.printed)
    try:
        model, plan = _planned(shape, tokens, profile, ids)
        with deploy(plan, backend="meta") as deployment:
            deployment.call_on_shapes()
            cost = deployment.cost
    except SfumatoError as error:
        return replace(row, refused=str(error))
    needed, room = memory_of(plan), ROOM * machine()["memory_gib"] * 2**30
    if needed > room:
        skipped = f"would take about {needed / 1e9:.0f} GB of memory, more than {room / 1e9:.0f}"
    row = replace(
        row, bytes_sent=tuple(cost.bytes_sent), client_bytes=cost.client_bytes, setup_bytes=cost.setup_bytes,
        rounds=cost.rounds, memory_bytes=needed, skipped=skipped,
        least={n: NETWORKS[n].least_s(cost.bytes_sent, cost.rounds) for n in networks},
    )  # fmt: skip
    return row if skipped else _measured(row, shape, profile, model, plan, ids, networks)


def _planned(shape: Shape, tokens: int, profile: Profile, ids: Tensor) -> tuple[Any, Plan]:
    """The model as it is captured, and its plan."""
    model: Any = shape.build()
    replaced = profile.replaced(model.model)
    change(model, replace(replaced, softmax="softmax") if profile.published else replaced)
    program = capture(model, (ids,))
    plan = make_plan(
        program,
        secret="inputs+weights",
        profile=profile.profile,
        ring=profile.ring,
        methods=dict(profile.methods),
        calibration=[((shape.ids(tokens, seed),), {}) for seed in _CALIBRATION],
        public_weights=public_weights(program, model, model.model, replaced),
    )
    return model, plan


def _measured(
    row: CostRow,
    shape: Shape,
    profile: Profile,
    model: Any,
    plan: Plan,
    ids: Tensor,
    networks: Sequence[str],
) -> CostRow:
    """The row with its error, and its seconds on each network."""

    def in_clear(certificate: bool) -> Backend:
        # A published polynomial may overflow where a comparison takes it out: the parties' words wrap there, too.
        return open_backend("plain", options={"wraps": True, "certificate": certificate})

    client_s = min(timeit.repeat(lambda: client_side(plan, (ids,)), number=1, repeat=2))
    found, _, outside = _run(plan, ids, in_clear)
    if profile.published:
        change(model, profile.replaced(model.model))
    error, same = (None, None) if found is None else _agreement(shape, model, ids, found)
    seconds = dict[str, float]()
    for name in networks:

        def emulated(certificate: bool, network: Network = NETWORKS[name]) -> Backend:
            return Emulated(network, {"certificate": certificate})

        _, backend, outside = _run(plan, ids, emulated, outside)
        seconds[name] = backend.call_s
    return replace(row, error=error, same=same, seconds=seconds, client_s=client_s, outside=outside)


def _run(
    plan: Plan, ids: Tensor, opened: Callable[[bool], Backend], outside: str = ""
) -> tuple[Tensor | None, Any, str]:
    """(result, the backend it ran on, why it ran without a certificate: ``outside``, or what that refused). In the
    clear a call may refuse its argument even so; there is no result then."""
    found = None
    for certificate in (False,) if outside else (True, False):
        with Deployment(plan, backend := opened(certificate)) as deployment:
            try:
                found = deployment(ids)
                break
            except RangeError as error:
                outside = outside or str(error)
    return found, backend, outside


def _agreement(
    shape: Shape, model: nn.Module, ids: Tensor, found: Tensor
) -> tuple[float | None, bool | None]:
    """(relative L2 error of the result or None, whether the token is the same or None)."""
    with torch.no_grad():
        wanted = model(ids)
    if shape.causal:
        return None, bool((found.round() == wanted).all())
    return float((found - wanted).norm() / wanted.norm()), None


def records(rows: Sequence[CostRow]) -> str:
    """The rows as JSON text."""
    return json.dumps([row.to_json() for row in rows], indent=1) + "\n"
