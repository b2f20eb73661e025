"""Architecture of the embedded pipeline and its assembly into a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .prompts import MAX_LENGTH, make_tokenizer

WIDTH_TEXT = 64


def make_vae(widths: tuple[int, ...] = (16, 32, 32), channels: int = 1) -> AutoencoderKL:
    """Autoencoder of 32x32 pixels without attention; to 4x8x8 with three ``widths``, to 4x4x4 with four."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """U-Net on 4x8x8 with transformer blocks (self-, cross-attention, GEGLU) at 4x4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH_TEXT,
        attention_head_dim=2,
        act_fn="silu",
    )


def make_text_encoder(tokenizer: CLIPTokenizer, layers: int = 2) -> CLIPTextModel:
    """Small CLIP text model for the given tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH_TEXT,
            projection_dim=WIDTH_TEXT,
            intermediate_size=2 * WIDTH_TEXT,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def make_pipeline() -> StableDiffusionPipeline:
    """Untrained pipeline of the final architecture."""
    tokenizer = make_tokenizer()
    return assembled(make_vae(), make_text_encoder(tokenizer), tokenizer, make_unet(), make_scheduler())


def assembled(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """A pipeline of these parts, without a checker of images."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save as a diffusers folder that holds no local path and also the classic tokenizer files."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    model = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokenizer = folder / "tokenizer"
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and ("_name_or_path" in config or "name_or_path" in config):
            config.pop("_name_or_path", None)
            config.pop("name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unet_macs(unet: UNet2DConditionModel) -> int:
    """Multiply-adds (attention products too) of one evaluation for one sample at the U-Net's own size."""
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latent = torch.zeros(1, unet.config.in_channels, size, size)
    text = torch.zeros(1, MAX_LENGTH, width)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(latent, torch.tensor([1]), text)
    return int(counter.get_total_flops()) // 2
