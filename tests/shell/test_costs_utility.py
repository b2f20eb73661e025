"""The scores of students on the pages of ``sfumato reproduce ditto | mpcformer | marill``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato.errors import JobError
from sfumato.shell.costs_page import page
from sfumato.study.costs import CostRow
from sfumato.study.utility import RECIPES_OF, WITHOUT, students_in
from sfumato.zoo.train.text.distil import RECIPES, name_of, summary
from sfumato.zoo.train.text.replace import Replaced


def folder(tmp_path: Path, **students: list[dict[str, Any]]) -> Path:
    """The file that ``summary`` writes for students of these names: scores by seed."""
    for name, seeds in students.items():
        task = name.split("-")[0]
        for seed, scores in enumerate(seeds):
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "task.json").write_text(
                json.dumps({"task": task, "seed": seed, "scores": scores})
            )
    summary(tmp_path)
    return tmp_path / "scores.json"


def scores(accuracy: float, counts: bool = True) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "interval": [accuracy - 4, accuracy + 3], "teacher": 80.0,
        "difference": accuracy - 80, "difference_interval": [accuracy - 82, accuracy - 79], "agreement": 95.0,
        "counts": counts,
    }  # fmt: skip


LANGUAGE = {
    "perplexity": 90.0, "interval": [85.0, 95.0], "teacher": 60.0, "ratio": 1.5, "ratio_interval": [1.4, 1.6],
    "agreement": 50.0, "counts": True,
}  # fmt: skip


def test_students_are_told_by_recipe_and_training(tmp_path: Path) -> None:
    file = folder(
        tmp_path,
        **{
            "sst2-mpcformer": [scores(78.0), scores(79.0), scores(80.0)],
            "sst2-mpcformer-2relu-without-all": [scores(50.0)],
            "sst2-ditto": [scores(79.5)],
            "sst2": [{"accuracy": 80.0, "counts": True}],  # a teacher
            "shakespeare-mpcformer-fitted-without-d": [LANGUAGE],
            "uci-marill-frozen2-rank4-merged2": [scores(60.0, counts=False)],
        },
    )
    language, distilled, untrained = students_in(file, "mpcformer")
    assert (distilled.recipe, distilled.training, distilled.seeds) == ("mpcformer", "distilled", 3)
    assert (distilled.score, distilled.difference) == (79.0, -1.0)
    assert distilled.interval is not None
    assert distilled.interval[1] - distilled.score == pytest.approx(4.303 / 3**0.5, abs=1e-3)  # Student's t
    assert (untrained.recipe, untrained.training, untrained.interval) == (
        "mpcformer-2relu",
        "not trained",
        (46, 53),
    )
    assert (language.task, language.language, language.score, language.difference) == (
        "shakespeare",
        True,
        90,
        1.5,
    )
    assert (language.changes, language.training) == ("fitted by least squares first", "trained on labels")
    (both,) = students_in(file, "marill")
    assert both.changes == "2 layers frozen, LoRA, rank 4, heads merged by 2"
    assert not both.counts

    row = CostRow("bert-base", 128, "MPCFormer, Quad", (1, 1, 1), rounds=2)
    text = page("mpcformer", "sfumato reproduce mpcformer", [row], (), students_in(file, "mpcformer"))
    assert (
        "| sst2 | mpcformer | distilled | 3 | 79.0 % | [76.5, 81.5] | 80.0 % | -1.0 | [-3.5, +1.5] | 95.0 % |"
        in text
    )
    assert "| 90.00 | [85.00, 95.00] | 60.00 | 1.500 | [1.400, 1.600] | 50.0 % | yes |" in text
    assert "| Quad+2Quad | distilled | 92.0 % | 80.3 | 2.2x |" in text, "what the paper prints"


@pytest.mark.parametrize("recipe", [r for own in RECIPES_OF.values() for r in own])
@pytest.mark.parametrize("without", list(WITHOUT))
def test_every_name_of_a_student_is_read(tmp_path: Path, recipe: str, without: str) -> None:
    assert recipe in RECIPES
    name = name_of("sst2", recipe, Replaced(frozen=1), without, 0, fitted=True).rsplit("-", 1)[0]
    paper = next(paper for paper, own in RECIPES_OF.items() if recipe in own)
    (found,) = students_in(folder(tmp_path, **{name: [scores(70.0)]}), paper)
    assert (found.recipe, found.training) == (recipe, WITHOUT[without])
    assert found.changes == "1 layers frozen, fitted by least squares first"


def test_what_is_no_file_of_scores(tmp_path: Path) -> None:
    other = tmp_path / "scores.json"
    for text in ("no JSON", '{"a": 1}', "[1]", '[{"name": "sst2-quad", "scores": [{"teacher": 1}]}]'):
        other.write_text(text)
        with pytest.raises(JobError, match="cannot be read as scores of students"):
            students_in(other, "mpcformer")
    with pytest.raises(JobError, match="cannot be read as scores of students"):
        students_in(tmp_path / "none.json", "ditto")
    with pytest.raises(
        JobError, match="puma changes no model, so its page has no scores; leave out --scores"
    ):
        students_in(other, "puma")
    file = folder(tmp_path, **{"sst2-quad": [scores(70.0)]})
    with pytest.raises(JobError, match="has no student for marill; train one with --recipe marill"):
        students_in(file, "marill")
