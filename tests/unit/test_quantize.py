"""Mixed plans: one ring a call, casts merged, ranges without room refused or left in Z64, and the certificate."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import CaptureError, JobError, RangeError
from sfumato.graph.edges import NO_EDGES, Edges, argument_type, check_handed, result_type
from sfumato.graph.formats import Format
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan

WIDTH, TOKENS = 32, 12


class Block(nn.Module):
    """A transformer block with a classifier: every kind of call that a mixed plan decides on."""

    def __init__(self, quad: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.quad = quad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.up(self.second(x))
        h = 0.125 * h * h + 0.25 * h + 0.5 if self.quad else nn.functional.gelu(h)
        return x + self.down(h)


def sample(seed: int) -> torch.Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def model(quad: bool = False, seed: int = 0) -> Block:
    torch.manual_seed(seed)
    block = Block(quad).eval()
    for weight in block.parameters():
        weight.requires_grad_(False)
        if weight.dim() == 2:
            weight.mul_(1.5)
    return block


def planned(block: Block, **options: object) -> Plan:
    calibration = [((sample(i),), {}) for i in range(1, 5)]
    return make_plan(sf.capture(block, (sample(0),)), calibration=calibration, **options)  # type: ignore[arg-type]


def error(block: Block, plan: Plan, backend: str) -> float:
    x = sample(9)
    wanted = block(x)
    return float((sf.run(plan, (x,), backend=backend).outputs - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
@pytest.mark.parametrize(("profile", "bound", "share"), [("fast", 5e-3, 0.8), ("precise", 1e-3, 0.98)])
def test_mixed_plans_are_lighter_and_close_to_float(
    secret: str, profile: str, bound: float, share: float
) -> None:
    block = model()
    mixed = planned(block, secret=secret, profile=profile, ring="mixed")
    assert error(block, mixed, "plain") < bound
    assert error(block, mixed, "simulate") < bound
    cost, uniform = sf.estimate(mixed), sf.estimate(planned(block, secret=secret, profile=profile))
    assert sum(cost.bytes_sent) < share * sum(uniform.bytes_sent)
    assert cost.setup_bytes <= uniform.setup_bytes


@pytest.mark.parametrize("profile", ["fast", "ditto"])
def test_every_call_reads_one_ring(profile: str) -> None:
    plan = planned(model(quad=True), secret="inputs+weights", profile=profile, ring="mixed")
    for node in plan.secret_nodes:
        rings = {plan.format_of(name).ring for name in node.refs() if plan.places[name] is not Place.PUBLIC}
        assert len(rings) == 1, node
    rings = {plan.format_of(n.name).ring for n in plan.secret_nodes}
    assert rings == ({"Z32"} if profile == "fast" else {"Z32", "Z64"})


def test_ditto_follows_its_map_and_costs_what_it_says() -> None:
    block = model(quad=True)
    plan = planned(block, secret="inputs+weights", profile="ditto")
    by_target = {n.target: plan.format_of(n.name) for n in plan.secret_nodes}
    for target in ("aten.linear.default", "aten.matmul.default", "sfumato.quad", "aten.add.Tensor"):
        assert by_target[target] == Format("Z32", 8), target
    assert by_target["aten.layer_norm.default"] == Format("Z64", 18)
    assert by_target["aten.softmax.int"] == Format("Z32", 8), "the maximum is in Z32, the rest is cast inside"
    assert "aten.scaled_dot_product_attention.default" not in by_target
    run = sf.run(plan, (sample(9),), backend="simulate").cost
    assert (run.bytes_sent, run.rounds) == (sf.estimate(plan).bytes_sent, sf.estimate(plan).rounds)
    assert error(block, plan, "simulate") < 0.3


def test_a_value_that_several_calls_read_is_cast_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y = x @ w
            return torch.exp(y) + torch.sqrt(y * y + 1.0) + y

    args = (sample(0) / 8, torch.eye(WIDTH)[:, :4])
    plan = make_plan(sf.capture(Twice(), args), calibration=[(args, {})], ring="mixed", profile="fast")
    casts = [n for n in plan.secret_nodes if n.target in ("sfumato.widen", "sfumato.shorten")]
    seen = [(n.args[0].name, plan.format_of(n.name)) for n in casts]
    assert seen
    assert len(seen) == len(set(seen))
    found = sf.run(plan, args, backend="simulate").outputs
    torch.testing.assert_close(found, Twice()(*args), atol=2e-2, rtol=2e-2)


def test_a_range_without_room_is_refused_by_name_or_left_in_z64() -> None:
    block = model(quad=True)
    with torch.no_grad():
        block.down.weight.mul_(1e6)
    with pytest.raises(JobError, match=r"down.*beyond|linear_\d \(down\)"):
        planned(block, secret="inputs+weights", profile="ditto")
    plan = planned(block, secret="inputs+weights", profile="fast", ring="mixed")
    wide = [n for n in plan.secret_nodes if n.target == "aten.linear.default" and n.module_path == "down"]
    assert [plan.format_of(n.name).ring for n in wide] == ["Z64"]
    assert error(block, plan, "simulate") < 5e-3


def test_small_values_are_not_rounded_away() -> None:
    block = model()
    x = sample(9) * 1e-3
    calibration = [((sample(i) * 1e-3,), {}) for i in range(4)]
    plan = make_plan(sf.capture(block, (x,)), calibration=calibration, ring="mixed", profile="fast")
    wanted = block(x) - block(x * 0)
    zero = sf.run(plan, (x * 0,), backend="plain", certificate=False).outputs
    found = sf.run(plan, (x,), backend="plain").outputs - zero
    assert float((found - wanted).norm() / wanted.norm()) < 0.5
    norms = [plan.format_of(n.name).ring for n in plan.secret_nodes if "layer_norm" in n.target]
    assert norms[0] == "Z64", "deviations of a thousandth have no digits left in Z32"


def test_what_leaves_its_range_in_z32_is_certified() -> None:
    block = model()
    plan = planned(block, secret="inputs+weights", profile="fast", ring="mixed")
    assert {plan.format_of(w.name).ring for w in plan.watches.values() if w.name} >= {"Z32"}
    with pytest.raises(RangeError, match="layer_norm"):
        sf.run(plan, (sample(9) * 6,), backend="simulate")


def test_formats_are_part_of_a_plan_and_of_its_digest() -> None:
    block = model()
    plans = [planned(block, profile="fast", ring=ring) for ring in ("Z64", "mixed")]
    assert plans[0].digest() != plans[1].digest()
    back = Plan.from_json(json.loads(json.dumps(plans[1].for_parties())))
    assert back.formats == plans[1].formats
    assert back.digest() == plans[1].digest()
    data = plans[1].for_parties()
    name = next(iter(data["formats"]))
    for wrong in (["Z16", 8], ["Z32", 31], ["Z32", "8"], ["B8", 0]):
        with pytest.raises(CaptureError):
            Plan.from_json({**data, "formats": {**data["formats"], name: wrong}})


class First(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.block(x)
        return torch.exp(y / 8), y


class Second(First):
    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return self.block(x + kept), x


class Large(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x + 13.0)


def edged(module: nn.Module, edges: Edges, ring: str = "mixed") -> Plan:
    count = 2 if isinstance(module, Second) else 1
    calibration = [(tuple(sample(i + k) for k in range(count)), {}) for i in range(2, 5)]
    program = sf.capture(module.eval(), calibration[0][0])
    return make_plan(
        program, secret="inputs+weights", profile="fast", ring=ring, calibration=calibration, edges=edges
    )


def test_edges_are_as_they_were_asked_for_and_cost_a_cast() -> None:
    block = model()
    free = edged(First(block), NO_EDGES)
    assert [str(result_type(free, i).ring) for i in range(2)] == ["Z64", "Z32"]
    wide, short = Format("Z64", 18), Format("Z32", free.format_of("add_1").frac)
    asked = edged(First(block), Edges(results={0: short, 1: wide}))
    assert [str(result_type(asked, i).ring) for i in range(2)] == ["Z32", "Z64"]
    assert sum(sf.estimate(asked).bytes_sent) > sum(sf.estimate(free).bytes_sent)
    x = sample(9)
    for found, wanted in zip(sf.run(asked, (x,), backend="simulate").outputs, First(block)(x), strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 5e-3
    taken = edged(Second(block), Edges(arguments={"kept": wide}))
    assert argument_type(taken, "kept").ring.bits == 64
    check_handed(asked, 1, taken, "kept")
    with pytest.raises(
        JobError, match=r"the result 1 of First is Z32.*takes Z64f18.* as kept; ask both plans"
    ):
        check_handed(free, 1, taken, "kept")


def test_a_weight_serves_the_call_with_the_least_room() -> None:
    block = model()
    free = edged(First(block), NO_EDGES)
    # The one with most fraction bits: a bit less is within the budget.
    weight = max(free.secret_weights, key=lambda n: (free.format_of(n).ring == "Z32", free.format_of(n).frac))
    fewer = free.format_of(weight)._replace(frac=free.format_of(weight).frac - 1)
    assert edged(First(block), Edges(weights={weight: fewer})).format_of(weight) == fewer
    wide = edged(First(block), Edges(weights={weight: Format("Z64", 18)}))
    assert wide.format_of(weight) == Format("Z64", 18)
    rings = {wide.format_of(n.name).ring for n in wide.secret_nodes if n.target == "aten.linear.default"}
    assert rings == {"Z32"}, "shortened where it is read"


def test_edges_that_cannot_be_had_are_refused() -> None:
    block, short = model(), Format("Z32", 8)
    for module, edges, words in (
        (First(block), Edges(arguments={"kept": short}), "no argument 'kept' that is one tensor; it has x"),
        (First(block), Edges(results={2: short}), "no result 2 that is a tensor; it has 2 results"),
        (
            Second(block),
            Edges(arguments={"kept": Format("Z32", 10)}, results={0: Format("Z32", 11)}),
            "no cast keeps",
        ),
    ):
        with pytest.raises(JobError, match=words):
            edged(module, edges)
    with pytest.raises(JobError, match="has no room in Z32f8; ask for Z64f18"):
        edged(Large(), Edges(results={0: short}))
    with pytest.raises(JobError, match="give ring='mixed'"):
        edged(First(block), Edges(results={0: short}), ring="Z64")


def test_mixing_needs_a_profile_that_says_how() -> None:
    block = model()
    for profile, ring in itertools.product(("puma", "mpcformer"), ("mixed",)):
        with pytest.raises(JobError, match="no mixture of rings"):
            planned(block, profile=profile, ring=ring)
    assert "mixed rings" in planned(block, profile="fast", ring="mixed").table()
