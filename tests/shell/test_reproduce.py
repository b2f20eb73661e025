"""``sfumato reproduce``: a small study from images to records, a page and pictures; what is wrong is said first."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sfumato.shell.cli import app
from sfumato.shell.reproduce import run_reproduce
from sfumato.study import plans, tables
from sfumato.study import reproduce as studies
from sfumato.study.reproduce import Asked
from sfumato.study.setting import Offline, Setting
from sfumato.study.tables import Study, Table

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(model: str) -> Study:
    """SDU's main rows in miniature."""
    approximated = Setting(name="approximated, 50 steps", steps=4, profile="fast")
    ten = Setting(name="approximated, 10 steps", steps=2, profile="fast")
    corrected = Setting(name="SDU, 10 steps", steps=2, profile="fast", offline=Offline(fine=2))
    main = (approximated, ten, corrected)
    return Study(
        "sdu", "a small study", (model,), main, (Table("Main", "all of it", (tables.ORIGINAL, *main)),)
    )


def test_from_images_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_RUNS", 8)
    monkeypatch.setattr(plans, "_TOGETHER", 4)
    monkeypatch.setattr(studies, "_CHUNK", 4)
    monkeypatch.setattr(studies, "_SECURE_CHUNK", 2)
    monkeypatch.setattr(tables, "ORIGINAL", replace(tables.ORIGINAL, steps=4))
    monkeypatch.setitem(tables.STUDIES, "sdu", (small, ("dit",)))
    said = io.StringIO()
    asked = Asked(paper="sdu", model="dit", out=tmp_path, images=8, secure=2)
    outcome = run_reproduce(asked, Console(file=said, width=200))
    assert [v.merit.images for v in outcome.validations] == [2, 2, 2]
    assert all(v.smallest_db > 40 for v in outcome.validations)
    records = json.loads((tmp_path / "sdu-dit.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in records["tables"][0]["rows"]] == list(outcome.merits)
    assert records["findings"][1]["holds"] is True  # the correction costs nothing
    page = (tmp_path / "sdu-dit.md").read_text(encoding="utf-8")
    for name in outcome.merits:
        assert f"| {name} |" in page
        assert name in said.getvalue()
    assert "## The simulation against the protocol" in page
    for picture in ("images", "cost"):
        assert f"(sdu-dit-{picture}.png)" in page
        with Image.open(tmp_path / f"sdu-dit-{picture}.png") as image:
            assert image.width > 300


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other"], "no study of 'other'; use one of sdu, usg, cipherdm"),
        (["cipherdm", "--model", "dit"], "cipherdm is studied on mnist01"),
        (["sdu", "--images", "150"], "--images must be a multiple of 100, not 150"),
        (["sdu", "--images", "100", "--secure", "30"], "--secure must be a multiple of 20"),
        (["sdu", "--model", "cifar10", "--images", "100"], "the weights of cifar10 do not come with sfumato"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    found = CliRunner().invoke(app, ["reproduce", *arguments, "--out", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert sentence in found.stderr
