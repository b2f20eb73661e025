"""``sfumato reproduce puma | ditto | mpcformer | marill``: rows, pages, errors; and the emulated networks of times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import sfumato as sf
from sfumato.api import Deployment
from sfumato.bench.emulated import NETWORKS, Emulated, Network
from sfumato.errors import JobError
from sfumato.shell.cli import app
from sfumato.shell.costs import DEFAULT_MODELS, Costs
from sfumato.study import costs
from sfumato.study.profiles import ROWS, Profile, public_weights
from sfumato.zoo.shapes import SHAPES, Shape, _Last, _Next, change, with_quad
from sfumato.zoo.train.text.replace import Quad, Replaced, apply


def small(layers: int = 1) -> nn.Module:
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48
    )
    return _Last(BertModel(config, add_pooling_layer=False))


def writes() -> nn.Module:
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    return _Next(GPT2LMHeadModel(config))


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
    assert list(by_label) == [p.label for p in ROWS["ditto"]]
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
    assert sentence in refused("puma", "--model", model, "--network", network, "--out", str(tmp_path))


def refused(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["reproduce", *arguments], env={"COLUMNS": "200"})
    assert found.exit_code == 2, found.output
    return " ".join(found.output.split())


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


# ---- replacements and changes ----------------------------------------------------------------------------------------


def told(paper: str, tmp_path: Path, *more: str) -> tuple[dict[str, dict[str, Any]], str]:
    """(rows by label, the page)."""
    asked = ["reproduce", paper, "--model", "tiny:8", "--out", str(tmp_path), *more]
    found = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / f"{paper}-costs.json").read_text())
    page = (tmp_path / f"{paper}-costs.md").read_text()
    return {row["label"]: row for row in rows}, page


def sent(row: dict[str, Any]) -> int:
    return sum(row["bytes_sent"])


def test_each_replacement_is_told_beside_the_model_it_is_for(tiny: Shape, tmp_path: Path) -> None:
    rows, page = told("mpcformer", tmp_path)
    assert list(rows) == [p.label for p in ROWS["mpcformer"]]
    theirs = [sent(rows[f"MPCFormer, {name}"]) for name in ("Quad+2Quad", "Quad+2ReLU", "Quad")]
    assert theirs == sorted(theirs)
    assert theirs[-1] < sent(rows["CrypTen, unchanged"])
    assert sent(rows["ours, fast, Quad"]) < sent(rows["ours, fast, unchanged"])
    # Against the replaced model, from which the unchanged one is far.
    assert all(row["error"] < 0.02 for row in rows.values())
    model, ids = tiny.build(), tiny.ids(8, 9)
    unchanged = model(ids)
    changed = change(model, Replaced("quad", "2quad"))(ids)
    assert (changed - unchanged).norm() > 0.05 * unchanged.norm()
    line = next(line for line in page.splitlines() if "MPCFormer, Quad+2Quad |" in line)
    base, row = rows["CrypTen, unchanged"], rows["MPCFormer, Quad+2Quad"]
    assert f"{(sent(base) + base['client_bytes']) / (sent(row) + row['client_bytes']):.2f}x" in line
    assert line.endswith("| 2.2x at 128, 5.26x at 512 |")


def test_each_change_is_counted_on_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", lambda: small(4), 60))
    monkeypatch.setattr(costs, "ROWS", {"marill": ROWS["marill"][1:]})  # PUMA's takes as long as five others
    rows, page = told("marill", tmp_path, "--run", "none", "--network", "lan")
    whole, half, quarter = (rows[name] for name in ("all secret", "frozen 1/2", "frozen 3/4"))
    assert 0.2 * sent(whole) < sent(quarter) < 0.3 * sent(whole) < 0.45 * sent(whole) < sent(half)
    assert sent(half) < 0.55 * sent(whole)
    assert quarter["setup_bytes"] < half["setup_bytes"] < whole["setup_bytes"]
    merged = [sent(rows[name]) for name in ("heads merged by 4", "heads merged by 2", "all secret")]
    assert merged == sorted(merged)
    assert sent(rows["frozen 3/4, rank 16, merged by 4"]) < sent(rows["LoRA, rank 16"])
    assert all(row["error"] is None and not row["seconds"] for row in rows.values())
    assert rows["all secret"]["least"]["lan"] > 0
    assert "They were not run: tiny 8 were not asked for." in page
    # What cannot be planned says so in its row.
    assert "| tiny, 8 | LoRA, rank 64 | - |" in page
    assert "LoRA, rank 64 cannot be planned: a rank of 64 saves nothing at width 32; choose 1 to 31." in page


def test_a_run_with_a_public_base_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", lambda: small(2), 60))
    both = Profile(label="both", profile="fast", ring="mixed", frozen=0.5, rank=4, merged=2)
    monkeypatch.setattr(costs, "ROWS", {"marill": (both,)})
    (row,) = costs.cost_rows("marill", [("tiny", 8)], ["none"])
    assert row.error is not None
    assert row.error < 0.02
    assert (row.refused, row.outside, row.skipped) == ("", "", "")
    assert row.seconds["none"] > 0
    assert row.client_s is not None


def test_a_run_that_leaves_its_ranges_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wild() -> nn.Module:
        model: Any = small()
        model.model.embeddings.word_embeddings.weight.data[59] *= 1000  # a token that calibration never sees
        return cast(nn.Module, model)

    def ids(self: Shape, tokens: int, seed: int) -> torch.Tensor:
        found = torch.randint(0, 59, (1, tokens), generator=torch.Generator().manual_seed(seed))
        return torch.full_like(found, 59) if seed == costs._RUN else found

    monkeypatch.setattr(Shape, "ids", ids)
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", wild, 60))
    monkeypatch.setattr(costs, "ROWS", {"puma": (ROWS["puma"][0], ROWS["puma"][-1])})
    rows, page = told("puma", tmp_path, "--network", "none")
    assert "layers left the range" in rows["PUMA"]["outside"]
    assert rows["PUMA"]["error"] > 0
    # Our exponential has a domain, and in the clear it says so without a certificate.
    assert "an exponential at" in rows["ours, fast"]["outside"]
    assert rows["ours, fast"]["error"] is None
    assert all(row["seconds"]["none"] > 0 for row in rows.values())
    assert page.count(" (1) |") == 2
    assert "- tiny, 8, PUMA: " in page


def test_what_does_not_fit_the_memory_is_counted_alone(tiny: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROWS", {"puma": ROWS["puma"][-1:]})
    (run,) = costs.cost_rows("puma", [("tiny", 8)])
    monkeypatch.setattr(costs, "ROOM", 1e-6)
    (counted,) = costs.cost_rows("puma", [("tiny", 8)], ["none"])
    assert "of memory, more than" in counted.skipped
    assert (counted.error, counted.seconds) == (None, {})
    assert (counted.bytes_sent, counted.rounds) == (run.bytes_sent, run.rounds)
    assert run.error is not None
    assert run.memory_bytes > 3 * 2 * 4 * 60 * 32  # at least the table


def test_what_is_run_is_said() -> None:
    assert Costs(paper="ditto").run == DEFAULT_MODELS["ditto"][1]
    assert Costs(paper="ditto", model="bert-large:32").run == "all"
    asked = Costs(paper="ditto", model="bert-base:32,bert-base:64", run="bert-base:32", networks=("lan",))
    assert asked.command == (
        "sfumato reproduce ditto --model bert-base:32,bert-base:64 --run bert-base:32 --network lan"
    )


def test_an_unknown_paper_lists_all() -> None:
    assert "usg, cipherdm, puma, ditto, mpcformer, marill" in refused("sfumato")


def test_what_is_run_has_to_be_counted(tiny: Shape, tmp_path: Path) -> None:
    asked = ("puma", "--model", "tiny:8", "--out", str(tmp_path), "--run")
    assert "tiny:4 cannot be run, as it is not counted; name it with --model, too" in refused(
        *asked, "tiny:4"
    )
    assert "--run takes NAME:TOKENS" in refused(*asked, "tiny")


def test_every_shape_merges_and_freezes() -> None:
    for name in ("bert-base", "bert-large", "gpt2-base", "gpt2-medium"):
        with torch.device("meta"):
            inner: Any = SHAPES[name].make()
        heads, layers = inner.model.config.num_attention_heads, inner.model.config.num_hidden_layers
        assert heads % 4 == 0
        assert [p.replaced(inner.model).frozen for p in ROWS["marill"][2:4]] == [layers // 2, layers * 3 // 4]


def test_changes_that_do_not_fit(tiny: Shape) -> None:
    with pytest.raises(JobError, match="4 heads do not merge by 3; choose a divisor of 4"):
        change(tiny.build(), Replaced(merged=3))


def test_what_a_student_shares_with_its_base() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model: Any = BertForSequenceClassification(config).eval()
    ids = torch.arange(6)[None]

    def learnt(model: Any, inner: Any, replaced: Replaced) -> set[str]:
        program = sf.capture(model, (ids,))
        public = set(public_weights(program, model, inner, replaced))
        assert not public or sf.make_plan(program, secret="inputs+weights", public_weights=public)
        return {i.source for i in program.inputs if i.kind == "parameter"} - public

    assert learnt(model, model, Replaced()) == {name for name, _ in model.named_parameters()}
    rest = learnt(model, model, Replaced(frozen=1))
    assert {name.split(".")[0] for name in rest} == {"bert", "classifier"}
    assert not any("embeddings" in name or "layer.0" in name for name in rest)
    apply(model, Replaced(rank=2))
    kept = learnt(model, model, Replaced(rank=2))
    assert all("lora" in name or "pooler" in name or "classifier" in name for name in kept)
    assert len([name for name in kept if "lora" in name]) == 2 * 12
    tied: Any = writes().eval()
    rest = learnt(tied, tied.model, Replaced(frozen=1))
    assert rest
    assert not any("wte" in name or "lm_head" in name or "h.0." in name for name in rest)
