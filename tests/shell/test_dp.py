"""``sfumato dp``: from private images to published ones on the command line, and one sentence where that fails."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from sfumato.dp import attack, parts
from sfumato.dp import audit as step_audit
from sfumato.dp import evaluate as measures
from sfumato.dp.data import Records, read_records
from sfumato.dp.ledger import NOT_COVERED, Ledger
from sfumato.dp.sample import save_samples
from sfumato.shell import dp as module
from sfumato.shell.cli import app

sys.path.insert(0, str(Path(__file__).parents[1] / "dp"))
from tuning import CAPTIONS, records_of, remembering, save_public

BUDGET = ("--epsilon", "8", "--delta", "1e-3", "--batch", "32", "--epochs", "2", "--draws", "2")
#: What the classes are called: only the data holder can say that these texts may be told.
NAMED = tuple(word for text in CAPTIONS for word in ("--caption", text))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("public") / "model"
    save_public(folder)
    with remembering():
        yield folder


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_samples(records_of(64), tmp_path_factory.mktemp("private") / "private.npz")


@pytest.fixture(scope="module")
def run(public: Path, private: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    result = invoked("train", "--public", public, "--private", private, "--out", out, *BUDGET, *NAMED)
    assert result.exit_code == 0, result.output
    guarantee(result.output)
    assert f"model: {out / 'model'}" in result.output.replace("\n", "")
    return out


def invoked(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["dp", *map(str, arguments)], env={"COLUMNS": "200"})


def said(result: Result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    line = result.stderr.strip()
    assert line.startswith("sfumato: ")
    assert "\n" not in line
    return line


def guarantee(text: str) -> None:
    """What is promised, and what is not."""
    assert "at δ = 0.001 (budget ε = 8)" in text
    assert "PRV" in text
    assert "PLD" in text
    for sentence in NOT_COVERED:
        assert sentence in text.replace("\n", " ")


def test_samples_carry_their_guarantee(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples.npz"
    result = invoked("sample", run / "model", "--images", 30, "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.output
    guarantee(result.output)
    found = read_records(out)
    assert found.captions == CAPTIONS
    assert found.labels.bincount().tolist() == [3] * 10
    assert found.images.shape == (30, 1, 32, 32)
    with Image.open(out.with_suffix(".png")) as grid:
        assert grid.size == (20 * 64, 2 * 64)


def test_a_public_model_claims_nothing(public: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    more = ("--prompt", "a handwritten six", "--prompt", "a handwritten one", "--guidance", 2)
    result = invoked("sample", public, "--images", 4, "--steps", 1, "--out", out, *more)
    assert result.exit_code == 0, result.output
    assert "no ledger: nothing is claimed" in result.output
    assert "ε =" not in result.output
    assert read_records(out).captions == ("a handwritten six", "a handwritten one")
    assert "name an .npz file" in said(invoked("sample", public, "--images", 1, "--out", tmp_path / "a.png"))
    assert "holds no pipeline" in said(invoked("sample", tmp_path, "--images", 1))


def test_a_finished_run_is_shown_again(run: Path, public: Path, private: Path) -> None:
    before = (run / "ledger.json").read_bytes()
    result = invoked("train", "--public", public, "--private", private, "--out", run, *BUDGET, *NAMED)
    assert result.exit_code == 0, result.output
    guarantee(result.output)
    assert (run / "ledger.json").read_bytes() == before


def test_texts_in_the_private_file_are_not_told(public: Path, private: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoked("train", "--public", public, "--private", private, "--out", out, *BUDGET)
    assert result.exit_code == 0, result.output
    assert Ledger.read(out / "ledger.json").captions == ("",)
    assert CAPTIONS[3] not in (out / "ledger.json").read_text("utf-8")


def test_names_are_not_markup(run: Path) -> None:
    """What comes from a file is printed as it is."""
    said, held = io.StringIO(), Ledger.read(run / "ledger.json")
    odd = replace(held, public={"photos [x]": "00", "[/x]": "00"}, trained="[bold]all[/bold] [/]")
    module.show_ledger(odd, Console(file=said, width=200))
    for text in ("photos [x], [/x]", "[bold]all[/bold] [/]"):
        assert text in said.getvalue()


def test_the_public_start_can_be_drawn_from(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "glyphs_path", lambda: public)
    out = tmp_path / "samples.npz"
    result = invoked("sample", "glyphs", "--images", 2, "--steps", 1, "--out", out, "--prompt", CAPTIONS[0])
    assert result.exit_code == 0, result.output
    assert "no ledger: nothing is claimed" in result.output
    assert read_records(out).images.shape == (2, 1, 32, 32)


def test_ledgers_add_up(run: Path, tmp_path: Path) -> None:
    one = invoked("ledger", run / "model")
    assert one.exit_code == 0, one.output
    guarantee(one.output)
    assert "4 of 4 spent, 4 in the weights" in one.output
    assert "together" not in one.output
    ledger = Ledger.read(run / "ledger.json")
    two = invoked("ledger", run / "model", run / "ledger.json")
    together = float(two.output.partition("together ε = ")[2].split()[0])
    assert ledger.spent().epsilon < together < 2.5 * ledger.spent().epsilon
    assert "if they read the same records" not in two.output
    other = json.loads((run / "ledger.json").read_text("utf-8")) | {"private": "0" * 64}
    (tmp_path / "ledger.json").write_text(json.dumps(other), "utf-8")
    assert "if they read the same records" in invoked("ledger", run, tmp_path).output
    assert "cannot be read" in said(invoked("ledger", tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--delta", "0.02"), "delta is 0.02, which is not below 1 / 64 records"),
        (("--batch", "100"), "batch is 100, but there are 64 records"),
        (("--epsilon", "0"), "epsilon is 0.0; it must be more than 0"),
        (("--what", "everything"), "what is trained is one of"),
        (("--first", "7"), "first=7 is outside the attention modules"),
        (("--limit-epsilon", "9"), "needs the list of them; name a register (--register)"),
        (("--caption", "one"), "a label is 9, but there are 1 captions"),
    ],
)
def test_what_is_refused(
    public: Path, private: Path, tmp_path: Path, change: tuple[str, ...], sentence: str
) -> None:
    out = tmp_path / "out"
    result = invoked("train", "--public", public, "--private", private, "--out", out, *BUDGET, *change)
    assert sentence in said(result)
    assert not out.exists()


def test_images_without_labels(public: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for number in range(3):
        Image.fromarray(np.full((28, 28), number, np.uint8)).save(loose / f"{number}.png")
    given = ("train", "--public", public, "--out", tmp_path / "out", *BUDGET)
    assert "the images have no labels; put each class into a folder" in said(
        invoked(*given, "--private", loose)
    )
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 28, 28), np.uint8))
    assert "has no labels" in said(invoked(*given, "--private", tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 28, 28), np.uint8), labels=np.arange(4))
    assert "say what each class is called in a prompt (--caption" in said(
        invoked(*given, "--private", tmp_path / "a.npz")
    )
    assert "no images to read" in said(invoked(*given, "--private", tmp_path / "nowhere"))


def test_evaluation_on_the_command_line(tmp_path: Path) -> None:
    synthetic = save_samples(records_of(60, 3, 2), tmp_path / "synthetic.npz")
    test = save_samples(records_of(40, 4, 2), tmp_path / "test.npz")
    given = (
        "evaluate",
        synthetic,
        "--test",
        test,
        "--private",
        test,
        "--kinds",
        "mlp",
        "--seeds",
        1,
        "--epochs",
        1,
    )
    told = invoked(*given)
    assert told.exit_code == 0, told.output
    assert "60 synthetic images, 40 real ones to test on" in told.output
    report = json.loads(invoked(*given, "--json").output)
    assert [found["kind"] for found in report["utility"]] == ["mlp"]
    assert report["copies"]["training"] == 40


def test_classes_are_matched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class folders are sorted by name: 'one' comes before 'zero', which is class 0 of the samples."""
    made = Records(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 2, ("zero", "one"))
    synthetic = save_samples(made, tmp_path / "synthetic.npz")
    for name, grey in (("zero", 10), ("one", 200)):
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / "test" / name / f"{number}.png")
    seen: list[Any] = []

    def utility(synthetic: Any, real: Any, **_: Any) -> list[Any]:
        seen.append(real)
        return []

    monkeypatch.setattr(measures, "utility", utility)
    result = invoked("evaluate", synthetic, "--test", tmp_path / "test")
    assert result.exit_code == 0, result.output
    ((images, labels),) = seen
    assert {(int(i.max()), int(k)) for i, k in zip(images, labels, strict=True)} == {(10, 0), (200, 1)}
    (tmp_path / "test" / "zero").rename(tmp_path / "test" / "nought")
    line = said(invoked("evaluate", synthetic, "--test", tmp_path / "test"))
    assert "there is no class 'nought' among 'zero', 'one'; name both sets alike" in line


@pytest.mark.parametrize(("bound", "code"), [(0.5, 0), (9.0, 1)])
def test_members_are_chosen_by_chance(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, code: int
) -> None:
    """A file that is sorted by class begins with one class. A bound above the ledger's claim fails the audit."""
    sets: list[Records] = []

    def attacked(folder: Path, *given: Records, delta: float) -> Any:
        assert delta == 1e-3
        sets.extend(given)
        return SimpleNamespace(to_json=dict, epsilon=bound)

    monkeypatch.setattr(attack, "attack_folder", attacked)
    found = SimpleNamespace(verdict="consistent", to_json=dict)
    monkeypatch.setattr(step_audit, "audit_step", lambda **_: found)
    files = []
    for number, name in enumerate(("members", "others")):
        held = records_of(400, number)
        held = Records(held.images, torch.arange(400) // 40, held.captions)
        files.append(save_samples(held, tmp_path / f"{name}.npz"))
    result = invoked("audit", "--model", run / "model", "--members", files[0], "--others", files[1],
                     "--images", 100, "--json")  # fmt: skip
    assert result.exit_code == code, result.output
    assert 0 < json.loads(result.stdout)["membership"]["claim"] <= 8
    assert [len(one) for one in sets] == [100, 100]
    for one in sets:
        assert len(one.labels.unique()) == 10


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, private: Path) -> None:
    @module.needs_dp
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'opacus'", name="opacus.optimizers")

    with pytest.raises(
        module.JobError, match=r"opacus.optimizers is not installed; pip install 'sfumato\[dp\]'"
    ):
        missing()


def test_membership_needs_both_sides(tmp_path: Path) -> None:
    line = said(invoked("audit", "--trials", 100, "--model", tmp_path))
    assert "needs --model, --members and --others together" in line


def test_pretraining_of_nothing(tmp_path: Path) -> None:
    line = said(invoked("pretrain", "--no-fonts", "--out", tmp_path / "out"))
    assert "a public model needs something to learn from" in line
    line = said(invoked("pretrain", "--font-folder", tmp_path, "--out", tmp_path / "out"))
    assert "name a folder of .ttf or .otf files (--font-folder)" in line
