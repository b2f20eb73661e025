"""What changes cost a model's users: the scores of trained students beside their teachers', from a file of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import JobError

__all__ = ["PRINTED", "RECIPES_OF", "WITHOUT", "Range", "Student", "students_in"]

#: Recipes of students (:data:`sfumato.zoo.train.text.distil.RECIPES`) by the paper whose page they are on.
RECIPES_OF: Mapping[str, tuple[str, ...]] = {
    "ditto": ("ditto", "ditto-gelu"),
    "mpcformer": ("quad", "mpcformer", "mpcformer-2relu", "secformer"),
    "marill": ("marill",),
}
#: How a student was made, by what its training went without.
WITHOUT = {
    "": "distilled",
    "d": "trained on labels",
    "pd": "trained on labels, from random weights",
    "all": "not trained",
}
#: Changes in a student's name, in words.
_CHANGES = {
    "frozen": "{} layers frozen",
    "rank": "LoRA, rank {}",
    "merged": "heads merged by {}",
    "fitted": "fitted by least squares first{}",
}

#: What a paper prints of its own students: a sentence, columns, rows ([MPCFormer], GLUE).
PRINTED: Mapping[str, tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]] = {
    "mpcformer": (
        "MPCFormer prints for BERT-base (SST-2; mean of GLUE's tasks; factor of time at 128 tokens):",
        ("model", "training", "SST-2", "GLUE", "faster"),
        (
            ("teacher", "labels", "93.1 %", "82.8", "1x"),
            ("Quad+2ReLU", WITHOUT[""], "92.0 %", "81.1", "1.93x"),
            ("Quad+2ReLU", WITHOUT["d"], "83.4 %", "63.3", ""),
            ("Quad+2ReLU", WITHOUT["pd"], "80.7 %", "56.6", ""),
            ("Quad+2Quad", WITHOUT[""], "92.0 %", "80.3", "2.2x"),
            ("Quad+2Quad", WITHOUT["d"], "83.3 %", "60.9", ""),
            ("Quad+2Quad", WITHOUT["pd"], "81.1 %", "55.7", ""),
        ),
    ),
}

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Student:
    """Scores of one kind of student over its seeds, means: accuracy in percent and ``difference`` to the teacher in
    points; of a language model perplexity, and the ratio of the two. ``interval`` and ``difference_interval``: 95 %,
    Student's t over several seeds, of one seed the bootstrap over sentences or blocks. ``agreement``: percent with the
    teacher's answer. ``counts``: the teacher is far enough above the larger class."""

    task: str
    recipe: str
    changes: str
    training: str
    seeds: int
    language: bool
    score: float
    interval: Range | None
    teacher: float
    difference: float
    difference_interval: Range | None
    agreement: float
    counts: bool


def students_in(file: Path, paper: str) -> list[Student]:
    """The students of a paper's recipes in a ``scores.json`` of ``python -m sfumato.zoo.train.text summary``.

    Raises:
        JobError: the file is no such file, or has no student for this paper.
    """
    if paper not in RECIPES_OF:
        raise JobError(
            f"{paper} changes no model, so its page has no scores; leave out --scores, or use "
            f"{', '.join(RECIPES_OF)}"
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        found = [_student(row) for row in rows if any("teacher" in scores for scores in row["scores"])]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(
            f"{file} cannot be read as scores of students ({error}); give the scores.json that "
            "python -m sfumato.zoo.train.text summary --out FOLDER writes there"
        ) from None
    own = [student for student in found if student.recipe in RECIPES_OF[paper]]
    if not own:
        raise JobError(
            f"{file} has no student for {paper}; train one with --recipe {' or '.join(RECIPES_OF[paper])}"
        )
    order = list(WITHOUT.values())
    return sorted(
        own,
        key=lambda s: (s.task, RECIPES_OF[paper].index(s.recipe), s.changes, order.index(s.training)),
    )


def _student(row: Mapping[str, Any]) -> Student:
    """A row of the file; its name, from ``distil.name_of``, tells recipe, changes and training."""
    name, _, without = str(row["name"]).removeprefix(f"{row['task']}-").partition("-without-")
    recipe = max(
        (r for own in RECIPES_OF.values() for r in own if name == r or name.startswith(f"{r}-")),
        key=len,
        default=name,
    )
    changes = [_change(part) for part in name.removeprefix(recipe).split("-") if part]
    language = "accuracy" not in row
    key, difference = ("perplexity", "ratio") if language else ("accuracy", "difference")
    first = row["scores"][0]
    return Student(
        task=str(row["task"]),
        recipe=recipe,
        changes=", ".join(changes),
        training=WITHOUT[without],
        seeds=len(row["seeds"]),
        language=language,
        score=float(row[key]["mean"]),
        interval=_interval(row[key], first.get("interval")),
        teacher=float(row["teacher"]["mean"]),
        difference=float(row[difference]["mean"]),
        difference_interval=_interval(row[difference], first.get(f"{difference}_interval")),
        agreement=float(row["agreement"]["mean"]),
        counts=all(bool(scores.get("counts", True)) for scores in row["scores"]),
    )


def _change(part: str) -> str:
    for name, words in _CHANGES.items():
        if part.startswith(name):
            return words.format(part.removeprefix(name))
    return part


def _interval(over_seeds: Mapping[str, Any], of_one: Any) -> Range | None:
    found = over_seeds.get("interval", of_one)
    return None if found is None else (float(found[0]), float(found[1]))
