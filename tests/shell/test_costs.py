"""``sfumato reproduce puma | ditto``: rows, pages, errors; and the emulated networks that times are measured on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import sfumato as sf
from sfumato.api import Deployment
from sfumato.bench.emulated import NETWORKS, Emulated, Network
from sfumato.errors import JobError
from sfumato.shell.cli import app
from sfumato.study import costs
from sfumato.zoo.shapes import SHAPES, Shape, _Last, with_quad
from sfumato.zoo.train.text.replace import Quad


def small() -> nn.Module:
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    return _Last(BertModel(config, add_pooling_layer=False))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Shape:
    shape = Shape("tiny", small, 60)
    monkeypatch.setitem(SHAPES, "tiny", shape)
    return shape


def test_a_paper_is_told_beside_ours(tiny: Shape, tmp_path: Path) -> None:
    asked = ["reproduce", "ditto", "--model", "tiny:8", "--network", "none", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "ditto-costs.json").read_text())
    by_label = {row["label"]: row for row in rows}
    assert list(by_label) == [p.label for p in costs.ROWS["ditto"]]
    total = {label: sum(row["bytes_sent"]) for label, row in by_label.items()}
    assert total["ours, fast, with Quad"] < total["Ditto"] < total["PUMA"]
    assert by_label["ours, fast"]["error"] < 0.02
    assert all(row["seconds"]["none"] > 0 for row in rows)
    page = (tmp_path / "ditto-costs.md").read_text()
    assert "| tiny, 8 | Ditto |" in page
    assert "none, s" in page


@pytest.mark.parametrize(
    ("model", "network", "sentence"),
    [
        ("tiny", "none", "NAME:TOKENS"),
        ("tiny:0", "none", "NAME:TOKENS"),
        ("huge:8", "none", "there is no model 'huge'"),
        ("tiny:8", "moon", "there is no network 'moon'"),
    ],
)
def test_what_cannot_be_told(tiny: Shape, tmp_path: Path, model: str, network: str, sentence: str) -> None:
    asked = ["reproduce", "puma", "--model", model, "--network", network, "--out", str(tmp_path)]
    found = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert sentence in " ".join(found.output.split())


def test_an_emulated_network_costs_its_latency_and_nothing_else(tiny: Shape) -> None:
    model, ids = tiny.build(), tiny.ids(8, 9)
    plan = sf.make_plan(sf.capture(model, (ids,)), secret="inputs+weights", calibration=[((ids,), {})])
    wanted = sf.estimate(plan)
    network = Network("slow", 2e-3, None)
    with Deployment(plan, Emulated(network)) as deployment:
        found = deployment(ids)
        cost = deployment.cost
    torch.testing.assert_close(found, model(ids), atol=2e-3, rtol=2e-3)
    assert (cost.bytes_sent, cost.rounds) == (wanted.bytes_sent, wanted.rounds)
    assert network.least_s(cost.bytes_sent, cost.rounds) == pytest.approx(2e-3 * cost.rounds)
    assert NETWORKS["wan"].least_s((50_000_000, 0, 0), 1) == pytest.approx(0.5)
    with pytest.raises(JobError, match="emulated for rep3"):
        Emulated(network, {"protocol": "plain"})


def test_quad_goes_where_gelu_was(tiny: Shape) -> None:
    model = with_quad(tiny.build())
    assert sum(isinstance(module, Quad) for module in model.modules()) == 1
