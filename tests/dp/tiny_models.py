"""Tiny models of every kind that is trained privately, and per-record gradients by the book: one record at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.dp.gradients import Gradients

TOKENS = 5
WIDTH = 8  # of the text's embedding


def conditional_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def class_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        num_class_embeds=4,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=2,
        sample_size=8,
    )


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=12,
            hidden_size=WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


class Denoiser(nn.Module):
    """A U-Net and its text encoder, which sees each record once however many draws the U-Net sees."""

    def __init__(self, unet: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.encoder = encoder

    def forward(self, noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        positions = torch.arange(TOKENS).expand(len(ids), -1)
        text = self.encoder(ids, position_ids=positions).last_hidden_state
        text = text.repeat_interleave(len(noisy) // len(ids), 0)
        return self.unet(noisy, times, text).sample


def one_by_one(module: nn.Module, losses: Callable[[int], Tensor], records: int) -> dict[str, Tensor]:
    """Gradients (records, \\*parameter) by autograd on batches of one record; ``losses(i)``: those of its draws."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in trained}
    for i in range(records):
        module.zero_grad()
        losses(i).mean().backward()
        for name, p in trained.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
    module.zero_grad()
    return {name: torch.stack(each) for name, each in rows.items()}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error, in units of what is allowed: 1e-5 of a parameter's largest gradient, plus 1e-7."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        allowed = 1e-5 * float(truth.abs().max()) + 1e-7
        worst = max(worst, float((found[name] - truth).abs().max()) / allowed)
    return worst


def sampled(gradients: Gradients, losses: Tensor) -> dict[str, Tensor]:
    gradients.backward(losses)
    found = {name: gradient for name, _, gradient in gradients.records()}
    gradients.clear()
    return found


def compare(module: nn.Module, forward: Callable[..., Tensor], inputs: list[Tensor], draws: int) -> float:
    """Error of `Gradients` on the batch `inputs`, as `error` counts it.

    An input has one row per draw, or one per record.
    """
    records = len(inputs[0]) // draws

    def losses(of: list[Tensor]) -> Tensor:
        output = forward(*of).flatten(1)
        # Of no symmetry: the sum of squares of a normalised output has no gradient.
        return (output.square() + torch.linspace(-1, 2, output.shape[1]) * output).sum(1)

    def own(i: int) -> Tensor:
        each = [len(x) // records for x in inputs]
        rows = [x[i * n : (i + 1) * n] for x, n in zip(inputs, each, strict=True)]
        # torch 2.13 dies in the backward pass of a channels-last group norm whose input needs no gradient; here only,
        # as `Gradients` does not ask for the gradient of the norm's weights.
        return losses([x.detach().requires_grad_() if x.is_floating_point() else x for x in rows])

    expected = one_by_one(module, own, records)
    gradients = Gradients(module, draws)
    found = sampled(gradients, losses(inputs))
    # Autograd was not asked for the gradient of the batch, and everything is trainable still.
    assert all(p.grad is None for p in module.parameters())
    assert set(found) == {name for name, p in module.named_parameters() if p.requires_grad}
    gradients.to_standard_module()
    return error(found, expected)
