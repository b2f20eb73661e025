"""A class-conditional pixel U-Net: CipherDM's for MNIST, and a wider one for colour images.

Reconstructed from private-diffusion.md 3.3 (authors' code): levels of residual blocks with group normalisation,
attention of one head at some levels and in the middle, a dense layer of the time embedding and a class embedding added
in each block. With base 4, levels (1, 2), two blocks a level, attention at level 1, two groups, times 4 -> 8 -> 8 and
two classes it has 15,881 parameters, 72,232 activations, and 1,176 softmax rows of 196 in a call: all as the digest
counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ClassUNet"]

_ACTIVATIONS = {"silu": functional.silu, "mish": functional.mish}


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """(B, width) sines, then cosines, of timesteps (B,) or of one."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(1, half - 1)))
    angles = timestep.reshape(-1, 1).to(torch.float32) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, groups: int, times: int, activation: str) -> None:
        super().__init__()
        self.first = nn.GroupNorm(groups, before)
        self.widen = nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(times, after)
        self.second = nn.GroupNorm(groups, after)
        self.dropout = nn.Dropout(0.1)
        self.refine = nn.Conv2d(after, after, 3, padding=1)
        self.skip: nn.Module = nn.Identity() if before == after else nn.Conv2d(before, after, 1)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        h = self.widen(self.activation(self.first(x)))
        h = h + (self.time(self.activation(time)) + label)[:, :, None, None]
        found: Tensor = self.skip(x) + self.refine(self.dropout(self.activation(self.second(h))))
        return found


class _Attention(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = x + self.out(mixed[:, 0].transpose(1, 2).reshape(x.shape))
        return found


class ClassUNet(nn.Module):
    """Noise that is predicted for a sample (B, channels, H, W) at a timestep, scalar or (B,), for a class.

    ``encoder_hidden_states`` (B, 1, `label_width`) is what the blocks add for the class, one piece for each: the table
    of classes stays with whoever calls. Zeros stand for no class.

    Args:
        levels: multipliers of ``base``; each level but the first halves the size. ``blocks``: residual blocks a level
            on the way down, one more on the way up. ``attention``: levels with attention after each block.
        times: widths of the sinusoids and of the time embedding.
        activation: ``"silu"`` or ``"mish"``, in the blocks and in the time embedding.
    """

    def __init__(
        self,
        channels: int = 1,
        base: int = 4,
        levels: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        groups: int = 2,
        times: tuple[int, int] = (4, 8),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        self.sinusoids = times[0]
        self.activation = _ACTIVATIONS[activation]
        self.embed, self.embed_again = nn.Linear(*times), nn.Linear(times[1], times[1])
        widths: list[int] = []  # of what each block adds for the class

        def block(before: int, after: int) -> _Block:
            widths.append(after)
            return _Block(before, after, groups, times[1], activation)

        def mixing(level: int, width: int) -> nn.Module:
            return _Attention(width, groups) if level in attention else nn.Identity()

        self.enter = nn.Conv2d(channels, base, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        width, kept = base, [base]
        for level, factor in enumerate(levels):
            for _ in range(blocks):
                self.down.append(nn.ModuleList([block(width, base * factor), mixing(level, base * factor)]))
                width = base * factor
                kept.append(width)
            if level + 1 < len(levels):
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept.append(width)
        self.middle = nn.ModuleList([block(width, width), _Attention(width, groups), block(width, width)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, factor in reversed(list(enumerate(levels))):
            for _ in range(blocks + 1):
                self.up.append(
                    nn.ModuleList([block(width + kept.pop(), base * factor), mixing(level, base * factor)])
                )
                width = base * factor
            if level:
                self.grow.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.leave = nn.GroupNorm(groups, width), nn.Conv2d(width, channels, 3, padding=1)
        self.blocks, self.label_widths = blocks, tuple(widths)
        for module in self.modules():  # as residual networks begin: near the identity
            if isinstance(module, _Block):
                nn.init.zeros_(module.refine.weight)
            elif isinstance(module, _Attention):
                nn.init.zeros_(module.out.weight)

    @property
    def label_width(self) -> int:
        """Values of one class."""
        return sum(self.label_widths)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.embed_again(self.activation(self.embed(sinusoids(timestep, self.sinusoids))))
        labels = iter(encoder_hidden_states[:, 0].split(self.label_widths, 1))
        x = self.enter(sample)
        kept, shrinks = [x], iter(self.shrink)
        pair: Any
        for i, pair in enumerate(self.down):
            block, mixing = pair
            x = mixing(block(x, time, next(labels)))
            kept.append(x)
            if (i + 1) % self.blocks == 0 and i + 1 < len(self.down):
                x = next(shrinks)(x)
                kept.append(x)
        first, mixing, second = self.middle
        x = second(mixing(first(x, time, next(labels))), time, next(labels))
        grows = iter(self.grow)
        for i, pair in enumerate(self.up):
            block, mixing = pair
            x = mixing(block(torch.cat([x, kept.pop()], 1), time, next(labels)))
            if (i + 1) % (self.blocks + 1) == 0 and i + 1 < len(self.up):
                x = next(grows)(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        found: Tensor = self.leave(self.activation(self.norm(x)))
        return found
