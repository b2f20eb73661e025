"""The parts of a latent-diffusion folder, as fine-tuning takes and leaves them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError
from sfumato.zoo import GLYPHS, glyphs_path

__all__ = ["Denoiser", "Latents", "Parts", "arithmetic", "check_device", "encode", "load_parts", "target"]

#: Pipelines that can be fine-tuned: with a text encoder, and without.
_WITH_TEXT, _WITHOUT = "StableDiffusionPipeline", "LDMPipeline"
#: What a U-Net may be trained to predict (`target`).
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that one norm clips both. ``text_encoder`` None: no condition."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, times: Tensor, ids: Tensor | None) -> Tensor:
        """Prediction (N, c, h, w) for latents (N, c, h, w), timesteps (N,) and token ids (R, length); each of the R
        records has N / R rows, one after the other, which share its text."""
        if self.text_encoder is None or ids is None:
            return self.unet(noisy, times).sample
        # Positions of every row by themselves: those that CLIP would share among rows have one gradient for all.
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        text = self.text_encoder(ids, position_ids=positions).last_hidden_state
        return self.unet(noisy, times, text.repeat_interleave(len(noisy) // len(ids), 0)).sample


@dataclass(frozen=True)
class Parts:
    """A pipeline and its parts. ``text_encoder`` and ``tokenizer`` are None for an unconditional one."""

    pipeline: Any
    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    @property
    def side(self) -> int:
        """Pixels a side."""
        return int(self.unet.config.sample_size) * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Of an image."""
        return int(self.vae.config.in_channels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

    @property
    def scale(self) -> float:
        """From the autoencoder's latents to the U-Net's, fixed when the public model was made."""
        return float(self.vae.config.scaling_factor)

    def ids(self, captions: Sequence[str]) -> Tensor | None:
        """Token ids (len(captions), length)."""
        if self.tokenizer is None:
            return None
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True
        )
        return torch.tensor(tokens.input_ids)

    def denoiser(self) -> Denoiser:
        return Denoiser(self.unet, self.text_encoder)


def folder_of(named: Path) -> Path:
    """The folder of a pipeline; ``glyphs`` is the public start that comes with sfumato."""
    return glyphs_path() if str(named) == GLYPHS else Path(named)


def load_parts(folder: Path) -> Parts:
    """Of a saved pipeline, or of ``glyphs``.

    Raises:
        JobError: no such folder, or a pipeline of a kind that is not fine-tuned here.
    """
    from diffusers import DiffusionPipeline

    folder = folder_of(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise JobError(
            f"{folder} holds no pipeline (model_index.json); make one with sfumato dp pretrain, or name another"
        )
    kind = json.loads(index.read_text("utf-8")).get("_class_name")
    if kind not in (_WITH_TEXT, _WITHOUT):
        raise JobError(f"{folder} is a {kind}; fine-tuning takes a {_WITH_TEXT} or a {_WITHOUT}")
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    text = kind == _WITH_TEXT
    parts = Parts(
        pipeline,
        pipeline.vae if text else pipeline.vqvae,
        pipeline.unet,
        pipeline.text_encoder if text else None,
        pipeline.tokenizer if text else None,
        pipeline.scheduler,
    )
    for part in (parts.vae, parts.unet, parts.text_encoder):
        if part is not None:
            part.float().eval().requires_grad_(False)
    return parts


def arithmetic(precision: str, device: str) -> AbstractContextManager[object]:
    """In which a model computes in ``precision``, "float32" or "bfloat16"."""
    if precision == "bfloat16":
        return torch.autocast(device.split(":")[0], torch.bfloat16)
    return nullcontext()


def check_device(device: str) -> None:
    """
    Raises:
        JobError: torch has no such device here.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):  # whichever its backend has
        raise JobError(
            f"torch cannot compute on {device!r} here; name another device (--device), or install its driver"
        ) from None


@dataclass(frozen=True)
class Latents:
    """Posteriors of encoded images: ``mean`` and ``std`` (N, c, h, w), in the U-Net's scale."""

    mean: Tensor
    std: Tensor

    def sample(self, rows: Tensor, stream: SecretStream) -> Tensor:
        """A fresh sample of each row's posterior (papers/dp-latent-diffusion 1.2)."""
        mean = self.mean[rows]
        return mean + self.std[rows] * stream.normal(mean.shape, 1.0)


@torch.no_grad()
def encode(parts: Parts, images: Tensor, batch: int = 250) -> Latents:
    """Bytes (N, C, side, side) to latents; each row depends on its own image alone."""
    means, stds = [], []
    for block in images.split(batch):
        encoded = parts.vae.encode(block.float() / 127.5 - 1)
        if hasattr(encoded, "latent_dist"):
            means.append(encoded.latent_dist.mean * parts.scale)
            stds.append(encoded.latent_dist.std * parts.scale)
        else:
            means.append(encoded.latents * parts.scale)
            stds.append(torch.zeros_like(means[-1]))
    return Latents(torch.cat(means), torch.cat(stds))


@torch.no_grad()
def decode(parts: Parts, latents: Tensor, batch: int = 250) -> Tensor:
    """Latents in the U-Net's scale to bytes (N, C, side, side)."""
    images = [parts.vae.decode(block / parts.scale).sample.float() for block in latents.split(batch)]
    return ((torch.cat(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def target(scheduler: Any, clean: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """What the U-Net is to predict for ``sqrt(signal) clean + sqrt(1 - signal) noise``; ``signal`` broadcasts."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return signal.sqrt() * noise - (1 - signal).sqrt() * clean
    if kind == "sample":
        return clean
    raise JobError(f"the model predicts {kind!r}; fine-tuning knows {', '.join(PREDICTIONS)}")
