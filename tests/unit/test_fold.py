"""Norms whose gain and shift went into the layers that read them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.graph import planning
from sfumato.graph.handlers.linear import LINEAR_PLUS
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan

WIDTH, ROWS = 48, 12


def _drawn(module: nn.Module) -> nn.Module:
    """Gains and shifts that are not ones and zeros."""
    torch.manual_seed(3)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.LayerNorm | nn.RMSNorm):
                part.weight.uniform_(0.5, 2.0)
            if isinstance(part, nn.LayerNorm):
                part.bias.uniform_(-0.5, 0.5)
    return module.eval()


class Before(nn.Module):
    """As in GPT-2 and LLaMA: norms before their layers."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.a, self.b = norm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.a(y) + self.b(y)


class After(nn.Module):
    """As in BERT: a residual reads the norm's result, too."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.last(self.down(nn.functional.gelu(self.up(y))) + y)


class Turned(Before):
    """GPT-2's layers: addmm of a reshape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.norm(x).view(-1, WIDTH)
        return torch.addmm(self.a.bias, rows, self.a.weight.t().contiguous()).view(3, -1, 32)


def sample(seed: int) -> torch.Tensor:
    return 2.0 * torch.randn(3, ROWS // 3, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.3


def planned(module: nn.Module, **options: object) -> Plan:
    options = {"profile": "fast", "ring": "mixed", "secret": "inputs+weights"} | options
    runs = [((sample(i),), {}) for i in range(1, 7)]
    calibration = options.pop("calibration", runs)
    return make_plan(sf.capture(module, (sample(0),)), calibration=calibration, **options)  # type: ignore[arg-type]


def unfolded(monkeypatch: pytest.MonkeyPatch, module: nn.Module, **options: object) -> Plan:
    monkeypatch.setattr(planning, "fold_norms", lambda placed, measured: placed)
    found = planned(module, **options)
    monkeypatch.undo()
    return found


def gains(plan: Plan) -> list[bool]:
    """Of the norms under the protocol, whether they have a gain of their own."""
    return [node.args[2] is not None for node in plan.secret_nodes if "norm" in node.target]


def error(module: nn.Module, plan: Plan, backend: str) -> float:
    with torch.no_grad():
        wanted = module(sample(9))
    return float((sf.run(plan, (sample(9),), backend=backend).outputs - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (Before(), [False]), (Before(nn.RMSNorm), [False]), (Turned(), [False]),
        (After(), [False, True]), (After(bias=False), [False, True]),
    ],
)  # fmt: skip
def test_a_folded_model_is_the_same_and_lighter(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, kept: list[bool]
) -> None:
    plan = planned(_drawn(module))
    assert gains(plan) == kept
    for backend in ("plain", "simulate"):
        assert error(module, plan, backend) < 1e-2
    apart = unfolded(monkeypatch, module)
    assert all(gains(apart))
    assert sum(sf.estimate(plan).bytes_sent) < sum(sf.estimate(apart).bytes_sent)
    assert sf.estimate(plan).setup_bytes <= sf.estimate(apart).setup_bytes


def test_a_residual_takes_the_gain_into_its_product() -> None:
    plan = planned(_drawn(After()))
    assert [node.target for node in plan.secret_nodes].count(LINEAR_PLUS) == 1
    public = planned(_drawn(After()), secret="inputs")
    assert LINEAR_PLUS not in [node.target for node in public.secret_nodes]
    assert all(gains(public)), "a residual with a public gain is left alone"


def test_a_public_gain_is_folded_where_layers_alone_read_it() -> None:
    module = _drawn(Before())
    plan = planned(module, secret="inputs")
    assert gains(plan) == [False]
    assert error(module, plan, "simulate") < 1e-2


class Tied(Before):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.b(x)


class Leaves(Before):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.norm(x)


@pytest.mark.parametrize("module", [Tied(), Leaves()])
def test_a_norm_with_other_readers_keeps_its_gain(module: nn.Module) -> None:
    assert gains(planned(_drawn(module))) == [True]


def test_papers_and_plans_in_one_ring_keep_their_norms() -> None:
    module = _drawn(Before())
    assert gains(planned(module, ring="Z64")) == [True]
    assert gains(planned(module, profile="puma", ring="Z64")) == [True]


def test_ranges_that_were_measured_without_folding_serve_without_it() -> None:
    module = _drawn(Before())
    measured = planned(module, ring="Z64").calibration
    plan = planned(module, calibration=measured)
    assert gains(plan) == [True]
    assert error(module, plan, "plain") < 1e-2
    again = planned(module, calibration=planned(module).calibration)
    assert gains(again) == [False]


def test_both_products_share_one_scale_in_z64() -> None:
    """Where the call has no room in Z32, it is done in Z64."""
    module = _drawn(After())
    with torch.no_grad():
        module.down.weight.mul_(3000.0)
    plan = planned(module)
    assert error(module, plan, "simulate") < 1e-2


class Same(After):
    """The layer beside the residual reads the norm, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.last(nn.functional.linear(y, self.square, self.shift) + y)

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH) / 7)
        self.shift = nn.Parameter(torch.randn(WIDTH))


class Two(Same):
    """Each of two norms is read by one side of a sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(x), self.square, self.shift) + self.last(0.5 * x + 1.0)


class Spread(Same):
    """The layer's result is broadcast in the sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + nn.functional.linear(x.mean(1, keepdim=True), self.square, self.shift)


class Twice(Turned):
    """One norm, read twice by layers of GPT-2's kind, the second one first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.norm(x), self.norm(0.5 * x)
        b = torch.addmm(self.a.bias, second.view(-1, WIDTH), self.b.weight.t().contiguous())
        return torch.addmm(self.a.bias, first.view(-1, WIDTH), self.a.weight.t().contiguous()) + b


class Row(Before):
    """The last row of the norm alone goes on, as before a language model's head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.norm(x)[:, -1, :])


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
@pytest.mark.parametrize("module", [Same(), Two(), Spread(), Twice(), Row()])
def test_whatever_reads_a_norm_computes_the_same(module: nn.Module, secret: str) -> None:
    plan = planned(_drawn(module), secret=secret)
    assert error(module, plan, "simulate") < 1e-2
    assert gains(planned(_drawn(Row()))) == [False]


@pytest.mark.parametrize("public", ["*.bias", "*norm*", "up.*", "down.weight"])
def test_parts_of_the_weights_may_be_public(public: str) -> None:
    module = _drawn(After())
    assert error(module, planned(module, public_weights=(public,)), "simulate") < 1e-2


def test_ranges_of_a_folded_plan_serve_without_folding() -> None:
    module = _drawn(After())
    measured = planned(module).calibration
    for options in ({"ring": "Z64"}, {"secret": "inputs"}, {"ring": "Z64", "secret": "inputs"}):
        plan = planned(module, calibration=measured, **options)
        assert error(module, plan, "plain") < 1e-2
