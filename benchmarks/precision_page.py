"""The page and the picture of ``precision.py``, from its record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

__all__ = ["draw", "kind", "page"]

Row = Mapping[str, Any]
_MOST = 14  # layers in a table; the record has all
_ENGINE, _SUMS, _DITTO = "engine", "2^k per tensor, as fine as sums leave", "2^-8"
_FREE, _ROWS = "real per tensor, as fine as sums leave", "real per channel, as fine as sums leave"


def kind(layer: str) -> str:
    """A layer's module path without the number of its block."""
    return ".".join(part for part in layer.split(".") if not part.isdigit())


def _short(layer: str) -> str:
    """A path as the tables print it."""
    return layer.removeprefix("bert.").replace("encoder.layer.", "block ").replace("model.", "")


def _at(rows: Iterable[Row], frac: int, grid: str) -> Row | None:
    """The row of these fraction bits and this grid, of the plans that have them on demand."""
    return next((r for r in rows if r["frac"] == frac and r["grid"] == grid and not r["common"]), None)


def _error(row: Row | None) -> str:
    return "-" if row is None else f"{row['error']:.1e}"


def page(record: Mapping[str, Any]) -> str:
    """The page."""
    parts = ["# Precision: which layers want more bits, and which scales", ""]
    parts += _finding(record["models"])
    parts += [
        "", _settings(record), "", common.machine_line(record["machine"]), "", "![Error against bytes](precision.png)",
        "",
    ]  # fmt: skip
    for name, model in record["models"].items():
        title = f"{name} ({model['replaced']})"
        if "scales" in model:
            parts += _scales(title, model["scales"])
        if "profiles" in model or "searched" in model:
            parts += _searched(title, model)
        if "layers" in model:
            parts += _layers(title, model["layers"], record["batch"])
    if "base" in record:
        parts += _base(record["base"])
    return "\n".join([*parts, *_COSTS]) + "\n"


def _settings(record: Mapping[str, Any]) -> str:
    return (
        f"Trained classifiers of 4 layers x 256; weights and sentences secret, {record['length']} pieces under a "
        f"secret mask, {record['batch']} sentences a call. Ranges come from {record['calibration']} sentences of the "
        f"training set; layers are compared, and plans searched, on {record['sweep']} others of it. Profiles and found "
        f"plans are measured on {record['sentences']} sentences of the test set, scales on the first "
        f"{record['grid']} of them. *Error* is the relative L2 error of the logits against float, *same class* the "
        "share of sentences with float's class, by the plan's arithmetic in the clear; MB (1e6 bytes) are exact, of "
        "all parties, a sentence."
    )


def _finding(models: Mapping[str, Any]) -> list[str]:
    """What the record says, model by model."""
    parts = [_SUMMARY]
    parts += [_of_scales(name, model["scales"]) for name, model in models.items() if "scales" in model]
    parts += [_of_layers(name, model["layers"]) for name, model in models.items() if "layers" in model]
    parts += [_of_rules(n, model) for n, model in models.items() if {"searched", "profiles"} <= set(model)]
    return ["\n\n".join(parts)]


_SUMMARY = (
    "**Ditto's powers of two and one step a tensor lose nothing that matters. Its fixed 8 fraction bits of weights do, "
    "and the embeddings want more bits than any other layer.** A word costs the same whatever its step is, and sums "
    "leave a weight in Z32 up to 15 fraction bits. Where weights take those, real steps and steps by channel change "
    "the error by less than the functions of `fast` err, for the same bytes. More than 10 fraction bits of activations "
    "push norms out of Z32, which costs a quarter or more of the bytes and can pass Z64 throughout. Where weights are "
    "held to 8 bits, as libraries of quantized inference hold them, steps by channel do pay; but here nothing asks for "
    "8 bits."
)


def _of_scales(name: str, rows: Sequence[Row]) -> str:
    fracs = sorted({r["frac"] for r in rows if not r["common"] and r["frac"] < 18})
    wide = next(r for r in rows if r["frac"] == 18)

    def over(grid: str) -> str:
        return ", ".join(_error(_at(rows, frac, grid)) for frac in fracs)

    sizes = ", ".join(
        f"{row['megabytes']:.1f}" for frac in fracs if (row := _at(rows, frac, _ENGINE)) is not None
    )
    common = next(r for r in rows if r["common"] and r["grid"] == _SUMS)
    real = next(r for r in rows if r["common"] and r["grid"].startswith("activations real"))
    return (
        f"Errors on `{name}` with f = {', '.join(map(str, fracs))}: weights of 2^-8, {over(_DITTO)}; powers of two per "
        f"tensor, as fine as sums leave, {over(_SUMS)}; real steps per tensor, {over(_FREE)}; real steps per channel, "
        f"{over(_ROWS)} (all imitated). The engine itself, with its functions: {over(_ENGINE)} for {sizes} MB, and "
        f"{wide['error']:.1e} for {wide['megabytes']:.1f} MB in Z64 throughout. A real step pays on the activations "
        f"alone: all norms fit at f = {common['frac']}, and the finest real step with which they do errs by "
        f"{real['error']:.1e} instead of {common['error']:.1e} (imitated), for no byte."
    )


def _of_layers(name: str, rows: Sequence[Row]) -> str:
    inside = [r["own"] for r in rows if "embeddings" not in r["layer"]]
    outside = [r["own"] for r in rows if "embeddings" in r["layer"]]
    first = sorted((r for r in rows if "embeddings" not in r["layer"]), key=lambda r: -r["own"])[:3]
    few = sorted((r for r in rows if "embeddings" not in r["layer"]), key=lambda r: r["own"])[:2]
    return (
        f"Layers of `{name}` that want more bits: the embeddings, whose values are small beside the one step of "
        f"activations ({min(outside):.1e} to {max(outside):.1e} each, alone in Z32). Every other layer looked at "
        f"changes the logits by {max(inside):.1e} at most, {_listed([r['layer'] for r in first])} the most and "
        f"{_listed([r['layer'] for r in few])} the least."
    )


def _of_rules(name: str, model: Mapping[str, Any]) -> str:
    rules = {r["label"]: r for r in model["profiles"]}
    said = []
    for row in model["searched"]:
        if row["of_rule"]:
            rule, wide = rules[f"{row['profile']}, mixed"], rules[f"{row['profile']}, Z64"]
            said.append(
                f"under `{row['profile']}` {row['megabytes']:.1f} MB at {row['error']:.1e} where the rule's plan takes "
                f"{rule['megabytes']:.1f} at {rule['error']:.1e} and Z64 throughout {wide['megabytes']:.1f} at "
                f"{wide['error']:.1e}"
            )
    return (
        f"The search on `{name}`: {'; '.join(said)}. The rules decide call by call and do not price casts; where many "
        "calls leave Z32, that costs more than it saves."
    )


_COSTS = [
    "",
    "## What scales would cost",
    "",
    "Words of a ring have 32 bits whatever a step means, so bytes see a scale only through the bits that truncations "
    "drop: one bit a result for each fraction bit of a weight. Rows of the tables that the engine does not execute "
    "are *imitated*: the plan in float64, with the engine's rounding of operands (to the nearest) and of results "
    "(floor, or ceiling with the probability of the fraction), functions and norms exact inside; their bytes are "
    "those of the plan with the same rings, and the bits dropped.",
    "",
    "- A real step of a weight is part of how its owner encodes it: nothing is sent for it. The result's step is then "
    "real, too. Functions and further products take that into public factors; a residual sum needs one step on both "
    "sides, so a layer before a residual keeps a power of two, or its input's step has to give way. The imitation "
    "grants every layer its step.",
    "- A step for each output channel needs results that are summed with others, or read by one function, to come back "
    "to one step: rows drop different numbers of bits, in the same round. That leaves powers of two of a common step; "
    "real steps by channel would need a multiplication before the truncation, whose bits the sums do not have.",
    "- One real step of all activations costs nothing, if products of two of them (scores, squares) keep the step that "
    "they get. A step for each tensor costs a truncation in Z32 (two messages of "
    "a word and the bits dropped, two rounds) wherever a residual reads a value that is finer than its sum.",
]


def _scales(title: str, rows: Sequence[Row]) -> list[str]:
    fracs = sorted({r["frac"] for r in rows if not r["common"] and r["frac"] < 18})
    grids = list(dict.fromkeys(r["grid"] for r in rows if not r["common"]))
    lines = [
        f"## Scales: {title}", "",
        "Error, and MB in brackets, by fraction bits of activations in Z32. The layers that `fast` keeps in Z64 by its "
        "own rule stay there, and norms whose squares have no room go there. A weight is rounded once, so grids whose "
        "errors differ by less than about 1.5 times are not told apart here.", "",
    ]  # fmt: skip
    table = []
    for grid in grids:
        cells = [_at(rows, frac, grid) for frac in fracs]
        if all(cell is None for cell in cells):
            continue
        shown = [f"{_error(cell)} ({cell['megabytes']:.1f})" if cell else "-" for cell in cells]
        table.append([("engine: " + _SUMS if grid == _ENGINE else f"imitated: {grid}"), *shown])
    lines += [common.markdown_table(["weights", *(f"f = {frac}" for frac in fracs)], table), ""]
    wide = next(r for r in rows if r["frac"] == 18)
    lines += [
        f"In Z64 throughout, f = 18: {_error(wide)} ({wide['megabytes']:.1f}). One scale with which all norms fit:",
        "",
    ]
    own = [
        [("engine" if r["grid"] == _ENGINE else f"imitated: {r['grid']}"), str(r["frac"]), _error(r),
         f"{100 * r['agreement']:.1f} %", f"{r['megabytes']:.1f}"]
        for r in rows if r["common"]
    ]  # fmt: skip
    return [
        *lines,
        common.markdown_table(["activations, weights", "f", "error", "same class", "MB"], own),
        "",
    ]


def _searched(title: str, model: Mapping[str, Any]) -> list[str]:
    head = [
        "plan",
        "f in Z32",
        "budget",
        "error in the search",
        "error",
        "same class",
        "MB",
        "rounds",
        "kept in Z64",
    ]
    rows = [[f"{r['label']} (own rule)", "-", "-", "-", *_cells(r), "-"] for r in model.get("profiles", ())]
    rows += [
        [f"search under `{r['profile']}`" + (", at its rule's error" if r["of_rule"] else ""), str(r["frac"]),
         f"{r['budget']:.1e}", f"{r['sweep_error']:.1e}", *_cells(r), _listed(r["wide"])]
        for r in model.get("searched", ())
    ]  # fmt: skip
    return [f"## Search: {title}", "", "Greedy by squared own error over the bytes that Z64 adds. Errors of the search "
            "are of its own sentences and never above the budget; *error* is of the test set."
            + (f" The order of layers is that of {model['order']}." if "order" in model else ""), "",
            common.markdown_table(head, rows), ""]  # fmt: skip


def _cells(row: Row) -> list[str]:
    return [
        f"{row['error']:.1e}", f"{100 * row['agreement']:.1f} %", f"{row['megabytes']:.1f}", str(row["rounds"]),
    ]  # fmt: skip


def _listed(layers: Sequence[str]) -> str:
    shown = ", ".join(_short(layer) for layer in layers[:4])
    return shown + (f" and {len(layers) - 4} more" if len(layers) > 4 else "") if layers else "none"


def _layers(title: str, rows: Sequence[Row], batch: int) -> list[str]:
    def price(row: Row) -> float:
        return row["own"] / row["added"] if row["added"] > 0.0 else math.inf

    head = [
        "layer",
        "own error",
        "MB saved alone",
        "own error a MB",
        "same class",
        "error with it alone in Z64",
        "MB it adds in Z64",
    ]
    shown = [
        [_short(r["layer"]), f"{r['own']:.1e}", f"{r['saved'] / batch:+.3f}",
         "-" if math.isinf(price(r)) else f"{price(r) * batch:.1e}", f"{100 * r['agreement']:.1f} %",
         f"{r['kept_error']:.1e}", f"{r['added'] / batch:+.3f}"]
        for r in sorted(rows, key=price, reverse=True)
    ]  # fmt: skip
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_short(kind(row["layer"])), []).append(row)
    summed = sorted(
        ([name, math.hypot(*(r["own"] for r in of)), sum(r["added"] for r in of) / batch]
         for name, of in kinds.items()),
        key=lambda row: -row[1],
    )  # fmt: skip
    return [
        f"## Layers: {title}", "",
        "*Own error*: change of the logits when this layer alone goes from Z64 to Z32, at the scale of activations "
        "with which all norms fit; what that saves includes its casts (-: they cost more than it saves). By own error "
        f"over the MB that Z32 saves among neighbours in Z32, the largest first; of {_blocks(rows)}"
        + (f"; the first {_MOST} of {len(rows)}, all in precision.json." if len(rows) > _MOST else "."), "",
        common.markdown_table(head, shown[:_MOST]), "",
        "By kind, over the blocks (errors as the root of the sum of squares):", "",
        common.markdown_table(["kind", "own error", "MB added by Z64, one at a time"],
                              [[name, f"{own:.1e}", f"{added:+.2f}"] for name, own, added in summed]), "",
    ]  # fmt: skip


def _blocks(rows: Sequence[Row]) -> str:
    numbers = sorted({int(part) for r in rows for part in r["layer"].split(".") if part.isdigit()})
    return f"blocks {', '.join(map(str, numbers))} and what is outside of blocks"


def _base(base: Mapping[str, Any]) -> list[str]:
    rows = [[name, f"{gigabytes:.3f}", str(rounds)] for name, (gigabytes, rounds) in base["rows"].items()]
    added = sorted(base["added"].items(), key=lambda pair: -pair[1])
    return [
        f"## Bytes of BERT-base, {base['tokens']} tokens", "",
        "Random weights, so bytes alone; GB of all parties under `fast`.", "",
        common.markdown_table(["plan", "GB", "rounds"], rows), "",
        "What each kind of layer adds when it stays in Z64 in all blocks and every other call is in Z32:", "",
        common.markdown_table(["kind", "GB added"], [[_short(name), f"{more:+.3f}"] for name, more in added]), "",
    ]  # fmt: skip


# ---- picture -----------------------------------------------------------------------------------------------

_MARKS = {
    _SUMS: ("o", "#1f4e79", "2^k per tensor"),
    _DITTO: ("v", "#c0392b", "weights 2^-8"),
    _FREE: ("s", "#27ae60", "real per tensor"),
    _ROWS: ("D", "#8e44ad", "real per channel"),
    "2^k per tensor, 8-bit weights": ("^", "#e67e22", "2^k per tensor, 8-bit weights"),
    "real per channel, 8-bit weights": ("x", "#7f8c8d", "real per channel, 8-bit weights"),
}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Error against bytes, and every layer's own error, one column a model."""
    models = {n: m for n, m in record["models"].items() if "scales" in m or "layers" in m}
    if not models:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(models), figsize=(7.2 * len(models), 10.5), squeeze=False, layout="constrained"
    )
    for column, (name, model) in enumerate(models.items()):
        _pareto(axes[0][column], name, model)
        _bars(axes[1][column], model.get("layers", ()))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _pareto(axis: Any, name: str, model: Mapping[str, Any]) -> None:
    rows = [r for r in model.get("scales", ()) if not r["common"]]
    if not rows:
        axis.set_visible(False)
        return
    own = sorted((r for r in rows if r["grid"] == _ENGINE), key=lambda r: r["frac"])
    axis.plot([r["megabytes"] for r in own], [r["error"] for r in own], "o-", color="#1f4e79", ms=5, lw=0.8,
              label="engine: 2^k per tensor, f as marked (18: Z64)")  # fmt: skip
    for row in own:
        axis.annotate(f"f = {row['frac']}", (row["megabytes"], row["error"]), fontsize=7, xytext=(4, 6),
                      textcoords="offset points")  # fmt: skip
    for grid, (mark, color, label) in _MARKS.items():
        these = [r for r in rows if r["grid"] == grid]
        axis.plot([r["megabytes"] for r in these], [r["error"] for r in these], mark, color=color, ms=5, mfc="none",
                  label=f"imitated: {label}")  # fmt: skip
    for key, mark, color, label in (
        ("profiles", "P", "black", "profiles' own rules"), ("searched", "*", "#d4ac0d", "search"),
    ):  # fmt: skip
        these = model.get(key, ())
        axis.plot(
            [r["megabytes"] for r in these], [r["error"] for r in these], mark, color=color, ms=9, label=label
        )
    for row in model.get("profiles", ()):
        axis.annotate(row["label"], (row["megabytes"], row["error"]), fontsize=7, xytext=(6, -9),
                      textcoords="offset points")  # fmt: skip
    axis.set(yscale="log", title=name, xlabel="MB of all parties, a sentence",
             ylabel="relative L2 error of the logits")  # fmt: skip
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter("{x:.0f}")
    axis.margins(x=0.12)


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    if not rows:
        axis.set_visible(False)
        return
    largest = sorted(rows, key=lambda r: r["own"], reverse=True)[:24][::-1]
    axis.barh([_short(r["layer"]) for r in largest], [r["own"] for r in largest], color="#1f4e79")
    axis.tick_params(axis="y", labelsize=7)
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.set(xscale="log", xlabel="change of the logits when this layer alone is in Z32 (the 24 largest)")
