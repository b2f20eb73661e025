"""What a row's images say: distance to real data, class, distance to the float image of the same seed, and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.quality import (
    Features,
    Interval,
    accuracy,
    f1_of_two,
    frechet,
    frechet_difference,
    precision_recall,
    psnr,
)
from sfumato.runtime.report import CostReport
from sfumato.study.subject import Subject
from sfumato.study.sweep import Row

__all__ = ["Merit", "merit"]

_FEWEST = 200  # with fewer images neighbours say nothing
_NEIGHBOURS_OF = 2000  # images for precision and recall: all pairs are in memory


@dataclass(frozen=True, slots=True)
class Merit:
    """Figures of one row, for one image where they are costs.

    ``frechet``: to the real training images, in the judge's features; ``against``: its relative difference to the base
    row's, with the interval of a paired bootstrap. ``accuracy`` and its difference in points. ``psnr_db``: median to
    the base row's image of the same seed and prompt, of 8-bit images; ``feature_distance``: of their features, relative
    (a stand-in for LPIPS). ``f1``: of the classes that were asked for. ``clip``: mean cosine of image and prompt, times
    100, where the judge is CLIP; distances are then to the base row's images. Bytes are of all parties to each other.
    ``tuning_cpu_s``: processor seconds of training on, of a network that was tuned.
    """

    name: str
    backend: str
    images: int
    frechet: float | None
    against: Interval | None
    accuracy: Interval | None
    points: Interval | None
    f1: float | None
    clip: float | None
    precision: float | None
    recall: float | None
    psnr_db: float | None
    feature_distance: float | None
    megabytes: float | None
    rounds: int | None
    client_megabytes: float | None
    offline_megabytes: float | None
    seconds: float
    cpu_s: float
    setting: Mapping[str, Any]
    tuning_cpu_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merit(model: Subject, row: Row, base: Row | None, cost: CostReport | None) -> Merit:
    """Figures of ``row`` beside those of ``base`` (drawn with the same seeds; the longer of the two is cut)."""
    count = len(row.images)
    distance = told = f1 = precision = recall = clip = None
    if model.asked is not None:
        wanted = model.asked[[i % len(model.asked) for i in range(count)]]
        clip = 100.0 * float((row.features * wanted).sum(1).mean())
        distance = None if base is None else frechet(Features.of(row.features), Features.of(base.features))
    real = None
    if model.reference is not None:
        real = Features(model.reference.mean.double(), model.reference.covariance.double())
        distance = frechet(Features.of(row.features), real)
        told = accuracy(row.said, row.wanted)
        f1 = f1_of_two(row.said, row.wanted, sorted(set(row.wanted.tolist())))
    if model.reference is not None and count >= _FEWEST:
        some = row.features[:_NEIGHBOURS_OF]
        precision, recall = precision_recall(some, model.reference.features.float()[: len(some)])
    beside = None if base is None or (base.setting == row.setting and base.backend == row.backend) else base
    against = points = near = apart = None
    if beside is not None:
        shared = min(count, len(beside.images))
        ours, theirs = row.first(shared), beside.first(shared)
        near = float(psnr(ours.images / 255.0, theirs.images / 255.0).median())
        if real is not None:
            against = frechet_difference(ours.features, theirs.features, real)
            points = _paired(ours, theirs)
            moved = (ours.features - theirs.features).norm(dim=1)
            apart = float((moved / theirs.features.norm(dim=1).clamp(min=1e-9)).median())
    return Merit(
        row.setting.name, row.backend, count, distance, against, told, points, f1, clip, precision, recall, near, apart,
        None if cost is None else sum(cost.online_bytes) / 1e6, None if cost is None else cost.online_rounds,
        None if cost is None else cost.client_bytes / 1e6, None if cost is None else sum(cost.offline_bytes) / 1e6,
        row.seconds / count, row.cpu_s / count, row.setting.to_json(), model.of(row.setting.network).tuning_cpu_s,
    )  # fmt: skip


def _paired(ours: Row, theirs: Row) -> Interval:
    """Difference of class accuracies in points, with its normal interval over the pairs."""
    hits = ((ours.said == ours.wanted).double() - (theirs.said == theirs.wanted).double()) * 100.0
    spread = 1.959963984540054 * float(hits.std()) / len(hits) ** 0.5 if len(hits) > 1 else 0.0
    middle = float(hits.mean())
    return Interval(middle, middle - spread, middle + spread)
