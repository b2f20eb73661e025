"""Distilled guidance: the points are the teacher's, training lowers the error, and the folder is a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from sfumato.diffusion.loading import load_pipeline
from sfumato.zoo import embedded_path
from sfumato.zoo.train import distil, loop
from sfumato.zoo.train.distil import Points, Teacher, main, on_runs, train_student
from sfumato.zoo.train.evaluate import draw

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline("embedded")


@pytest.fixture(scope="module")
def teacher(pipeline: StableDiffusionPipeline) -> Teacher:
    return Teacher(pipeline, scale=3.0)


@pytest.fixture(scope="module")
def points(teacher: Teacher) -> Points:
    torch.manual_seed(0)
    return on_runs(teacher, 6, steps=4)


def error(unet: nn.Module, teacher: Teacher, points: Points) -> float:
    """Mean square of the difference to what is wanted."""
    with torch.no_grad():
        found: Tensor = unet(points.noisy, points.times, teacher.text(points.ids)).sample
    return float((found - points.wanted).square().mean())


def test_points_are_guided_but_at_low_noise(teacher: Teacher, points: Points) -> None:
    assert points.noisy.shape == points.wanted.shape == (6 * 4, 4, 8, 8)
    assert points.times.tolist() == [t for t in (999, 749, 499, 249) for _ in range(6)]
    unet = teacher.pipeline.unet
    for k in (0, 20):  # of the first step, and of the last
        text = teacher.text(points.ids[k : k + 1])
        with torch.no_grad():
            without, towards = (
                unet(points.noisy[k : k + 1], points.times[k], y).sample for y in (teacher.null, text)
            )
        wanted = towards if points.times[k] < 300 else without + 3.0 * (towards - without)
        torch.testing.assert_close(points.wanted[k : k + 1], wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock by which each step of training takes a second."""
    found = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(thread_time=lambda: float(next(found))))
    return found


def test_the_student_learns(tmp_path: Path, teacher: Teacher, points: Points, ticks: Iterator[int]) -> None:
    unet = teacher.pipeline.unet
    before = error(unet, teacher, points)
    train_student(teacher, points, tmp_path, minutes=10 / 60)
    student = train_student(teacher, points, tmp_path, minutes=25 / 60)
    assert next(ticks) == 27  # it went on with the eleventh step
    assert error(student, teacher, points) < 0.5 * before
    assert error(unet, teacher, points) == before


def test_the_command_saves_a_pipeline(
    tmp_path: Path, ticks: Iterator[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distil, "RUNS", 2)
    assert main(["--out", str(tmp_path), "--minutes", "0.05", "--guidance", "3"]) == 0
    folder = tmp_path / "embedded-distilled-3"
    assert f"--model {folder} --sampler auto --steps 5 --guidance 1" in capsys.readouterr().out
    made, own = load_pipeline(folder), embedded_path()
    assert draw(made, [3], [0], guidance=1.0, steps=2).shape == (1, 32, 32)
    for part in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert (folder / part).read_bytes() == (own / part).read_bytes()
    changed = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / changed).read_bytes() != (own / changed).read_bytes()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--minutes", "0"])
    assert "--minutes must be positive" in capsys.readouterr().err
