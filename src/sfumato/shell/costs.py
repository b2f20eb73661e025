"""``sfumato reproduce puma | ditto | mpcformer | marill``: what transformers of published sizes cost, beside what the
papers print, and what students of their recipes are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sfumato.errors import JobError
from sfumato.shell.costs_page import base_of, cells, heads, page
from sfumato.shell.reproduce import bars
from sfumato.study.costs import CostRow, cost_rows, records
from sfumato.study.utility import students_in

__all__ = ["DEFAULT_MODELS", "Costs", "models_of", "run_costs"]

_SIZES = "bert-base:32,bert-base:64,bert-base:128,bert-base:256,bert-large:128,gpt2-base:32,gpt2-medium:32"
#: What is counted where nothing else is asked for, and of it what is also run.
DEFAULT_MODELS = {
    "puma": (_SIZES, "bert-base:128,gpt2-base:32"),
    "ditto": (_SIZES, "bert-base:128,gpt2-base:32"),
    "mpcformer": ("bert-base:128", "all"),
    "marill": ("bert-base:128", "all"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What to tell. ``model``: as :func:`models_of` takes it (empty: the paper's first); ``run``: those that are also
    run for error and seconds, ``"all"`` or ``"none"`` (empty: all that ``model`` names, or the paper's first).
    ``scores``: a file of students' scores."""

    paper: str
    model: str = ""
    run: str = ""
    networks: Sequence[str] = ()
    scores: Path | None = None
    out: Path = Path("reproduce")

    def __post_init__(self) -> None:
        counted, run = DEFAULT_MODELS[self.paper]
        object.__setattr__(self, "run", self.run or ("all" if self.model else run))
        object.__setattr__(self, "model", self.model or counted)

    @property
    def command(self) -> str:
        """The command line that asks for it."""
        timed = "".join(f" --network {name}" for name in self.networks)
        scored = "" if self.scores is None else f" --scores {self.scores.name}"
        run = "" if self.run == "all" else f" --run {self.run}"
        return f"sfumato reproduce {self.paper} --model {self.model}{run}{timed}{scored}"


def models_of(text: str, option: str = "--model") -> list[tuple[str, int]]:
    """(model, tokens) of ``"bert-base:128,gpt2-base:32"``.

    Raises:
        JobError: another form.
    """
    found = []
    for part in text.split(","):
        name, _, tokens = part.strip().partition(":")
        if not tokens.isdigit() or not 1 <= int(tokens) <= 512:
            raise JobError(
                f"{option} takes NAME:TOKENS with 1 to 512 tokens, such as bert-base:128, not {part!r}"
            )
        found.append((name, int(tokens)))
    return found


def run_costs(asked: Costs, console: Console) -> list[CostRow]:
    """Count, print, and write ``PAPER-costs.json`` and ``.md`` into the folder.

    Raises:
        JobError: an unknown paper, model or network; a model to run that is not counted; a file without scores.
    """
    models = models_of(asked.model)
    run = None if asked.run == "all" else [] if asked.run == "none" else models_of(asked.run, "--run")
    students = [] if asked.scores is None else students_in(asked.scores, asked.paper)
    asked.out.mkdir(parents=True, exist_ok=True)
    with bars(console) as progress:
        rows = cost_rows(asked.paper, models, asked.networks, run=run, progress=progress)
    table = Table(title=f"{asked.paper}: bytes, rounds and agreement", title_justify="left")
    for i, head in enumerate(heads(asked.paper, asked.networks)):
        table.add_column(head, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*cells(asked.paper, row, base_of(rows, row), asked.networks))
    console.print(table)
    json_path, page_path = asked.out / f"{asked.paper}-costs.json", asked.out / f"{asked.paper}-costs.md"
    json_path.write_text(records(rows), encoding="utf-8")
    page_path.write_text(page(asked.paper, asked.command, rows, asked.networks, students), encoding="utf-8")
    console.print(f"page: {page_path}\nrecords: {json_path}", style="bold")
    return rows
