"""DP-LDM's table at this machine's scale, row by row: fine-tune, sample, train classifiers, test on real images.

Every row that is finished stays as ``rows/NAME.json`` (and a grid of its first images), so a run that was interrupted
goes on, and rows can be computed by several processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.dp import evaluate, sample
from sfumato.dp.data import Records, fit
from sfumato.dp.finetune import finetune
from sfumato.dp.kernel import train_kernel
from sfumato.dp.ledger import Ledger
from sfumato.dp.parts import decode, encode, folder_of, load_parts
from sfumato.dp.randomness import SecretStream
from sfumato.dp.rows import Row
from sfumato.dp.sources import read_sources
from sfumato.dp.subjects import Subject
from sfumato.errors import JobError

__all__ = ["Setting", "finished_rows", "run_row"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where data, public model and results are, and how much is drawn and trained on it.

    ``images`` of a main row, ``few`` of an ablation's; ``kinds`` and ``seeds`` of the classifiers of a main row (an
    ablation has one CNN); ``epochs`` of a main row's classifiers,
    ``few_epochs`` of an ablation's; ``steps`` of sampling; ``kernel_minutes`` of a core for the baseline's generator;
    ``device`` for training, sampling and classifiers; ``features``: whose features distances are measured in
    (their name, and what gives them of images (N, C, H, W)), where it is not the subject's judge.
    """

    subject: Subject
    data: Path
    public: Path
    out: Path
    images: int = 50_000
    few: int = 10_000
    kinds: tuple[str, ...] = ("cnn", "mlp")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 25
    kernel_minutes: float = 5.0
    epochs: int = 4
    few_epochs: int = 10
    precision: str = "bfloat16"
    device: str = "cpu"
    features: tuple[str, Callable[[Tensor], Tensor]] | None = None

    @property
    def rows(self) -> Path:
        return self.out / f"dp-ldm-{self.subject.name}-rows"


def finished_rows(setting: Setting) -> dict[str, dict[str, Any]]:
    """What has been measured, by row."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(setting.rows.glob("*.json"))}


def run_row(row: Row, setting: Setting, progress: Progress | None = None) -> dict[str, Any]:
    """Measure one row, unless it has been; what its JSON holds.

    Raises:
        JobError: data or model are missing or do not fit.
    """
    told: Progress = progress or (lambda what, done, of: None)
    path = setting.rows / f"{row.name}.json"
    if path.is_file():
        held = json.loads(path.read_text("utf-8"))
        wanted = _settings(row, setting)
        found = {**held, "features": (held.get("distance") or {}).get("features")}
        if differs := [
            name for name, value in wanted.items() if _plain(found.get(name, value)) != _plain(value)
        ]:
            raise JobError(
                f"{path} was measured with another {', '.join(differs)}; remove it, or name another folder (--out)"
            )
        return held
    setting.rows.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    examiner = _examiner(setting)  # before any work, since its weights may be missing
    private, test = setting.subject.private(setting.data), setting.subject.test(setting.data)
    made, record = _images(row, setting, private, told)
    drawn = time.process_time()
    record |= {"row": row.name, "title": row.title, "main": row.main, "changes": dict(row.changes)}
    record |= _settings(row, setting)
    side = test.images.shape[-1]
    images = cropped(made.images, side)
    sample.grid(_by_class(images, made.labels, len(made.captions)), 20, 2).save(path.with_suffix(".png"))
    told("classifiers", 0, 1)
    kinds, seeds = (setting.kinds, setting.seeds) if row.main else (("cnn",), (0,))
    epochs = setting.epochs if row.main else setting.few_epochs
    recipe = evaluate.ClassifierRecipe(epochs=epochs, mirror=setting.subject.mirror)
    if row.captions:
        record["utility"] = [
            found.to_json()
            for found in evaluate.utility(
                (images, made.labels),
                (fit_test(test, images), test.labels),
                kinds=kinds,
                seeds=seeds,
                recipe=recipe,
                device=setting.device,
            )
        ]
    if examiner is not None:
        few = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: setting.few]]
        real = private.images[: setting.few]
        # What no sampler behind this autoencoder can pass; once, with the row of real images.
        floor = reconstructed(setting.public, real, side) if row.kind == "real" else None
        record["distance"] = evaluate.distance(
            few, real, features=examiner[1], name=examiner[0], reconstructions=floor
        ).to_json()
    if row.main and row.kind != "real":
        part = slice(0, 2000)
        record["copies"] = evaluate.copies(
            images[part], private.images, fit_test(test, images)[part]
        ).to_json()
    record |= {"cpu_s_images": drawn - began, "cpu_s_evaluation": time.process_time() - drawn}
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(draft, path)
    return record


def _examiner(setting: Setting) -> tuple[str, Callable[[Tensor], Tensor]] | None:
    """Whose features distances are measured in: their name, and how to get them."""
    if setting.features is not None or setting.subject.judge is None:
        return setting.features
    return str(_features_name(setting)), evaluate.judge_features(setting.subject.judge)


def _features_name(setting: Setting) -> str | None:
    if setting.features is not None:
        return setting.features[0]
    return None if setting.subject.judge is None else f"sfumato judge {setting.subject.judge}"


def _plain(value: Any) -> Any:
    """A recipe without the captions that a ledger adds, and without what does not change the result."""
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if k not in ("captions", "physical", "interval")}


def _settings(row: Row, setting: Setting) -> dict[str, Any]:
    """What a row's numbers depend on beside the data and its recipe."""
    found: dict[str, Any] = {"kind": row.kind, "captions": row.captions}
    if row.kind in ("tuned", "public"):
        found |= {
            "guidance": row.guidance,
            "steps_of_sampling": setting.steps,
            "precision": setting.precision,
        }
        found["public"] = read_sources(folder_of(setting.public)).digests()
    if row.kind == "tuned" and row.recipe is not None:
        found["recipe"] = row.recipe.to_json()
    if (name := _features_name(setting)) is not None:
        found["features"] = name
    if row.kind != "real":
        found["images"] = setting.images if row.main else setting.few
    if row.main and row.captions:
        found["classifiers"] = list(setting.kinds)
    return found


def _images(row: Row, setting: Setting, private: Records, told: Progress) -> tuple[Records, dict[str, Any]]:
    """The row's images, uniform over the classes, and what making them cost."""
    count = setting.images if row.main else setting.few
    captions = setting.subject.captions if row.captions else ("",)
    labels = torch.arange(count) % len(captions)
    record: dict[str, Any] = {"images": count}
    if row.kind == "real":
        chosen = torch.randperm(len(private), generator=torch.Generator().manual_seed(0))[:count]
        return Records(private.images[chosen], private.labels[chosen], captions), {"images": len(chosen)}
    began = time.process_time()
    if row.kind == "kernel":
        assert row.recipe is not None
        trained = train_kernel(
            private.images, private.labels, epsilon=row.recipe.epsilon, delta=row.recipe.delta,
            stream=SecretStream(), classes=len(captions), minutes=setting.kernel_minutes,
            device=setting.device,
        )  # fmt: skip
        record |= {"epsilon": row.recipe.epsilon, "delta": row.recipe.delta, "cpu_s_training": trained.cpu_s}
        record["events"] = [asdict(event) for event in trained.events]
        return Records(trained.sample(labels, seed=1), labels, captions), record
    folder, resumed = setting.public, False
    if row.kind == "tuned":
        assert row.recipe is not None
        records = private if row.captions else private.without_captions()
        out = setting.rows / f"{row.run}.run"
        resumed = (out / "ledger.json").is_file()  # then this process does not know what it has cost
        run = finetune(setting.public, records, row.recipe, out, device=setting.device, progress=told)
        folder = run.model
        record |= _account(run.ledger)
    record["cpu_s_training"] = None if resumed else time.process_time() - began
    made = sample.draw(
        load_parts(folder), captions, labels, steps=setting.steps, guidance=row.guidance, seed=1,
        precision=setting.precision, device=setting.device,
        progress=lambda done, of: told("samples", done, of),
    )  # fmt: skip
    return made, record


def _account(ledger: Ledger) -> dict[str, Any]:
    spent = ledger.spent()
    return {
        "epsilon": None if ledger.epsilon == float("inf") else ledger.epsilon,
        "delta": ledger.delta,
        "noise_multiplier": ledger.event.noise_multiplier,
        "sample_rate": ledger.event.sample_rate,
        "steps": ledger.event.steps,
        "trained": ledger.trained,
        "spent": {k: (None if v == float("inf") else v) for k, v in asdict(spent).items()},
        "recipe": dict(ledger.recipe),
    }


def reconstructed(public: Path, images: Tensor, side: int) -> Tensor:
    """Real images (N, C, H, W) through the public autoencoder and back: what no sampler behind it can pass."""
    parts = load_parts(public)
    return cropped(decode(parts, encode(parts, fit(images, parts.channels, parts.side)).mean), side)


def cropped(images: Tensor, side: int) -> Tensor:
    """The middle, where a model's images were padded from ``side``."""
    edge = (images.shape[-1] - side) // 2
    return images[:, :, edge : edge + side, edge : edge + side].contiguous() if edge > 0 else images


def fit_test(test: Records, images: Tensor) -> Tensor:
    """Test images with the channels and side of synthetic ones."""
    return fit(test.images, images.shape[1], images.shape[-1])


def _by_class(images: Tensor, labels: Tensor, classes: int, columns: int = 20) -> Tensor:
    """The first images of each class, a row each."""
    rows = [images[labels == k][:columns] for k in range(classes)]
    blank = torch.zeros(1, *images.shape[1:], dtype=torch.uint8)
    return torch.cat([torch.cat([row, blank.expand(columns - len(row), -1, -1, -1)]) for row in rows])
