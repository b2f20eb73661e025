"""A run that is killed, goes on, or is one of several: what it costs is never told too low."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfumato.dp import finetune as module
from sfumato.dp.data import Records
from sfumato.dp.finetune import Run, finetune
from sfumato.dp.ledger import Ledger, Register
from sfumato.dp.trainer import Trainer
from sfumato.errors import BudgetExceeded

sys.path.insert(0, str(Path(__file__).parent))
from tuning import CAPTIONS, RECIPE, STEPS, Stopped, images_of, refused, stop_at, weights

pytestmark = pytest.mark.usefixtures("remembered")


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_crash_costs_training_and_no_privacy(
    public: Path, records: Records, tmp_path: Path, steps: list[int], at: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        finetune(public, records, RECIPE, out, progress=stop_at(at))
    ledger = Ledger.read(out / "ledger.json")
    assert len(steps) == at <= ledger.reserved
    assert ledger.reserved - ledger.done <= RECIPE.interval
    assert not (out / "model").exists()
    run = finetune(public, records, RECIPE, out)
    assert run.ledger.reserved == STEPS
    assert len(steps) <= STEPS
    assert run.ledger.done >= STEPS - RECIPE.interval
    assert run.ledger.run == ledger.run
    assert run.ledger.event == ledger.event
    assert run.ledger.spent().epsilon <= RECIPE.epsilon


@pytest.mark.parametrize("where", ["_save", "_keep", "_publish"])
def test_a_crash_while_writing(
    public: Path, records: Records, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:  # fmt: skip
    """Between a checkpoint and the ledger that says so, and everywhere else."""
    out, original, calls = tmp_path / "out", getattr(module, where), iter(range(100))

    def dies(*given: Any) -> None:
        if next(calls) == (0 if where == "_publish" else 3):
            raise Stopped
        original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module, where, dies)
        with pytest.raises(Stopped):
            finetune(public, records, replace(RECIPE, interval=1), out)
    ledger = Ledger.read(out / "ledger.json")
    assert ledger.done <= len(steps) <= ledger.reserved
    run = finetune(public, records, replace(RECIPE, interval=1), out)
    assert run.ledger.reserved == STEPS
    assert len(steps) <= STEPS
    # A step whose checkpoint was written counts as done though the ledger did not say so yet.
    assert run.ledger.done == (STEPS - 1 if where == "_save" else STEPS)


def test_no_weights_are_left_without_their_ledger(
    public: Path, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would pass for public ones."""

    def dies(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(module.Sources, "write", dies)
        with pytest.raises(Stopped):
            finetune(public, records, RECIPE, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    run = finetune(public, records, RECIPE, tmp_path / "out")
    assert (run.model / "ledger.json").is_file()
    assert sorted(path.name for path in run.model.parent.iterdir() if "model" in path.name) == ["model"]


def test_a_finished_run_costs_nothing_more(
    public: Path, records: Records, steps: list[int], run: Run
) -> None:
    before = weights(run.model)
    again = finetune(public, records, RECIPE, run.model.parent)
    assert steps == []
    assert again.ledger == run.ledger
    after = weights(run.model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.fixture
def broken(public: Path, records: Records, tmp_path: Path) -> Path:
    """A run that died in its fourth step, with two steps in the checkpoint."""
    with pytest.raises(Stopped):
        finetune(public, records, RECIPE, tmp_path / "out", progress=stop_at(4))
    return tmp_path / "out"


def test_a_run_goes_on_as_it_began(public: Path, records: Records, broken: Path, tmp_path: Path) -> None:
    held = (broken / "ledger.json").read_bytes()
    refused("holds a run with another recipe;", public, records, replace(RECIPE, rate=5e-3), broken)
    refused("another private images or key;", public, Records(images_of(64, 7), records.labels, CAPTIONS),
            RECIPE, broken)  # fmt: skip
    other = replace(RECIPE, epsilon=float("inf"))
    refused(
        "another epsilon, records, private images or key, recipe;", public, records.first(40), other, broken
    )
    declared = public.parent / "declared"
    if not declared.exists():
        shutil.copytree(public, declared, ignore=shutil.ignore_patterns("sources.*"))
    refused("another public start;", declared, records, RECIPE, broken, declared=["photos"])
    # The same images, of which one has another caption; the same declared start with other weights.
    turned = records.labels.clone()
    turned[0] = (turned[0] + 1) % len(CAPTIONS)
    refused("begun with other images, captions or public weights; go on with the same", public,
            Records(records.images, turned, CAPTIONS), RECIPE, broken)  # fmt: skip
    changed = tmp_path / "changed"
    shutil.copytree(public, changed)
    model = next((changed / "vae").glob("*.safetensors"))
    save_file({name: 1.01 * value for name, value in load_file(model).items()}, model)
    refused("begun with other images, captions or public weights", changed, records, RECIPE, broken)
    assert (broken / "ledger.json").read_bytes() == held
    # But with less memory, since that changes nothing.
    assert finetune(public, records, replace(RECIPE, physical=8), broken).ledger.reserved == STEPS


def test_a_checkpoint_and_its_ledger_belong_together(public: Path, records: Records, broken: Path) -> None:
    state, ledger = broken / "checkpoint.pt", broken / "ledger.json"
    saved, told = state.read_bytes(), Ledger.read(ledger)

    state.unlink()
    refused("checkpoint.pt is missing", public, records, RECIPE, broken)
    for damaged in (b"", b"no archive", saved[:1000]):
        state.write_bytes(damaged)
        refused("checkpoint.pt is damaged; restore it and its ledger", public, records, RECIPE, broken)
    state.write_bytes(saved)

    ledger.unlink()  # a fresh ledger would forget what the weights have cost
    refused("of another run", public, records, RECIPE, broken)

    replace(told, done=3).write(ledger)
    refused("older than its ledger", public, records, RECIPE, broken)
    replace(told, done=0, reserved=1).write(ledger)
    refused("newer than its ledger", public, records, RECIPE, broken)

    told.write(ledger)
    assert finetune(public, records, RECIPE, broken).ledger.done == 4


def test_a_run_that_cannot_go_on_is_not_charged(public: Path, records: Records, tmp_path: Path) -> None:
    out, register = tmp_path / "out", tmp_path / "register.jsonl"
    with pytest.raises(Stopped):
        finetune(public, records, RECIPE, out, register=register, progress=stop_at(4))
    (out / "checkpoint.pt").unlink()
    register.write_text("")
    held = (out / "ledger.json").read_bytes()
    refused("checkpoint.pt is missing", public, records, RECIPE, out, register=register)
    assert register.read_text() == ""
    assert (out / "ledger.json").read_bytes() == held


def test_a_short_run_has_checkpoints(public: Path, records: Records, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        finetune(public, records, replace(RECIPE, interval=100), tmp_path / "out", progress=stop_at(3))
    ledger = Ledger.read(tmp_path / "out" / "ledger.json")
    assert (ledger.done, ledger.reserved) == (2, 4)
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


def test_a_run_that_lost_every_step_publishes_nothing(public: Path, records: Records, tmp_path: Path) -> None:
    recipe, out = replace(RECIPE, epochs=0.5), tmp_path / "out"
    with pytest.raises(Stopped):
        finetune(public, records, recipe, out, progress=stop_at(1))
    ledger = Ledger.read(out / "ledger.json")
    assert (ledger.done, ledger.reserved, ledger.left) == (0, 1, 0)
    for _ in range(2):
        refused("every step of the run in .* was lost before a checkpoint", public, records, recipe, out)
        assert not (out / "model").exists()


def test_an_ended_run_takes_no_step(public: Path, records: Records, broken: Path) -> None:
    ledger = Ledger.read(broken / "ledger.json")
    ledger.finish().write(broken / "ledger.json")
    refused("this run ended at", public, records, RECIPE, broken)


def test_a_register_adds_runs_up(public: Path, records: Records, tmp_path: Path, steps: list[int]) -> None:
    register = tmp_path / "runs" / "register.jsonl"
    refused(
        "needs the list of them; name a register",
        public,
        records,
        RECIPE,
        tmp_path / "one",
        limit_epsilon=11.0,
    )
    refused("is named as the key beside a register is", public, records, RECIPE, tmp_path / "one",
            register=tmp_path / "runs.key")  # fmt: skip
    recipe = replace(RECIPE, epochs=1)
    finetune(public, records, recipe, tmp_path / "one", register=register, limit_epsilon=11.0)
    again = finetune(public, records, recipe, tmp_path / "one", register=register, limit_epsilon=11.0)
    ran = len(steps)
    with pytest.raises(BudgetExceeded, match="all 2 of this register"):
        finetune(public, records, recipe, tmp_path / "two", register=register, limit_epsilon=11.0)
    assert len(steps) == ran == 2
    assert not (tmp_path / "two" / "ledger.json").exists()
    other = finetune(public, records, recipe, tmp_path / "two", register=register)
    assert other.ledger.private == again.ledger.private
    assert len(register.read_text().splitlines()) == 2
    assert Register(register).charge(other.ledger).epsilon > recipe.epsilon


def test_adapters_go_on_after_a_crash(public: Path, records: Records, tmp_path: Path) -> None:
    """Adapters begin at random numbers, which a second process must not draw anew."""
    pytest.importorskip("peft", reason="no peft")
    recipe = replace(RECIPE, what="lora", rank=2, interval=2)
    with pytest.raises(Stopped):
        finetune(public, records, recipe, tmp_path / "out", progress=stop_at(3))
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    held: list[list[torch.Tensor]] = []

    def look(what: str, done: int, of: int) -> None:
        if what == "steps" and not held:
            held.append([])

    original = Trainer.step

    def first(self: Trainer, rows: torch.Tensor) -> None:
        if not held:
            held.append([p.detach().clone() for p in self.choice.parameters])
        original(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", first)
        finetune(public, records, recipe, tmp_path / "out", progress=look)
    assert all(torch.equal(a, b) for a, b in zip(held[0], saved["parameters"], strict=True))


# ---- processes ---------------------------------------------------------------------------------------------


def started(public: Path, out: Path, settings: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).parent / "one_process.py"), str(public), str(out)]
    return subprocess.Popen(
        [*command, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_any_moment(public: Path, tmp_path: Path) -> None:
    out, planned, ran = tmp_path / "out", 12, 0
    settings = {"epochs": 6, "interval": 3}
    moments = [random.SystemRandom().randrange(1, 6) for _ in range(3)]
    for moment in moments:
        with started(public, out, settings) as child:
            assert child.stdout is not None
            lines = []
            while len(lines) < moment and (line := child.stdout.readline()):
                lines += [line] if line.startswith("step") else []
            child.send_signal(signal.SIGKILL)
            rest, problem = child.communicate()
        ran += len(lines) + rest.count("step")
        ledger = Ledger.read(out / "ledger.json")
        assert ran <= ledger.reserved <= planned, (moments, problem)
        if child.returncode == 0:  # it was quicker
            break
    with started(public, out, settings) as child:
        said, problem = child.communicate()
    assert child.returncode == 0, problem
    ledger = Ledger.read(out / "model" / "ledger.json")
    assert ledger.reserved == planned, moments
    assert ran + said.count("step") <= planned, moments
    assert ledger.done >= planned - 3 * len(moments), moments


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_one_model(public: Path, tmp_path: Path) -> None:
    """Adapters, which begin at random: each process by itself would begin elsewhere."""
    pytest.importorskip("peft", reason="no peft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"what": "lora", "rank": 2}
    two = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        started(public, tmp_path / "out", settings, RANK=str(k), LOCAL_RANK=str(k), **two) for k in (0, 1)
    ]
    said = []
    for child in children:
        with child:
            text, problem = child.communicate()
        assert child.returncode == 0, problem
        said.append([line.split() for line in text.splitlines()])
    ledger = Ledger.read(tmp_path / "out" / "model" / "ledger.json")
    assert ledger.done == ledger.reserved == STEPS
    rows = [[int(line[1]) for line in lines if line[0] == "step"] for lines in said]
    assert [len(mine) for mine in rows] == [STEPS, STEPS]
    # Every record of a batch is at one of them, by turns.
    assert all(0 <= one - other <= 1 for one, other in zip(*rows, strict=True))
    assert [sum(line[0] == "noise" for line in lines) for lines in said] == [STEPS, 0]
    for what in ("last", "average"):
        one, other = ([line[1] for line in lines if line[0] == what] for lines in said)
        assert one == other
    assert said[0][-1] == ["leads", ledger.run, str(STEPS)]
    assert said[1][-1] == ["follows", ledger.run, str(STEPS)]
