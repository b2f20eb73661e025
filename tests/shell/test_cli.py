"""The command line: help, errors in one line with exit code 2, cluster folders. No model runs here."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sfumato.shell.cli import app

COMMANDS = ["demo", "generate", "classify", "complete", "estimate", "party", "cluster", "catalogue"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})


def errors(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.strip()]


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", result.output)


@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["generate"],
        ["classify"],
        ["complete"],
        ["estimate"],
        ["party"],
        ["cluster", "init"],
        ["catalogue"],
    ],
)
def test_each_command_shows_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"sfumato {' '.join(command)}" in " ".join(result.output.split())


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("sfumato ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "a boat", "--model", "./no/such/folder"], "no pipeline folder"),
        (["classify", "fine", "--model", "./no/such/folder"], "no model folder"),
        (["complete", "a boat", "--model", "./no/such/folder"], "no model folder"),
        (["complete", "a boat", "--model", "x", "--report", "no/such/folder/report.json"], "no folder"),
        (["generate", "a boat", "--backend", "fast"], "no backend 'fast'"),
        (["generate", "a boat", "--profile", "quick"], "no profile 'quick'"),
        (["generate", "a boat", "--secret", "all"], "no secret 'all'"),
        (["generate", "a boat", "--out", "no/such/folder/image.png"], "no folder"),
        (["generate", "a boat", "--out", "image"], "image names no picture format"),
        (["generate", "a boat", "--out", "image.foo"], "image.foo names no picture format"),
        (["generate", "a boat", "--out", "image.psd"], "image.psd names no picture format"),
        (["generate", "a boat", "--out", "/"], "/ is a folder"),
        (["generate", "a boat", "--report", "no/such/folder/report.json"], "for the report"),
        (["generate", "a boat", "--cluster", "ours.toml", "--backend", "simulate"], "not backend 'simulate'"),
        (["demo", "--model", "cluster:ours"], "use sfumato generate"),
        (["demo", "--out", "/dev/null"], "cannot make the folder /dev/null"),
        (["generate", "a boat", "--mask", "mask.png"], "need --image"),
        (["generate", "a boat", "--image", "./no/such.png"], "no picture that can be read"),
        (["estimate", "./no/such/folder"], "no pipeline folder"),
        (["party", "--folder", "./no/such/folder"], "cluster file"),
        (["catalogue", "cosine"], "no function 'cosine'; there are exp, reciprocal"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(errors(result)) == 1
    assert errors(result)[0].startswith("sfumato: ")
    assert words in errors(result)[0]
    assert "Traceback" not in result.output


def test_a_folder_without_index_is_named(tmp_path: Path) -> None:
    result = run("estimate", str(tmp_path))
    assert result.exit_code == 2
    assert "model_index.json" in result.stderr


def test_another_kind_of_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    result = run("estimate", str(tmp_path))
    assert result.exit_code == 2
    assert "StableDiffusionXLPipeline" in result.stderr


def test_wrong_numbers_are_refused_before_work() -> None:
    assert run("generate", "a boat", "--steps", "0").exit_code == 2
    assert run("generate").exit_code == 2


def test_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sfumato.runtime.authority.init_cluster", interrupted)
    result = run("cluster", "init", "anywhere")
    assert result.exit_code == 130
    assert errors(result) == ["sfumato: interrupted"]


def test_cluster_init_makes_folders_and_never_overwrites(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    result = run("cluster", "init", str(folder), "--client", "alice", "--client", "bob")
    assert result.exit_code == 0
    assert {p.name for p in folder.iterdir()} == {
        "party0",
        "party1",
        "party2",
        "alice",
        "authority",
        "bob",
        "owner",
        "cluster.toml",
    }
    key = folder / "party1" / "key.pem"
    before = key.read_bytes()
    again = run("cluster", "init", str(folder))
    assert again.exit_code == 2
    assert "not empty" in again.stderr
    assert key.read_bytes() == before


def test_a_clients_folder_runs_no_party(tmp_path: Path) -> None:
    assert run("cluster", "init", str(tmp_path / "ours")).exit_code == 0
    result = run("party", "--folder", str(tmp_path / "ours" / "client"))
    assert result.exit_code == 2
    assert "no party" in result.stderr


def test_each_party_is_known_by_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("cluster", "init", str(tmp_path / "ours")).exit_code == 0
    served: list[list[str]] = []

    def serve(arguments: list[str]) -> int:
        served.append(arguments)
        return 0

    monkeypatch.setattr("sfumato.runtime.server.main", serve)
    for index in range(3):
        assert (
            run("party", "--folder", str(tmp_path / "ours" / f"party{index}"), "--threads", "2").exit_code
            == 0
        )
        assert served[-1][2:] == ["--index", str(index), "--threads", "2"]


def test_help_does_not_load_torch() -> None:
    import subprocess

    program = "import sys; from sfumato.shell import cli; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_an_estimate_shows_its_plan_and_published_prices() -> None:
    result = run("estimate", "embedded", "--steps", "2", "--profile", "fast", "--plan")
    assert result.exit_code == 0, result.output
    for word in ("sent by P0", "headroom", "bits/element", "sines", "at SPU's prices"):
        assert word in result.output
    assert "second" not in result.output, "nothing ran"


def test_an_estimate_as_json_has_no_times() -> None:
    result = run("estimate", "embedded", "--steps", "2", "--profile", "fast", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["rounds"] > 0
    assert (record["seconds"], record["steps"]) == (None, [])
