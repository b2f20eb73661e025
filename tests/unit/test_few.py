"""The few-step student: its steps are the teacher's grid, training lowers the error, and studies draw with it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from sfumato.errors import JobError
from sfumato.study.draw import Drawer
from sfumato.study.reproduce import Asked, drawable
from sfumato.study.setting import Setting
from sfumato.study.subject import subject
from sfumato.study.tables import study
from sfumato.zoo.classes import FEW, KINDS, ClassModel, load_class_model, save_class_model
from sfumato.zoo.train import loop
from sfumato.zoo.train.few import Runs, grid_of, kind_of, main, record_runs, train_student

NAME, STEPS, FINE = "mnist01", 2, 10


@pytest.fixture(scope="module")
def teacher() -> ClassModel:
    return load_class_model(NAME)


@pytest.fixture(scope="module")
def runs(teacher: ClassModel) -> Runs:
    torch.manual_seed(0)
    return record_runs(teacher, 16, STEPS, FINE, 1.5)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock by which each step of training takes a second."""
    found = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(thread_time=lambda: float(next(found))))
    return found


@pytest.mark.parametrize("name", ["cifar10", NAME])  # one predicts noise and clips, the other v
def test_steps_are_those_of_the_scheduler(name: str) -> None:
    kind = kind_of(KINDS[name], 10, 50)
    grid, scheduler = grid_of(kind, 10), DDIMScheduler(**kind.scheduler)
    assert grid.times.tolist() == list(range(981, 0, -100))
    sample, output = torch.randn(2, 10, 1, 4, 4)
    scheduler.set_timesteps(10)
    wanted = [scheduler.step(output[k], t, sample[k]).prev_sample for k, t in enumerate(scheduler.timesteps)]
    torch.testing.assert_close(grid.step(torch.arange(10), sample, output), torch.stack(wanted))


def test_runs_are_guided_and_begin_and_end_where_the_teachers_do(teacher: ClassModel, runs: Runs) -> None:
    model = subject(NAME)
    noise = runs.points[:, 0]
    assert runs.points.shape == (16, STEPS + 1, 1, 28, 28)
    with Drawer(model, 16) as drawer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "noise", lambda *_: noise)
        made = drawer.draw(
            Setting(name="teacher", steps=FINE, guidance=1.5), runs.labels.tolist(), list(range(16))
        )
    torch.testing.assert_close((runs.points[:, -1] / 2 + 0.5).clamp(0, 1), made.images, atol=1e-3, rtol=0)


def landed(model: ClassModel, runs: Runs) -> float:
    """Mean square between the last points of the runs and the student's own."""
    grid = grid_of(kind_of(load_class_model(NAME).kind, STEPS, FINE), STEPS)
    sample = runs.points[:, 0]
    with torch.no_grad():
        for k, time in enumerate(grid.times):
            output = model.network(sample, time, model.embeddings[runs.labels])
            sample = grid.step(torch.full((len(sample),), k), sample, output)
    return float((sample - runs.points[:, -1]).square().mean())


def test_the_student_comes_nearer_and_draws_by_its_own_steps_alone(
    tmp_path: Path, teacher: ClassModel, runs: Runs, ticks: Iterator[int]
) -> None:
    before = landed(teacher, runs)
    train_student(teacher, runs, tmp_path, minutes=20 / 60)
    student = train_student(teacher, runs, tmp_path, minutes=60 / 60)
    assert next(ticks) == 62  # it went on with the 21st step
    after = landed(student, runs)
    assert after < 0.5 * before
    save_class_model(student, tmp_path)
    assert landed(load_class_model(NAME, tmp_path, FEW), runs) == pytest.approx(after, rel=0.02)
    model = subject(NAME, str(tmp_path))
    with Drawer(model, 2) as drawer:
        two = Setting(name="few", steps=STEPS, network=FEW)
        exact = drawer.draw(two, [0, 1], [1, 2]).images
        with pytest.raises(JobError, match=r"draws in 2 steps, not 5; train another .* --steps 5"):
            drawer.draw(Setting(name="five", steps=5, network=FEW), [0, 1], [1, 2])
    sample = model.noise([1, 2])
    assert landed(student, Runs(torch.stack([sample, 2 * exact - 1], 1), torch.arange(2), FINE)) < 1e-2


def test_a_study_does_without_a_student_that_was_not_made(tmp_path: Path) -> None:
    asked = Asked(paper="sdu", model="cifar10", out=tmp_path, weights=str(tmp_path))
    wanted = study("sdu", "cifar10")
    without = drawable(wanted, asked)
    assert {row.network for row in without.main} == {""}
    (tmp_path / f"cifar10-{FEW}.safetensors").touch()
    assert drawable(wanted, asked) == wanted
    assert {row.network for row in wanted.main} == {"", FEW}


def test_the_command_saves_weights_with_their_steps(
    tmp_path: Path, ticks: Iterator[int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", NAME, "--out", str(tmp_path), "--runs", "4", "--minutes", "0.02"]
    assert main([*arguments, "--steps", "2", "--fine", "4"]) == 0
    made = load_class_model(NAME, tmp_path, FEW)
    assert (made.steps, made.kind.guidance, made.kind.scheduler["steps_offset"]) == (2, None, 251)
    assert main([*arguments, "--steps", "4", "--fine", "6"]) == 2
    assert "--fine must be a multiple of --steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--steps", "0"])
    with pytest.raises(JobError, match=r"zoo\.train\.few --model cifar10"):
        load_class_model("cifar10", tmp_path, FEW)
