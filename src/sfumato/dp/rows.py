"""The rows of `sfumato reproduce dp-ldm`: what is compared with what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sfumato.dp.recipe import Recipe
from sfumato.dp.subjects import Subject
from sfumato.errors import JobError

__all__ = ["Row", "chosen_rows", "rows_of"]


@dataclass(frozen=True)
class Row:
    """One way to images: ``kind`` "tuned" (by ``recipe``), "public" (no private image), "kernel" (the baseline), "real"
    (the private images themselves). ``main``: evaluated with all classifiers and seeds; ``guidance`` at sampling;
    ``captions`` False trains and samples without; ``of``: draws from another row's weights."""

    name: str
    title: str
    kind: str = "tuned"
    recipe: Recipe | None = None
    main: bool = False
    guidance: float = 1.0
    captions: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    of: str = ""

    @property
    def run(self) -> str:
        """The training whose weights are drawn from: the row's own, or that of the row ``of``."""
        return self.of or self.name

    @property
    def epsilon(self) -> float | None:
        """None where no private image was read; infinite where they were read without protection."""
        if self.kind == "public":
            return None
        return self.recipe.epsilon if self.recipe is not None else math.inf


def rows_of(subject: Subject, guidance: float = 1.0) -> dict[str, Row]:
    """By name: the main rows, then one change each to the ablation's base, which trains an eighth as long and samples
    without guidance."""
    base = Recipe(epsilon=10.0, delta=subject.delta, batch=subject.batch, epochs=subject.epochs)

    def at(epsilon: float, **changes: Any) -> Recipe:
        return replace(base, epsilon=epsilon, **changes)

    rows = [
        Row("public", "public model only", "public", main=True, guidance=guidance),
        Row("eps10", "DP fine-tuned, ε = 10", recipe=at(10.0), main=True, guidance=guidance),
        Row("eps1", "DP fine-tuned, ε = 1", recipe=at(1.0), main=True, guidance=guidance),
        Row("eps-inf", "fine-tuned without privacy", recipe=at(math.inf), main=True, guidance=guidance),
        Row("kernel10", "kernel mean embedding, ε = 10", "kernel", at(10.0), main=True),
        Row("kernel1", "kernel mean embedding, ε = 1", "kernel", at(1.0), main=True),
        Row("real", "the real training images", "real", main=True),
    ]
    # Few steps, so a higher rate and a shorter average than the default's.
    short = {"epochs": subject.epochs / 8, "rate": 3e-3, "average": 0.95}
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "base": ("base of the ablation", {}),
        "draws1": ("one timestep per record, not two", {"draws": 1}),
        "draws4": ("four timesteps per record", {"draws": 4}),
        "last": ("last weights, not averaged ones", {"average": 0.0}),
        "constant": ("constant rate, not a cosine", {"decay": "constant"}),
        "clipped": ("clipped at 1, not normalised", {"normalise": False, "clip": 1.0}),
        "small": ("batches of a quarter, four times the steps", {"batch": max(64, subject.batch // 4)}),
        "large": ("batches four times as large, a quarter of the steps", {"batch": subject.batch * 4}),
        "slow": ("a third of the rate", {"rate": 1e-3}),
        "from2": ("attention modules from the 2nd", {"first": 2}),
        "from3": ("attention modules from the 3rd", {"first": 3}),
        "from4": ("attention modules from the 4th", {"first": 4}),
        "lora4": ("LoRA of rank 4", {"what": "lora", "rank": 4}),
        "lora16": ("LoRA of rank 16", {"what": "lora", "rank": 16}),
        "conditioning": ("conditioning embedder alone", {"what": "conditioning"}),
        "all": ("the whole U-Net", {"what": "all"}),
    }
    for epsilon in (1.0, 10.0):
        for name, (title, change) in changes.items():
            recipe = at(epsilon, **{**short, **change})
            rows.append(
                Row(
                    f"{name}-eps{epsilon:g}",
                    f"{title}, ε = {epsilon:g}",
                    recipe=recipe,
                    changes=change,
                )
            )
    for epsilon in (10.0, 1.0):
        other = 1.0 if guidance != 1.0 else 1.5
        name = f"eps{epsilon:g}"
        title = f"DP fine-tuned, ε = {epsilon:g}, guidance {other:g}"
        rows.append(Row(f"{name}-guidance", title, recipe=at(epsilon), main=True, guidance=other, of=name))
    rows.append(Row("unconditional", "without captions, ε = 10", recipe=at(10.0, **short), captions=False))
    return {row.name: row for row in rows}


def chosen_rows(rows: Mapping[str, Row], names: tuple[str, ...]) -> list[Row]:
    """Rows by name; "main" and "ablation" stand for all of a kind.

    Raises:
        JobError: no such row.
    """
    found: dict[str, Row] = {}
    for name in names:
        if name in ("main", "ablation"):
            found |= {row.name: row for row in rows.values() if row.main == (name == "main")}
        elif name in rows:
            found[name] = rows[name]
        else:
            raise JobError(f"there is no row {name!r}; use main, ablation, or some of {', '.join(rows)}")
    return list(found.values())
