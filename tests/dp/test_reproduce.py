"""``sfumato reproduce dp-ldm`` in miniature: rows to JSON, JSON to a page, and no row computed twice."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from sfumato.dp import reproduce as module
from sfumato.dp.data import Records
from sfumato.dp.kernel import KernelSettings
from sfumato.dp.ledger import NOT_COVERED, Ledger
from sfumato.dp.reproduce import Setting, cropped, finished_rows, reconstructed, run_row
from sfumato.dp.rows import chosen_rows, rows_of
from sfumato.dp.sources import Seen, Sources
from sfumato.dp.subjects import SUBJECTS, Subject
from sfumato.errors import JobError
from sfumato.shell import dp_reproduce
from sfumato.shell.dp_page import accuracy_of, page

sys.path.insert(0, str(Path(__file__).parent))
from tuning import CAPTIONS, images_of, records_of

pytestmark = pytest.mark.usefixtures("remembered")

SUBJECT = Subject(
    "mnist",
    CAPTIONS,
    lambda folder: records_of(200, 11),
    lambda folder: records_of(100, 12),
    None,
    batch=64,
    epochs=1.0,
    delta=1e-4,
)


@pytest.fixture(scope="module")
def setting(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    small = KernelSettings(frequencies=50, per_class=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train_kernel", partial(module.train_kernel, settings=small))
        patch.setitem(SUBJECTS, "mnist", SUBJECT)  # type: ignore[arg-type]
        yield Setting(
            subject=SUBJECT, data=Path("nowhere"), public=public, out=tmp_path_factory.mktemp("out"), images=40,
            few=20, kinds=("cnn",), seeds=(0,), steps=2, kernel_minutes=0.002, epochs=1, few_epochs=1,
        )  # fmt: skip


ROWS = ("public", "eps10", "kernel10", "real", "draws1-eps10", "unconditional")


@pytest.fixture(scope="module")
def measured(setting: Setting) -> dict[str, dict[str, Any]]:
    known = rows_of(SUBJECT)
    return {name: run_row(known[name], setting) for name in ROWS}


def test_every_row_says_what_it_cost(measured: dict[str, dict[str, Any]], setting: Setting) -> None:
    for name, record in measured.items():
        assert json.loads((setting.rows / f"{name}.json").read_text("utf-8")) == record
        with Image.open(setting.rows / f"{name}.png") as grid:
            assert grid.size == (20 * 28 * 2, (1 if name == "unconditional" else 10) * 28 * 2)
        assert record["images"] == (40 if record["main"] else 20)
    tuned = measured["eps10"]
    assert tuned["steps"] == 3
    assert 0 < max(tuned["spent"]["prv"], tuned["spent"]["pld"]) <= 10.0
    ledger = Ledger.read(setting.rows / "eps10.run" / "model" / "ledger.json")
    assert (ledger.done, ledger.event.steps) == (3, 3)
    assert ledger.event.noise_multiplier == tuned["noise_multiplier"]
    for name in ("public", "eps10", "kernel10"):
        assert measured[name]["copies"]["identical"] == 0
    assert [event["steps"] for event in measured["kernel10"]["events"]] == [1]
    assert "spent" not in measured["public"]
    assert measured["draws1-eps10"]["changes"] == {"draws": 1}
    assert measured["draws1-eps10"]["recipe"]["draws"] == 1
    assert "utility" not in measured["unconditional"]  # no labels to learn from
    assert finished_rows(setting).keys() == set(ROWS)


def test_no_row_is_computed_twice(
    measured: dict[str, dict[str, Any]], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_images", lambda *_: pytest.fail("computed again"))
    for name, record in measured.items():
        assert run_row(rows_of(SUBJECT)[name], setting) == record


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("eps10", {"images": 60}, "images"),
        ("draws1-eps10", {"few": 30}, "images"),
        ("eps10", {"kinds": ("cnn", "mlp")}, "classifiers"),
        ("public", {"steps": 3, "precision": "float32"}, "steps_of_sampling, precision"),
        ("eps10", {"guidance": 2.0}, "guidance"),
        ("public", {"public": "other"}, "public"),
        ("eps10", {"recipe": {"rate": 1e-3}}, "recipe"),
        ("public", {"features": ("Inception", lambda _: pytest.fail("computed"))}, "features"),
    ],
)
def test_no_row_passes_for_one_of_other_settings(
    measured: dict[str, dict[str, Any]], setting: Setting, tmp_path: Path, name: str, change: dict[str, Any], what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "_images", lambda *_: pytest.fail("computed again"))
    row = rows_of(SUBJECT, change.pop("guidance", 1.0))[name]
    if "recipe" in change:
        assert row.recipe is not None
        row = replace(row, recipe=replace(row.recipe, physical=8, **change.pop("recipe")))
    if "public" in change:
        change["public"] = tmp_path
        Sources((Seen.declared("other images", "given by hand"),)).write(tmp_path)
    before = (setting.rows / f"{name}.json").read_bytes()
    with pytest.raises(JobError, match=f"{name}.json was measured with another {what}; remove it"):
        run_row(row, replace(setting, **change))
    assert (setting.rows / f"{name}.json").read_bytes() == before


def test_guidance_draws_from_the_same_weights(
    measured: dict[str, dict[str, Any]], setting: Setting, steps: list[int]
) -> None:
    row = rows_of(SUBJECT)["eps10-guidance"]
    found = run_row(row, setting)
    assert steps == []  # no second training, which would cost ε a second time
    assert not (setting.rows / "eps10-guidance.run").exists()
    assert (found["guidance"], measured["eps10"]["guidance"]) == (1.5, 1.0)
    assert found["spent"] == measured["eps10"]["spent"]
    # What another process trained has a cost that this one has not seen.
    assert found["cpu_s_training"] is None
    assert measured["eps10"]["cpu_s_training"] > 0
    (setting.rows / "eps10-guidance.json").unlink()  # the other tests count the rows


def test_the_page(
    measured: dict[str, dict[str, Any]], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_images", lambda *_: pytest.fail("computed again"))
    said = io.StringIO()
    dp_reproduce.run_dp_ldm(Console(file=said, width=200), setting, ROWS)
    held = json.loads((setting.out / "dp-ldm-mnist.json").read_text("utf-8"))
    assert list(held) == [name for name in rows_of(SUBJECT) if name in ROWS]
    text = (setting.out / "dp-ldm-mnist.md").read_text("utf-8")
    verdict = text.split("\n\n")[1]
    ours, theirs = accuracy_of(measured["eps10"]), accuracy_of(measured["kernel10"])
    assert ours is not None
    assert theirs is not None
    assert f"reaches {100 * ours:.1f} %" in verdict
    assert ("**not above**" in verdict) == (ours <= theirs)
    assert "The public model alone" in verdict
    for line in (
        "## Main rows",
        "## One change each, ε = 10",
        "| DP fine-tuned, ε = 10 |",
        "## Printed",
        *NOT_COVERED,
    ):
        assert line in text
    assert "## One change each, ε = 1\n" not in text  # none was measured
    with Image.open(setting.out / "dp-ldm-mnist.png") as picture:
        assert picture.width > 300
    assert "DP fine-tuned, ε = 10: " in said.getvalue()


def test_what_does_not_exist(setting: Setting) -> None:
    with pytest.raises(JobError, match="there is no data set 'faces'; use one of mnist, pneumonia, cifar10"):
        dp_reproduce.setting_of(
            subject="faces",
            data=setting.data,
            public=setting.public,
            out=setting.out,
            images=40,
            kinds=("cnn",),
        )
    with pytest.raises(
        JobError, match="there is no row 'eps3'; use main, ablation, or some of public, eps10"
    ):
        dp_reproduce.run_dp_ldm(Console(quiet=True), setting, ("eps3",))


def test_rows() -> None:
    known = rows_of(SUBJECT, guidance=2.0)
    main, ablation = chosen_rows(known, ("main",)), chosen_rows(known, ("ablation",))
    names = ["public", "eps10", "eps1", "eps-inf", "kernel10", "kernel1", "real"]
    assert [row.name for row in main] == [*names, "eps10-guidance", "eps1-guidance"]
    for other in ("eps10", "eps1"):
        again = known[f"{other}-guidance"]
        assert (again.run, again.recipe, again.guidance) == (other, known[other].recipe, 1.0)
        assert known[other].run == other
        assert rows_of(SUBJECT)[again.name].guidance == 1.5
    assert {row.name for row in main + ablation} == set(known)
    assert chosen_rows(known, ("eps1", "main", "eps1"))[0].name == "eps1"
    for row in ablation:
        assert row.recipe is not None
        assert row.recipe.epochs < SUBJECT.epochs
        base = known[f"base-eps{row.recipe.epsilon:g}"].recipe
        assert base is not None
        assert row.recipe == replace(base, **row.changes)
    assert {row.guidance for row in main if row.kind in ("tuned", "public") and not row.of} == {2.0}
    assert {row.guidance for row in ablation} == {1.0}
    assert known["public"].epsilon is None
    assert known["real"].epsilon == float("inf")


def test_a_page_of_nothing() -> None:
    assert "No row has been finished yet." in page({}, "mnist")


def test_what_the_autoencoder_leaves(public: Path) -> None:
    images = images_of(5, 3)
    assert reconstructed(public, images, 28).shape == (5, 1, 28, 28)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    assert torch.equal(cropped(padded, 28), images)
    assert cropped(images, 28) is images


@pytest.mark.parametrize("name", ["mnist", "pneumonia", "cifar10"])
def test_subjects(name: str, data_dir: Path) -> None:
    subject = SUBJECTS[name]
    private, test = subject.private(data_dir / "images"), subject.test(data_dir / "images")
    assert private.captions == test.captions == subject.captions
    assert private.images.shape[1:] == test.images.shape[1:]
    assert subject.delta < 1 / len(private)
    assert subject.batch <= len(private)
    assert set(test.labels.tolist()) == set(range(len(subject.captions)))
    assert isinstance(private, Records)
