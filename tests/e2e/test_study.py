"""Studies draw what they say: chunks in files, also on other machines; cuts and corrections as under the protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.diffusion.correction import Pull
from sfumato.errors import JobError
from sfumato.quality import psnr
from sfumato.study import draw
from sfumato.study.draw import Drawer
from sfumato.study.merit import merit
from sfumato.study.setting import Offline, Setting
from sfumato.study.subject import Subject, subject
from sfumato.study.sweep import Row, Sweep
from sfumato.zoo.classes import load_class_model, save_class_model

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.timeout(300)]

IMAGES = 4
SHORT: dict[str, Any] = {"steps": 2, "profile": "fast"}
EXACT = Setting(name="exact", steps=2)
FAST = Setting(name="fast", **SHORT)


@pytest.fixture(scope="module", autouse=True)
def few_calibration_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.study.plans._RUNS", 8)
        patch.setattr("sfumato.study.plans._TOGETHER", 4)
        yield


@pytest.fixture(scope="module")
def model() -> Subject:
    return subject("dit")


def drawn(model: Subject, setting: Setting, backend: str = "plain") -> torch.Tensor:
    with Drawer(model, IMAGES, backend) as drawer:
        return drawer.draw(setting, range(IMAGES), range(100, 100 + IMAGES)).images


def test_a_sweep_goes_on_where_it_was(
    tmp_path: Path, model: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, seen = Sweep(tmp_path, "dit", 2 * IMAGES, IMAGES), list[tuple[int, int]]()
    first = sweep.run([EXACT, FAST], lambda done, all: seen.append((done, all)))
    assert seen == [(i, 4) for i in range(5)]
    assert len({path.parent for path in tmp_path.rglob("*.safetensors")}) == 2
    file = next(path for path in tmp_path.rglob("*.safetensors") if "exact" in str(path))
    file.write_bytes(file.read_bytes()[:-10])  # half a file is none
    drawings = list[str]()
    real = Drawer.draw

    def counted(self: Drawer, setting: Setting, *rest: Any) -> Any:
        drawings.append(setting.name)
        return real(self, setting, *rest)

    monkeypatch.setattr(Drawer, "draw", counted)
    again = sweep.run([EXACT, FAST])
    assert drawings == ["exact"]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.features, b.features)
    with pytest.raises(JobError, match="do not divide into chunks of 3"):
        Sweep(tmp_path, "dit", 8, 3).run([EXACT])
    with pytest.raises(JobError, match="from 8 on are not drawn yet"):
        Sweep(tmp_path, "dit", 12, IMAGES).row(EXACT)


def test_merit_of_a_row(tmp_path: Path, model: Subject) -> None:
    rows: list[Row] = Sweep(tmp_path, "dit", 2 * IMAGES, IMAGES).run([EXACT, FAST])
    with Drawer(model, IMAGES) as drawer:
        found = merit(model, rows[1], rows[0], drawer.cost(FAST))
        with pytest.raises(JobError, match="does not run under the protocol"):
            drawer.cost(EXACT)
    assert found.images == 2 * IMAGES
    assert found.psnr_db is not None
    assert found.psnr_db > 40
    assert found.megabytes is not None
    assert found.megabytes > 1
    assert json.loads(json.dumps(found.to_json()))["name"] == "fast"
    assert merit(model, rows[0], rows[0], None).psnr_db is None


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"unguided": 1},
        {"public_first": True},
        {"solver": "dpm++", "spacing": "trailing", "public_first": True, "unguided": 1, "steps": 3},
        {"lowered": Pull(eta=0.3)},
        {"offline": Offline(fine=4, reading="B"), "aligned": True},
        {"offline": Offline(fine=4, independent=True)},
    ],
    ids=["plain", "unguided", "public first", "both", "lowered", "scores", "independent"],
)
def test_the_simulation_draws_what_the_float_loop_does(model: Subject, more: dict[str, Any]) -> None:
    exact = drawn(model, Setting(name="", **{"steps": 2, **more}))
    assert float(psnr(drawn(model, Setting(name="", **{**SHORT, **more})), exact).min()) > 40


def test_the_protocol_draws_what_the_simulation_does(model: Subject) -> None:
    setting = Setting(name="", **SHORT, offline=Offline(fine=4, reading="B"), aligned=True)
    near = psnr(drawn(model, setting, "simulate"), drawn(model, setting))
    assert float(near.min()) > 50


def test_corrections_are_free_and_cuts_are_cheaper(model: Subject) -> None:
    with Drawer(model, IMAGES) as drawer:

        def cost(**more: Any) -> int:
            return sum(drawer.cost(Setting(name="", **SHORT, **more)).bytes_sent)

        whole = cost()
        assert cost(offline=Offline(fine=2)) == whole
        assert cost(offline=Offline(kind="measured", fine=2)) == whole
        assert cost(unguided=1) < 0.8 * whole
        assert cost(unguided=1, public_first=True) < 0.56 * whole


def test_measured_errors_and_the_fitted_blend(model: Subject) -> None:
    """Of approximations that err: the measured error explains part of theirs, and more of itself is no better."""
    setting = Setting(name="", steps=2, profile="cipherdm", offline=Offline(kind="blend", fine=2))
    with Drawer(model, IMAGES) as drawer:
        fit = drawer.fit(setting)
        assert all(-1.0 <= r <= 1.0 for r in fit.correlation)
        assert all(0.0 <= g <= 1.0 for g in fit.pull)
        images = drawer.draw(setting, range(IMAGES), range(IMAGES)).images
    assert bool(images.isfinite().all())
    with pytest.raises(JobError, match="give the setting a profile"):
        drawn(model, Setting(name="", steps=2, offline=Offline(kind="measured", fine=2)))


def test_ranges_that_a_run_leaves_are_measured_on_more(
    model: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.errors import RangeError

    efforts, real = list[int](), draw.ranges

    def narrow(subject: Subject, setting: Setting, effort: int = 1) -> Any:
        efforts.append(effort)
        if effort == 1:
            raise RangeError("left")
        return real(subject, setting, 1)

    monkeypatch.setattr(draw, "ranges", narrow)
    drawn(model, FAST)
    assert efforts == [1, 2]


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """A folder with another network of `model`, and one that takes the place of its own: both a little off."""
    known, folder = load_class_model("dit"), tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in known.network.parameters():
            parameter.mul_(1.0 + 0.2 * torch.randn_like(parameter))
    save_class_model(known, folder)
    save_class_model(replace(known, embeddings=2.0 * known.embeddings, variant="other"), folder)
    return folder


def test_another_network_draws_other_images_by_a_plan_of_its_own(other_weights: Path) -> None:
    model = subject("dit", str(other_weights))
    other, fast = replace(EXACT, network="other"), replace(FAST, network="other")
    exact = drawn(model, other)
    assert float(psnr(exact, drawn(model, EXACT)).max()) < 35
    assert float(psnr(drawn(model, fast), exact).min()) > 40
    with pytest.raises(JobError, match="weights of dit-third"):
        drawn(model, replace(EXACT, network="third"))
    with pytest.raises(JobError, match="embedded has no other network 'third'"):
        subject("embedded").of("third")


def test_chunks_of_other_weights_lie_elsewhere(tmp_path: Path, other_weights: Path) -> None:
    weights = str(other_weights)

    def folder(weights: str, network: str = "") -> Path:
        sweep = Sweep(tmp_path, "dit", IMAGES, IMAGES, weights=weights)
        return sweep.file(sweep.chunk_of(replace(EXACT, network=network), 0)).parent.parent

    assert folder("").name == "dit"
    found = {folder(""), folder(weights), folder(weights, "other")}
    assert len(found) == 3
    # The same weights in another place are the same; trained anew they are not.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in other_weights.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert folder(str(moved)) == folder(weights)
    anew = tmp_path / "anew"
    anew.mkdir()
    save_class_model(replace(load_class_model("dit", moved), embeddings=torch.ones(20, 1, 96)), anew)
    assert folder(str(anew)) not in found


def test_chunks_on_two_workers_of_a_cluster(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    here = Sweep(tmp_path / "here", "dit", 2 * IMAGES, IMAGES).run([EXACT])[0]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
    try:
        there = Sweep(tmp_path / "there", "dit", 2 * IMAGES, IMAGES, ray="auto").run([EXACT])[0]
        workers = ray.cluster_resources()["CPU"]
    finally:
        ray.shutdown()
    assert workers == 2
    assert torch.equal(here.images, there.images)
