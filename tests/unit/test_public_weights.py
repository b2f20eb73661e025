"""Weights that are public although others are secret: a frozen prefix at the client, low-rank changes kept apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import JobError
from sfumato.graph.places import Place
from sfumato.graph.planning import make_plan

WIDTH = 16


class Tower(nn.Module):
    """Token ids through an embedding and three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class LowRank(nn.Module):
    """x W + (x A) B, the change of a public W kept unmerged."""

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + self.up(self.down(x))
        return y


def test_a_public_prefix_runs_at_the_client() -> None:
    torch.manual_seed(0)
    model, ids = Tower().eval(), torch.arange(6)[None]
    program = sf.capture(model, (ids,))
    whole = make_plan(program, secret="inputs+weights")
    frozen = make_plan(program, secret="inputs+weights", public_weights=("table.*", "layers.[01].*"))
    assert [n.target for n in frozen.secret_nodes if "linear" in n.target] == ["sfumato.activated_linear"]
    assert all(frozen.places[n] is not Place.OWNER for n in frozen.places if "layers_0" in n or "table" in n)
    assert len(frozen.secret_weights) == 2, "the last layer's weight and bias"
    costs = [sf.estimate(plan) for plan in (whole, frozen)]
    assert sum(costs[1].bytes_sent) < 0.4 * sum(costs[0].bytes_sent)
    assert costs[1].setup_bytes < costs[0].setup_bytes
    found = sf.run(frozen, (ids,), backend="simulate").outputs
    torch.testing.assert_close(found, model(ids), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("profile", "ring"), [("precise", "Z64"), ("fast", "mixed")])
def test_low_rank_changes_of_a_public_layer(profile: str, ring: str) -> None:
    torch.manual_seed(0)
    model, x = LowRank().eval(), torch.randn(4, WIDTH)
    plan = make_plan(
        sf.capture(model, (x,)), secret="inputs+weights", public_weights=("base.*",), profile=profile, ring=ring,
        calibration=[((torch.randn(4, WIDTH),), {}) for _ in range(3)],
    )  # fmt: skip
    assert len(plan.secret_weights) == 2
    found = sf.run(plan, (x,), backend="simulate").outputs
    torch.testing.assert_close(found, model(x), atol=3e-2 if ring == "mixed" else 1e-3, rtol=1e-2)


def test_patterns_have_to_fit() -> None:
    program = sf.capture(Tower().eval(), (torch.arange(6)[None],))
    with pytest.raises(JobError, match=r"'layer\.0\.\*' fits no weight of Tower, such as table\.weight"):
        make_plan(program, secret="inputs+weights", public_weights="layer.0.*")
