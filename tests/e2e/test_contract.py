"""What a user and an operator may rely on at the edges: whole numbers, other rings, recovery, and what a plan tells."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.graph.plan import Plan


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Picks(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x.argmax(-1), torch.maximum(x, y), x > y


def test_whole_numbers_and_comparisons_far_from_zero() -> None:
    x, y = 100 + normal(4, 5), 100 + normal(4, 5, seed=1)
    plan = sf.make_plan(sf.capture(Picks(), (x, y)))
    index, larger, above = sf.run(plan, (x, y), backend="simulate").outputs
    assert torch.equal(index, x.argmax(-1))
    assert float((larger - torch.maximum(x, y)).abs().max()) < 1e-2
    assert torch.equal(above.bool(), x > y)


def test_a_plan_in_the_small_ring_runs_with_its_certificate() -> None:
    module = nn.Linear(6, 4).eval()
    x = normal(3, 6)
    plan = sf.make_plan(sf.capture(module, (x,)), ring="Z32", frac=10)
    result = sf.run(plan, (x,), backend="simulate")
    assert float((result.outputs - module(x).detach()).abs().max()) < 0.05
    assert sf.estimate(plan).same_cost(result.cost)


def test_a_deployment_goes_on_after_a_range_error_and_estimates_repeat() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.SiLU()).eval()
    x = normal(16, 8)
    plan = sf.make_plan(sf.capture(module, (x,)))
    with sf.deploy(plan, backend="simulate") as deployment:
        with pytest.raises(sf.RangeError):
            deployment(30 * x)
        assert float((deployment(x) - module(x).detach()).abs().max()) < 1e-3
        cost = deployment.cost
    with sf.deploy(plan, backend="meta") as shapes:
        shapes.call_on_shapes()
        shapes.call_on_shapes()
        opened = 3 * 16 * 8 * 8  # bytes of one result; the refused one was not opened
        assert shapes.cost.same_cost(replace(cost, client_bytes=cost.client_bytes + opened))


def test_parties_get_no_measured_number() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()).eval()
    with torch.no_grad():
        module[1].weight.uniform_(0.3, 1.7)
    x = normal(1, 2, 8, 8)
    plan = sf.make_plan(sf.capture(module, (x,)), secret="inputs+weights")
    sent = json.dumps(plan.for_parties())
    measured = {v for stats in plan.calibration.stats.values() for k, v in stats.items() if k != "hi_count"}
    assert measured
    assert [v for v in measured if repr(v) in sent and v != round(v, 2)] == []
    assert Plan.from_json(json.loads(sent)).digest() == plan.digest()
