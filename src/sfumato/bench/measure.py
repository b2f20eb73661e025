"""One case, measured as the peers are: three processes over mutual TLS; sharing, planning and revealing apart.

A timed call begins at each party when all three have the command and ends when its last byte has left. CPU seconds are
the party process's own, bytes are the kernel's count on its sockets to the other parties.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.bench.cases import Case, reference
from sfumato.bench.floor import Floor, Rates, Work
from sfumato.bench.machine import Foreign, cores
from sfumato.errors import SfumatoError
from sfumato.graph.capture import capture
from sfumato.graph.plan import Plan, client_side
from sfumato.graph.planning import make_plan
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport

__all__ = ["Settings", "bound", "error_against", "measure"]

_QUIET = 0.1  # a run is quiet when others use less of the machine


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure. ``public``: weights public where a case has some; ``budget_s``: stop repeating beyond it."""

    public: bool = False
    profile: str = "precise"
    repeat: int = 3
    budget_s: float = 60.0

    @property
    def config(self) -> str:
        """The setting's name in a record."""
        return f"rep3 {self.profile}"


def measure(case: Case, settings: Settings, rates: Rates) -> dict[str, Any]:
    """The case's record: the peers' fields, and ours. A case that does not run gives its ``error`` instead."""
    record = {
        "peer": "sfumato",
        "config": settings.config,
        "weights": "public" if settings.public else "secret",
        "case": case.name,
    }
    try:
        return {**record, **_measured(case, settings, rates)}
    except SfumatoError as error:
        return {**record, "error": str(error)}


def _measured(case: Case, settings: Settings, rates: Rates) -> dict[str, Any]:
    module, inputs = case.built()
    has_parameters = any(True for _ in module.parameters())
    secret_weights = has_parameters and not settings.public
    started = time.perf_counter()
    plan = make_plan(
        capture(module, inputs),
        secret="inputs+weights" if secret_weights else "inputs",
        profile=settings.profile,
        calibration=[(inputs, {})],
    )
    compile_s = time.perf_counter() - started
    work = Work.of(module, inputs, secret_weights=secret_weights)
    with open_backend("local") as session:
        first, runs, certificate, found, total = _runs(session, plan, inputs, settings)
    exact = reference(module, inputs)
    summary = _summary(runs, settings.repeat)
    floor = Floor.of(work, max(first["bytes_sent_per_party"]), first["rounds"], rates)
    return {
        **summary,
        **error_against(exact, found),
        "compile_s": round(compile_s, 3),
        **first,
        "steps": max(first["rounds"], *first["sends_per_party"]),
        **certificate,
        "client_bytes": total.client_bytes,
        "setup_bytes": total.setup_bytes,
        "peak_memory_per_party": list(total.peak_memory),
        "cpu_bound_s": round(bound(summary["cpu_s_per_party"]), 6),
        **floor.to_json(),
    }


def _runs(
    session: Backend, plan: Plan, inputs: tuple[Tensor, ...], settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any], Tensor, CostReport]:
    """Counted cost of a call, the timed calls, the certificate's cost, the value, and the session's cost."""
    values = client_side(plan, inputs)
    session.load("case", plan)
    for name, tensor in values.secrets.items():
        session.put_input(name, plan, name, tensor)
    names = {name: name for name in values.secrets}

    def call(i: int) -> dict[str, Any]:
        if i:
            session.drop("out")
        with Foreign() as foreign:
            session.call("case", f"call{i}", names, values.publics, ["out"])
        took = session.last_call
        cpu = [t.cpu_s for t in took]
        return {
            "wall": max(t.wall_s for t in took),
            "cpu": cpu,
            "sent": [t.kernel_bytes for t in took],
            "foreign": foreign.share(sum(cpu)),
        }

    before = session.report()
    call(0)  # the warm-up; from clocks of zero, so its rounds are the operation's own
    first = _counted(before, session.report())
    runs: list[dict[str, Any]] = []
    while not _enough(runs, settings):
        runs.append(call(len(runs) + 1))
    before = session.report()
    session.certify("out")
    after = session.report()
    certificate = {f"certificate_{key}": value for key, value in _counted(before, after).items()}
    certificate["certificate_wall_s"] = round(
        max((t.wall_s for t in session.last_certificate), default=0.0), 6
    )
    certificate["certificate_cpu_s_per_party"] = [round(t.cpu_s, 4) for t in session.last_certificate]
    found = session.reveal("out")
    return first, runs, certificate, found, session.report()


def _counted(before: CostReport, after: CostReport) -> dict[str, Any]:
    def less(name: str) -> list[int]:
        return [a - b for a, b in zip(getattr(after, name), getattr(before, name), strict=True)]

    return {
        "rounds": after.rounds - before.rounds,
        "sends_per_party": less("sends"),
        "bytes_sent_per_party": less("bytes_sent"),
    }


def _enough(runs: Sequence[Mapping[str, Any]], settings: Settings) -> bool:
    """Stop after ``repeat`` runs on a quiet machine; on a busy one try twice as often; never beyond the budget."""
    quiet = sum(run["foreign"] < _QUIET for run in runs)
    spent = sum(run["wall"] for run in runs)
    return quiet >= settings.repeat or len(runs) >= 2 * settings.repeat or spent > settings.budget_s


def _summary(runs: Sequence[Mapping[str, Any]], repeat: int) -> dict[str, Any]:
    """Medians over the ``repeat`` runs that other processes disturbed least."""
    best = sorted(runs, key=lambda run: run["foreign"])[:repeat]
    return {
        "wall_s": round(statistics.median(run["wall"] for run in best), 6),
        "wall_min_s": round(min(run["wall"] for run in runs), 6),
        "wall_max_s": round(max(run["wall"] for run in runs), 6),
        "runs": len(runs),
        "cpu_s_per_party": [
            round(statistics.median(cpu), 4) for cpu in zip(*(run["cpu"] for run in best), strict=True)
        ],
        "foreign_cpu": round(max(run["foreign"] for run in best), 3),
        "tcp_sent_per_party": best[0]["sent"],
    }


def bound(cpu: Sequence[float]) -> float:
    """Seconds to expect on this machine when it is quiet and the network costs nothing: the largest party, or the
    parties' sum on all cores."""
    return max(max(cpu), sum(cpu) / cores())


def error_against(exact: Tensor, found: Tensor) -> dict[str, float]:
    """Largest absolute error and relative error in L2 norm, in float64."""
    difference = found.double() - exact.double()
    return {
        "max_abs_err": float(difference.abs().max()),
        "rel_l2_err": float(difference.norm() / exact.double().norm()),
    }
