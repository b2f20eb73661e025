"""`sfumato catalogue`: the overview, one function's table, JSON, and pages with figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sfumato.catalogue import FUNCTIONS
from sfumato.catalogue.defects import DEFECTS, defects_of
from sfumato.shell.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_overview_has_a_line_for_every_function() -> None:
    result = run("catalogue")
    assert result.exit_code == 0, result.output
    for name in FUNCTIONS:
        assert re.search(rf"\b{name}\b", result.output)
    assert f"{len(DEFECTS)} known defects" in result.output


def test_one_function_shows_methods_and_defects() -> None:
    result = run("catalogue", "erf")
    assert result.exit_code == 0, result.output
    for name in ("crypten.erf", "crypten.erf-fixed", "spu.erf", "sfumato.erf"):
        assert re.search(rf"{re.escape(name)}\s", result.output)
    words = " ".join(result.output.split())
    for defect in defects_of("erf"):
        assert defect.title in words


def test_remarks_keep_their_brackets() -> None:
    result = run("catalogue", "mish")
    assert result.exit_code == 0, result.output
    assert "([CipherDM], authors' code)" in " ".join(result.output.split())


def test_json_is_json() -> None:
    result = run("catalogue", "layer-norm", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["function"] == "layer_norm"
    assert {"name", "stated", "exact", "recorded", "cost", "rep3"} <= set(data["methods"][0])


@pytest.mark.parametrize("name", ["erf", "layer_norm"])
def test_a_page_stands_alone(name: str, tmp_path: Path) -> None:
    result = run("catalogue", name, "--out", str(tmp_path / "pages"))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "pages" / f"catalogue-{name}.html").read_text(encoding="utf-8")
    pictures = re.findall(r'src="([^"]{1,22})', page)
    assert len(pictures) == 2 + len(defects_of(name))
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    for png in (tmp_path / "pages").glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("catalogue", "erf", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot make the folder" in result.stderr
