"""Training of the judge on real images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional

from ..judge import Judge, as_judged, save_judge
from .data import load_split
from .loop import Indices, channels_last, run


def shifted(images: torch.Tensor, clothes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images moved by up to 2 pixels, clothes also mirrored half of the time."""
    count = len(images)
    padded = functional.pad(images, (2, 2, 2, 2))
    dy, dx = torch.randint(0, 5, (2, count, 1), generator=generator)
    columns = torch.arange(28).expand(count, 28)
    mirror = (torch.rand(count, 1, generator=generator) < 0.5) & clothes[:, None]
    columns = torch.where(mirror, 27 - columns, columns)
    rows = torch.arange(28)[None] + dy
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], (columns + dx)[:, None]][:, None]


def accuracies(judge: Judge, data: Path) -> tuple[float, float]:
    """Accuracy on the real test digits and the real test clothes."""
    test = load_split(data, train=False)
    right = (judge.classify(test.images) == test.labels).float()
    digits = test.labels < 10
    return float(right[digits].mean()), float(right[~digits].mean())


def train_judge(data: Path, out: Path, minutes: float) -> Path:
    """Train the judge, print its test accuracies and give the path of its weights."""
    path = out / "judge.safetensors"
    split = load_split(data, train=True)
    torch.manual_seed(0)
    judge = channels_last(Judge())
    draw = Indices(len(split.labels), 128, seed=1)
    generator = torch.Generator().manual_seed(2)

    def step(_: int) -> torch.Tensor:
        chosen = draw()
        labels = split.labels[chosen]
        images = shifted(as_judged(split.images[chosen]), labels >= 10, generator)
        scores = judge(images.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(scores, labels, label_smoothing=0.05)

    average = run(
        "judge", judge, step, out / "judge.ckpt", minutes, peak=3e-3, decay=0.998, weight_decay=1e-2
    )
    judge.load_state_dict(average.state)
    digits, clothes = accuracies(judge, data)
    print(f"judge: {100 * digits:.2f} % of test digits, {100 * clothes:.2f} % of test clothes", flush=True)
    save_judge(judge, path)
    return path
