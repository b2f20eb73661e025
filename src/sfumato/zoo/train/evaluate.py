"""How good the embedded pipeline is: accuracy by the judge, diversity, a labelled grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from ..judge import Judge
from .data import load_split
from .prompts import CLASS_NAMES, class_prompts

STEPS = 50
NEIGHBOURS = 5
Row = dict[str, str | float]


class Diversity(NamedTuple):
    """Generated images against as many real test images of the same class, in judge features."""

    recall: float
    coverage: float
    spread: float


def plain_prompt(label: int) -> str:
    """The prompt used for measuring a class."""
    return f"a handwritten {CLASS_NAMES[label]}" if label < 10 else class_prompts(label)[0]


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline,
    labels: list[int],
    seeds: list[int],
    guidance: float,
    steps: int = STEPS,
) -> torch.Tensor:
    """Images (N, 32, 32) in [0, 1], one per pair of class and seed."""
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        [plain_prompt(label) for label in labels],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        guidance_scale=guidance,
        num_inference_steps=steps,
        output_type="np",
    )
    return torch.from_numpy(np.asarray(out.images)).reshape(len(seeds), 32, 32)


def generate(pipeline: StableDiffusionPipeline, label: int, seeds: range, guidance: float) -> torch.Tensor:
    """Images (N, 32, 32) in [0, 1] of one class, one per seed."""
    return draw(pipeline, [label] * len(seeds), list(seeds), guidance)


def _radii(points: torch.Tensor) -> torch.Tensor:
    return torch.cdist(points, points).kthvalue(NEIGHBOURS + 1, dim=1).values


def diversity(fake: torch.Tensor, real: torch.Tensor) -> Diversity:
    """Recall, coverage and mean pairwise distance relative to the real images (1 is as diverse)."""
    between = torch.cdist(real, fake)
    recall = (between <= _radii(fake)[None]).any(1).float().mean()
    coverage = (between <= _radii(real)[:, None]).any(1).float().mean()
    spread = torch.pdist(fake).mean() / torch.pdist(real).mean()
    return Diversity(float(recall), float(coverage), float(spread))


class Measure:
    """Measures one class after another and sums up."""

    def __init__(self, pipeline: StableDiffusionPipeline, judge: Judge, data: Path, guidance: float) -> None:
        self.pipeline, self.judge, self.guidance = pipeline, judge, guidance
        self.test, self.train = load_split(data, train=False), load_split(data, train=True)

    def one(self, label: int, count: int) -> Row:
        """Accuracy and diversity of a class, and the diversity of real training images as reference."""
        images = generate(self.pipeline, label, range(count), self.guidance)
        said = self.judge.classify(images)
        features = [self.judge.extract(s.images[s.labels == label][:count]) for s in (self.test, self.train)]
        row: Row = {"class": CLASS_NAMES[label], "accuracy": float((said == label).float().mean())}
        row |= diversity(self.judge.extract(images), features[0])._asdict()
        row |= {f"real_{k}": v for k, v in diversity(features[1], features[0])._asdict().items()}
        wrong = said[said != label].bincount(minlength=20)
        row["taken_for"] = CLASS_NAMES[int(wrong.argmax())] if int(wrong.sum()) else ""
        print(row, flush=True)
        return row

    def summary(self, rows: list[Row], count: int) -> dict[str, object]:
        """The rows of all classes with the means of digits and of clothes."""
        measures = [key for key, value in rows[0].items() if isinstance(value, float)]
        groups = {
            group: {key: sum(float(row[key]) for row in part) / len(part) for key in measures}
            for group, part in (("digits", rows[:10]), ("clothes", rows[10:]))
        }
        return {"guidance": self.guidance, "steps": STEPS, "per_class": count, "classes": rows, **groups}


def evaluate(
    pipeline: StableDiffusionPipeline, judge: Judge, data: Path, guidance: float, per_class: int = 100
) -> dict[str, object]:
    """Accuracy of every class and diversity, also of real training images as the reference."""
    measure = Measure(pipeline, judge, data, guidance)
    return measure.summary([measure.one(label, per_class) for label in range(20)], per_class)


def draw_grid(pipeline: StableDiffusionPipeline, guidance: float, path: Path, columns: int = 8) -> None:
    """Labelled picture of seeds 0..7 (columns) of all classes (rows), nothing picked."""
    left, top, tile = 84, 14, 34
    canvas = Image.new("L", (left + columns * tile, top + 20 * tile), 255)
    pen = ImageDraw.Draw(canvas)
    for column in range(columns):
        pen.text((left + column * tile + 2, 1), f"seed {column}" if column == 0 else str(column), fill=0)
    for label, name in enumerate(CLASS_NAMES):
        pen.text((4, top + label * tile + 10), name, fill=0)
        images = (generate(pipeline, label, range(columns), guidance) * 255).round().byte()
        for column, image in enumerate(images):
            canvas.paste(Image.fromarray(image.numpy()), (left + column * tile, top + label * tile))
    canvas.resize((2 * canvas.width, 2 * canvas.height), Image.Resampling.NEAREST).save(path, optimize=True)


def report_table(report: dict[str, object]) -> str:
    """Markdown table of a report of ``evaluate``."""
    lines = [
        "| class | accuracy | recall (real) | coverage (real) | spread | most often taken for |",
        "|" + "---|" * 6,
    ]
    rows = report["classes"]
    assert isinstance(rows, list)
    for name in ("digits", "clothes"):
        group = report[name]
        assert isinstance(group, dict)
        rows = [*rows, {"class": f"**all {name}**", "taken_for": "", **group}]
    for row in rows:
        cells = [
            f"{row['class']} | {100 * row['accuracy']:.1f} %",
            f"{row['recall']:.2f} ({row['real_recall']:.2f})",
            f"{row['coverage']:.2f} ({row['real_coverage']:.2f})",
            f"{row['spread']:.2f} | {row['taken_for']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def save_report(report: dict[str, object], folder: Path) -> None:
    """Write the report as JSON and as a Markdown table."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report_table(report), encoding="utf-8")
