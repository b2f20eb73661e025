"""``sfumato reproduce puma | ditto``: what transformers of published sizes cost, beside what the papers print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sfumato.bench.machine import machine, machine_line
from sfumato.bench.page import markdown_table
from sfumato.errors import JobError
from sfumato.shell.reproduce import bars
from sfumato.study.costs import PUBLISHED, CostRow, cost_rows, records

__all__ = ["DEFAULT_MODELS", "models_of", "run_costs"]

#: What is told where nothing else is asked for.
DEFAULT_MODELS = {"puma": "bert-base:128,gpt2-base:32", "ditto": "bert-base:128,gpt2-base:32"}
_TITLES = {"puma": "PUMA", "ditto": "Ditto"}
_GIB = 1 << 30


def models_of(text: str) -> list[tuple[str, int]]:
    """(model, tokens) of ``"bert-base:128,gpt2-base:32"``.

    Raises:
        JobError: another form.
    """
    found = []
    for part in text.split(","):
        name, _, tokens = part.strip().partition(":")
        if not tokens.isdigit() or not 1 <= int(tokens) <= 512:
            raise JobError(
                f"--model takes NAME:TOKENS with 1 to 512 tokens, such as bert-base:128, not {part!r}"
            )
        found.append((name, int(tokens)))
    return found


def run_costs(paper: str, models: str, networks: Sequence[str], out: Path, console: Console) -> list[CostRow]:
    """Count, print, and write ``PAPER-costs.json`` and ``.md`` into the folder.

    Raises:
        JobError: an unknown paper, model or network.
    """
    wanted = models_of(models)
    out.mkdir(parents=True, exist_ok=True)
    with bars(console) as progress:
        rows = cost_rows(paper, wanted, networks, progress=progress)
    heads = _heads(networks)
    table = Table(title=f"{paper}: bytes, rounds and agreement", title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*_cells(row, _base(rows, row), networks))
    console.print(table)
    json_path, page = out / f"{paper}-costs.json", out / f"{paper}-costs.md"
    json_path.write_text(records(rows), encoding="utf-8")
    page.write_text(_page(paper, models, rows, networks), encoding="utf-8")
    console.print(f"page: {page}\nrecords: {json_path}", style="bold")
    return rows


def _base(rows: Sequence[CostRow], row: CostRow) -> CostRow:
    """The first row of the same model and length."""
    return next(r for r in rows if (r.model, r.tokens) == (row.model, row.tokens))


def _heads(networks: Sequence[str]) -> tuple[str, ...]:
    times = [head for name in networks for head in (f"{name}, s", f"{name}, least s")]
    return ("model", "profile", "GB", "of it client", "fewer", "rounds", "error", *times)


def _cells(row: CostRow, base: CostRow, networks: Sequence[str]) -> tuple[str, ...]:
    if row.error is not None:
        told = f"{row.error:.1e}"
    else:
        told = "-" if row.same is None else "same token" if row.same else "another token"
    times = [f"{value[name]:.2f}" for name in networks for value in (row.seconds, row.least)]
    return (
        f"{row.model}, {row.tokens}", row.label, f"{row.total_gb:.3f}", f"{row.client_bytes / 1e9:.4f}",
        f"{base.total_gb / row.total_gb:.2f}x", f"{row.rounds:,}", told, *times,
    )  # fmt: skip


def _page(paper: str, models: str, rows: Sequence[CostRow], networks: Sequence[str]) -> str:
    timed = "".join(f" --network {name}" for name in networks)
    lines = [
        f"# {_TITLES[paper]}: cost of published sizes", "",
        f"`sfumato reproduce {paper} --model {models}{timed}`. {machine_line(machine())}", "",
        "Random weights, all secret; token ids secret, as keys of point functions; bytes (1e9) of the three parties "
        "and of the client's own link, certificate included, exact; \"fewer\" is against a model's first row. Rows run "
        "on the same engine and kernels: a paper's row shows its functions, types and casts, not its system. Error: "
        "relative L2 of the last hidden state against the same model in float, by the plan's arithmetic in the clear; "
        "models of the GPT type answer with the next token's id, argmax included. Ranges are from two other random "
        "inputs.", "",
        markdown_table(_heads(networks), [_cells(row, _base(rows, row), networks) for row in rows]), "",
    ]  # fmt: skip
    if networks:
        lines += [
            "Seconds are of one call and its certificate, three threads of one process on links with the network's "
            "latency and bandwidth; the parties share the machine's cores, so computing counts up to three times over "
            "what three hosts would take. Least: rounds times latency, or bytes over bandwidth, whichever is more.", "",
        ]  # fmt: skip
    printed: list[tuple[str, ...]] = [
        (f"{name}, {tokens}", p.label, f"{p.gib:.3f}", f"{p.gib * _GIB / 1e9:.2f}",
         "-" if p.seconds is None else f"{p.seconds:.1f}", p.how or "printed")
        for name, tokens in dict.fromkeys((row.model, row.tokens) for row in rows)
        for p in PUBLISHED.get((name, tokens), ())
    ]  # fmt: skip
    if printed:
        lines += ["## What the papers print", "", "On their machines and engines; GiB of all parties.", ""]
        lines.append(markdown_table(("model", "system", "GiB", "GB", "s", ""), printed))
    return "\n".join(lines).rstrip() + "\n"
