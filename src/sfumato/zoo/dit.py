"""A denoiser of the diffusion-transformer type (Peebles and Xie 2023): patches, attention, adaptive layer norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.zoo.unet import sinusoids

__all__ = ["DiT"]


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adapt = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adapt(condition)[:, None].chunk(6, -1)
        h = self.first(x) * (1.0 + scale) + shift
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(mixed)
        h = self.second(x) * (1.0 + scale2) + shift2
        return x + gate2 * self.fall(functional.gelu(self.rise(h), approximate="tanh"))


class DiT(nn.Module):
    """Noise that is predicted for a sample (B, channels, size, size) at a timestep, scalar or (B,), for a class.

    ``encoder_hidden_states`` (B, 1, width): the class's embedding, added to that of the time; zeros for no class. It
    and the time meet the sample in shifts, scales and gates alone, which their holder computes in the clear.
    """

    def __init__(
        self,
        channels: int = 4,
        size: int = 8,
        patch: int = 2,
        width: int = 96,
        layers: int = 5,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.enter = nn.Conv2d(channels, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.adapt = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, channels * patch * patch)
        for module in (self.adapt, self.leave):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    @property
    def label_width(self) -> int:
        """Values of one class."""
        return self.width

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        condition = functional.silu(self.time(sinusoids(timestep, 64)) + encoder_hidden_states[:, 0])
        x = self.enter(sample).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x, condition)
        shift, scale = self.adapt(condition)[:, None].chunk(2, -1)
        x = self.leave(self.norm(x) * (1.0 + scale) + shift)
        batch, channels, size = sample.shape[0], sample.shape[1], sample.shape[2] // self.patch
        x = x.reshape(batch, size, size, channels, self.patch, self.patch)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)
