"""A pipeline folder's parts: what is read of it, and what the latents and targets are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sfumato.dp.parts import Latents, Parts, decode, encode, load_parts, target
from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tuning import CAPTIONS, images_of


@pytest.fixture(scope="module")
def parts(public: Path) -> Parts:
    return load_parts(public)


def test_sizes(parts: Parts, public_unconditional: Path) -> None:
    assert (parts.side, parts.channels, parts.latent_shape) == (32, 1, (4, 4, 4))
    assert not any(
        p.requires_grad for part in (parts.vae, parts.unet, parts.text_encoder) for p in part.parameters()
    )
    other = load_parts(public_unconditional)
    assert (other.side, other.channels, other.latent_shape) == (16, 1, (3, 8, 8))
    assert other.text_encoder is other.tokenizer is None
    assert other.ids(["anything"]) is None


def test_ids_are_of_one_length(parts: Parts) -> None:
    ids = parts.ids([*CAPTIONS, "", "a handwritten " * 20])
    assert ids is not None
    assert ids.shape == (12, parts.tokenizer.model_max_length)
    assert len(ids.unique(dim=0)) == 12


def test_latents_are_of_each_image_alone(parts: Parts, public_unconditional: Path) -> None:
    images = torch.nn.functional.pad(images_of(7, 1), (2, 2, 2, 2))
    latents = encode(parts, images)
    assert latents.mean.shape == latents.std.shape == (7, 4, 4, 4)
    assert torch.allclose(encode(parts, images, batch=3).mean, latents.mean, atol=1e-5)
    assert torch.allclose(encode(parts, images[4:5]).mean, latents.mean[4:5], atol=1e-5)
    with torch.no_grad():
        posterior = parts.vae.encode(images.float() / 127.5 - 1).latent_dist
    assert torch.allclose(latents.mean, posterior.mean * parts.scale, atol=1e-5)
    assert torch.allclose(latents.std, posterior.std * parts.scale, atol=1e-5)
    decoded = decode(parts, latents.mean, batch=2)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    # A quantising autoencoder has no spread.
    assert encode(load_parts(public_unconditional), images_of(2, 1, 16)).std.abs().max() == 0


def test_every_visit_is_a_fresh_sample() -> None:
    mean, std = torch.tensor([1.0, -2.0]).view(2, 1, 1, 1), torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    latents = Latents(mean.expand(2, 1, 8, 8), std.expand(2, 1, 8, 8))
    rows, stream = torch.tensor([0] * 400 + [1]), SecretStream(bytes(32))
    drawn = latents.sample(rows, stream)
    assert drawn[:400].mean() == pytest.approx(1.0, abs=0.02)
    assert drawn[:400].std() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(drawn[400], mean[1].expand(1, 8, 8))
    assert not torch.equal(drawn, latents.sample(rows, stream))


def test_targets_lead_back_to_the_image() -> None:
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    signal = torch.tensor([0.9, 0.5, 0.1]).view(3, 1, 1, 1)
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def wanted(kind: str) -> torch.Tensor:
        return target(SimpleNamespace(config=SimpleNamespace(prediction_type=kind)), clean, noise, signal)

    assert torch.equal(wanted("epsilon"), noise)
    assert torch.equal(wanted("sample"), clean)
    v = wanted("v_prediction")
    assert torch.allclose(signal.sqrt() * noisy - (1 - signal).sqrt() * v, clean, atol=1e-5)
    with pytest.raises(JobError, match="predicts 'flow'"):
        wanted("flow")


def test_a_record_s_draws_share_its_text(parts: Parts) -> None:
    model = parts.denoiser()
    ids = parts.ids(CAPTIONS[:2])
    noisy, times = torch.randn(4, 4, 4, 4), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        together = model(noisy, times, ids)
        for row in range(4):
            assert ids is not None
            alone = model(noisy[row : row + 1], times[row : row + 1], ids[row // 2 : row // 2 + 1])
            assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_what_is_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"holds no pipeline \(model_index.json\); make one"):
        load_parts(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(
        JobError, match="is a FluxPipeline; fine-tuning takes a StableDiffusionPipeline or a LDMPi"
    ):
        load_parts(tmp_path)
