"""The range certificate names the layer that left its calibrated range, and stays silent otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import JobError
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
    assert watched(plan) == ["silu.argument", "linear_1"]
    with pytest.raises(
        sf.RangeError, match=r"left the range that Sequential was calibrated for, silu.argument at 1"
    ):
        sf.run(plan, (inputs(6.0),), backend="simulate")


def test_a_linear_result_may_pass_what_calibration_saw() -> None:
    module = nn.Linear(8, 4).eval()
    plan = sf.make_plan(sf.capture(module, (inputs(1.0),)))
    sf.run(plan, (inputs(3.0),), backend="simulate")
    with pytest.raises(sf.RangeError, match="linear at the root"):
        sf.run(plan, (inputs(400.0),), backend="simulate")


def test_it_can_be_switched_off_and_then_costs_nothing() -> None:
    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)))
    on, off = sf.estimate(plan), sf.estimate(plan, certificate=False)
    assert off.total_bytes < on.total_bytes
    result = sf.run(plan, (inputs(1.0),), backend="simulate", certificate=False)
    assert off.same_cost(result.cost)
    assert not any("certificate" in path for path in result.cost.by_path)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores come in blocks of rows, a row's sum and the maximum inside."""
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("module", "named"), [(nn.SiLU(), r"silu at the root \(1 elements\)"), (Attention(), "scores")]
)
def test_every_element_can_be_looked_at(module: nn.Module, named: str) -> None:
    plan = sf.make_plan(sf.capture(module, (inputs(1.0),)), calibration=[((inputs(1.0),), {})])
    one_outlier = inputs(1.0)
    one_outlier[17, 3] = 60.0
    result = sf.run(plan, (inputs(1.0),), backend="simulate", certificate="all")
    assert torch.allclose(result.outputs, module(inputs(1.0)), atol=1e-3)
    with pytest.raises(sf.RangeError, match=named):
        sf.run(plan, (one_outlier,), backend="simulate", certificate="all")
    if isinstance(module, nn.SiLU):
        sf.run(plan, (one_outlier,), backend="simulate")  # eight samples of 512 elements miss it


def test_looking_at_every_element_costs_what_the_estimate_says() -> None:
    plan = sf.make_plan(sf.capture(model(), (inputs(1.0),)))
    result = sf.run(plan, (inputs(1.0),), backend="simulate", certificate="all")
    assert sf.estimate(plan, certificate="all").same_cost(result.cost)
    assert result.cost.total_bytes > sf.estimate(plan).total_bytes
    with pytest.raises(JobError, match="certificate must be"):
        sf.estimate(plan, certificate="most")  # type: ignore[arg-type]


def chain() -> sf.Plan:
    """A plan whose outputs fit its inputs, so that calls can follow each other."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()
    return sf.make_plan(sf.capture(module, (inputs(1.0),)))


def test_a_chain_of_calls_pays_one_certificate_when_it_is_revealed() -> None:
    with sf.deploy(chain(), backend="simulate") as deployment:
        handle = deployment(inputs(1.0), reveal=False)
        for _ in range(3):
            following = deployment(handle, reveal=False)
            deployment.drop(handle)
            handle = following
        assert not any("certificate" in path for path in deployment.cost.by_path)
        before = deployment.cost
        deployment(handle)
        after = deployment.cost
        paths = {path for path in after.by_path if "certificate" in path}
        assert paths == {"/ranges0/certificate"}
        one = sf.estimate(chain())  # one call and its certificate
        assert after.rounds - before.rounds <= one.rounds  # calls may overlap by a round
        deployment(deployment(inputs(1.0), reveal=False))
        assert sum("certificate" in path for path in deployment.cost.by_path) == 2


def test_a_violation_early_in_a_chain_is_named_at_the_end() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.Tanh()).eval()
    plan = sf.make_plan(sf.capture(module, (inputs(1.0),)))
    with sf.deploy(plan, backend="simulate") as deployment:
        wrong = deployment(inputs(9.0), reveal=False)
        right = deployment(inputs(1.0), reveal=False)
        after = deployment(wrong, reveal=False)
        deployment.drop(wrong)
        with pytest.raises(sf.RangeError, match=r"silu at 0 \(\d+ of 24 samples\)"):
            deployment(after)
        with pytest.raises(sf.RangeError, match="silu at 0"):  # it is remembered, and nobody computes on
            deployment(after, reveal=False)
        assert deployment(right).shape == (64, 8)  # another lineage


def test_samples_of_values_that_nobody_can_reveal_are_forgotten() -> None:
    from sfumato.runtime.lockstep import Lockstep

    with sf.deploy(chain(), backend="simulate") as deployment:
        backend = deployment._backend
        assert isinstance(backend, Lockstep)

        def waiting() -> list[str]:
            return list(backend._machines[0]._samples)

        first = deployment(inputs(1.0), reveal=False)
        second = deployment(first, reveal=False)
        deployment.drop(first)
        assert len(waiting()) == 2  # the second call descends from both
        deployment.drop(second)
        assert waiting() == []
        deployment(inputs(1.0))
        assert waiting() == []


def test_samples_are_no_handles_and_each_plan_judges_its_own() -> None:
    """No command opens or repeats what waits for a certificate, and a plan of the same name comes after it."""
    from sfumato.runtime.commands import Certify
    from sfumato.runtime.lockstep import Lockstep

    with sf.deploy(chain(), backend="simulate") as deployment:
        backend = deployment._backend
        assert isinstance(backend, Lockstep)
        name = next(iter(backend._plans))
        first = deployment(inputs(1.0), reveal=False)
        (samples,) = backend._machines[0]._samples
        for machine in backend._machines:
            assert samples not in machine._handles
        with pytest.raises(JobError, match=samples):
            backend.reveal(samples)
        for runs in (((name, (samples, samples)),), ((name, ("nothing",)),), ()):
            with pytest.raises(JobError, match="certificate needs samples"):
                backend._command(Certify(f"odd{len(str(runs))}", runs))
        backend.load(name, chain())
        assert not backend._machines[0]._samples  # judged by the plan that they were taken under
        deployment(first)


def test_many_calls_are_judged_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory: the certificate comes before the reveal when samples pile up, and the estimate knows it."""
    monkeypatch.setattr("sfumato.runtime.backend._MOST_SAMPLES", 2 * 8 * len(watched(chain())))

    def calls(backend: str) -> sf.CostReport:
        with sf.deploy(chain(), backend=backend) as deployment:
            handle = deployment(inputs(1.0), reveal=False)
            for _ in range(4):
                following = deployment(handle, reveal=False)
                deployment.drop(handle)
                handle = following
            deployment(handle)
            return deployment.cost

    real = calls("simulate")
    assert sum("certificate" in path for path in real.by_path) == 2
    assert calls("meta").same_cost(real)


def test_results_do_not_depend_on_thread_count() -> None:
    from sfumato.runtime.lockstep import Lockstep

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
