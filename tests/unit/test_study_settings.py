"""Rows of studies as data, the tables made of them, and the sentences about them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sfumato.diffusion.correction import Pull
from sfumato.errors import JobError
from sfumato.quality import Interval
from sfumato.study.findings import findings
from sfumato.study.merit import Merit
from sfumato.study.setting import Offline, Setting
from sfumato.study.tables import CONTROL_4, STUDIES, TUNED, study
from sfumato.zoo.classes import weights_path

PAIRS = [(paper, model) for paper, (_, models) in STUDIES.items() for model in models]


@pytest.mark.parametrize(("paper", "model"), PAIRS)
def test_every_row_survives_json_and_has_one_meaning(paper: str, model: str) -> None:
    wanted = study(paper, model)
    named: dict[str, Setting] = {}
    for row in (*wanted.main, *(row for table in wanted.tables for row in table.rows)):
        assert Setting.from_json(json.loads(json.dumps(row.to_json()))) == row
        assert named.setdefault(row.name, row) == row, f"two rows are called {row.name}"
    assert {row.name for row in wanted.main} <= {row.name for row in wanted.tables[0].rows}


def test_a_digest_is_of_what_is_drawn_and_not_of_the_name() -> None:
    row = Setting(name="a", steps=10, offline=Offline(pull=Pull(eta=0.1)))
    assert replace(row, name="b").digest == row.digest
    assert replace(row, steps=11).digest != row.digest
    assert replace(row, offline=Offline(pull=Pull(eta=0.2))).digest != row.digest
    with pytest.raises(JobError, match="no correction 'magic'"):
        Offline(kind="magic")


@pytest.mark.parametrize(("paper", "model"), PAIRS)
def test_tuned_networks_that_are_studied_come_with_sfumato(paper: str, model: str) -> None:
    known = {row for table in study(paper, model).tables for row in table.rows if row.network}
    rows = {row for row in known if row.network.startswith("tuned-")}
    assert {row.network for row in known - rows} <= {"distilled", "few"}
    wanted = TUNED.get(paper, {}).get(model)
    assert {row.network for row in rows} == ({wanted} if wanted else set())
    for row in rows:
        assert row.name.startswith(CONTROL_4)
        assert row.profile == paper
        assert weights_path(model, None, row.network).is_file()


def test_what_is_not_studied_is_named() -> None:
    with pytest.raises(JobError, match="no study of 'other'; use one of sdu, usg, cipherdm"):
        study("other", "embedded")
    with pytest.raises(JobError, match="cipherdm is studied on mnist01"):
        study("cipherdm", "embedded")


def made(name: str, frechet: float, megabytes: float, against: tuple[float, float, float]) -> Merit:
    near: dict[str, Any] = dict.fromkeys(("precision", "recall", "psnr_db", "feature_distance"), 0.5)
    return Merit(
        name=name, backend="plain", images=100, frechet=frechet, against=Interval(*against),
        accuracy=Interval(0.9, 0.8, 1.0), points=Interval(0.0, -0.5, 0.5), f1=0.9, clip=None, megabytes=megabytes,
        rounds=10, client_megabytes=1.0, offline_megabytes=0.0, seconds=1.0, cpu_s=1.0, setting={}, **near,
    )  # fmt: skip


@pytest.mark.parametrize("better", [True, False])
def test_sentences_follow_the_numbers(better: bool) -> None:
    moved = (-0.1, -0.2, 0.0) if better else (0.1, 0.06, 0.2)
    names = (
        "original, 50 steps",
        "approximated, 50 steps",
        "approximated, 10 steps",
        "SDU, 10 steps",
        "ours, 5 steps",
    )
    costs = (0.0, 500.0, 100.0, 100.0, 10.0)
    rows = {n: made(n, 3.0 if better else 4.0, c, moved) for n, c in zip(names, costs, strict=True)}
    told = {finding.claim[:12]: finding.holds for finding in findings("sdu", rows)}
    assert told["SDU with 10 "] is better
    assert told["ours, 5 step"] is better
    assert told["The correcti"] is True
    assert told["50 approxima"] is True
    rows["SDU, 10 steps"] = replace(rows["SDU, 10 steps"], rounds=11)
    assert not {f.claim[:12]: f.holds for f in findings("sdu", rows)}["The correcti"]


def test_too_few_images_leave_a_comparison_open() -> None:
    base = made("original, 50 steps", 3.0, 0.0, (0.0, 0.0, 0.0))
    few = made("ours, 5 steps", 3.0, 10.0, (0.01, -0.08, 0.1))
    assert [finding.holds for finding in findings("ours", {base.name: base, few.name: few})] == [None]


def test_what_tuning_gains_is_told_with_its_processor_hours() -> None:
    names = ("original, 50 steps", "SPU's functions", "CipherDM (softmax and SiLU)", "ours, 50 steps")
    rows = {name: made(name, 60.0, 10.0, (0.0, 0.0, 0.0)) for name in names}
    without = {finding.claim for finding in findings("cipherdm", rows)}
    name = f"{CONTROL_4}: CipherDM"
    rows[name] = replace(made(name, 20.0, 10.0, (0.0, 0.0, 0.0)), tuning_cpu_s=900.0)
    (told,) = (finding for finding in findings("cipherdm", rows) if finding.claim not in without)
    assert told.holds is True
    assert "20.000 against 60.000" in told.numbers
    assert "90.0 % right (F1 0.900)" in told.numbers
    assert told.numbers.endswith("0.250 processor hours")
    rows[name] = replace(rows[name], frechet=61.0)
    assert [f.holds for f in findings("cipherdm", rows) if f.claim == told.claim] == [False]
