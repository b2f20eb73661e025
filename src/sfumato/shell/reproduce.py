"""``sfumato reproduce``: a paper's tables at this machine's scale, as JSON and a page with plots and images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sfumato.bench.machine import machine, machine_line
from sfumato.quality import Interval
from sfumato.study.inception import Inception, inception_distances
from sfumato.study.merit import Merit
from sfumato.study.reproduce import Asked, Outcome, Validation, reproduce, tables_of, write
from sfumato.study.tables import ORIGINAL

__all__ = ["bars", "run_reproduce"]

_COLUMNS = (
    "row", "images", "Fréchet", "difference", "accuracy", "CLIP", "F1", "precision / recall", "PSNR", "MB", "rounds",
    "CPU s",
)  # fmt: skip
_GRID_ROWS, _GRID_IMAGES = 8, 10


def run_reproduce(asked: Asked, console: Console, inception: Path | None = None) -> Outcome:
    """Draw, measure, print, and write ``PAPER-MODEL.json``, ``.md`` and its pictures into the folder.

    ``inception``: a file of InceptionV3's weights; distances in its features go to the page, and to
    ``PAPER-MODEL-inception.json``.

    Raises:
        JobError: what was asked for cannot be drawn or examined.
    """
    examiner = None if inception is None else Inception(inception)
    asked.out.mkdir(parents=True, exist_ok=True)
    with bars(console) as progress:
        outcome = reproduce(asked, progress)
        distances: dict[str, float] = {}
        if examiner is not None:
            images = {name: row.images for name, row in outcome.rows.items()}
            distances = inception_distances(
                examiner, images, ORIGINAL.name, lambda done, all: progress("Inception's features", done, all)
            )
    for table in tables_of(asked, outcome.study):
        shown = Table(title=table.title, title_justify="left")
        heads, rows = _told([_cells(outcome.merits[row.name]) for row in table.rows])
        for i, name in enumerate(heads):
            shown.add_column(name, justify="left" if i == 0 else "right")
        for cells in rows:
            shown.add_row(*cells)
        console.print(shown)
    for finding in outcome.findings:
        console.print(f"{_verdict(finding.holds)}: {finding.claim}. {finding.numbers}", markup=False)
    for name, distance in distances.items():
        console.print(f"{name}: {distance:.3f} in Inception's features to {ORIGINAL.name}", markup=False)
    records = write(outcome)
    if examiner is not None:
        beside = asked.out / f"{asked.name}-inception.json"
        beside.write_text(json.dumps(distances, indent=1) + "\n", encoding="utf-8")
    page = _write_page(outcome, distances)
    console.print(f"page: {page}\nrecords: {records}", style="bold")
    return outcome


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """``progress(what, done, all)``, shown as bars."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, all: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=all)
            bars.update(tasks[what], completed=done, total=all)

        yield progress


def _verdict(holds: bool | None) -> str:
    return "open" if holds is None else "holds" if holds else "does not hold"


def _cells(m: Merit) -> tuple[str, ...]:
    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    def percent(x: Interval | None) -> str:
        return "-" if x is None else f"{100 * x.value:+.1f} % [{100 * x.low:+.1f}, {100 * x.high:+.1f}]"

    told = "-" if m.accuracy is None else f"{100 * m.accuracy.value:.1f} %"
    both = "-" if m.precision is None else f"{m.precision:.2f} / {m.recall:.2f}"
    return (
        m.name, f"{m.images:,}", number(m.frechet, ".3f"), percent(m.against), told, number(m.clip, ".2f"),
        number(m.f1, ".3f"), both,
        number(m.psnr_db, ".1f"), number(m.megabytes, ",.1f"), number(m.rounds, ","), number(m.cpu_s, ".3f"),
    )  # fmt: skip


def _told(rows: list[tuple[str, ...]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows, without the columns that say nothing."""
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] != "-" for row in rows)]
    return tuple(_COLUMNS[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


# ---- the page ----------------------------------------------------------------------------------------------


def _write_page(outcome: Outcome, distances: Mapping[str, float]) -> Path:
    name, out, most = outcome.asked.name, outcome.asked.out, outcome.asked.secure_steps
    _grid(outcome, out / f"{name}-images.png")
    _plot(outcome, out / f"{name}-cost.png")
    lines = [
        f"# {'Our few-step settings' if outcome.asked.ours else outcome.study.title}", "",
        f"`sfumato reproduce {outcome.study.name} --model {outcome.asked.model} --images {outcome.asked.images}"
        f"{f' --secure {outcome.asked.secure}' if outcome.asked.secure else ''}"
        f"{f' --secure-steps {most}' if outcome.asked.secure and most is not None else ''}"
        f"{' --main' if outcome.asked.main else ''}{' --ours' if outcome.asked.ours else ''}`. "
        f"{machine_line(machine())}", "",
        "Fréchet distance, precision and recall are in the features of a classifier that was trained on the same real "
        "data, so they are not comparable with published FID; differences are to the first row, with 95 % intervals of "
        "a bootstrap over pairs of the same prompt and seed. PSNR is the median to the original's image. MB and rounds "
        "are between the parties for one image, exact, online; CPU seconds are of the simulation (`plain`), not of the "
        "protocol. Weights public, text encoder and image decoder at the client.", "",
        "## What holds", "",
        *(f"- **{_verdict(f.holds)}**: {f.claim}. {f.numbers}." for f in outcome.findings), "",
        f"![images by row]({name}-images.png)", "", f"![quality against bytes]({name}-cost.png)", "",
    ]  # fmt: skip
    for table in tables_of(outcome.asked, outcome.study):
        lines += [f"## {table.title}", "", f"{table.shows[0].upper()}{table.shows[1:]}.", ""]
        lines += _markdown(*_told([_cells(outcome.merits[row.name]) for row in table.rows]))
    if distances:
        lines += ["## Inception's features", "",
                  f"Fréchet distance to the images of {ORIGINAL.name}, in the features of published FID (InceptionV3, "
                  "torch-fidelity). It grows as images get fewer: compare rows of as many images.", ""]  # fmt: skip
        shown: list[tuple[str, ...]] = [
            (name, f"{outcome.merits[name].images:,}", f"{d:.3f}") for name, d in distances.items()
        ]
        lines += _markdown(("row", "images", "Fréchet, Inception"), shown)
    if outcome.validations:
        lines += ["## The simulation against the protocol", "",
                  "The same prompts and seeds, by the plan's arithmetic in the clear and by three processes over TLS. "
                  "Truncation rounds at random in both, so images differ in their last bits. CPU s are of the three "
                  "parties together, 20 images at once; a step's over that of the exact network.", ""]  # fmt: skip
        lines += _markdown(
            ("row", "images", "PSNR, smallest", "PSNR, median", "same class", "Fréchet, protocol",
             "Fréchet, simulation", "CPU s an image", "a step, over float"),
            [_validated(v) for v in outcome.validations],
        )  # fmt: skip
    page = out / f"{name}.md"
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return page


def _validated(v: Validation) -> tuple[str, ...]:
    told = "-" if v.merit.frechet is None else f"{v.merit.frechet:.3f}"
    near, same = (f"{v.smallest_db:.1f}", f"{v.median_db:.1f}"), f"{100 * v.same_class:.1f} %"
    plain = "-" if v.frechet is None else f"{v.frechet:.3f}"
    spent = (f"{v.merit.cpu_s:.2f}", f"{v.step_ratio:.0f}")
    return (v.name, f"{v.merit.images:,}", *near, same, told, plain, *spent)


def _markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def _grid(outcome: Outcome, path: Path) -> None:
    """The main rows, one above the other, of the same prompts and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(outcome.rows)[:_GRID_ROWS]
    step = max(1, len(outcome.rows[names[0]].images[:100]) // (2 * _GRID_IMAGES))
    figure, axes = plt.subplots(
        len(names), 1, figsize=(_GRID_IMAGES * 0.9, len(names) * 1.15), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        images = outcome.rows[name].images[:: max(1, step // 5)][:_GRID_IMAGES].numpy()
        strip = np.concatenate(list(images.transpose(0, 2, 3, 1)), axis=1)
        axis.imshow(strip.squeeze(), cmap="gray", vmin=0, vmax=255)
        cost = outcome.merits[name].megabytes
        axis.set_title(
            f"{name}: {'in the clear' if cost is None else f'{cost:,.0f} MB'}", fontsize=8, loc="left"
        )
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot(outcome: Outcome, path: Path) -> None:
    """How much further than the original's images a row's are from real ones, against bytes. Not the distances
    themselves: those fall with the number of images, and tables have different ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    for name, m in outcome.merits.items():
        if m.megabytes is None or m.against is None:
            continue
        middle, low, high = (100.0 * x for x in (m.against.value, m.against.low, m.against.high))
        ours = name.startswith("ours")
        axis.errorbar(m.megabytes, middle, [[max(0.0, middle - low)], [max(0.0, high - middle)]],
                      fmt="s" if ours else "o", color="#c0392b" if ours else "#1f4e79", lw=0.7, ms=4)  # fmt: skip
        axis.annotate(name, (m.megabytes, middle), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axis.axhline(0.0, color="#888", lw=1, ls="--")
    axis.set_xscale("log")
    axis.margins(x=0.2)
    axis.set_xlabel("MB between the parties, one image")
    axis.set_ylabel("Fréchet distance over that of the original's images, %")
    figure.savefig(path, dpi=110)
    plt.close(figure)
