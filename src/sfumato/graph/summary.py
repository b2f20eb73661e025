"""The text of a plan: what runs where, with which methods at which error, headroom and cost, and why moving work to
the client shows nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.graph.calibrate import Calibration
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.handlers.smooth import ACTIVATED
from sfumato.graph.program import Node
from sfumato.types import Ring

__all__ = ["Group", "grouped", "table_text"]

_WHY = {
    "public": "from public weights, constants and public arguments only; known to all",
    "owner": "from secret weights alone; the model owner computes it once and shares it",
    "client": "from what the client knows by itself; computed there in float, and what is used is shared",
    "secret": "under the protocol",
}
#: Fraction bits of a public factor beside a secret.
_GAIN = 20


@dataclass(frozen=True, slots=True)
class Group:
    """Calls of one target and method: the largest error, the least headroom, and the range of costs."""

    target: str
    method: str
    count: int
    error: float | None
    headroom: int | None
    bits: tuple[float, float] | None
    detail: str


def grouped(
    nodes: Iterable[Node],
    choices: Mapping[str, Mapping[str, Any]],
    measured: Calibration,
    options: Options,
) -> list[Group]:
    """Interactive calls by target and method, those with the most calls first."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for node in nodes:
        if HANDLERS[node.target].local:
            continue
        choice = choices.get(node.name) or _linear(node, measured, options)
        called = str(node.kwargs.get("function", "")) if node.target == ACTIVATED else ""
        name = f"linear, {called}" if called else node.target.split(".")[1].rstrip("_")
        key = name, str(choice.get("method", ""))
        found.setdefault(key, []).append(choice)
    groups = [_group(target, method, rows) for (target, method), rows in found.items()]
    return sorted(groups, key=lambda g: (-g.count, g.target, g.method))


def _linear(node: Node, measured: Calibration, options: Options) -> Mapping[str, Any]:
    """What can be said of a call that is linear in each secret: one unit of error, and the room above its result."""
    top = measured.of(node).get("hi_out", 0.0)
    if top <= 0.0:
        return {}
    bits = Ring.named(options.ring).bits
    gain = max(0, min(_GAIN, bits - 8 - options.frac))
    return {
        "method": "exact product", "error": 2.0**-options.frac,
        "headroom": bits - 2 - math.frexp(top)[1] - options.frac - gain,
    }  # fmt: skip


def _group(target: str, method: str, rows: Sequence[Mapping[str, Any]]) -> Group:
    def known(key: str) -> list[Any]:
        return [row[key] for row in rows if key in row]

    bits = known("bits")
    return Group(
        target,
        method,
        len(rows),
        max(known("error"), default=None),
        min(known("headroom"), default=None),
        (min(bits), max(bits)) if bits else None,
        _detail(rows),
    )


def _detail(rows: Sequence[Mapping[str, Any]]) -> str:
    """Sines and word bits of series, exponentials' words, bits of comparisons: ranges over a group."""
    plans = [row["plan"] for row in rows if "plan" in row]
    series = [s for s in map(_series_of, plans) if s]
    cores = [plan.get("exp", plan)["core"] for plan in plans if "core" in plan or "exp" in plan]
    parts = []
    if series:
        parts.append(
            f"{_span(len(s['cos']) for s in series)} sines, {_span(s['word'] for s in series)} bit words"
        )
    if cores:
        parts.append(f"exp in {_span(core['word'] for core in cores)} bits")
    buckets = [b for b in (plan.get("inverse", plan).get("buckets", 0) for plan in plans) if b]
    if buckets:
        parts.append(f"{_span(buckets)} buckets")
    windows = [row["window"] for row in rows if "window" in row]
    if windows:
        parts.append(f"{_span(windows)} bits compared")
    return ", ".join(parts)


def _series_of(plan: Mapping[str, Any]) -> Any:
    return plan.get("inverse", plan).get("series")


def _span(values: Iterable[float]) -> str:
    found = [round(v) for v in values]
    low, high = min(found), max(found)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def table_text(
    title: str,
    options: Options,
    inputs: Sequence[tuple[str, str, tuple[int, ...]]],
    runs: Counter[str],
    groups: Sequence[Group],
    moved: int,
    notes: Sequence[str],
) -> str:
    """A short table; one line per fact."""
    lines = [
        f"plan for {title}: secret={options.secret}, profile={options.profile}, "
        f"{options.ring}, frac={options.frac}",
        "",
    ]
    lines.append("  argument                 who knows it   shape")
    lines += [
        f"  {name:24} {'nobody' if place == 'secret' else place:14} {list(shape)}"
        for name, place, shape in inputs
    ]
    lines += ["", "  calls  where    why"]
    lines += [f"  {count:5}  {place:8} {_WHY[place]}" for place, count in sorted(runs.items())]
    if groups:
        lines += [
            "",
            "  calls  under the protocol        method          error  headroom   bits/element  how",
        ]
        lines += [_row(group) for group in groups]
    if moved:
        lines.append(
            f"  {moved} calls moved to the client: it knows all their inputs, so it learns nothing new, "
            "and nobody else sees them"
        )
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])


def _row(group: Group) -> str:
    error = "" if group.error is None else f"{group.error:.1e}"
    room = "" if group.headroom is None else f"{group.headroom} bits"
    bits = "" if group.bits is None else _span(group.bits)
    start = f"  {group.count:5}  {group.target[:24]:24}  {group.method:14} {error:>7} {room:>9}"
    row = f"{start} {bits:>14}  {group.detail}"
    return row.rstrip()
