"""The range certificate names the layer that left its calibrated range, and stays silent otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.graph.certificate import watched


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4)).eval()


def inputs(scale: float) -> torch.Tensor:
    return scale * torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
def test_inside_the_range_nothing_is_said(secret: str) -> None:
    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)), secret=secret)
    result = sf.run(plan, (inputs(1.0),), backend="simulate")
    assert float((result.outputs - model()(inputs(1.0)).detach()).abs().max()) < 1e-3
    assert any("certificate" in path for path in result.cost.by_path)


def test_outside_the_range_names_the_layer() -> None:
    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)))
    assert len(watched(plan)) == 3
    with pytest.raises(sf.RangeError, match=r"left the range that Sequential was calibrated for, silu at 1"):
        sf.run(plan, (inputs(6.0),), backend="simulate")


def test_a_linear_result_may_pass_what_calibration_saw() -> None:
    module = nn.Linear(8, 4).eval()
    plan = sf.make_plan(sf.capture(module, (inputs(1.0),)))
    sf.run(plan, (inputs(3.0),), backend="simulate")
    with pytest.raises(sf.RangeError, match="linear at the root"):
        sf.run(plan, (inputs(40.0),), backend="simulate")


def test_it_can_be_switched_off_and_then_costs_nothing() -> None:
    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)))
    on, off = sf.estimate(plan), sf.estimate(plan, certificate=False)
    assert off.total_bytes < on.total_bytes
    result = sf.run(plan, (inputs(1.0),), backend="simulate", certificate=False)
    assert off.same_cost(result.cost)
    assert not any("certificate" in path for path in result.cost.by_path)


def test_results_do_not_depend_on_thread_count() -> None:
    from sfumato.runtime.backend import Lockstep

    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with Lockstep("plain", {}, seed=bytes(32)) as backend, sf.Deployment(plan, backend) as deployment:
                found.append(deployment(inputs(1.0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
