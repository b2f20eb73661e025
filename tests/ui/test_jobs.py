"""What happens behind the page, without one: settings, runs, history, errors in their places."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stand_in import Pipe, StandInStudio, report

from sfumato.diffusion.seen import Block
from sfumato.errors import CaptureError, JobError, LinkError
from sfumato.runtime.backend import Backend
from sfumato.ui.figures import bars_of, png_of
from sfumato.ui.jobs import Run, Session, Studio
from sfumato.ui.settings import FieldError, Settings, problem_of

GOOD = ("a seven", "embedded", 4, 4.0, "public", 0, None, "")


def over(run: Run) -> Run:
    assert run.wait(90), run.progress()
    return run


def changed(**values: Any) -> tuple[Any, ...]:
    names = ("prompt", "model", "steps", "guidance", "weights", "seed", "size", "cluster")
    return tuple(values.get(name, good) for name, good in zip(names, GOOD, strict=True))


@pytest.mark.parametrize(
    ("values", "field", "sentence"),
    [
        ({"model": " "}, "model", "Choose a model"),
        ({"model": "cluster:ours"}, "parties", "cluster file"),
        ({"cluster": "/no/such/file"}, "parties", "no cluster file /no/such/file"),
        ({"steps": 0}, "run", "steps"),
        ({"steps": 2.5}, "run", "whole"),
        ({"steps": None}, "run", "steps"),
        ({"guidance": "much"}, "run", "guidance"),
        ({"guidance": float("inf")}, "run", "guidance"),
        ({"seed": -1}, "run", "seed"),
        ({"size": 4}, "run", "image size"),
        ({"size": "large"}, "run", "image size"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(values: Any, field: str, sentence: str) -> None:
    with pytest.raises(FieldError, match=sentence) as caught:
        Settings.of(*changed(**values))
    assert caught.value.field == field


def test_settings_are_what_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").touch()
    given = Settings.of(" a boat ", "a/b", 7.0, 1, "secret", 3.0, 64, str(tmp_path / "cluster.toml"))
    assert given == Settings(
        prompt="a boat", model="a/b", steps=7, guidance=1.0, secret_weights=True, seed=3, size=64,
        cluster=str(tmp_path / "cluster.toml"),
    )  # fmt: skip
    assert given.secret == "inputs+weights"
    assert Settings.of(*changed(size=" ")).size is None
    assert Settings(model="cluster:ours", secret_weights=True).secret == "inputs"  # its owner decides


def test_an_error_is_one_sentence_in_its_place(caplog: pytest.LogCaptureFixture) -> None:
    assert problem_of(LinkError("party 1 is silent")) == ("parties", "Party 1 is silent.")
    assert problem_of(JobError("use one of a, b"), "model") == ("model", "Use one of a, b.")
    told = problem_of(CaptureError("2 nodes cannot run:", ["one", "two"]), "model")
    assert told.text.startswith("2 nodes cannot run (and 2 lines more")
    with caplog.at_level(logging.ERROR):
        told = problem_of(RuntimeError("secret words"))
    assert "secret words" not in told.text
    assert "RuntimeError" in told.text
    assert "\n" not in told.text


def test_a_run_draws_and_lands_in_the_history() -> None:
    studio, session = StandInStudio(), Session()
    run = over(studio.start(Settings(prompt="a seven", steps=4, seed=5), session))
    assert run.problem is None
    drawn = run.drawn
    assert drawn is not None
    assert session.history == [drawn]
    assert session.shown is drawn
    assert drawn.report.rounds == 28
    assert sum(bar.total_bytes for bar in drawn.bars) == drawn.report.total_bytes
    pictures = [np.asarray(Image.open(io.BytesIO(png))) for png in drawn.shares]
    assert len(pictures) == 3
    assert all(picture.std() > 50 for picture in pictures)  # noise all over, as 8-bit grey
    again = over(studio.start(Settings(prompt="a seven", steps=4, seed=5), session)).drawn
    assert again is not None
    assert again.image == drawn.image
    assert len(studio.pipes) == 1  # kept alive between runs
    assert json.loads(drawn.report.to_json())["total_bytes"] == 2400


def test_pipelines_are_kept_for_few_settings_and_closed_after() -> None:
    studio, session = StandInStudio(), Session()
    for model in ("a", "b", "c"):
        over(studio.start(Settings(model=model, steps=1), session))
    assert [pipe.closed for pipe in studio.pipes] == [True, False, False]
    studio.close()
    assert all(pipe.closed for pipe in studio.pipes)
    with pytest.raises(FieldError, match="closing"):
        studio.start(Settings(), session)


def test_one_run_at_a_time_and_one_for_each_browser() -> None:
    studio, mine, other = StandInStudio(), Session(), Session()
    studio.hold()
    first = studio.start(Settings(steps=2), mine)
    with pytest.raises(FieldError, match="already"):
        studio.start(Settings(), mine)
    second = studio.start(Settings(steps=2), other)
    assert not second.wait(0.3)
    assert second.progress().phase == "waiting"
    assert studio.drawing
    studio.release()
    assert over(first).drawn is not None
    assert over(second).drawn is not None
    assert (len(mine.history), len(other.history)) == (1, 1)
    assert not studio.drawing


@pytest.mark.parametrize("waiting", [False, True])
def test_cancel_ends_a_run_that_waits_or_draws(waiting: bool) -> None:
    studio, session = StandInStudio(), Session()
    studio.hold()
    blocker = studio.start(Settings(steps=2), Session()) if waiting else None
    run = studio.start(Settings(steps=2), session)
    while run.progress().phase != ("waiting" if waiting else "starting"):
        assert not run.wait(0.02)
    run.cancel()
    assert run.progress().phase == "cancelling"
    if not waiting:
        studio.release()
    assert over(run).cancelled
    assert run.drawn is None
    assert session.history == []
    studio.release()
    if blocker is not None:
        assert over(blocker).drawn is not None
    assert over(studio.start(Settings(steps=1), session)).drawn is not None


@pytest.mark.parametrize("backend", ["simulate", pytest.param("local", marks=pytest.mark.processes)])
def test_a_cancelled_run_opens_nothing_and_the_next_draws(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    reveal, stepped = Backend.reveal, Run.stepped

    def watched(self: Backend, handle: str, **given: Any) -> Any:
        opened.append(handle)
        return reveal(self, handle, **given)

    def cancelling(run: Run, *given: Any) -> Any:
        run.cancel()
        return stepped(run, *given)

    monkeypatch.setattr(Backend, "reveal", watched)
    studio, session = Studio(backend=backend), Session()
    settings = Settings(prompt="a seven", steps=2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "stepped", cancelling)
            assert over(studio.start(settings, session)).cancelled
        assert opened == []
        (pipe,) = studio._pipes.values()
        processes = pipe._parties.process_ids
        assert over(studio.start(settings, session)).drawn is not None
        assert opened != []
        assert pipe._parties.process_ids == processes
    finally:
        studio.close()


def test_after_the_last_step_it_is_too_late_to_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped, phases = Run.stepped, list[str]()

    def late(run: Run, pipe: Any, step: int, *given: Any) -> Any:
        found = stepped(run, pipe, step, *given)
        if step == 1:
            run.cancel()
            phases.append(run.progress().phase)
        return found

    monkeypatch.setattr(Run, "stepped", late)
    run = over(StandInStudio().start(Settings(steps=2), Session()))
    assert phases == ["opening"]
    assert run.drawn is not None
    assert not run.cancelled


@pytest.mark.parametrize(
    ("prompt", "field", "sentence"),
    [
        ("lost", "parties", "Party 1 is silent."),
        ("refused", "run", "This model takes no such size."),
        ("broken", "run", "unexpected went wrong (RuntimeError)"),
    ],
)
def test_a_failed_run_says_why_and_the_next_works(prompt: str, field: str, sentence: str) -> None:
    studio, session = StandInStudio(), Session()
    problem = over(studio.start(Settings(prompt=prompt), session)).problem
    assert problem is not None
    assert problem.field == field
    assert sentence in problem.text
    assert over(studio.start(Settings(steps=1), session)).drawn is not None


def test_a_model_that_cannot_be_loaded_is_told_beside_the_model() -> None:
    problem = over(StandInStudio().start(Settings(model="nowhere"), Session())).problem
    assert problem == ("model", "There is no pipeline folder nowhere.")


def test_the_time_is_known_after_a_run() -> None:
    studio = StandInStudio()
    before = studio.estimate(Settings(steps=4))
    assert (before.rounds, before.total_bytes, before.seconds) == (28, 2400, None)
    over(studio.start(Settings(steps=4), Session()))
    after = studio.estimate(Settings(steps=8)).seconds
    assert after == pytest.approx(2.4)  # twice the bytes of what took 1.2 s


def test_progress_knows_the_time_left() -> None:
    run = Run(Settings(steps=4))
    pipe = Pipe(run.settings)
    run.enter("starting")
    assert run.progress().left_s is None
    run.stepped(pipe, 0, None, {})
    run.stepped(pipe, 1, None, {})
    now = run.progress()
    assert (now.phase, now.step, now.steps) == ("drawing", 2, 4)
    assert now.left_s is not None
    run.stepped(pipe, 2, None, {})
    run.stepped(pipe, 3, None, {})
    assert run.progress().phase == "opening"


def test_progress_counts_the_schedulers_own_steps() -> None:
    run = Run(Settings(steps=2))
    pipe = Pipe(run.settings)
    pipe.num_timesteps = 3  # as PNDM has them
    run.stepped(pipe, 0, None, {})
    run.stepped(pipe, 1, None, {})
    assert (run.progress().phase, run.progress().steps) == ("drawing", 3)
    run.stepped(pipe, 2, None, {})
    assert run.progress().phase == "opening"


def test_sessions_are_apart_and_bounded() -> None:
    studio = StandInStudio()
    first = studio.session("first")
    assert studio.session("first") is first
    assert studio.session("second") is not first
    for k in range(70):
        studio.session(f"{k}")
    assert studio.session("first") is not first


def test_a_browser_that_draws_is_not_forgotten() -> None:
    studio = StandInStudio()
    studio.hold()
    drawing, idle = studio.session("drawing"), studio.session("idle")
    run = studio.start(Settings(steps=1), drawing)
    for k in range(70):
        studio.session(f"{k}")
    assert studio.session("drawing") is drawing
    assert studio.session("idle") is not idle
    studio.release()
    assert over(run).drawn is drawing.history[0]


def test_bars_name_the_blocks_in_words() -> None:
    blocks = [Block("conv_in", {"convolution": 30}, 3), Block("down_blocks.0", {"norm": 60, "linear": 10}, 5)]
    assert [(bar.label, bar.total_bytes, bar.share) for bar in bars_of(blocks)] == [
        ("First layer", 30, 0.3),
        ("Down 1", 70, 0.7),
    ]


def test_pictures_keep_their_pixels() -> None:
    array = np.linspace(0, 1, 64).reshape(8, 8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_of(array)))), np.round(array * 255))
    colours = np.zeros((4, 4, 3))
    colours[..., 1] = 1.0
    assert Image.open(io.BytesIO(png_of(colours))).getpixel((0, 0)) == (0, 255, 0)


def test_the_stand_in_counts_as_a_report_does() -> None:
    assert report(4).total_bytes == sum(sum(cost.bytes_sent) for cost in report(4).by_path.values())
