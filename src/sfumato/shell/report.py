"""Reports for people: a page, tables for the terminal, and pictures."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from sfumato.graph.plan import Plan
from sfumato.runtime.report import CostReport, readable

__all__ = ["cost_table", "layer_bytes", "psnr", "readable", "save_bars", "save_panels", "write_page"]

_NODE = re.compile(r"step\d+/(?:~\d+/)?(?:#\d+/)?([^/#]+)")
_BLOCK = re.compile(r"(conv_in|conv_out|conv_norm_out|conv_act|mid_block|(?:down|up)_blocks\.\d+)")
_KINDS = {
    "conv2d": "convolution",
    "linear": "linear",
    "group_norm": "norm",
    "layer_norm": "norm",
    "silu": "activation",
    "gelu": "activation",
    "scaled_dot_product_attention": "attention",
}


def psnr(image: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10.0 * float(np.log10(error))


def cost_table(report: CostReport, title: str = "cost") -> Table:
    """Totals of a run or an estimate."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("rounds", f"{report.rounds:,}")
    for party, sent in enumerate(report.bytes_sent):
        table.add_row(f"sent by P{party}", readable(sent))
    table.add_row("with the client", readable(report.client_bytes))
    table.add_row("weights, once", readable(report.setup_bytes))
    if report.seconds is not None:
        table.add_row("seconds", f"{report.seconds:.2f}")
    if report.steps:
        table.add_row("seconds a step", f"{sum(report.steps) / len(report.steps):.2f}")
    return table


def layer_bytes(report: CostReport, plan: Plan) -> dict[str, dict[str, int]]:
    """Bytes of all parties by block of the U-Net, then by kind of layer."""
    nodes = {node.name: node for node in plan.program.nodes}
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path, cost in report.by_path.items():
        found = _NODE.match(path.strip("/"))
        node = nodes.get(found.group(1)) if found else None
        if node is None:
            block, kind = "sampler", "sampler"
        else:
            match = _BLOCK.search(node.module_path)
            block = match.group(1) if match else "other"
            kind = _KINDS.get(node.target.split(".")[1], "other")
        groups[block][kind] += sum(cost.bytes_sent)
    return {block: dict(kinds) for block, kinds in groups.items()}


def save_bars(path: Path, groups: Mapping[str, Mapping[str, int]]) -> None:
    """A bar for each block, coloured by kind of layer."""
    plt = _pyplot()
    order = sorted(groups, key=_depth)
    kinds = sorted({kind for block in groups.values() for kind in block})
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(order) + 1.4), layout="constrained")
    left = np.zeros(len(order))
    for kind in kinds:
        sizes = np.array([groups[block].get(kind, 0) / 1e6 for block in order])
        axes.barh(order, sizes, left=left, label=kind)
        left += sizes
    axes.set_xlim(0, 1.04 * float(left.max()) or 1.0)
    axes.invert_yaxis()
    axes.set_xlabel("MB sent by the three parties together")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _depth(block: str) -> tuple[int, str]:
    order = ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")
    return next((i for i, name in enumerate(order) if block.startswith(name)), len(order)), block


def save_panels(path: Path, panels: Sequence[tuple[str, NDArray[Any]]]) -> None:
    """Pictures side by side, each under its title. Arrays (H, W) or (H, W, C) in [0, 1]."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.7), layout="constrained")
    for axis, (title, picture) in zip(np.atleast_1d(axes), panels, strict=True):
        flat = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
        axis.imshow(np.clip(flat, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize="medium")
        axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(path: Path, facts: Mapping[str, str], report: CostReport, pictures: Sequence[str]) -> None:
    """The run as a Markdown page."""
    lines = ["# One private image", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += [f"![]({picture})" for picture in pictures]
    lines += ["", "```", report.table(), "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
