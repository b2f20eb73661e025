"""A paper's study on one model, from images to a page. Interrupted, it goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.errors import JobError
from sfumato.quality import psnr
from sfumato.runtime.report import CostReport
from sfumato.study.draw import Drawer
from sfumato.study.findings import Finding, findings
from sfumato.study.merit import Merit, merit
from sfumato.study.setting import Setting
from sfumato.study.subject import Subject, has_student, subject
from sfumato.study.sweep import Row, Sweep
from sfumato.study.tables import ORIGINAL, Study, Table, study
from sfumato.zoo.classes import FEW

__all__ = ["Asked", "Outcome", "Validation", "drawable", "reproduce"]

_CHUNK, _SECURE_CHUNK = 100, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to reproduce.

    ``images``: of each row by the plan's arithmetic in the clear; ``secure``: of each main row under the protocol,
    three processes over TLS, or 0, and of those with at most ``secure_steps`` steps (None: all); ``main``: the main
    rows alone; ``ours``: our settings and the original alone. ``weights``: folder of those that do not come with
    sfumato. ``prompts``: of a pipeline, which ``model`` then names by folder or hub id; ``clip``: a CLIP model to
    examine its images with.
    """

    paper: str
    model: str
    out: Path
    images: int = 1000
    secure: int = 0
    secure_steps: int | None = None
    main: bool = False
    ours: bool = False
    ray: str | None = None
    weights: str = ""
    prompts: tuple[str, ...] = ()
    clip: str = ""

    @property
    def name(self) -> str:
        """Of files: the paper, and the model or the last part of its path."""
        return f"{'ours' if self.ours else self.paper}-{Path(self.model).name}"


@dataclass(frozen=True, slots=True)
class Validation:
    """A row drawn both ways from the same seeds: ``psnr_db``, the smallest and the median between the 8-bit images
    (100: the same), the classes told alike, and the merit under the protocol. ``step_ratio``: processor time of a step,
    of the three parties together, over that of the exact network in float. ``frechet``: of the same images simulated.
    """

    name: str
    smallest_db: float
    median_db: float
    same_class: float
    step_ratio: float
    frechet: float | None
    merit: Merit


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that a page shows."""

    asked: Asked
    study: Study
    rows: dict[str, Row]
    merits: dict[str, Merit]
    validations: list[Validation]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """Without the images."""
        return {
            "paper": self.study.name, "model": self.asked.model, "images": self.asked.images,
            "tables": [
                {"title": table.title, "rows": [self.merits[row.name].to_json() for row in table.rows]}
                for table in tables_of(self.asked, self.study)
            ],
            "validation": [asdict(validation) for validation in self.validations],
            "findings": [asdict(finding) for finding in self.findings],
        }  # fmt: skip


def reproduce(asked: Asked, progress: Callable[[str, int, int], None] | None = None) -> Outcome:
    """Draw what is missing under ``out / "chunks"`` and measure. ``progress(what, done, all)`` counts chunks.

    Raises:
        JobError: an unknown paper or model, weights that are not here, or numbers of images that do not fit.
    """
    wanted = drawable(study(asked.paper, asked.model, listed=not asked.prompts), asked)
    if asked.images < _CHUNK or asked.images % _CHUNK:
        raise JobError(f"--images must be a multiple of {_CHUNK}, not {asked.images}")
    if asked.secure % _SECURE_CHUNK or asked.secure > asked.images:
        raise JobError(f"--secure must be a multiple of {_SECURE_CHUNK}, and at most --images")
    model = subject(asked.model, asked.weights, asked.prompts, asked.clip)

    def counted(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, all: progress(what, done, all)

    rows: dict[str, Row] = {}
    for table in tables_of(asked, wanted):
        sweep = _sweep(asked, _share(asked.images, table.share))
        for row in sweep.run([s for s in table.rows if s.name not in rows], counted(table.title)):
            rows[row.setting.name] = row
    base = rows[ORIGINAL.name]
    validations = []
    with Drawer(model, _CHUNK) as drawer:
        merits = {name: merit(model, row, base, _cost(drawer, row.setting)) for name, row in rows.items()}
        if asked.secure:
            most = math.inf if asked.secure_steps is None else asked.secure_steps
            drawn = [s for s in wanted.main if s.name in rows and s.profile is not None]
            chosen = [s for s in drawn if s.steps <= most]
            real = _sweep(asked, asked.secure, "local").run(chosen, counted("under the protocol"))
            validations = [_validated(model, row, rows, base, drawer) for row in real]
    return Outcome(
        asked, wanted, rows, merits, validations, findings("ours" if asked.ours else asked.paper, merits)
    )


def drawable(wanted: Study, asked: Asked) -> Study:
    """The study without rows of a student that was not made."""
    if has_student(asked.model, asked.weights):
        return wanted

    def here(rows: Sequence[Setting]) -> tuple[Setting, ...]:
        return tuple(row for row in rows if row.network != FEW)

    tables = tuple(replace(table, rows=here(table.rows)) for table in wanted.tables)
    return replace(wanted, main=here(wanted.main), tables=tables)


def tables_of(asked: Asked, wanted: Study) -> Sequence[Table]:
    """The tables that were asked for."""
    if asked.ours:
        ours = tuple(row for row in wanted.main if row.name.startswith("ours"))
        return (Table("Ours", "our settings beside the original", (ORIGINAL, *ours)),)
    return wanted.tables[:1] if asked.main else wanted.tables


def write(outcome: Outcome) -> Path:
    """The records, as JSON."""
    path = outcome.asked.out / f"{outcome.asked.name}.json"
    path.write_text(json.dumps(outcome.to_json(), indent=1) + "\n", encoding="utf-8")
    return path


def _sweep(asked: Asked, images: int, backend: str = "plain") -> Sweep:
    chunk = _CHUNK if backend == "plain" else _SECURE_CHUNK
    return Sweep(
        asked.out / "chunks",
        asked.model,
        images,
        chunk,
        backend,
        asked.ray,
        asked.weights,
        asked.prompts,
        asked.clip,
    )


def _share(images: int, share: float) -> int:
    return max(_CHUNK, math.ceil(images * share / _CHUNK) * _CHUNK)


def _cost(drawer: Drawer, setting: Setting) -> CostReport | None:
    return None if setting.profile is None else drawer.cost(setting)


def _validated(model: Subject, real: Row, rows: dict[str, Row], base: Row, drawer: Drawer) -> Validation:
    plain = rows[real.setting.name].first(len(real.images))
    near = psnr(real.images / 255.0, plain.images / 255.0)
    same = float((real.said == plain.said).double().mean())
    found = merit(model, real, base, drawer.cost(real.setting))
    ratio = _step_s(real) / max(_step_s(base), 1e-9)
    simulated = merit(model, plain, None, None).frechet
    return Validation(
        real.setting.name, float(near.min()), float(near.median()), same, ratio, simulated, found
    )


def _step_s(row: Row) -> float:
    """Processor seconds of one image and step."""
    return row.cpu_s / len(row.images) / row.setting.steps
