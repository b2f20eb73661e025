"""``sfumato bench``: the peers' cases through three real processes, side by side with the peers' own records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sfumato.bench import page as pages
from sfumato.bench.cases import all_cases, select
from sfumato.bench.floor import measure_rates
from sfumato.bench.machine import machine
from sfumato.bench.measure import Settings, measure
from sfumato.bench.peers import Key, latest, peer_records, read_lines
from sfumato.errors import JobError
from sfumato.graph.planning import PROFILES

__all__ = ["Bench", "list_cases", "run_bench"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What to measure and where to write."""

    cases: Sequence[str] = ()
    settings: Settings = field(default_factory=Settings)
    json: Path | None = None
    peers: Sequence[Path] = ()
    out: Path | None = None


def list_cases(console: Console) -> None:
    """Print the names of all cases."""
    for case in all_cases():
        notes = ["weights"] * case.has_weights + ["only when named"] * case.long
        console.print(case.name + (f"  ({', '.join(notes)})" if notes else ""), highlight=False)


def run_bench(bench: Bench, console: Console) -> list[dict[str, Any]]:
    """Measure, print, write; what can be refused is refused before anything is measured."""
    if bench.settings.profile not in PROFILES:
        raise JobError(f"there is no profile {bench.settings.profile!r}; use one of {', '.join(PROFILES)}")
    chosen = select(bench.cases, public=bench.settings.public)
    peers: dict[Key, dict[str, Any]] = peer_records(bench.peers) if bench.peers else {}
    for path in (bench.json, bench.out):
        if path is not None and not path.parent.is_dir():
            raise JobError(f"there is no folder {path.parent} for {path.name}")
    kept = read_lines(bench.json) if bench.json is not None and bench.json.exists() else []
    new: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("self-test of this machine", total=len(chosen))
        rates = measure_rates()
        for case in chosen:
            progress.update(task, description=case.name)
            record = measure(case, bench.settings, rates)
            new.append(record)
            if bench.json is not None:
                with open(bench.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**record, "rates": rates.to_json()}) + "\n")
            progress.advance(task)
    narrow = console.width < _WIDE
    console.print(_table("cases", pages.own_header(), [pages.own_row(own) for own in new], narrow))
    if peers:
        rows = [pages.comparison_row(own, peers) for own in new]
        console.print(_table("beside the peers", pages.comparison_header(), rows, narrow))
    if bench.out is not None:
        text = pages.page(latest([*kept, *new]), machine(), rates.to_json(), peers)
        bench.out.write_text(text, encoding="utf-8")
        console.print(f"page: {bench.out}", style="bold")
    if bench.json is not None:
        console.print(f"records: {bench.json}", style="bold")
    return new


#: A terminal of this width shows every column; a narrower one those that people compare by.
_WIDE = 170
_ASIDE = ("weights", "wall", "floor", "certificate", ": CPU s", "rel error", "steps", "MB", "CPU bound")


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], narrow: bool) -> Table:
    beside = any("/ ours" in name for name in header)
    aside = _ASIDE if beside else _ASIDE[:4]
    shown = [i for i, name in enumerate(header) if not (narrow and any(word in name for word in aside))]
    table = Table(title=title + (": CPU, bytes, steps" if beside and narrow else ""), title_justify="left")
    for i in shown:
        table.add_column(header[i], justify="left" if i < 2 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table
