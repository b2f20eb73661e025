"""Joint training of the U-Net and the text encoder on cached latents."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from .build import make_pipeline
from .loop import Indices, channels_last, run
from .prompts import MAX_LENGTH, class_prompts

LATENTS, CHECKPOINT = "latents.pt", "unet.ckpt"
DROP = 0.12
SNR_LIMIT = 5.0
BATCH = 128


class PromptTable:
    """Token ids of all training prompts, drawn by class; the last row is the empty prompt."""

    def __init__(self, pipeline: StableDiffusionPipeline, seed: int) -> None:
        prompts = [class_prompts(label) for label in range(20)]
        flat = [prompt for group in prompts for prompt in group] + [""]
        encoded = pipeline.tokenizer(flat, padding="max_length", max_length=MAX_LENGTH, truncation=True)
        self.ids = torch.tensor(encoded.input_ids)
        self.counts = torch.tensor([len(group) for group in prompts])
        self.starts = self.counts.cumsum(0) - self.counts
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, labels: torch.Tensor) -> torch.Tensor:
        """Token ids (N, 16) of one random prompt per label, a share of them empty."""
        pick, drop = torch.rand(2, len(labels), generator=self.generator)
        rows = self.starts[labels] + (pick * self.counts[labels]).long()
        return self.ids[torch.where(drop < DROP, len(self.ids) - 1, rows)]


class Denoiser(nn.Module):
    """U-Net and text encoder as one module."""

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        super().__init__()
        self.unet = pipeline.unet
        self.text = pipeline.text_encoder

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, times, self.text(ids).last_hidden_state).sample


def _train(number: int, processes: int, labels: torch.Tensor, out: Path, minutes: float) -> None:
    """Training in process ``number`` of several; the batch is divided among them."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    if processes > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        meeting = f"file://{(out / 'meeting').resolve()}"
        distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=processes)
    torch.manual_seed(0)
    pipeline = make_pipeline()
    model = channels_last(Denoiser(pipeline))
    latents = torch.load(out / LATENTS, weights_only=True, mmap=True)
    table = PromptTable(pipeline, seed=100 + number)
    draw = Indices(len(labels), BATCH // processes, seed=200 + number)
    alphas = pipeline.scheduler.alphas_cumprod
    weights = (SNR_LIMIT * (1 - alphas) / alphas).clamp(max=1.0)

    def step(_: int) -> torch.Tensor:
        chosen = draw()
        clean = latents[chosen].float()
        noise = torch.randn_like(clean)
        times = torch.randint(0, len(alphas), (len(chosen),))
        signal = alphas[times][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        guess = model(noisy.contiguous(memory_format=torch.channels_last), times, table.draw(labels[chosen]))
        return ((guess - noise).square().mean((1, 2, 3)) * weights[times]).mean()

    run("unet", model, step, out / CHECKPOINT, minutes, peak=1.5e-3, decay=0.999)
    if processes > 1:
        distributed.destroy_process_group()


def train_unet(
    vae: AutoencoderKL, labels: torch.Tensor, out: Path, minutes: float, processes: int = 2
) -> StableDiffusionPipeline:
    """Train on the latents cached in ``out`` by predicting the noise (min-SNR weights).

    Gives the pipeline with averaged weights. Processes of one thread each are faster here than threads.
    """
    if processes > 1:
        (out / "meeting").unlink(missing_ok=True)
        spawn(_train, (processes, labels, out, minutes), nprocs=processes)
    else:
        _train(0, 1, labels, out, minutes)
    return pipeline_from_checkpoint(vae, out / CHECKPOINT)


def pipeline_from_checkpoint(vae: AutoencoderKL, checkpoint: Path) -> StableDiffusionPipeline:
    """Pipeline with the averaged weights of a training, finished or not."""
    pipeline = make_pipeline()
    pipeline.register_modules(vae=vae)
    model = Denoiser(pipeline)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["average"])
    model.eval()
    return pipeline
