"""Papers as profiles, and single published methods, inside plans of ordinary modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.graph.published import PAPERS


class Block(nn.Module):
    """A norm, attention with a causal mask, an activation: what papers replace."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(self.activation(mixed))


def block(activation: nn.Module | None = None) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Block(activation or nn.GELU()).eval().requires_grad_(False), torch.randn(1, 8, 16)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


# Largest relative error of the block: what the papers' methods reach on ordinary inputs.
@pytest.mark.parametrize(
    ("profile", "largest"),
    [("crypten", 0.05), ("spu", 0.01), ("puma", 0.02), ("cipherdm", 0.05), ("bumblebee", 0.02), ("sdu", 0.05),
     ("shaft", 0.05), ("usg-precise", 0.02), ("usg-loose", 0.05)],
)  # fmt: skip
def test_a_papers_profile_runs_its_own_methods(profile: str, largest: float) -> None:
    module, x = block(nn.SiLU())
    plan = sf.make_plan(sf.capture(module, (x,)), profile=profile, calibration=[((x,), {})])
    entries = {str(c["entry"]) for c in plan.choices.values() if "entry" in c}
    assert len(entries) == 3
    assert any(entry in note for note in plan.notes for entry in entries)
    exact = module(x)
    found = sf.run(plan, (x,), backend="simulate", certificate=False).outputs
    ours = sf.make_plan(sf.capture(module, (x,)), calibration=[((x,), {})])
    own = sf.run(ours, (x,), backend="simulate").outputs
    assert relative(own, exact) < relative(found, exact) < largest


def test_the_cost_of_a_paper_is_estimated_to_the_byte() -> None:
    module, x = block()
    plan = sf.make_plan(sf.capture(module, (x,)), profile="puma", calibration=[((x,), {})])
    run = sf.run(plan, (x,), backend="simulate", certificate=False)
    estimate = sf.estimate(plan, certificate=False)
    assert (estimate.rounds, estimate.bytes_sent) == (run.cost.rounds, run.cost.bytes_sent)
    ours = sf.estimate(sf.make_plan(sf.capture(module, (x,)), calibration=[((x,), {})]), certificate=False)
    assert sum(ours.bytes_sent) < sum(estimate.bytes_sent) / 2


def test_one_method_may_be_chosen_by_name() -> None:
    module, x = block()
    plan = sf.make_plan(
        sf.capture(module, (x,)), methods={"gelu": "mpcformer.gelu"}, calibration=[((x,), {})]
    )
    assert [n.target for n in plan.secret_nodes if "quad" in n.target] == ["sfumato.quad"], (
        "as a student has it"
    )
    assert Plan.from_json(plan.to_json(), plan.program.weights).digest() == plan.digest()
    found = sf.run(plan, (x,), backend="simulate", certificate=False).outputs
    quad = Block(_Quad())
    quad.load_state_dict(module.state_dict(), strict=False)
    assert relative(found, quad.eval().requires_grad_(False)(x)) < 1e-3


class _Quad(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.125 * x * x + 0.25 * x + 0.5


@pytest.mark.parametrize(
    ("methods", "word"),
    [({"gelu": "puma.silu"}, "approximates silu"), ({"curve": "puma.gelu"}, "no function"),
     ({"gelu": "puma.glue"}, "no entry"), ({"exp": "sigma.exp"}, "look-ups")],
)  # fmt: skip
def test_a_wrong_method_gets_one_sentence(methods: dict[str, str], word: str) -> None:
    module, x = block()
    with pytest.raises(JobError, match=word):
        sf.make_plan(sf.capture(module, (x,)), methods=methods, calibration=[((x,), {})])


def test_a_paper_whose_methods_are_tables_says_what_stands_in() -> None:
    module, x = block()
    plan = sf.make_plan(sf.capture(module, (x,)), profile="iron", calibration=[((x,), {})])
    assert any("iron.gelu" in note and "stand in" in note for note in plan.notes)
    assert "puma" in PAPERS
