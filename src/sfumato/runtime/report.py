"""What a run cost, or will cost: the same record for estimates, simulations and real runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CostReport", "PathCost", "readable"]


@dataclass(frozen=True, slots=True)
class PathCost:
    """Payload bytes and sends per party under one path."""

    bytes_sent: tuple[int, ...]
    sends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CostReport:
    """Cost of one run.

    ``rounds``: length of the longest chain of messages. ``bytes_sent``, ``sends``: payload and messages of each party
    to the other parties (P0, P1, P2), exact; TLS and framing are not in it. ``client_bytes``: payload between client
    and all parties, both ways, except weights, which are ``setup_bytes``. ``offline_bytes`` is what could be prepared
    before the inputs are known: nothing, in today's rep3. ``seconds``, ``cpu_seconds``, ``peak_memory`` (bytes) and
    ``kernel_bytes`` are measured and empty in an estimate.
    """

    protocol: str
    rounds: int
    bytes_sent: tuple[int, ...]
    sends: tuple[int, ...]
    client_bytes: int
    setup_bytes: int
    by_path: Mapping[str, PathCost] = field(default_factory=dict)
    offline_bytes: tuple[int, ...] = ()
    seconds: float | None = None
    cpu_seconds: tuple[float, ...] = ()
    peak_memory: tuple[int, ...] = ()
    kernel_bytes: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Payload of all parties together."""
        return sum(self.bytes_sent)

    def same_cost(self, other: CostReport) -> bool:
        """Whether counted cost agrees: bytes, sends and rounds, per party and per path."""
        return (
            self.rounds == other.rounds
            and tuple(self.bytes_sent) == tuple(other.bytes_sent)
            and tuple(self.sends) == tuple(other.sends)
            and self.client_bytes == other.client_bytes
            and dict(self.by_path) == dict(other.by_path)
        )

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(asdict(self) | {"total_bytes": self.total_bytes}, indent=1)

    def grouped(self, depth: int = 1) -> dict[str, PathCost]:
        """Costs by place in the model, summed over calls and steps, largest first.

        A path starts with the call (``step3``), then names ``depth`` levels of the model; "~" and "#" mark what
        overlaps with what, not where it is.
        """
        groups: dict[str, list[list[int]]] = {}
        for path, cost in self.by_path.items():
            names = [part for part in path.strip("/").split("/") if part[:1] not in "~#"]
            key = "/".join(names[1 : 1 + depth]) or names[0]
            sums = groups.setdefault(key, [[0] * len(cost.bytes_sent), [0] * len(cost.sends)])
            for i, (size, count) in enumerate(zip(cost.bytes_sent, cost.sends, strict=True)):
                sums[0][i] += size
                sums[1][i] += count
        found = {key: PathCost(tuple(sizes), tuple(counts)) for key, (sizes, counts) in groups.items()}
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].bytes_sent)))

    def table(self, rows: int = 12, depth: int = 1) -> str:
        """A short text table: totals, then the most expensive paths."""
        lines = [
            f"protocol {self.protocol}: {self.rounds:,} rounds, {readable(self.total_bytes)} between the parties "
            f"({', '.join(f'P{i} {readable(b)}' for i, b in enumerate(self.bytes_sent))}), "
            f"{readable(self.client_bytes)} with the client, {readable(self.setup_bytes)} of weights",
        ]
        if self.seconds is not None:
            lines.append(f"time {self.seconds:.2f} s" + _measured(self.cpu_seconds, self.peak_memory))
        groups = list(self.grouped(depth).items())
        if groups:
            width = max(len(path) for path, _ in groups[:rows])
            lines.append(f"{'path':<{width}}  {'sent':>10}  {'share':>6}  {'messages':>8}")
        for path, cost in groups[:rows]:
            share = sum(cost.bytes_sent) / max(1, self.total_bytes)
            lines.append(
                f"{path:<{width}}  {readable(sum(cost.bytes_sent)):>10}  {share:>6.1%}  {sum(cost.sends):>8,}"
            )
        if len(groups) > rows:
            lines.append(f"and {len(groups) - rows} more paths")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _measured(cpu: Sequence[float], memory: Sequence[int]) -> str:
    text = ""
    if cpu:
        text += f", CPU {sum(cpu):.1f} s over the parties"
    if memory:
        text += f", peak memory {readable(max(memory))} a party"
    return text


def readable(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def merged_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, PathCost]:
    """Rows of all parties by path, from their ``{path: [bytes, sends]}``."""
    paths = sorted({path for party in rows for path in party})
    return {
        path: PathCost(
            tuple(int(party.get(path, (0, 0))[0]) for party in rows),
            tuple(int(party.get(path, (0, 0))[1]) for party in rows),
        )
        for path in paths
    }
