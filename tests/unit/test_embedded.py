"""The embedded pipeline's folder: loads, small, cheap, and its tokenizer takes any prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from sfumato.zoo import embedded_path
from sfumato.zoo.judge import Judge, load_judge, save_judge
from sfumato.zoo.train.build import unet_macs
from sfumato.zoo.train.data import DataError, load_split, read_idx
from sfumato.zoo.train.evaluate import diversity
from sfumato.zoo.train.prompts import CLASS_NAMES, class_prompts


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(embedded_path(), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_folder_is_small_and_names_no_local_path() -> None:
    files = [path for path in embedded_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
    for path in files:
        if path.suffix == ".json":
            config = json.loads(path.read_text(encoding="utf-8"))
            assert not {"_name_or_path", "name_or_path"} & set(config)


def test_unet_cost(pipeline: StableDiffusionPipeline, record_property: Callable[[str, object], None]) -> None:
    macs = unet_macs(pipeline.unet)
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    record_property("unet_macs", macs)
    record_property("unet_parameters", parameters)
    print(f"U-Net: {parameters} parameters, {macs / 1e6:.1f} M multiply-adds")
    assert 10e6 < macs <= 60e6
    assert 0.5e6 < parameters < 1.6e6


def test_scheduler_and_guards(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.steps_offset, config.clip_sample) == ("epsilon", 1, False)
    assert pipeline.safety_checker is None
    assert not pipeline.config.requires_safety_checker
    kinds = {type(module).__name__ for module in pipeline.unet.modules()}
    assert {"BasicTransformerBlock", "GEGLU"} <= kinds


def test_gives_grey_pil_images(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["a handwritten seven", "quixotic 漢 prompt"]
    images = pipeline(prompts, num_inference_steps=2, output_type="pil").images
    assert len(images) == 2
    assert all(isinstance(image, Image.Image) and image.size == (32, 32) for image in images)
    assert all(image.mode == "L" for image in images)


@pytest.mark.parametrize("text", ["quixotic zebra", "ünïcode 漢字 ok", "x_7 & co", "the digit 3"])
def test_tokenizer_round_trip(pipeline: StableDiffusionPipeline, text: str) -> None:
    tokenizer = pipeline.tokenizer
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("label", range(20))
def test_class_prompts_fit(pipeline: StableDiffusionPipeline, label: int) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 16
    prompts = class_prompts(label)
    assert len(prompts) >= 50
    seen = {tuple(tokenizer(prompt).input_ids) for prompt in prompts}
    assert len(seen) == len(prompts)
    assert max(len(ids) for ids in seen) <= tokenizer.model_max_length
    assert any(CLASS_NAMES[label] in prompt for prompt in prompts)


def test_no_prompt_names_two_classes() -> None:
    prompts = [prompt for label in range(20) for prompt in class_prompts(label)]
    assert len(set(prompts)) == len(prompts)


def test_judge_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    small = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    large = torch.nn.functional.pad(small, (2, 2, 2, 2))[:, None].float() / 255
    assert torch.equal(again.classify(small), again.classify(large))
    torch.testing.assert_close(again.extract(small), judge.extract(large), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="28x28 or 32x32"):
        judge.classify(torch.zeros(1, 3, 32, 32))


def test_diversity_of_equal_and_collapsed_sets() -> None:
    torch.manual_seed(0)
    real = torch.randn(60, 8)
    same, collapsed = diversity(real, real), diversity(real[:1] + 1e-3 * torch.randn(60, 8), real)
    assert (same.recall, same.coverage, same.spread) == (1.0, 1.0, 1.0)
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.6
    assert collapsed.spread < 0.01


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\0\0\x0d\1\0\0\0\1x", "unsigned bytes"),
        (b"\0\0\x08\1\0\0\0\5abc", "5 bytes"),
        (b"\0\0\x08\3\0\0", "cut off"),
        (b"\x1f\x8bxx", "gzip"),
    ],
)
def test_idx_errors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(path)
    with pytest.raises(DataError, match="no such idx file"):
        read_idx(tmp_path / "other")


def test_load_split_pads_and_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mnist"):
        load_split(tmp_path, train=False)
    images = np.full((3, 28, 28), 9, np.uint8)
    for name in ("mnist", "fashion_mnist"):
        (tmp_path / name).mkdir()
        header = b"\0\0\x08\3" + np.array([3, 28, 28], ">u4").tobytes()
        (tmp_path / name / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = b"\0\0\x08\1" + np.array([3], ">u4").tobytes() + bytes([0, 4, 9])
        (tmp_path / name / "t10k-labels-idx1-ubyte").write_bytes(labels)
    split = load_split(tmp_path, train=False)
    assert split.images.shape == (6, 1, 32, 32)
    assert split.labels.tolist() == [0, 4, 9, 10, 14, 19]
    assert int(split.images.sum()) == 6 * 28 * 28 * 9


def test_built_in_prompts_for_ranges_are_short_enough_for_it() -> None:
    """Longer ones are cut, with a remark of transformers' in the middle of somebody's run."""
    from sfumato.diffusion.calibrate import PROMPTS

    tokenizer = CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")
    assert [text for text in PROMPTS if len(tokenizer(text).input_ids) > tokenizer.model_max_length] == []
