"""The catalogue's figures: error against x over what models feed the function, error against cost, and the defects."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfumato.catalogue import FUNCTIONS, entries_of, get
from sfumato.catalogue.defects import Curve, Defect, curve_of, defects_of
from sfumato.catalogue.entry import Entry, Function
from sfumato.catalogue.measure import error_curve, grid, recorded, rows, scaling
from sfumato.catalogue.ours import own_methods
from sfumato.catalogue.table import MAIN_SOURCE, Line
from sfumato.catalogue.words import Reals

__all__ = ["Figure", "figures_of"]

#: Errors are drawn between these.
_FLOOR, _CEILING = 1e-6, 1e3
_COLUMNS = 4
_DEVIATIONS = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
_SCALES = np.exp(np.linspace(math.log(0.02), math.log(50.0), 13))
_INK, _RANGE, _HISTOGRAM = "#1f4e79", "#cfe3f5", "#c9a227"


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with what it shows."""

    key: str
    title: str
    caption: str
    png: bytes


def figures_of(name: str, lines: Sequence[Line]) -> list[Figure]:
    """All figures of one function."""
    known = FUNCTIONS[name]
    found = [_rows_figure(known) if known.rows else _curves_figure(known), _cost_figure(known, lines)]
    if name in ("reciprocal", "rsqrt"):
        found.append(_scaling_figure(name))
    return found + [_defect_figure(defect) for defect in defects_of(name)]


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    plt.close(figure)
    return buffer.getvalue()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _panels(count: int, height: float = 2.1) -> tuple[Any, Any]:
    """A grid of small panels with shared axes; spare ones are hidden."""
    lines = math.ceil(count / _COLUMNS)
    figure, axes = _pyplot().subplots(
        lines, _COLUMNS, figsize=(12.5, height * lines + 0.7), sharex=True, sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    flat = axes.ravel()
    for axis in flat[count:]:
        axis.set_visible(False)
    # Where the panel below is missing, the one above it keeps its labels.
    for index in range(count):
        if index + _COLUMNS >= count:
            flat[index].tick_params(labelbottom=True)
    return figure, flat


# ---- error against x ---------------------------------------------------------------------------------------


def _span(known: Function) -> tuple[float, float]:
    """What the panels show: the usual range and the recorded one."""
    lo, hi = known.lo, known.hi
    for record in recorded(known.name):
        if record.source == MAIN_SOURCE:
            lo, hi = min(lo, record.low), max(hi, record.high)
    return (max(lo, 1e-4), hi) if known.log else (lo, hi)


def _curves_figure(known: Function) -> Figure:
    entries, own = entries_of(known.name), own_methods(known.name)[:1]
    lo, hi = _span(known)
    x = grid(known, lo, hi, 1201)
    figure, axes = _panels(len(entries) + len(own))
    for axis, entry in zip(axes, entries, strict=False):
        _panel(axis, known, x, error_curve(entry, x), (entry.lo, entry.hi), _mark(entry), entry.frac)
    for axis, method in zip(axes[len(entries) :], own, strict=False):
        _panel(
            axis, known, method.curve[0], method.curve[1], (method.lo, method.hi), method.name, method.frac
        )
    axes[0].set_xlim(lo, hi)
    figure.supxlabel("x", fontsize="small")
    figure.supylabel("relative error" if known.relative else "absolute error", fontsize="small")
    caption = (
        "Each panel is one method at its own fraction bits f. Blue band: its range. Yellow: how often the embedded "
        "pipeline feeds x (its own scale, linear). Errors below 1e-6 and above 1e3 are drawn at the edge."
    )
    return Figure("curves", f"{known.name}: error against x", caption, _png(figure))


def _mark(entry: Entry) -> str:
    return entry.name + (" ?" if entry.uncertain else "") + (" *" if entry.another else "")


def _panel(
    axis: Any, known: Function, x: Reals, error: Reals, stated: tuple[float, float], title: str, frac: int
) -> None:
    axis.axvspan(*stated, color=_RANGE, alpha=0.55, lw=0)
    record = next((r for r in recorded(known.name) if r.source == MAIN_SOURCE), None)
    if record is not None:
        counts = np.array(record.counts, dtype=np.float64)
        below = axis.twinx()
        below.stairs(counts / counts.max(), np.array(record.edges), fill=True, color=_HISTOGRAM, alpha=0.45)
        below.set_ylim(0, 4)
        below.set_yticks([])
        below.set_zorder(1)
        axis.set_zorder(2)
        axis.patch.set_visible(False)
    axis.plot(x, np.clip(np.nan_to_num(error, nan=_CEILING), _FLOOR, _CEILING), color=_INK, lw=1.0)
    axis.set_yscale("log")
    axis.set_ylim(_FLOOR, _CEILING)
    axis.set_yticks([1e-6, 1e-4, 1e-2, 1e0, 1e2])
    if known.log:
        axis.set_xscale("log")
    axis.set_title(f"{title}  (f={frac})", fontsize=8.5)
    axis.tick_params(labelsize=7)
    axis.grid(True, which="major", lw=0.3, alpha=0.6)


def _rows_figure(known: Function) -> Figure:
    softmax = known.name == "softmax"
    at = _DEVIATIONS if softmax else _SCALES
    lengths = (77, 1024) if softmax else (128,)
    entries = entries_of(known.name)
    figure, axes = _panels(len(entries))
    for axis, entry in zip(axes, entries, strict=False):
        for length, style in zip(lengths, ("-", "--"), strict=False):
            axis.plot(at, _row_curve(entry, length, at), style, color=_INK, lw=1.1, marker=".", ms=3,
                      label=f"{length} values")  # fmt: skip
        axis.set_yscale("log")
        if not softmax:
            axis.set_xscale("log")
        axis.set_ylim(_FLOOR, _CEILING)
        axis.set_yticks([1e-6, 1e-4, 1e-2, 1e0, 1e2])
        axis.set_title(f"{_mark(entry)}  (f={entry.frac})", fontsize=8.5)
        axis.tick_params(labelsize=7)
        axis.grid(True, which="major", lw=0.3, alpha=0.6)
        for record in recorded(known.name):
            if record.source == MAIN_SOURCE:
                spread = [float(np.std(row)) for row in record.rows]
                axis.plot(spread, np.full(len(spread), 2.5 * _FLOOR), "|", color=_HISTOGRAM, ms=9)
    axes[0].legend(fontsize=7, loc="upper right")
    figure.supxlabel("standard deviation of the row", fontsize="small")
    measure = "total variation" if softmax else "largest error"
    figure.supylabel(f"{measure}, mean of 8 rows", fontsize="small")
    caption = (
        "Rows of normal values. Yellow ticks: deviations of rows recorded in the embedded pipeline. "
        f"{measure.capitalize()} below 1e-6 and above 1e3 is drawn at the edge."
    )
    return Figure("curves", f"{known.name}: error against the spread of a row", caption, _png(figure))


def _row_curve(entry: Entry, length: int, at: Reals) -> Reals:
    found = []
    for deviation in at:
        error = error_curve(entry, rows(8, length, float(deviation)))
        each = error.sum(-1) / 2 if entry.function == "softmax" else error.max(-1)
        found.append(float(each.mean()))
    return np.clip(np.nan_to_num(np.array(found), nan=_CEILING), _FLOOR, _CEILING)


# ---- error against cost ------------------------------------------------------------------------------------


def _cost_figure(known: Function, lines: Sequence[Line]) -> Figure:
    """Numbered points, and their names beside the plot, so that no labels collide."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(12.5, 5.6), layout="constrained", sharey=True)
    shown = [line for line in lines if line.rep3 is not None or line.cost.bits]
    for axis, title, of in (
        (axes[0], "each in its own protocol, published or derived", lambda line: line.cost),
        (axes[1], "as it runs here, on rep3", lambda line: line.rep3),
    ):
        points = [(i, line, of(line)) for i, line in enumerate(shown, 1)]
        points = [(i, line, cost) for i, line, cost in points if cost is not None and cost.bits]
        xs = np.array([cost.bits for _, _, cost in points], dtype=np.float64)
        ys = np.clip(np.array([(line.main or line.stated).mean for _, line, _ in points]), _FLOOR, _CEILING)
        for (_, line, _), x, y in zip(points, xs, ys, strict=True):
            own = line.name.startswith("sfumato")
            axis.plot(x, y, "s" if own else "o", ms=6, color="#4a8f29" if own else _INK,
                      mfc="none" if line.another or line.uncertain else None)  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("bits per element, all parties", fontsize="small")
        axis.set_title(title, fontsize="medium")
        axis.grid(True, which="major", lw=0.3, alpha=0.6)
        axis.margins(0.1)
        _number_points(axis, [i for i, _, _ in points], xs, ys)
    told = (
        "mean error on the recorded inputs" if any(line.main for line in lines) else "mean error on its range"
    )
    axes[0].set_ylabel(told, fontsize="small")
    names = [f"{i:2d} {line.name}" for i, line in enumerate(shown, 1)]
    half = math.ceil(len(names) / 4)
    columns = [names[k : k + half] for k in range(0, len(names), half)]
    text = "\n".join(
        "   ".join(column[row].ljust(34) if row < len(column) else " " * 34 for column in columns)
        for row in range(half)
    )
    figure.supxlabel(text, fontsize=7.5, family="monospace", ha="left", x=0.03)
    caption = (
        "Left and down is better. Green squares: this library, planned for the recorded range. Hollow: uncertain, or "
        "another function. Published costs are those of different protocols and trust models."
    )
    return Figure("cost", f"{known.name}: error against cost", caption, _png(figure))


def _number_points(axis: Any, numbers: Sequence[int], xs: Reals, ys: Reals) -> None:
    """Numbers beside the points; points that share a place share one label."""
    places: list[tuple[float, float, list[int]]] = []
    wide = np.diff(np.log10(axis.get_xlim()))[0]
    tall = np.diff(np.log10(axis.get_ylim()))[0]
    for number, x, y in zip(numbers, np.log10(xs), np.log10(ys), strict=True):
        for px, py, held in places:
            if abs(px - x) < 0.06 * wide and abs(py - y) < 0.04 * tall:
                held.append(number)
                break
        else:
            places.append((float(x), float(y), [number]))
    for px, py, held in places:
        label = ",".join(map(str, held[:4])) + (",..." if len(held) > 4 else "")
        axis.annotate(label, (10**px, 10**py), xytext=(5, 4), textcoords="offset points", fontsize=7.5)


# ---- the scaling factor ------------------------------------------------------------------------------------


def _scaling_figure(name: str) -> Figure:
    kernel = get("sdu.reciprocal-d64" if name == "reciprocal" else "sdu.rsqrt-d64")
    points = (4.0, 64.0, 256.0)
    divisors = tuple(2.0**i for i in range(13))
    found = scaling(kernel, divisors=divisors, fracs=(16, 18, 20), points=points)
    figure, axes = _pyplot().subplots(1, len(points), figsize=(12.5, 3.8), layout="constrained", sharey=True)
    for axis, x in zip(axes, points, strict=True):
        for frac, colour in zip((16, 18, 20), ("#b03a2e", "#1f4e79", "#4a8f29"), strict=True):
            chosen = [p for p in found if p.x == x and p.frac == frac]
            d = np.array([p.d for p in chosen])
            axis.plot(
                d,
                np.clip([p.measured for p in chosen], 1e-7, 1e2),
                ".",
                color=colour,
                label=f"measured, f={frac}",
            )
            expected = np.clip([p.law + p.grain for p in chosen], 1e-7, 1e2)
            axis.plot(d, expected, "-", color=colour, lw=1.0, label=f"law, f={frac}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"x near {x:g}", fontsize="medium")
        axis.set_xlabel("divisor d", fontsize="small")
        axis.grid(True, which="major", lw=0.3, alpha=0.6)
    axes[0].set_ylabel("relative error, largest of 200", fontsize="small")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7.5, loc="outside right upper")
    grain = "2^-f x" if name == "reciprocal" else "2^-f sqrt(x)"
    law = "2^-f d / x" if name == "reciprocal" else "2^-f d / (2 x)"
    caption = (
        f"CrypTen's kernel at x/d, scaled back. Law: rho(x/d), the kernel's own error, plus {law}, plus {grain} for "
        "the result's own rounding; rounding inside the last step may add a few units. In exact arithmetic scaling "
        "amplifies nothing; in fixed point its second term grows with d."
    )
    return Figure("scaling", f"{name}: what the scaling factor d costs", caption, _png(figure))


# ---- defects -----------------------------------------------------------------------------------------------


def _defect_figure(defect: Defect) -> Figure:
    curve = curve_of(defect)
    figure, axis = _pyplot().subplots(figsize=(8.2, 3.6), layout="constrained")
    _draw(axis, curve)
    caption = f"{defect.source}; {', '.join(defect.entries)}. Measured: {curve.measured:.3g} {curve.what}."
    return Figure(f"defect-{defect.key}", f"Defect: {defect.title}", caption, _png(figure))


def _draw(axis: Any, curve: Curve) -> None:
    styles = ("-", "--", "-.", ":", "-", "--")
    for (label, y), style in zip(curve.lines, styles, strict=False):
        axis.plot(curve.x, y, style, lw=1.3, label=label, marker="." if len(curve.x) < 30 else None)
    if curve.log_x:
        axis.set_xscale("log")
    if curve.log_y:
        axis.set_yscale("log")
    axis.set_xlabel(curve.x_label, fontsize="small")
    axis.set_ylabel(curve.y_label, fontsize="small")
    axis.grid(True, which="major", lw=0.3, alpha=0.6)
    axis.legend(fontsize="small")
