"""How good a text model is: accuracy or perplexity with an interval, and agreement with its teacher.

Intervals are percentile bootstraps over sentences (or over blocks of text). A task counts only where the teacher is
at least 15 points above the larger class: below that there is nothing that a student could lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import Batch, Blocks, Rows

__all__ = [
    "MARGIN",
    "interval",
    "mean_interval",
    "predictions",
    "score_classes",
    "score_language",
    "token_losses",
]

#: Points that a teacher must be above the majority for its task to count.
MARGIN = 15.0
_RESAMPLES = 2_000


def interval(values: np.ndarray, of: Callable[[np.ndarray], np.ndarray] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of a mean of ``values`` (N,) or (N, k), over its first axis.

    ``of`` turns the means of a resample (resamples, ...) into the number; by default they are that number.
    """
    draw = np.random.default_rng(0)
    means = np.stack(
        [values[draw.integers(len(values), size=len(values))].mean(0) for _ in range(_RESAMPLES)]
    )
    found = means if of is None else of(means)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: list[float]) -> dict[str, Any]:
    """Mean over seeds and its 95 % interval by Student's t; no interval of fewer than two."""
    found: dict[str, Any] = {"mean": round(float(np.mean(values)), 4)}
    if len(values) > 1:
        # Quantiles of t at 97.5 % by degrees of freedom; that of 6 is wide enough for more.
        factor = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}.get(len(values) - 1, 2.447)
        half = factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        found["interval"] = [round(found["mean"] - half, 4), round(found["mean"] + half, 4)]
    return found


@torch.no_grad()
def predictions(model: nn.Module, rows: Rows) -> Tensor:
    """The class (N,) that a classifier gives to each sentence."""
    model.eval()
    return torch.cat([model(b.ids, attention_mask=b.mask).logits.argmax(-1) for b in rows.in_order()])


def _points(share: float) -> float:
    return round(100 * float(share), 2)


def score_classes(model: nn.Module, rows: Rows, teacher: nn.Module | None = None) -> dict[str, Any]:
    """Accuracy in percent; beside a teacher also its accuracy, the difference in points and the agreement."""
    labels = np.array(rows.labels)
    right = predictions(model, rows).numpy() == labels
    majority = max(np.bincount(labels)) / len(labels)
    found: dict[str, Any] = {
        "examples": len(labels),
        "majority": _points(majority),
        "accuracy": _points(right.mean()),
        "interval": [_points(x) for x in interval(right.astype(float))],
    }
    above = right.mean()
    if teacher is not None:
        theirs = predictions(teacher, rows).numpy() == labels
        change = right.astype(float) - theirs
        above = theirs.mean()
        found |= {
            "teacher": _points(theirs.mean()),
            "difference": _points(change.mean()),
            "difference_interval": [_points(x) for x in interval(change)],
            # Two classes: the same class exactly where both are right or both are wrong.
            "agreement": _points((right == theirs).mean()),
        }
    found["counts"] = bool(100 * (above - majority) >= MARGIN)
    return found


@torch.no_grad()
def token_losses(model: nn.Module, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Loss in nats and most likely piece, both (blocks, length - 1), of every piece but a block's first."""
    model.eval()
    losses, chosen = [], []

    def one(batch: Batch) -> None:
        logits = model(batch.ids, attention_mask=batch.mask).logits[:, :-1]
        losses.append(functional.cross_entropy(logits.mT, batch.ids[:, 1:], reduction="none"))
        chosen.append(logits.argmax(-1))

    for batch in blocks.in_order():
        one(batch)
    return torch.cat(losses), torch.cat(chosen)


def score_language(
    model: nn.Module, blocks: Blocks, words: int, teacher: nn.Module | None = None
) -> dict[str, Any]:
    """Perplexity by pieces and by ``words`` of the text, and that of the pieces' own frequencies in it.

    The first piece of a block is given, the others are predicted from at most the block before them.
    """
    losses, chosen = token_losses(model, blocks)
    seen = torch.cat([batch.ids for batch in blocks.in_order()])
    counts = torch.bincount(seen[:, 1:].flatten()).double()
    frequency = counts[counts > 0] / counts.sum()
    rows = losses.double().mean(1).numpy()
    per_word = len(blocks.stream) / words
    found: dict[str, Any] = {
        "pieces": losses.numel(),
        "unigram": round(float(torch.exp(-(frequency * frequency.log()).sum())), 2),
        "perplexity": round(math.exp(rows.mean()), 3),
        "interval": [round(x, 3) for x in interval(rows, np.exp)],
        "word_perplexity": round(math.exp(rows.mean() * per_word), 2),
        "next_piece": _points(float((chosen == seen[:, 1:]).double().mean())),
    }
    if teacher is not None:
        theirs, guessed = token_losses(teacher, blocks)
        means = theirs.double().mean(1).numpy()
        found |= {
            "teacher": round(math.exp(means.mean()), 3),
            "ratio": round(math.exp(rows.mean() - means.mean()), 4),
            "ratio_interval": [round(x, 4) for x in interval(rows - means, np.exp)],
            "agreement": _points(float((chosen == guessed).double().mean())),
        }
    return found
