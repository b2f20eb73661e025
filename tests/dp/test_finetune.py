"""A fine-tuning from a public folder to a folder that may be published: what changes, what it costs, what leaks."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn

from sfumato.dp import finetune as module
from sfumato.dp.data import Records
from sfumato.dp.finetune import Run, finetune
from sfumato.dp.ledger import Ledger
from sfumato.dp.parts import load_parts
from sfumato.dp.randomness import SecretStream
from sfumato.dp.recipe import Recipe
from sfumato.dp.sources import read_sources
from sfumato.dp.trainer import Trainer, poisson_batch
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tuning import CAPTIONS, RECIPE, STEPS, changed, images_of, records_of, refused, weights

pytestmark = pytest.mark.usefixtures("remembered")


def files_with(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# ---- what comes out ----------------------------------------------------------------------------------------


def test_the_ledger_says_what_was_done(run: Run, public: Path) -> None:
    ledger = Ledger.read(run.model / "ledger.json")
    assert ledger == run.ledger == Ledger.read(run.model.parent / "ledger.json")
    assert (ledger.done, ledger.reserved, ledger.event.steps) == (STEPS, STEPS, STEPS)
    assert ledger.ended is not None
    spent = ledger.spent()
    assert 0 < spent.prv <= RECIPE.epsilon
    assert 0 < spent.pld <= RECIPE.epsilon
    assert spent.epsilon == pytest.approx(
        RECIPE.epsilon, rel=0.01
    )  # and no more noise than the budget asks for
    assert (ledger.event.sample_rate, ledger.records, ledger.expected_batch) == (0.5, 64, 32.0)
    assert Recipe.from_json({k: v for k, v in ledger.recipe.items() if k != "captions"}) == RECIPE
    assert ledger.captions == CAPTIONS
    # The next one who starts from this model sees what it has seen.
    sources = read_sources(run.model)
    assert sources.digests().items() > read_sources(public).digests().items()
    assert any(ledger.run in name for name in sources.digests())


def test_what_is_not_trained_stays_bit_for_bit(run: Run, public: Path) -> None:
    found = changed(public, run.model)
    assert found
    assert all(
        name.startswith("text_encoder.") or ".attentions." in name for name in found
    )  # no autoencoder, ResBlock, time embedding or convolution at either end
    everything = weights(public)
    trained = {n for n in everything if n.startswith("text_encoder.") or ".attentions." in n}
    assert found == trained
    for part in ("scheduler", "vae", "unet", "text_encoder"):
        for file in (public / part).glob("*.json"):
            assert json.loads(file.read_text()) == json.loads((run.model / part / file.name).read_text())
    for file in ("vocab.json", "merges.txt"):
        assert (public / "tokenizer" / file).read_bytes() == (run.model / "tokenizer" / file).read_bytes()


def test_no_buffer_changes(run: Run, public: Path) -> None:
    before, after = load_parts(public), load_parts(run.model)
    for name in ("vae", "unet", "text_encoder"):
        ours = dict(getattr(after, name).named_buffers())
        for key, value in getattr(before, name).named_buffers():
            assert torch.equal(value, ours[key]), key
    assert torch.equal(before.scheduler.alphas_cumprod, after.scheduler.alphas_cumprod)
    assert before.scale == after.scale


def test_diffusers_loads_every_key(run: Run) -> None:
    _, info = UNet2DConditionModel.from_pretrained(run.model / "unet", output_loading_info=True)
    assert not any(info.values()), info
    pipeline = StableDiffusionPipeline.from_pretrained(run.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(CAPTIONS[3], height=32, width=32, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 1)
    assert np.isfinite(images).all()


def test_what_is_private_is_not_in_the_published_folder(
    public: Path, records: Records, tmp_path: Path
) -> None:
    texts = tuple(f"patient number {n} has a fracture" for n in ("one", "two", "three", "four"))
    own = Records(records.images, records.labels % 4, texts, classes=False)
    run = finetune(public, own, replace(RECIPE, epochs=1), tmp_path / "out")
    assert run.ledger.captions == ("",)
    assert not files_with(run.model, "fracture")
    assert not files_with(tmp_path / "out", "fracture")
    # Nor the key of the commitment, nor the optimizer's state.
    key = (tmp_path / "out" / "private.key").read_bytes()
    assert not [path for path in run.model.rglob("*") if path.is_file() and key in path.read_bytes()]
    assert not list(run.model.rglob("*.pt")) + list(run.model.rglob("*.key"))
    assert (tmp_path / "out" / "private.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("noise_too", [False, True])
def test_no_seed_makes_a_run_again(
    public: Path, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise_too: bool
) -> None:
    """A known seed would let the noise be taken off. Batches and draws are the same in both runs, so it is the noise
    that differs: with that fixed as well, they are one."""
    fixed, original = {"coins", "draws"} | ({"noise"} if noise_too else set()), SecretStream.child

    def child(self: SecretStream, label: str) -> SecretStream:
        made = original(self, label)
        return SecretStream(label.encode().ljust(32)) if label in fixed else made

    monkeypatch.setattr(SecretStream, "child", child)
    made = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        np.random.seed(0)
        made.append(finetune(public, records, replace(RECIPE, epochs=1), tmp_path / name).model)
    trained = {n for n in weights(public) if n.startswith("text_encoder.") or ".attentions." in n}
    assert changed(*made) == (set() if noise_too else trained)


# ---- what can be trained -----------------------------------------------------------------------------------


def test_adapters_are_merged(public: Path, records: Records, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="no peft")
    run = finetune(public, records, replace(RECIPE, epochs=1, what="lora", rank=2), tmp_path / "out")
    assert not [name for name in weights(run.model) if "lora" in name]
    found = changed(public, run.model)
    assert {name for name in found if name.startswith("unet.")} == {
        name
        for name in weights(public)
        if name.startswith("unet.") and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }  # fmt: skip
    _, info = UNet2DConditionModel.from_pretrained(run.model / "unet", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"what": "conditioning"}, ("text_encoder.",)),
        ({"what": "all"}, ("text_encoder.", "unet.")),
        ({"first": 2}, ("text_encoder.", "unet.mid_block.attentions.", "unet.up_blocks.0.attentions.")),
    ],
)
def test_other_parts(
    public: Path, records: Records, tmp_path: Path, change: dict[str, Any], trained: tuple[str, ...]
) -> None:
    run = finetune(public, records, replace(RECIPE, epochs=1, **change), tmp_path / "out")
    assert changed(public, run.model) == {name for name in weights(public) if name.startswith(trained)}


def test_without_captions(public_unconditional: Path, records: Records, tmp_path: Path) -> None:
    run = finetune(
        public_unconditional, records.without_captions(), replace(RECIPE, epochs=1), tmp_path / "out"
    )
    found = changed(public_unconditional, run.model)
    assert found == {
        name for name in weights(public_unconditional) if name.startswith("unet.") and ".attentions." in name
    }
    _, info = UNet2DModel.from_pretrained(run.model / "unet", output_loading_info=True)
    assert not any(info.values()), info
    DiffusionPipeline.from_pretrained(run.model, local_files_only=True)
    assert run.ledger.captions == ("",)


def test_narrow_arithmetic_and_no_budget(public: Path, records: Records, tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, epsilon=float("inf"), epochs=1, precision="bfloat16", decay="constant", average=0.0, normalise=False
    )  # fmt: skip
    run = finetune(public, records, recipe, tmp_path / "out")
    assert run.ledger.event.noise_multiplier == 0
    assert run.ledger.spent().epsilon == float("inf")
    assert changed(public, run.model)


# ---- what is refused ---------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit(
    public: Path, public_unconditional: Path, records: Records, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    long = " ".join(["a handwritten one"] * 12)
    same = Records(records.images, records.labels % 2, (f"{long} left", f"{long} right"))
    refused("two captions are the same to the model's tokenizer", public, same, RECIPE, out)
    # Private texts are cut without a word: an error would tell that two of them begin alike.
    module._check(load_parts(public), replace(same, classes=False), RECIPE, out)
    refused("takes no prompts", public_unconditional, records, RECIPE, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch": 65}, "batch is 65, but there are 64 records"),
        ({"what": "everything"}, "what is trained is one of attention, lora, conditioning, all"),
        ({"first": 9}, "first=9 is outside the attention modules 1 to"),
        ({"what": "lora"}, "a rank of at least 1"),
        ({"delta": 1 / 64}, "which is not below 1 / 64 records"),
        ({"epsilon": 101.0}, "epsilon is a number above 0 and at most 100"),
    ],
)
def test_settings_that_do_not_fit(
    public: Path, records: Records, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    refused(sentence, public, records, replace(RECIPE, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(public: Path, records: Records, tmp_path: Path, device: str) -> None:
    given = {"device": device, "register": tmp_path / "register.jsonl"}
    refused(f"torch cannot compute on '{device}' here; name another", public, records, RECIPE,
            tmp_path / "out", **given)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_nothing_is_charged_before_the_last_check(
    public: Path, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixes(self: Trainer) -> None:
        raise JobError("it mixes records")

    monkeypatch.setattr(Trainer, "verify", mixes)
    out, register = tmp_path / "out", tmp_path / "register.jsonl"
    refused("it mixes records", public, records, RECIPE, out, register=register)
    assert not register.exists()
    assert not (out / "ledger.json").exists()


def test_a_private_model_is_no_public_start(run: Run, tmp_path: Path) -> None:
    """Of other images too: nobody can tell that they are others."""
    refused("was itself fine-tuned on private images.*start from the public model that it", run.model,
            records_of(64, 9), RECIPE, tmp_path / "out")  # fmt: skip
    # Nor without its ledger, whatever is declared of it.
    shutil.copytree(run.model, tmp_path / "bare", ignore=shutil.ignore_patterns("ledger.json"))
    refused("was itself fine-tuned on private images", tmp_path / "bare", records_of(64, 9), RECIPE,
            tmp_path / "out", declared=["photos"])  # fmt: skip
    for path in (tmp_path / "bare").glob("sources.*"):
        path.unlink()
    refused("was private; start from a model", tmp_path / "bare", records_of(64, 9), RECIPE,
            tmp_path / "out", declared=["private images of run 1"])  # fmt: skip
    assert not (tmp_path / "out").exists()


def edited(public: Path, to: Path, file: str, **entries: Any) -> Path:
    """A copy of the folder with entries of a JSON file of it changed."""
    shutil.copytree(public, to)
    config = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(config | entries))
    return to


def test_models_that_do_not_fit(public: Path, records: Records, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused("holds no pipeline", tmp_path, records, RECIPE, out)
    large = edited(public, tmp_path / "xl", "model_index.json", _class_name="StableDiffusionXLPipeline")
    refused("is a StableDiffusionXLPipeline; fine-tuning takes", large, records, RECIPE, out)
    odd = edited(public, tmp_path / "odd", "scheduler/scheduler_config.json", prediction_type="flow")
    refused("predicts 'flow'", odd, records, RECIPE, out)
    silent = tmp_path / "silent"
    shutil.copytree(public, silent, ignore=shutil.ignore_patterns("sources.*"))
    refused("does not say what its model has seen", silent, records, RECIPE, out)
    assert not out.exists()


def test_batch_norm_is_refused(
    public: Path, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mixing(folder: Path) -> Any:
        parts = load_parts(folder)
        parts.unet.conv_norm_out = nn.BatchNorm2d(16)
        return parts

    monkeypatch.setattr(module, "load_parts", mixing)
    refused(
        "conv_norm_out \\(BatchNorm2d\\) normalises over the batch", public, records, RECIPE, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_public_images_cannot_be_private(public: Path, public_images: torch.Tensor, tmp_path: Path) -> None:
    """However they are padded or copied to colours."""
    own = images_of(64, 1)
    padded = torch.nn.functional.pad(public_images, (2, 2, 2, 2))
    for seen in (public_images[:3], padded[:3].expand(-1, 3, -1, -1)):
        wide = torch.nn.functional.pad(own, (2, 2, 2, 2)) if seen.shape[-1] == 32 else own
        mixed = torch.cat([wide.expand(-1, seen.shape[1], -1, -1), seen])
        records = Records(mixed, torch.arange(67) % 10, CAPTIONS)
        refused("has seen 3 of the 67 private images", public, records, RECIPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- batches -----------------------------------------------------------------------------------------------


def test_every_record_has_a_coin_of_its_own() -> None:
    stream, records, rate, batches = SecretStream(b"\1" * 32).child("coins"), 20, 0.3, 8000
    drawn = torch.zeros(batches, records, dtype=torch.float64)
    for row in drawn:
        row[poisson_batch(stream, records, rate)] = 1
    # Five standard errors of a frequency, and of a product of two independent ones.
    sure = 5 * (rate * (1 - rate) / batches) ** 0.5
    assert (drawn.mean(0) - rate).abs().max() < sure
    both = drawn.T @ drawn / batches
    both.fill_diagonal_(rate * rate)
    assert (both - rate * rate).abs().max() < 5 * (rate**2 * (1 - rate**2) / batches) ** 0.5
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(records * rate * (1 - rate), rel=0.1)  # no fixed size
    after = drawn[1:].T @ drawn[:-1] / (batches - 1)  # nor does a step know the one before
    assert (after - rate * rate).abs().max() < 5 * (rate**2 * (1 - rate**2) / batches) ** 0.5


def test_a_rate_of_one_takes_all_and_a_small_one_nobody() -> None:
    stream = SecretStream().child("coins")
    assert poisson_batch(stream, 100, 1.0).tolist() == list(range(100))
    assert min(len(poisson_batch(stream, 10, 0.01)) for _ in range(60)) == 0


def test_a_step_of_nobody_is_noise(
    public: Path, records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: list[int] = []
    original = Trainer.step

    def nobody(self: Trainer, rows: torch.Tensor) -> None:
        before = [p.detach().clone() for p in self.choice.parameters]
        sizes.append(len(rows))
        original(self, rows[:0])
        moved = [not torch.equal(p, b) for p, b in zip(self.choice.parameters, before, strict=True)]
        assert all(moved)

    monkeypatch.setattr(Trainer, "step", nobody)
    run = finetune(public, records, replace(RECIPE, epochs=1), tmp_path / "out")
    assert run.ledger.done == 2


def test_a_full_batch(public: Path, records: Records, tmp_path: Path, steps: list[int]) -> None:
    run = finetune(public, records, replace(RECIPE, batch=64, epochs=2), tmp_path / "out")
    assert run.ledger.event.sample_rate == 1.0
    assert steps == [64, 64]
