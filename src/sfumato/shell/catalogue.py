"""The catalogue for people: an overview and one function's table for the terminal, and a page with its figures."""

from __future__ import annotations

import base64
import html
import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sfumato.catalogue import FUNCTIONS, PROFILES, entries_of, function
from sfumato.catalogue.defects import DEFECTS, curve_of, defects_of, remarks_of
from sfumato.catalogue.entry import Function
from sfumato.catalogue.measure import recorded
from sfumato.catalogue.prices import Cost
from sfumato.catalogue.table import MAIN_SOURCE, Line, lines_of, to_json
from sfumato.errors import JobError
from sfumato.shell.figures import Figure, figures_of

__all__ = ["print_function", "print_overview", "show", "write_function_page"]

_LEGEND = (
    "? uncertain at the source; * another function, its error is a distance and it needs re-training; "
    "max error in fixed point at the source's fraction bits, in brackets that of the formula alone; mean and "
    "outside: weighted by the embedded pipeline's recorded inputs; bits of all parties per element; ~ derived from "
    "unit prices or code, not measured"
)


def show(name: str | None, out: Path | None, as_json: bool, console: Console) -> None:
    """What the command does: an overview without a name, else the table, the defects, and the page if asked.

    Raises:
        RangeError: no such function; lists them.
        JobError: the folder cannot be made.
    """
    if name is None and as_json:
        print(json.dumps({known: to_json(known) for known in FUNCTIONS}))
    elif as_json:
        print(json.dumps(to_json(function(name or "").name)))
    elif name is None:
        print_overview(console)
    else:
        print_function(function(name).name, console)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise JobError(f"cannot make the folder {out} for the pages") from None
        for known in FUNCTIONS if name is None else (function(name).name,):
            page = write_function_page(known, out)
            if not as_json:
                console.print(f"page: {page}")


# ---- numbers as text ---------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    if math.isinf(value) or abs(value) >= 1e6:
        return f"{value:.0e}"
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


def _range(lo: float, hi: float) -> str:
    return f"{lo:.4g} .. {hi:.4g}"


def _cost(cost: Cost | None) -> str:
    if cost is None:
        return "-"
    rounds = "-" if cost.rounds is None else str(cost.rounds)
    return f"{rounds} / {_number(cost.bits)}"


def _own_cost(cost: Cost) -> str:
    """In the source's protocol; a derived one is marked."""
    if cost.rounds is None:
        return "-"
    return _cost(cost) if "measured" in cost.where or "counted" in cost.where else f"~{_cost(cost)}"


def _share(value: float) -> str:
    if value == 0:
        return "0"
    if value < 1e-6:
        return "< 0.0001 %"
    return f"{100 * value:.2g} %" if value < 0.995 else "100 %"


def _marks(line: Line) -> str:
    return line.name + (" ?" if line.uncertain else "") + (" *" if line.another else "")


def _counts(line: Line) -> str:
    if math.isnan(line.multiplications):
        return "-"
    return f"{line.multiplications:.3g} / {line.comparisons:.3g}"


# ---- terminal ----------------------------------------------------------------------------------------------


def print_overview(console: Console) -> None:
    """One line per function."""
    table = Table(title="Published methods, and ours, by function", title_justify="left")
    for heading in (
        "function",
        "methods",
        "recorded inputs",
        "most accurate there",
        "fewest bits on rep3",
        "defects",
    ):
        table.add_column(heading, overflow="fold")
    for known in FUNCTIONS.values():
        lines = lines_of(known.name)
        record = next((r for r in recorded(known.name) if r.source == MAIN_SOURCE), None)
        serious = [line for line in lines if not line.another and line.rep3 is not None]
        exact = min(serious, key=lambda line: (line.main or line.stated).mean)
        # A method that misses a tenth of the function is no bargain.
        usable = [line for line in serious if (line.main or line.stated).max < 0.1] or serious
        cheap = min(usable, key=lambda line: line.rep3.bits or math.inf if line.rep3 else math.inf)
        table.add_row(
            known.name, str(len(entries_of(known.name))),
            "-" if record is None else _range(record.low, record.high),
            f"{exact.name} {_number((exact.main or exact.stated).mean)}",
            f"{cheap.name} {_number(cheap.rep3.bits if cheap.rep3 else None)}",
            str(len(defects_of(known.name)) or "-"),
        )  # fmt: skip
    console.print(table)
    console.print(f"{len(DEFECTS)} known defects; profiles: {', '.join(PROFILES)}")
    console.print("sfumato catalogue FUNCTION shows one; --out FOLDER writes a page with figures")


def print_function(name: str, console: Console) -> None:
    """The table of one function and its defects."""
    known, lines = FUNCTIONS[name], lines_of(name)
    table = Table(title=f"{name}: {_error_name(known)}", title_justify="left", padding=(0, 1))
    narrow = console.width < _WIDE
    shown = [i for i, heading in enumerate(_HEADINGS) if not (narrow and heading in _WIDE_ONLY)]
    for i in shown:
        table.add_column(_HEADINGS[i], overflow="fold", no_wrap=True)
    for line in lines:
        cells = _cells(line)
        # Without the formula's own error, in brackets, a narrow terminal holds the line.
        table.add_row(*(cells[i].split(" (")[0] if narrow else cells[i] for i in shown))
    console.print(table)
    console.print(_LEGEND + (f"; {_WIDE} columns show more" if narrow else ""))
    for record in recorded(name):
        console.print(f"recorded, {record.source}: {record.note}; {record.count:,} values in "
                      f"{_range(record.low, record.high)}")  # fmt: skip
    found = defects_of(name)
    if found or remarks_of(name):
        console.print("\nknown defects")
    for defect in found:
        curve = curve_of(defect)
        said = f"- {defect.title} ({', '.join(defect.entries)}): {_number(curve.measured)} {curve.what}"
        console.print(said, markup=False)
    for remark in remarks_of(name):
        console.print(f"- {remark.text} ({remark.source})", markup=False)


_HEADINGS = (
    "method", "range", "max error", "mean,\nrecorded", "outside", "products /\ncomparisons",
    "rounds/bits,\nown", "rounds/bits,\nrep3",
)  # fmt: skip

#: Columns that only a terminal of this width shows.
_WIDE_ONLY = frozenset(("range", "outside", "products /\ncomparisons"))
_WIDE = 132


def _error_name(known: Function) -> str:
    if known.name == "softmax":
        return "error as total variation of a row of 128 scores of deviation 2"
    if known.name == "layer_norm":
        return "largest error of a row of 128 values of deviation 1"
    return "relative error" if known.relative else "absolute error"


def _cells(line: Line) -> tuple[str, ...]:
    main = line.main
    return (
        _marks(line),
        _range(line.lo, line.hi),
        f"{_number(line.stated.max)} ({_number(line.exact)})",
        "-" if main is None else _number(main.mean),
        "-" if main is None else _share(main.outside),
        _counts(line),
        _own_cost(line.cost),
        _cost(line.rep3),
    )


# ---- the page ----------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #fff; }
td.n { white-space: nowrap; } img { max-width: 100%; } small { color: #666; }
tr.own { background: #f2f7ee; }
"""


def write_function_page(name: str, folder: Path) -> Path:
    """One self-contained page, ``catalogue-NAME.html``; its figures also as PNG files beside it."""
    known, lines = FUNCTIONS[name], lines_of(name)
    figures = figures_of(name, lines)
    for figure in figures:
        (folder / f"catalogue-{name}-{figure.key}.png").write_bytes(figure.png)
    body = [
        f"<h1>{name}</h1>",
        f"<p>{len(entries_of(name))} published methods and ours. Errors: {html.escape(_error_name(known))}. "
        f"{html.escape(_LEGEND)}.</p>",
        _html_records(name),
        _html_table(lines),
        *(_html_figure(figure) for figure in figures),
        _html_remarks(name),
        _html_notes(lines),
    ]
    page = folder / f"catalogue-{name}.html"
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>sfumato catalogue: {name}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>\n",
        encoding="utf-8",
    )
    return page


def _html_records(name: str) -> str:
    items = "".join(
        f"<li>{html.escape(r.source)}: {html.escape(r.note)}; {r.count:,} values in {_range(r.low, r.high)}</li>"
        for r in recorded(name)
    )
    return (
        f"<p>Recorded inputs:</p><ul>{items}</ul>"
        if items
        else "<p>No model here uses it: nothing recorded.</p>"
    )


def _html_table(lines: list[Line]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in (*_HEADINGS, "what, and where from"))
    rows = []
    for line in lines:
        cells = "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in _cells(line))
        where = html.escape(f"{line.what}; {line.source}; f = {line.frac}, {line.ring_bits} bits")
        how = html.escape(line.cost.where)
        style = ' class="own"' if line.name.startswith("sfumato") else ""
        rows.append(
            f"<tr{style}>{cells}<td>{where}<br><small>cost {how}; {html.escape(line.trust)}</small></td></tr>"
        )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _html_figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode("ascii")
    return (
        f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.caption)}</p>"
        f'<img alt="{html.escape(figure.title)}" src="data:image/png;base64,{data}">'
    )


def _html_remarks(name: str) -> str:
    items = "".join(
        f"<li>{html.escape(remark.text)} ({html.escape(remark.source)})</li>" for remark in remarks_of(name)
    )
    return f"<h2>Also reported, without a curve</h2><ul>{items}</ul>" if items else ""


def _html_notes(lines: list[Line]) -> str:
    items = []
    for line in lines:
        uncertain = f"uncertain: {line.uncertain}" if line.uncertain else ""
        said = "; ".join(part for part in (line.notes, f"range {line.range_is}", uncertain) if part)
        items.append(f"<li><b>{html.escape(line.name)}</b>: {html.escape(said)}</li>")
    return f"<h2>Notes</h2><ul>{''.join(items)}</ul>"
