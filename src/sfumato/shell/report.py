"""Reports for people: a page, tables for the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from sfumato.diffusion.seen import Block
from sfumato.runtime.report import CostReport, readable

__all__ = ["cost_table", "psnr", "readable", "save_bars", "save_panels", "write_page"]


def psnr(image: NDArray[Any], reference: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10.0 * float(np.log10(error))


def cost_table(report: CostReport, title: str = "cost") -> Table:
    """Totals of a run or an estimate; time where a run was measured, not where it ran on shapes."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("rounds", f"{report.rounds:,}")
    for party, sent in enumerate(report.bytes_sent):
        table.add_row(f"sent by P{party}", readable(sent))
    table.add_row("with the client", readable(report.client_bytes))
    table.add_row("weights, once", readable(report.setup_bytes))
    if report.seconds is not None:
        table.add_row("seconds", f"{report.seconds:.2f}")
    if report.seconds is not None and report.steps:
        table.add_row("seconds a step", f"{sum(report.steps) / len(report.steps):.2f}")
    return table


def save_bars(path: Path, blocks: Sequence[Block]) -> None:
    """A bar for each block, coloured by kind of layer."""
    plt = _pyplot()
    order = [block.name for block in blocks]
    kinds = sorted({kind for block in blocks for kind in block.kinds})
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(order) + 1.4), layout="constrained")
    left = np.zeros(len(order))
    for kind in kinds:
        sizes = np.array([block.kinds.get(kind, 0) / 1e6 for block in blocks])
        axes.barh(order, sizes, left=left, label=kind)
        left += sizes
    axes.set_xlim(0, 1.04 * float(left.max()) or 1.0)
    axes.invert_yaxis()
    axes.set_xlabel("MB sent by the three parties together")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
