"""The text of a plan: what runs where, with which methods, and why moving work to the client shows
nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sfumato.graph.handlers import Options

__all__ = ["table_text"]

_WHY = {
    "public": "from public weights, constants and public arguments only; known to all",
    "owner": "from secret weights alone; the model owner computes it once and shares it",
    "client": "from what the client knows by itself; computed there in float, and what is used is shared",
    "secret": "under the protocol",
}


def table_text(
    title: str,
    options: Options,
    inputs: Sequence[tuple[str, str, tuple[int, ...]]],
    runs: Counter[str],
    targets: Counter[str],
    methods: Counter[str],
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
    if targets:
        shown = ", ".join(f"{count} {target.split('.')[1]}" for target, count in targets.most_common(8))
        lines += ["", f"  under the protocol: {shown}{', ...' if len(targets) > 8 else ''}"]
    if methods:
        lines.append("  methods: " + ", ".join(f"{count} {name}" for name, count in methods.most_common()))
    if moved:
        lines.append(
            f"  {moved} calls moved to the client: it knows all their inputs, so it learns nothing new, "
            "and nobody else sees them"
        )
    return "\n".join([*lines, *(f"  note: {note}" for note in notes)])
