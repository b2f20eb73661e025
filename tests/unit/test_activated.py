"""Linear layers that are joined with their activation, and scores that are opened without being closed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import RangeError, TypeMismatch
from sfumato.graph import planning
from sfumato.graph.certificate import Samples
from sfumato.graph.handlers.smooth import ACTIVATED
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.ops.activation import SmoothPlan
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3_evaluate import check_domain
from sfumato.types import Z64, Secret, Shared

WIDTH, ROWS = 48, 12


class Mlp(nn.Module):
    def __init__(self, activation: nn.Module, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(WIDTH, 64), activation, nn.Linear(64, WIDTH)
        self.twice = twice
        with torch.no_grad():
            self.up.weight.mul_(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = self.down(self.act(h))
        return y + self.down(h) if self.twice else y


class Attention(nn.Module):
    def __init__(self, causal: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.causal = causal
        self.register_buffer(
            "bias", torch.linspace(-1.0, 1.0, ROWS * ROWS).view(ROWS, ROWS) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(ROWS, 3, -1).transpose(0, 1)[None] for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, is_causal=self.causal)


def sample(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def planned(module: nn.Module, **options: object) -> Plan:
    runs = [((sample(i),), {}) for i in range(1, 7)]
    return make_plan(sf.capture(module.eval(), (sample(0),)), calibration=runs, **options)  # type: ignore[arg-type]


def targets(plan: Plan) -> list[str]:
    return [node.target for node in plan.secret_nodes]


def error(module: nn.Module, plan: Plan, backend: str) -> float:
    with torch.no_grad():
        wanted = module(sample(9))
    return float((sf.run(plan, (sample(9),), backend=backend).outputs - wanted).norm() / wanted.norm())


def without_joining(monkeypatch: pytest.MonkeyPatch, module: nn.Module, **options: object) -> Plan:
    monkeypatch.setattr(planning, "join_activations", lambda placed, *rest: placed)
    found = planned(module, **options)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
@pytest.mark.parametrize(
    ("profile", "ring", "bound"), [("precise", "Z64", 3e-4), ("fast", "Z64", 3e-3), ("fast", "mixed", 8e-3)]
)
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.GELU(approximate="tanh")])
def test_a_layer_and_its_activation_are_one_call(
    monkeypatch: pytest.MonkeyPatch, activation: nn.Module, profile: str, ring: str, bound: float, secret: str
) -> None:
    module = Mlp(activation)
    plan = planned(module, profile=profile, ring=ring, secret=secret)
    assert targets(plan).count(ACTIVATED) == 1
    for backend in ("plain", "simulate"):
        assert error(module, plan, backend) < bound
    apart = without_joining(monkeypatch, module, profile=profile, ring=ring, secret=secret)
    assert ACTIVATED not in targets(apart)
    joined, two = sf.estimate(plan), sf.estimate(apart)
    assert sum(joined.bytes_sent) < sum(two.bytes_sent)
    assert joined.rounds < two.rounds


def test_a_value_that_others_read_stays_a_call_of_its_own() -> None:
    assert ACTIVATED not in targets(planned(Mlp(nn.GELU(), twice=True)))


def test_a_published_activation_stays_a_call_of_its_own() -> None:
    assert ACTIVATED not in targets(planned(Mlp(nn.GELU()), methods={"gelu": "puma.gelu"}))


def test_layers_of_gpt_are_joined_too() -> None:
    class Turned(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.addmm(self.up.bias, x, self.up.weight.t().contiguous())
            return self.down(self.act(h.view(3, -1, 64))).view(ROWS, WIDTH)

    module = Turned(nn.GELU(approximate="tanh"))
    for ring, bound in (("Z64", 3e-3), ("mixed", 8e-3)):
        plan = planned(module, profile="fast", secret="inputs+weights", ring=ring)
        assert targets(plan).count(ACTIVATED) == 1
        assert error(module, plan, "simulate") < bound


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
@pytest.mark.parametrize("ring", ["Z64", "mixed"])
def test_the_argument_is_watched(ring: str, secret: str) -> None:
    """What the certificate sees is the argument itself: inputs four times as large leave its range."""
    module = Mlp(nn.GELU())
    plan = planned(module, profile="fast", ring=ring, secret=secret)
    (name,) = (node.name for node in plan.secret_nodes if node.target == ACTIVATED)
    assert plan.watches[f"{name}.argument"].ranged
    sf.run(plan, (sample(9),), backend="simulate")
    with pytest.raises(RangeError, match=name):
        sf.run(plan, (6 * sample(9),), backend="simulate")


@pytest.mark.parametrize(("causal", "bias"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("profile", "ring", "bound"), [("precise", "Z64", 5e-4), ("fast", "Z64", 4e-3), ("fast", "mixed", 1e-2)]
)
def test_scores_are_opened_without_being_closed(
    monkeypatch: pytest.MonkeyPatch, profile: str, ring: str, bound: float, causal: bool, bias: bool
) -> None:
    module = Attention(causal, bias)
    secret = "inputs" if bias else "inputs+weights"  # a bias that is secret makes attention call by call
    plan = planned(module, profile=profile, ring=ring, secret=secret)
    (attention,) = (node.name for node in plan.secret_nodes if "attention" in node.target)
    assert plan.choices[attention]["plan"]["known"] > 0
    for backend in ("plain", "simulate"):
        assert error(module, plan, backend) < bound
    monkeypatch.setattr("sfumato.ops.attention.known_scores", lambda *args, **options: 0)
    closed = planned(module, profile=profile, ring=ring, secret=secret)
    assert closed.choices[attention]["plan"]["known"] == 0
    ours, theirs = sf.estimate(plan), sf.estimate(closed)
    assert sum(ours.bytes_sent) < sum(theirs.bytes_sent)
    assert ours.rounds == theirs.rounds - 2


def test_scores_that_leave_their_range_are_seen() -> None:
    module = Attention()
    plan = planned(module, profile="fast", secret="inputs+weights")
    with pytest.raises(RangeError, match="scores"):
        sf.run(plan, (6 * sample(9),), backend="simulate")


def test_samples_of_pieces_do_not_depend_on_their_order() -> None:
    """Whichever piece of a value comes first, the same elements are kept."""
    plan = planned(Mlp(nn.GELU()), profile="fast")
    (node,) = (node for node in plan.secret_nodes if node.target == ACTIVATED)
    pieces = {f"piece{i}": torch.arange(100) + 1000 * i for i in range(3)}
    found = []
    for order in (["piece0", "piece1", "piece2"], ["piece2", "piece0", "piece1"]):
        samples = Samples(Plain(), plan, "run")
        for path in order:
            sampler = samples.sampler(node, "argument", path, 100)
            assert sampler is not None
            picked = sampler[0](pieces[path])
            sampler[1](Shared(Secret(Z64, 18, tuple(picked.shape)), (picked,)))
        found.append(samples._of_pieces(f"{node.name}.argument").parts[0])
    assert torch.equal(*found)
    assert len({int(word) // 1000 for word in found[0]}) > 1  # from more than one piece


def test_an_argument_of_which_too_little_is_known_is_refused() -> None:
    plan = planned(Mlp(nn.GELU()), profile="fast")
    (choice,) = (plan.choices[n.name] for n in plan.secret_nodes if n.target == ACTIVATED)
    series, type = SmoothPlan.from_dict(choice["plan"]).series, Secret(Z64, 18, (1,))
    check_domain((series,), type, Z64, 18, 46)
    with pytest.raises(TypeMismatch, match="can open"):
        check_domain((series,), type, Z64, 18, series.period_log2 + 17)
    assert series.linear
    least = series.word - series.scale + 18 + series.linear_frac
    check_domain((series,), type, Z64, 18, least)
    with pytest.raises(TypeMismatch, match="linear part"):
        check_domain((series,), type, Z64, 18, least - 1)


def test_a_short_product_is_watched_in_its_own_ring() -> None:
    """In Z64, a large product of secrets is made in 32-bit words, and so are its samples."""
    torch.manual_seed(2)
    module = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8)).eval()
    runs = [((torch.randn(256, 256),), {}) for _ in range(2)]
    plan = make_plan(
        sf.capture(module, runs[0][0]), calibration=runs, profile="fast", secret="inputs+weights"
    )
    (name,) = (node.name for node in plan.secret_nodes if node.target == ACTIVATED)
    assert "words" in plan.choices[name]
    sf.run(plan, runs[0][0], backend="simulate")


@pytest.mark.parametrize("addend", [(ROWS, 64), (1,), (ROWS, 1)])
def test_an_addend_that_is_no_bias_keeps_the_layer_apart(addend: tuple[int, ...]) -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.weight, self.addend = (
                nn.Parameter(torch.randn(WIDTH, 64) / 7),
                nn.Parameter(torch.randn(addend)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(torch.addmm(self.addend, x, self.weight))

    module = Added()
    plan = planned(module, profile="fast", secret="inputs+weights")
    assert ACTIVATED not in targets(plan)
    assert error(module, plan, "simulate") < 3e-3


def test_scores_with_more_bits_than_attention_keeps_are_closed_first() -> None:
    module = Attention()
    plan = planned(module, profile="fast", secret="inputs", frac=22)
    assert error(module, plan, "simulate") < 4e-3


def test_a_layer_of_whole_numbers_is_joined() -> None:
    class Chosen(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.up((x > 0.0).to(torch.float32)))

    module = Chosen(nn.GELU())
    plan = planned(module, profile="fast", secret="inputs+weights")
    assert error(module, plan, "simulate") < 3e-3
