"""What a run cost, or will cost: the same record for estimates, simulations and real runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["CostReport", "PathCost", "Took", "readable"]


@dataclass(frozen=True, slots=True)
class PathCost:
    """Payload bytes and messages per party under one path."""

    bytes_sent: tuple[int, ...]
    messages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Took:
    """What one party spent on one command, from when all had it to when its last byte had left. ``kernel_bytes``: sent
    to the other parties, framing and TLS included."""

    wall_s: float
    cpu_s: float
    kernel_bytes: int


@dataclass(frozen=True, slots=True)
class CostReport:
    """Cost of one run.

    ``rounds``: length of the longest chain of messages. ``bytes_sent``: payload of each party to the other parties (P0,
    P1, P2), exact; TLS and framing are not in it. ``sends``: in how many rounds each party sends something to a peer,
    summed over peers and commands; messages of one round to one peer travel together. ``client_bytes``: payload between
    client and all parties, both ways, except weights, which are ``setup_bytes``. ``offline_rounds``, ``offline_sends``
    and ``offline_bytes`` are what could be prepared before the inputs are known, a part of the totals; ``online_`` is
    the rest. In today's rep3 all is online: its openings run one way, under masks made from what they open.
    ``seconds``, ``cpu_seconds``, ``peak_memory`` (bytes) and ``kernel_bytes`` are measured, and empty in an estimate.
    """

    protocol: str
    rounds: int
    bytes_sent: tuple[int, ...]
    sends: tuple[int, ...]
    client_bytes: int
    setup_bytes: int
    by_path: Mapping[str, PathCost] = field(default_factory=dict)
    offline_rounds: int = 0
    offline_sends: tuple[int, ...] = ()
    offline_bytes: tuple[int, ...] = ()
    seconds: float | None = None
    cpu_seconds: tuple[float, ...] = ()
    peak_memory: tuple[int, ...] = ()
    kernel_bytes: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        nothing = (0,) * len(self.bytes_sent)
        object.__setattr__(self, "offline_bytes", tuple(self.offline_bytes) or nothing)
        object.__setattr__(self, "offline_sends", tuple(self.offline_sends) or nothing)

    @property
    def online_rounds(self) -> int:
        """Rounds that wait for the inputs."""
        return self.rounds - self.offline_rounds

    @property
    def online_sends(self) -> tuple[int, ...]:
        """Sends of each party that wait for the inputs."""
        return tuple(a - b for a, b in zip(self.sends, self.offline_sends, strict=True))

    @property
    def online_bytes(self) -> tuple[int, ...]:
        """Payload of each party that waits for the inputs."""
        return tuple(a - b for a, b in zip(self.bytes_sent, self.offline_bytes, strict=True))

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

    def since(self, before: CostReport, seconds: float | None = None) -> CostReport:
        """What a session has cost after ``before``, an earlier report of its own: counts are differences, memory is the
        session's. Rounds that overlap with what came before count once."""

        def more(now: Sequence[Any], then: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(a - b for a, b in zip(now, then, strict=True))

        return replace(
            self,
            rounds=self.rounds - before.rounds,
            bytes_sent=more(self.bytes_sent, before.bytes_sent),
            sends=more(self.sends, before.sends),
            client_bytes=self.client_bytes - before.client_bytes,
            setup_bytes=self.setup_bytes - before.setup_bytes,
            by_path={path: cost for path, cost in self.by_path.items() if path not in before.by_path},
            seconds=seconds,
            cpu_seconds=more(self.cpu_seconds, before.cpu_seconds),
            kernel_bytes=more(self.kernel_bytes, before.kernel_bytes),
        )

    def to_json(self) -> str:
        """The record as JSON text."""
        derived = ("online_rounds", "online_sends", "online_bytes", "total_bytes")
        return json.dumps(asdict(self) | {name: getattr(self, name) for name in derived}, indent=1)

    def grouped(self, depth: int = 1) -> dict[str, PathCost]:
        """Costs by place in the model, summed over calls and steps, largest first.

        A path starts with the call (``step3``), then names ``depth`` levels of the model; "~" and "#" mark what
        overlaps with what, not where it is.
        """
        groups: dict[str, list[list[int]]] = {}
        for path, cost in self.by_path.items():
            names = [part for part in path.strip("/").split("/") if part[:1] not in "~#"]
            key = "/".join(names[1 : 1 + depth]) or names[0]
            sums = groups.setdefault(key, [[0] * len(cost.bytes_sent), [0] * len(cost.messages)])
            for i, (size, count) in enumerate(zip(cost.bytes_sent, cost.messages, strict=True)):
                sums[0][i] += size
                sums[1][i] += count
        found = {key: PathCost(tuple(sizes), tuple(counts)) for key, (sizes, counts) in groups.items()}
        return dict(sorted(found.items(), key=lambda item: -sum(item[1].bytes_sent)))

    def table(self, rows: int = 12, depth: int = 1) -> str:
        """A short text table: totals, then the most expensive paths."""
        lines = [
            f"protocol {self.protocol}: {self.rounds:,} rounds, at most {max(self.sends, default=0):,} sends a party, "
            f"{readable(self.total_bytes)} between the parties "
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
                f"{path:<{width}}  {readable(sum(cost.bytes_sent)):>10}  {share:>6.1%}  {sum(cost.messages):>8,}"
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
    """Rows of all parties by path, from their ``{path: [bytes, messages]}``."""
    paths = sorted({path for party in rows for path in party})
    return {
        path: PathCost(
            tuple(int(party.get(path, (0, 0))[0]) for party in rows),
            tuple(int(party.get(path, (0, 0))[1]) for party in rows),
        )
        for path in paths
    }
