"""Beside other systems: their JSON lines, how many times less ours takes, and whether the goals are met."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.bench.measure import bound
from sfumato.errors import JobError

__all__ = [
    "GOALS",
    "PEERS",
    "Comparison",
    "Goal",
    "compare",
    "goal_for",
    "peer_records",
    "read_lines",
    "steps_of",
]

#: The peers' default configurations, by their name in a record.
PEERS = {"spu": "ABY3 FM64 f18", "crypten": "2PC TFP 64-bit f16"}
#: An error below this is good enough where a peer's is smaller.
GOOD_ERROR = 2e-3


class Factors(NamedTuple):
    """How many times less than a peer: CPU bound, bytes of the largest party, steps. None: no goal."""

    cpu: float | None = None
    bytes: float | None = None
    steps: float | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What these cases (shell patterns) are to reach, by peer."""

    cases: tuple[str, ...]
    spu: Factors
    crypten: Factors = field(default_factory=Factors)
    weights: str = "secret"

    def against(self, peer: str) -> Factors:
        """The goal against one peer."""
        return self.spu if peer == "spu" else self.crypten

    def fits(self, case: str, weights: str) -> bool:
        """Whether the goal is about this case."""
        return weights == self.weights and any(fnmatch.fnmatchcase(case, p) for p in self.cases)


def _sizes(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_1e[56]" for name in names)


#: The project's goals. The first that fits a case counts.
GOALS = (
    Goal(
        _sizes("silu", "gelu", "gelu_tanh", "quick_gelu", "tanh", "sigmoid", "mish"),
        Factors(8, 8, 8),
        Factors(3, 4, 4),
    ),
    Goal(_sizes("exp", "exp_negative", "reciprocal", "rsqrt"), Factors(4, 4, 3), Factors(2)),
    Goal(_sizes("relu", "less"), Factors(4, 2, 1.3), Factors(4, 6)),
    Goal(("softmax_*",), Factors(8, 10, 3), Factors(5, 10, 2)),
    Goal(("layernorm_*", "groupnorm*"), Factors(5, 3, 4), Factors(1.5, 1.1)),
    Goal(("conv3x3_64x*",), Factors(4, 1.5), Factors(1.2)),
    Goal(("matmul_*", "conv3x3_*"), Factors(4, 1.5), Factors(2)),
    Goal(("matmul_*", "conv3x3_*"), Factors(8, 1.7), weights="public"),
    Goal(("bert_layer_*",), Factors(10, 12), Factors(2.5, 8, 1.5)),
    Goal(("gpt2_layer_*",), Factors(8, 4), Factors(2.5, 8, 1.5)),
    Goal(("unet_mnist_*",), Factors(8, 12, 4), Factors(3, 10, 1.5)),
)


def goal_for(case: str, weights: str) -> Goal | None:
    """The goal of a case, if it has one."""
    return next((goal for goal in GOALS if goal.fits(case, weights)), None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines.

    Raises:
        JobError: no such file, or a line that is no record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise JobError(f"cannot read {path}; give a file of JSON lines") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"peer", "case"} <= record.keys():
            raise JobError(f"line {number} of {path} is no benchmark record")
        records.append(record)
    return records


#: (peer, case, weights)
Key = tuple[str, str, str]


def peer_records(paths: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """The peers' default configurations by (peer, case, weights) from files, or from the ``.jsonl`` files of folders.

    Of several records of one case, the one that other processes disturbed least.

    Raises:
        JobError: nothing to read, or nothing of the peers in it.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for record in read_lines(file):
                peer = str(record["peer"])
                if record.get("config") != PEERS.get(peer, ""):
                    continue
                key = (peer, str(record["case"]), str(record.get("weights", "secret")))
                known = found.get(key)
                if known is None or _disturbed(record) < _disturbed(known):
                    found[key] = record
    if not found:
        wanted = " or ".join(f"{peer} ({config})" for peer, config in PEERS.items())
        raise JobError(f"there is no record of {wanted} in what --peers names")
    return found


def _disturbed(record: Mapping[str, Any]) -> float:
    return 2.0 if "error" in record else float(record.get("foreign_cpu", 1.0))


def steps_of(record: Mapping[str, Any]) -> int | None:
    """Rounds or sends, whatever a record counts."""
    for name in ("steps", "spu_sends", "rounds"):
        if name in record:
            return int(record[name])
    return None


class Comparison(NamedTuple):
    """How many times less than a peer ours takes, and which goals that misses."""

    cpu: float
    bytes: float
    steps: float | None
    error_ok: bool
    missed: tuple[str, ...]
    has_goal: bool

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.has_goal and self.error_ok:
            return "no goal"
        return "met" if not self.missed else "missed: " + ", ".join(self.missed)


def compare(own: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> Comparison | None:
    """Ours beside a peer's record of the same case; None where either did not run."""
    if theirs is None or "error" in theirs or "error" in own:
        return None
    steps, their_steps = steps_of(own), steps_of(theirs)
    ratios = Factors(
        bound(theirs["cpu_s_per_party"]) / bound(own["cpu_s_per_party"]),
        max(theirs["tcp_sent_per_party"]) / max(own["tcp_sent_per_party"]),
        their_steps / steps if steps and their_steps is not None else None,
    )
    goal = goal_for(str(own["case"]), str(own["weights"]))
    factors = goal.against(str(theirs["peer"])) if goal else Factors()
    missed = [
        f"{name} {ratio:.3g}x of {asked:g}x"
        for name, ratio, asked in zip(("CPU", "MB", "steps"), ratios, factors, strict=True)
        if asked is not None and ratio is not None and ratio < asked
    ]
    error_ok = own["rel_l2_err"] <= max(theirs["rel_l2_err"], GOOD_ERROR)
    if not error_ok:
        missed.append("error")
    has_goal = any(asked is not None for asked in factors)
    assert ratios.cpu is not None
    assert ratios.bytes is not None
    return Comparison(ratios.cpu, ratios.bytes, ratios.steps, error_ok, tuple(missed), has_goal)


def latest(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Our records, the last of each case and setting, in the order of their first appearance."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for record in records:
        if record["peer"] == "sfumato":
            found[str(record["case"]), str(record["weights"]), str(record["config"])] = record
    return list(found.values())
