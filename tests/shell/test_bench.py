"""``sfumato bench``: a small case through the command, the peers' records beside it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from sfumato.bench.cases import all_cases, select
from sfumato.bench.floor import Floor, Rates, Work
from sfumato.bench.machine import cores
from sfumato.bench.page import comparison_row, markdown_table, number
from sfumato.bench.peers import GOALS, compare, goal_for, latest, peer_records
from sfumato.errors import JobError
from sfumato.shell.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "250", "TERM": "dumb"})


def record(peer: str, config: str, **fields: Any) -> dict[str, Any]:
    return {
        "peer": peer,
        "config": config,
        "weights": "secret",
        "case": "silu_1e5",
        "wall_s": 1.0,
        "cpu_s_per_party": [0.8, 0.8, 0.8],
        "foreign_cpu": 0.5,
        "tcp_sent_per_party": [80_000_000, 1],
        "max_abs_err": 1e-3,
        "rel_l2_err": 1e-3,
        **fields,
    }


SPU = record("spu", "ABY3 FM64 f18", spu_sends=80)
OURS = record(
    "sfumato", "rep3 precise", cpu_s_per_party=[0.1, 0.1, 0.1], tcp_sent_per_party=[10_000_000], steps=10
)


@pytest.mark.processes
def test_a_case_is_measured_and_set_beside_the_peers(tmp_path: Path) -> None:
    peers, lines, page = tmp_path / "peers", tmp_path / "ours.jsonl", tmp_path / "page.md"
    peers.mkdir()
    (peers / "spu.jsonl").write_text(json.dumps({**SPU, "case": "mul_1e5"}) + "\n")
    result = run("mul_1e5", "--repeat", "1", "--peers", str(peers), "--json", str(lines), "--out", str(page))
    assert result.exit_code == 0, result.output
    (own,) = [json.loads(line) for line in lines.read_text().splitlines()]
    assert (own["peer"], own["case"], own["weights"], own["rounds"]) == ("sfumato", "mul_1e5", "secret", 3)
    assert own["rel_l2_err"] < 1e-4
    assert all(cpu > 0 for cpu in own["cpu_s_per_party"])
    assert 0 < own["wall_min_s"] <= own["wall_s"] <= own["wall_max_s"]
    assert own["steps"] == max(own["rounds"], *own["sends_per_party"])
    sent = zip(own["tcp_sent_per_party"], own["bytes_sent_per_party"], strict=True)
    assert all(payload < kernel < 1.05 * payload + 5000 for kernel, payload in sent)
    assert own["certificate_rounds"] > 0
    assert sum(own["certificate_bytes_sent_per_party"]) < sum(own["bytes_sent_per_party"]) / 100
    assert own["floor_s"] == max(own["gemm_s"], own["link_s"], own["rounds_s"]) > 0
    assert own["rates"]["round_s"] > 0
    text = page.read_text()
    assert "mul_1e5" in text
    assert "Side by side" in text
    assert "mul_1e5" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_case"], "no case 'no_such_case'; use matmul_512x512x512"),
        (["silu_1e5", "--public"], "leave --public out"),
        (["silu_1e5", "--profile", "quick"], "no profile 'quick'"),
        (["silu_1e5", "--peers", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["silu_1e5", "--json", "nowhere/a.jsonl"], "no folder nowhere"),
        (["silu_1e5", "--out", "nowhere/a.md"], "no folder nowhere"),
    ],
)
def test_errors_come_before_anything_is_measured(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("sfumato: ")
    assert words in result.stderr


def test_the_list_names_every_case_once() -> None:
    result = run("--list")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.output.splitlines()]
    assert names == [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert {"exp_negative_1e6", "quick_gelu_1e5", "less_1e5", "bert_base_12_128"} <= set(names)


def test_cases_are_chosen_by_name_and_pattern() -> None:
    assert [case.name for case in select(["relu_1e5", "*_1e5"])].count("relu_1e5") == 1
    assert [case.name for case in select(["softmax_*"])] == ["softmax_256x256", "softmax_1024x1024"]
    assert "bert_base_12_128" not in {case.name for case in select([])}
    assert all(case.has_weights for case in select([], public=True))


def test_every_goal_has_cases_and_most_cases_a_goal() -> None:
    names = [case.name for case in all_cases()]
    for goal in GOALS:
        assert any(goal.fits(name, goal.weights) for name in names), goal
    without = {name for name in names if goal_for(name, "secret") is None}
    assert without == {"mul_1e5", "mul_1e6", "bert_base_12_128"}


def test_ratios_and_verdicts() -> None:
    met = compare(OURS, SPU)
    assert met is not None
    assert (met.cpu, met.bytes, met.steps) == (pytest.approx(8), 8, 8)
    assert met.verdict == "met"
    missed = compare({**OURS, "steps": 20, "rel_l2_err": 0.01}, SPU)
    assert missed is not None
    assert missed.verdict == "missed: steps 4x of 8x, error"
    good = compare({**OURS, "rel_l2_err": 1.9e-3}, SPU)  # larger than the peer's, and good enough
    assert good is not None
    assert good.error_ok
    assert compare({**OURS, "error": "no"}, SPU) is None
    assert compare(OURS, None) is None


def test_the_quietest_record_of_the_default_configuration_counts(tmp_path: Path) -> None:
    lines = [SPU, {**SPU, "foreign_cpu": 0.1, "wall_s": 2.0}, {**SPU, "config": "SEMI2K", "foreign_cpu": 0.0}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = peer_records([tmp_path])
    assert found["spu", "silu_1e5", "secret"]["wall_s"] == 2.0
    assert len(found) == 1
    row = comparison_row(OURS, found)
    assert "met" in row
    assert row[-1] == "-"  # no record of the other peer
    (tmp_path / "b.jsonl").write_text("not json\n")
    with pytest.raises(JobError, match=r"line 1 of .*b.jsonl is no benchmark record"):
        peer_records([tmp_path])


def test_the_page_shows_the_last_record_of_a_case() -> None:
    records = [OURS, {**OURS, "case": "relu_1e5"}, {**OURS, "wall_s": 3.0}, SPU]
    assert [(r["case"], r["wall_s"]) for r in latest(records)] == [("silu_1e5", 3.0), ("relu_1e5", 1.0)]
    assert markdown_table(["a"], [["1"]]) == "| a |\n|---|\n| 1 |"
    assert [number(x) for x in (None, 0.0, 123456.0, 0.25, 2e-5)] == ["-", "0", "1.2e5", "0.25", "2.0e-5"]


def test_the_floor_is_the_largest_of_three_bounds() -> None:
    rates = Rates(1e9, 1e6, 1e-3)
    module, x = nn.Linear(4, 6).eval(), torch.randn(3, 4)
    assert Work.of(module, (x,), secret_weights=False) == Work(0, 72)
    secret = Work.of(module, (x,), secret_weights=True)
    assert secret == Work(72, 0)
    assert secret.seconds(1e9) == pytest.approx(max(2.0, 5 / cores()) * 72e-9)
    assert Floor.of(secret, 5_000, 2, rates).binding == "link"
    assert Floor.of(secret, 500, 2, rates).seconds == pytest.approx(2e-3)
    assert Floor.of(Work(10**9, 0), 500, 2, rates).binding == "GEMM"


def test_attention_multiplies_secrets_even_with_public_weights() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert Work.of(Attention(), (torch.randn(1, 2, 5, 4),), secret_weights=False) == Work(2 * 2 * 25 * 4, 0)
