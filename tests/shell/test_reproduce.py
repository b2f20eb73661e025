"""``sfumato reproduce``: a small study from images to records, a page and pictures; what is wrong is said first."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rich.console import Console
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

from sfumato.shell.cli import app
from sfumato.shell.reproduce import run_reproduce
from sfumato.study import plans, tables
from sfumato.study import reproduce as studies
from sfumato.study.reproduce import Asked
from sfumato.study.setting import Offline, Setting
from sfumato.study.tables import Study, Table
from sfumato.zoo import embedded_path

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images at once, and ranges from few runs."""
    monkeypatch.setattr(plans, "_RUNS", 8)
    monkeypatch.setattr(plans, "_TOGETHER", 4)
    monkeypatch.setattr(studies, "_CHUNK", 4)
    monkeypatch.setattr(studies, "_SECURE_CHUNK", 2)


def small(model: str) -> Study:
    """SDU's main rows in miniature."""
    approximated = Setting(name="approximated, 50 steps", steps=4, profile="fast")
    ten = Setting(name="approximated, 10 steps", steps=2, profile="fast")
    corrected = Setting(name="SDU, 10 steps", steps=2, profile="fast", offline=Offline(fine=2))
    main = (approximated, ten, corrected)
    return Study("sdu", "a small study", main, (Table("Main", "all of it", (tables.ORIGINAL, *main)),))


def test_from_images_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(tables, "ORIGINAL", replace(tables.ORIGINAL, steps=4))
    monkeypatch.setitem(tables.STUDIES, "sdu", (small, ("dit",)))
    said = io.StringIO()
    asked = Asked(paper="sdu", model="dit", out=tmp_path, images=8, secure=2)
    outcome = run_reproduce(asked, Console(file=said, width=200))
    assert [v.merit.images for v in outcome.validations] == [2, 2, 2]
    assert all(v.smallest_db > 40 for v in outcome.validations)
    records = json.loads((tmp_path / "sdu-dit.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in records["tables"][0]["rows"]] == list(outcome.merits)
    assert records["findings"][1]["holds"] is True  # the correction costs nothing
    page = (tmp_path / "sdu-dit.md").read_text(encoding="utf-8")
    for name in outcome.merits:
        assert f"| {name} |" in page
        assert name in said.getvalue()
    assert "## The simulation against the protocol" in page
    for picture in ("images", "cost"):
        assert f"(sdu-dit-{picture}.png)" in page
        with Image.open(tmp_path / f"sdu-dit-{picture}.png") as image:
            assert image.width > 300


def test_our_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(studies, "ORIGINAL", replace(tables.ORIGINAL, steps=4))
    two = Setting(name="ours, 2 steps", steps=2, profile="fast")
    made = small("dit")
    three = replace(two, name="ours, 3 steps", steps=3)
    monkeypatch.setitem(
        tables.STUDIES, "sdu", (lambda _: replace(made, main=(*made.main, two, three)), ("dit",))
    )
    asked = Asked(paper="sdu", model="dit", out=tmp_path, images=4, secure=2, secure_steps=2, ours=True)
    outcome = run_reproduce(asked, Console(file=io.StringIO()))
    assert list(outcome.merits) == [tables.ORIGINAL.name, two.name, three.name]
    assert [v.name for v in outcome.validations] == [two.name]
    assert outcome.validations[0].step_ratio > 1.0
    assert [f.claim.partition(":")[0] for f in outcome.findings] == [two.name, three.name]
    assert "--secure 2 --secure-steps 2 --ours" in (tmp_path / "ours-dit.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other"], "no study of 'other'; use one of sdu, usg, cipherdm"),
        (["cipherdm", "--model", "dit"], "cipherdm is studied on mnist01"),
        (["sdu", "--images", "150"], "--images must be a multiple of 100, not 150"),
        (["sdu", "--images", "100", "--secure", "30"], "--secure must be a multiple of 20"),
        (
            ["sdu", "--images", "100", "--inception", "none.pth"],
            "there is no file none.pth; give torch-fidelity's",
        ),
        (["dp-ldm", "--secure", "20"], "dp-ldm has no use for --secure; leave it out"),
        (["sdu", "--rows", "main"], "sdu has no use for --rows"),
        (["puma", "--main"], "puma has no use for --main"),
        (["sdu", "--model", "cifar10", "--images", "100"], "the weights of cifar10 do not come with sfumato"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    found = CliRunner().invoke(app, ["reproduce", *arguments, "--out", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert sentence in found.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline and a CLIP model in the hub's layout, small, with random weights."""
    folder = tmp_path_factory.mktemp("hub")
    pipe = DiffusionPipeline.from_pretrained(embedded_path())
    pipe.save_pretrained(folder / "pipe")
    torch.manual_seed(0)
    text = pipe.text_encoder.config.to_dict() | {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    pipe.tokenizer.save_pretrained(folder / "clip")
    return folder / "pipe", folder / "clip"


class Flat:
    """Stands in for Inception: the features of an image are some of its pixels."""

    def __init__(self, weights: Path) -> None:
        assert weights.name == "weights.pth"

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::4, ::4].flatten(1).float()


def test_any_pipeline_with_prompts_of_its_own(
    tmp_path: Path, folders: tuple[Path, Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_RUNS", 8)
    monkeypatch.setattr(plans, "_TOGETHER", 2)
    monkeypatch.setattr(studies, "_CHUNK", 2)
    monkeypatch.setattr(tables, "ORIGINAL", replace(tables.ORIGINAL, steps=2))
    monkeypatch.setitem(tables.STUDIES, "sdu", (small, ("embedded",)))
    captions = data_dir / "prompts" / "coco_val2017_prompts.txt"
    prompts = tuple(line for line in captions.read_text(encoding="utf-8").splitlines() if line.strip())[:4]
    pipe, clip = map(str, folders)
    asked = Asked(paper="sdu", model=pipe, out=tmp_path, images=4, prompts=prompts, clip=clip)
    monkeypatch.setattr("sfumato.shell.reproduce.Inception", Flat)
    merits = run_reproduce(asked, Console(file=io.StringIO()), tmp_path / "weights.pth").merits
    base = merits[tables.ORIGINAL.name]
    assert base.frechet == pytest.approx(0.0, abs=1e-6)
    assert all(m.clip is not None and -100 <= m.clip <= 100 for m in merits.values())
    assert merits["approximated, 10 steps"].clip == pytest.approx(base.clip, abs=1.0)
    distances = json.loads((tmp_path / "sdu-pipe-inception.json").read_text(encoding="utf-8"))
    assert list(distances) == list(merits)
    assert distances[base.name] == 0.0 < distances["approximated, 10 steps"]
    page = (tmp_path / "sdu-pipe.md").read_text(encoding="utf-8")
    assert f"| approximated, 10 steps | 4 | {distances['approximated, 10 steps']:.3f} |" in page
