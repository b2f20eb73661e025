"""The memory estimate: monotone in sizes, and what a lean plan holds is little beside a process."""

from __future__ import annotations

import torch
from torch import nn

import sfumato as sf
from sfumato.graph.memory import BASE, peak_memory
from sfumato.ops.tiles import DEFAULT_TILES


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def planned(module: nn.Module, *shape: int) -> int:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return peak_memory(sf.make_plan(sf.capture(module.eval(), (x,)), calibration=[((x,), {})])) - BASE


def test_memory_grows_with_the_values_alive_and_with_dealt_tables() -> None:
    linear, smooth = planned(nn.Linear(8, 8), 4096, 8), planned(nn.SiLU(), 4096, 8)
    assert 4096 * 8 * 16 * 2 < linear < smooth < 4096 * 8 * 16 * 40
    assert planned(nn.SiLU(), 8192, 8) > 1.9 * smooth


def test_long_attention_stops_at_its_block() -> None:
    short, long = planned(Attention(), 1, 2, 1500, 4), planned(Attention(), 1, 2, 3000, 4)
    scores = DEFAULT_TILES.scores
    assert scores < 2 * 1500**2
    assert long < short + 3000 * 8 * 200
