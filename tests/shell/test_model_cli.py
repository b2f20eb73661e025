"""`sfumato model` without parties: what it prints, what it asks, and what it says when something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import sfumato as sf
from sfumato.diffusion.settings import Settings
from sfumato.errors import JobError, LinkError
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.sharing import ModelToShare
from sfumato.shell.cli import app
from sfumato.shell.model import found

SETTINGS = Settings(scheduler="DDIMScheduler", steps=20, guidance=7.5, height=512, width=512)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    init_cluster(tmp_path / "ours")
    return tmp_path / "ours" / "owner" / "cluster.toml"


def entry(name: str = "sd", **more: Any) -> dict[str, Any]:
    return {
        "name": name, "owner": "sfumato://owner/studio", "share_id": "ab" * 16, "clients": None, "plans": 3,
        "nbytes": 1_000_000, "shared_at": 1_700_000_000, "secret": True, "offers": [asdict(SETTINGS)], "problem": "",
        **more,
    }  # fmt: skip


def invoked(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def answering(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[int, dict[str, Any]], dict[str, Any]]
) -> list[tuple[int, dict[str, Any]]]:
    """Parties that answer so; what they are asked."""
    asked: list[tuple[int, dict[str, Any]]] = []

    def ask(_: Any, keys: Any, party: int, request: dict[str, Any]) -> dict[str, Any]:
        asked.append((party, request))
        return answer(party, request)

    monkeypatch.setattr("sfumato.runtime.control.ask", ask)
    return asked


# ---- list --------------------------------------------------------------------------------------------------


def test_models_of_three_parties_are_one_list() -> None:
    old, new = entry(share_id="00" * 16), entry(share_id="11" * 16, nbytes=7)
    replies = {
        0: {"models": [entry("a"), new]},
        1: {"models": [entry("a", problem="its manifest was changed"), new]},
        2: {"models": [entry("a"), old]},
    }
    a, left, whole = found(replies)
    assert (a["name"], a["parties"], a["complete"]) == ("a", [0, 2], False)
    assert a["problem"] == "party 1: its manifest was changed"
    assert (left["parties"], left["nbytes"]) == ([2], [1_000_000])
    assert (whole["parties"], whole["nbytes"], whole["complete"]) == ([0, 1], [7, 7], False)
    assert found({party: {"models": [entry()]} for party in range(3)})[0]["complete"]


def test_list_is_a_table(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(
        monkeypatch, lambda *_: {"models": [entry(), entry("layer", offers=[{"title": "Net"}])]}
    )
    result = invoked("model", "list", "--cluster", cluster)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    for words in ("sd", "studio", "2023-11-14", "3.00 MB", "20 steps", "512x512", "all", "Net"):
        assert words in result.output
    assert asked == [(party, {"ask": "models"}) for party in range(3)]
    as_json = json.loads(invoked("model", "list", "--cluster", cluster, "--json").output)
    assert [model["name"] for model in as_json["models"]] == ["layer", "sd"]
    assert as_json["parties"] == [0, 1, 2]


def test_a_party_that_does_not_answer_is_named(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(party: int, _: Any) -> dict[str, Any]:
        if party == 1:
            raise LinkError("party 1 (127.0.0.1:8441) cannot be reached")
        return {"models": [entry()]}

    answering(monkeypatch, answer)
    result = invoked("model", "list", "--cluster", cluster)
    assert result.exit_code == 0
    assert "only P0, P2" in " ".join(result.stdout.split())
    assert result.stderr == "sfumato: party 1 (127.0.0.1:8441) cannot be reached\n"

    def nobody(party: int, _: Any) -> dict[str, Any]:
        raise LinkError(f"party {party} cannot be reached")

    answering(monkeypatch, nobody)
    result = invoked("model", "list", "--cluster", cluster)
    assert (result.exit_code, result.stderr) == (2, "sfumato: party 0 cannot be reached\n")


def test_no_models(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda *_: {"models": []})
    assert invoked("model", "list", "--cluster", cluster).output == "no models\n"


# ---- remove ------------------------------------------------------------------------------------------------


def test_remove_asks_first_and_then_everybody(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, lambda *_: {})
    result = invoked("model", "remove", "sd", "--cluster", cluster)
    assert result.exit_code == 2
    assert result.stderr == "sfumato: there is nobody here to confirm this; say --yes\n"
    assert asked == []
    result = invoked("model", "remove", "sd", "--cluster", cluster, "--yes")
    assert result.stdout == "sd is removed at all parties\n"
    assert asked == [(party, {"ask": "remove", "model": "sd"}) for party in range(3)]


def test_a_model_that_stays_somewhere(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(party: int, _: Any) -> dict[str, Any]:
        if party == 2:
            raise LinkError("cannot be reached")
        return {}

    answering(monkeypatch, answer)
    result = invoked("model", "remove", "sd", "--cluster", cluster, "--yes")
    assert result.exit_code == 2
    assert result.stderr == "sfumato: removed at P0, P1; party 2: cannot be reached\n"


# ---- share -------------------------------------------------------------------------------------------------


@pytest.fixture
def offering(monkeypatch: pytest.MonkeyPatch) -> list[ModelToShare]:
    """`model share` without a pipeline: a small plan stands for the U-Net's. What was sent to the parties."""
    module, x = nn.Linear(4, 4).eval(), torch.ones(1, 4)
    plan = sf.make_plan(sf.capture(module, (x,)), secret="inputs+weights")
    offer = {"settings": asdict(SETTINGS), "parts": {"unet": plan.digest()}, "reveal": ["unet"]}
    sent: list[ModelToShare] = []

    def offered(pipe: Any, name: str, terms: Any, *, replace: bool) -> ModelToShare:
        return ModelToShare(
            name=name, plans={plan.digest(): plan}, offers=[offer], files={"vae/a.safetensors": b"1234"},
            clients=terms.clients, replace=replace,
        )  # fmt: skip

    def share_model(_: Any, keys: Path, model: ModelToShare, *, progress: Any) -> str:
        assert (keys / "key.pem").is_file()
        progress(1, 2)
        sent.append(model)
        return "cd" * 16

    monkeypatch.setattr("sfumato.diffusion.pipeline.SecurePipeline.from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("sfumato.diffusion.offers.offered", offered)
    monkeypatch.setattr("sfumato.runtime.sharing.share_model", share_model)
    return sent


def test_share_shows_who_learns_what_before_anything_leaves(
    cluster: Path, offering: list[ModelToShare]
) -> None:
    arguments = ("model", "share", "a-folder", "--name", "sd", "--cluster", cluster, "--client", "ward")
    result = invoked(*arguments)
    assert result.exit_code == 2
    assert "say --yes" in result.stderr
    assert offering == []
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("cluster:sd will offer", "512x512", "latents", "all of vae", "not prevented", "ward"):
        assert words in " ".join(result.stdout.split())
    result = invoked(*arguments, "--yes", "--replace")
    assert result.exit_code == 0
    assert "shared as cluster:sd (share cdcdcdcd)" in result.stdout
    assert [(model.clients, model.replace) for model in offering] == [(["ward"], True)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--name", "../sd"), "a model's name must be"),
        (("--name", "sd", "--scheduler", "eulr"), "there is no scheduler 'eulr'"),
        (("--name", "sd", "--open", "weights"), "is one of image, latents"),
        (("--name", "sd", "--height", "64"), "height and width go together"),
    ],
)
def test_mistakes_are_said_before_any_work(
    cluster: Path, offering: list[ModelToShare], more: tuple[str, ...], said: str
) -> None:
    result = invoked("model", "share", "a-folder", "--cluster", cluster, *more, "--yes")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert offering == []


def test_a_shared_model_needs_its_cluster() -> None:
    for command in (("generate", "a seven", "--model", "cluster:sd"), ("estimate", "cluster:sd")):
        result = invoked(*command)
        assert result.exit_code == 2
        assert "cluster:sd is at the parties of a cluster" in result.stderr


def test_settings_survive_and_nothing_else_passes() -> None:
    assert Settings.from_json(json.loads(json.dumps(asdict(SETTINGS)))) == SETTINGS
    for wrong in ({"steps": 0}, {"steps": True}, {"guidance": "x"}, {"scheduler": "a b"}, {"more": 1}):
        with pytest.raises(JobError, match="settings"):
            Settings.from_json({**asdict(SETTINGS), **wrong})
