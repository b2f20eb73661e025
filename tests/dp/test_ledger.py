"""The ledger: what a crash, a resume, a second run and a forged file can do to the reported ε."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from sfumato.dp import accountant
from sfumato.dp.accountant import Event, spent
from sfumato.dp.ledger import NOT_COVERED, Ledger, Register, compose
from sfumato.errors import BudgetExceeded, JobError

PLAN = Event(0.05, 2.0, 10)
DELTA = 1e-5
RECORDS = "ab" * 32


def ledger(**changed: Any) -> Ledger:
    entries: dict[str, Any] = {
        "epsilon": 1.0, "delta": DELTA, "event": PLAN, "clip": 0.001, "records": 2000, "expected_batch": 100,
        "trained": "attention", "public": {"fonts": "00" * 32}, "private": RECORDS,
    }  # fmt: skip
    return Ledger(**(entries | changed))


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    for kept in (
        ledger(recipe={"batch": 100, "epsilon": "inf"}),
        ledger(epsilon=math.inf, event=Event(0.05, 0.0, 10)),
        ledger().reserve(4).complete(3).finish(),
    ):
        kept.write(path)
        assert Ledger.read(path) == kept
    assert os.listdir(tmp_path) == ["ledger.json"]
    found = json.loads(path.read_text())
    assert found["adjacency"] == "add or remove one record (image and its label)"
    assert found["not_covered"] == list(NOT_COVERED)
    assert "seed" not in path.read_text()


def test_no_time_of_the_day_is_published(tmp_path: Path) -> None:
    """How long the steps took follows the sizes of the batches, which are secret."""
    ledger().reserve(10).complete(10).finish().write(tmp_path / "ledger.json")
    found = json.loads((tmp_path / "ledger.json").read_text())
    for name in ("started", "ended"):
        assert date.fromisoformat(found[name]).isoformat() == found[name]
    assert not re.search(r"\d\d:\d\d", (tmp_path / "ledger.json").read_text())


def test_a_failed_write_leaves_the_last_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.json"
    ledger(run="0" * 32).write(path)

    def no_disk(source: Any, target: Any) -> None:
        raise OSError("no disk")

    monkeypatch.setattr(os, "replace", no_disk)
    with pytest.raises(OSError, match="no disk"):
        ledger(run="1" * 32).write(path)
    assert Ledger.read(path).run == "0" * 32


def test_it_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), rename(a, b))[1])
    ledger().write(tmp_path / "ledger.json")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def train(path: Path, ran: list[int], interval: int, dies_after: int | None = None) -> None:
    """A trainer that runs ``interval`` steps a checkpoint and is killed after so many."""
    kept = Ledger.read(path)
    while kept.left:
        block = min(interval, kept.left)
        kept = kept.reserve(block)
        kept.write(path)
        for _ in range(block):
            if dies_after == 0:
                return
            dies_after = None if dies_after is None else dies_after - 1
            ran.append(1)
        kept = kept.complete(block)
        kept.write(path)


@pytest.mark.parametrize("deaths", [[], [0], [1], [3], [0, 0, 0, 0], [1, 2, 0, 5]])
def test_kills_and_resumes_stay_within_the_budget(tmp_path: Path, deaths: list[int]) -> None:
    path, ran = tmp_path / "ledger.json", list[int]()
    ledger().write(path)
    for number, death in enumerate(deaths, 1):
        train(path, ran, 3, death)
        at_death = Ledger.read(path)
        assert len(ran) <= at_death.reserved  # ε is never reported too low
        assert at_death.reserved - at_death.done <= 3 * number  # a kill costs one interval at most
    train(path, ran, 3)
    last = Ledger.read(path)
    assert last.reserved == PLAN.steps
    assert len(ran) >= last.done >= PLAN.steps - 3 * len(deaths)
    assert len(ran) <= PLAN.steps
    with pytest.raises(BudgetExceeded, match="10 are spent and 0 left"):
        last.reserve(1)


def test_spent_is_of_the_reserved_steps() -> None:
    assert ledger().spent().epsilon == 0.0
    killed = ledger().reserve(6).complete(2)
    assert killed.spent() == spent([replace(PLAN, steps=6)], DELTA)
    assert killed.finish().spent() == killed.spent()


def test_reserving_and_reporting_wrongly() -> None:
    with pytest.raises(BudgetExceeded, match="ask for fewer"):
        ledger().reserve(11)
    with pytest.raises(JobError, match="reserve first"):
        ledger().reserve(2).complete(3)
    with pytest.raises(JobError, match="at least one step"):
        ledger().reserve(0)
    with pytest.raises(JobError, match="start a new one"):
        ledger().finish().reserve(1)


def test_a_plan_above_its_budget() -> None:
    whole = spent([PLAN], DELTA)
    assert ledger(epsilon=whole.epsilon).verify() == whole
    with pytest.raises(BudgetExceeded, match="raise the noise multiplier or plan fewer"):
        ledger(epsilon=whole.epsilon - 0.001).verify()
    assert ledger(epsilon=math.inf, event=Event(0.05, 0.0, 10)).verify().epsilon == math.inf


def test_accountants_that_disagree_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "_pld", lambda events, delta: 3.0)
    for priced in (ledger().verify, ledger().reserve(1).spent):
        with pytest.raises(JobError, match="accountants disagree"):
            priced()


def test_runs_add_up() -> None:
    first, second = ledger().reserve(10), ledger(event=Event(0.1, 3.0, 20), expected_batch=200).reserve(5)
    assert compose([first, second]) == spent([PLAN, Event(0.1, 3.0, 5)], DELTA)
    assert compose([first, second]).epsilon > max(first.spent().epsilon, second.spent().epsilon)
    assert compose([]).epsilon == 0.0
    with pytest.raises(JobError, match="different delta"):
        compose([first, replace(second, delta=1e-6)])


def change(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("sigma", 1.0), "unknown entries: sigma"),
        (lambda entries: entries.pop("reserved"), "missing or unknown entries: reserved"),
        (change("format", 2), "its format is 2"),
        (change("format", True), "format has the wrong type"),
        (change("delta", "1e-5"), "delta has the wrong type"),
        (change("delta", 1), "delta is 1"),
        (change("epsilon", "large"), "a number or 'inf'"),
        (change("epsilon", float("nan")), "epsilon has the wrong type"),
        (change("records", 2000.0), "records has the wrong type"),
        (change("records", 1000), "make them equal"),
        (change("reserved", 11), "ascending order"),
        (change("done", 1), "ascending order"),
        (change("adjacency", "replace one record"), "adjacency must be"),
        (change("mechanism", "shuffled batches"), "mechanism must be"),
        (change("event", {"sample_rate": 0.05, "steps": 10}), "entries: noise_multiplier"),
        (
            change("event", {"sample_rate": 0.05, "noise_multiplier": -2.0, "steps": 10}),
            "noise_multiplier is",
        ),
        (change("public", {"fonts": 3}), "fonts has the wrong type"),
        (change("not_covered", [3]), "list of sentences"),
        (change("private", "records.npz"), "64 hex digits"),
        (change("run", "mine"), "32 hex digits"),
        (change("clip", 0), "clip is 0"),
    ],
)
def test_reading_is_strict(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = tmp_path / "ledger.json"
    ledger().write(path)
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(JobError, match=message):
        Ledger.read(path)


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_what_is_no_ledger(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.json"
    with pytest.raises(JobError, match="a private model needs its ledger"):
        Ledger.read(path)
    path.write_text(content)
    with pytest.raises(JobError, match="is not a ledger"):
        Ledger.read(path)


def test_the_register_adds_up_all_its_runs(tmp_path: Path) -> None:
    register = Register(tmp_path / "runs.jsonl")
    one, two = spent([PLAN], DELTA).epsilon, spent([PLAN, PLAN], DELTA).epsilon
    limit = (two + spent([PLAN] * 3, DELTA).epsilon) / 2
    first = ledger()
    assert register.charge(first, limit).epsilon == one
    assert register.charge(first.reserve(5), limit).epsilon == one  # resumed: entered already
    # Other records by their commitment, which one image more, or a resized copy, is enough for.
    assert register.charge(ledger(private="cd" * 32), limit).epsilon == two
    before = register.path.read_bytes()
    for third in (ledger(), ledger(private="ef" * 32)):
        with pytest.raises(BudgetExceeded, match="all 3 of this register"):
            register.charge(third, limit)
    assert register.path.read_bytes() == before
    assert register.charge(ledger()).epsilon > two  # without a limit it is only counted
    assert register.path.stat().st_mode & 0o777 == 0o600
    assert len(register.path.read_text().splitlines()) == 3


def test_a_larger_delta_makes_no_earlier_run_cheaper(tmp_path: Path) -> None:
    register = Register(tmp_path / "runs.jsonl")
    register.charge(ledger())
    two = spent([PLAN, PLAN], DELTA).epsilon
    with pytest.raises(BudgetExceeded, match=f"at delta {DELTA:g}, more than the limit of"):
        register.charge(replace(ledger(), delta=100 * DELTA), two - 1e-3)
    assert register.charge(replace(ledger(), delta=100 * DELTA)).epsilon == two


def test_the_register_knows_its_runs(tmp_path: Path) -> None:
    register, first = Register(tmp_path / "runs.jsonl"), ledger()
    register.charge(first)
    with pytest.raises(JobError, match="with another plan; start a new run"):
        register.charge(replace(first, event=Event(0.05, 2.0, 5)))


@pytest.mark.parametrize("damage", ['{"format": 1', '{"format": 1}\n', "\n", '{"run": NaN}\n'])
def test_a_damaged_register_stops_every_run(tmp_path: Path, damage: str) -> None:
    register = Register(tmp_path / "runs.jsonl")
    register.charge(ledger())
    with register.path.open("a") as file:
        file.write(damage)
    with pytest.raises(JobError, match="line 2 of the register"):
        register.charge(ledger())
