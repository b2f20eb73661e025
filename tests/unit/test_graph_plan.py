"""Where values live, what is rewritten for it, what is refused, and that plans travel as JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import CaptureError, JobError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.capture import capture
from sfumato.graph.evaluate import evaluate, resolve
from sfumato.graph.fuse import fuse
from sfumato.graph.handlers import HANDLERS
from sfumato.graph.order import waves
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan, client_side, load_side
from sfumato.graph.planning import make_plan


class Tiny(nn.Module):
    """A table, a linear layer, a public time, a secret image."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 4)
        self.time = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        emb = self.inner(self.table(ids))
        return self.inner(x) + torch.sin(self.time(t.reshape(1, 1))) + emb * 2.0


def tiny_plan(**options: Any) -> Plan:
    torch.manual_seed(0)
    module = Tiny()
    return make_plan(
        capture(module, (torch.randn(3, 4), torch.tensor(0.5), torch.tensor([1, 4, 2]))), **options
    )


def secret_targets(plan: Plan) -> Counter[str]:
    return Counter(node.target.split(".")[1] for node in plan.secret_nodes)


def test_public_weights_move_the_prompt_to_the_client() -> None:
    plan = tiny_plan()
    assert secret_targets(plan) == {"linear": 1, "add": 2}
    assert plan.places["sin"] is Place.PUBLIC
    assert plan.places["embedding"] is Place.CLIENT
    assert [plan.places[n] for n in plan.client_inputs] == [Place.SECRET, Place.CLIENT]
    assert plan.public_inputs == ("sin",)
    assert set(plan.constants) == {"inner.weight", "inner.bias"}
    assert plan.secret_weights == ()
    assert "it knows all their inputs" in str(plan)


def test_without_relocation_only_the_look_up_is_the_clients() -> None:
    plan = tiny_plan(relocate=False)
    assert secret_targets(plan) == {"linear": 2, "mul": 1, "add": 2}
    assert "embedding" in plan.client_inputs


def test_secret_weights_turn_the_look_up_into_a_product() -> None:
    plan = make_plan(
        capture(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), (torch.tensor([[1, 4, 2]]),)),
        secret="inputs+weights",
    )
    assert secret_targets(plan) == {"matmul": 1, "linear": 1}
    (rows,) = plan.client_inputs
    assert plan.secret_type(rows).frac == 0
    assert plan.secret_type(rows).shape == (1, 3, 5)
    assert set(plan.secret_weights) == {"0.weight", "1.weight", "1.bias"}
    values = client_side(plan, (torch.tensor([[0, 3, 3]]),))
    assert values.secrets[rows][0].argmax(-1).tolist() == [0, 3, 3]
    assert set(load_side(plan).secrets) == set(plan.secret_weights)


def test_public_and_client_known_change_places() -> None:
    everything = tiny_plan(public=("x", "ids"))
    assert not everything.secret_nodes
    assert any("nothing is left" in note for note in everything.notes)
    known = tiny_plan(client_known=("x",))
    assert not known.secret_nodes
    values = client_side(known, (torch.ones(3, 4), torch.tensor(0.1), torch.tensor([0, 0, 0])))
    assert values.outputs[known.program.output_names[0]].shape == (3, 4)


def test_the_pooled_token_is_picked_by_a_product() -> None:
    class Pool(nn.Module):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return x[torch.arange(2), ids.argmax(-1)]

    plan = make_plan(capture(Pool(), (torch.randn(2, 3, 4), torch.tensor([[1, 9, 2], [9, 1, 2]]))))
    assert secret_targets(plan) == {"reshape": 2, "matmul": 1}
    rows = next(n for n in plan.client_inputs if n.endswith("_rows"))
    values = client_side(plan, (torch.zeros(2, 3, 4), torch.tensor([[1, 9, 2], [9, 1, 2]])))
    assert values.secrets[rows].argmax(-1).tolist() == [1, 3]


def test_batch_norm_is_folded_into_the_convolution() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    module[1].running_mean.copy_(torch.tensor([1.0, 2.0]))
    plan = make_plan(capture(module, (torch.randn(1, 1, 5, 5),)))
    assert secret_targets(plan) == {"conv2d": 1}
    constants = load_side(plan).publics
    x = torch.randn(1, 1, 5, 5)
    node = plan.secret_nodes[0]
    kernel, bias = (constants[a.name] for a in node.args[1:3])
    torch.testing.assert_close(F.conv2d(x, kernel, bias), module(x), atol=1e-5, rtol=1e-5)


class Hostile(nn.Module):
    """Three calls that no protocol here runs on secrets, and public ones of the same kind."""

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        fine = torch.fft.rfft(torch.arange(4.0)).real.sum() + torch.remainder(torch.arange(4.0), 3.0).sum()
        a = torch.fft.rfft(x).real
        b = torch.remainder(x, 3.0)
        c = torch.special.bessel_j0(x) / 2.0
        return a.sum() + b.sum() + c.sum() + fine


def test_every_unsupported_call_is_listed_with_its_path() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Hostile()

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            return self.block(x, ids)

    program = capture(Outer(), (torch.rand(4), torch.zeros(2)))
    with pytest.raises(CaptureError, match="not supported") as caught:
        make_plan(program)
    text = "\n".join(caught.value.problems)
    assert "at block" in text
    for name in ("remainder", "bessel", "fft"):
        assert name in text
    assert make_plan(program, public=("x", "ids")).secret_nodes == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "quick"}, "no profile 'quick'"),
        ({"secret": "weights"}, "secret must be"),
        ({"public": ("y",)}, "no captured argument 'y'"),
        ({"client_known": "z"}, "no captured argument 'z'"),
        ({"public": "x", "client_known": "x"}, "cannot be public and"),
        ({"ring": "Z128"}, "no ring"),
        ({"frac": 40}, "frac must lie"),
        ({"calibration": []}, "no samples"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        tiny_plan(**options)
    assert "\n" not in str(caught.value)


def test_plans_travel_as_json() -> None:
    plan = tiny_plan(relocate=False)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.program.weights)
    assert again == plan
    assert again.digest() == plan.digest()
    assert again.digest() != tiny_plan().digest()
    assert again.order == plan.order


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=0),
        lambda d: d["places"].popitem(),
        lambda d: d.pop("options"),
        lambda d: d["options"].update(extra=1),
        lambda d: d["places"].update(x="elsewhere"),
        lambda d: d["watches"].update({"nobody.scores": ["", 0.0, 1.0, 18]}),
    ],
)
def test_broken_plans_are_refused(change: Any) -> None:
    data = json.loads(json.dumps(tiny_plan().to_json()))
    change(data)
    with pytest.raises(CaptureError):
        Plan.from_json(data)


def test_calibrations_merge_by_key() -> None:
    a = Calibration({"n": {"lo_x": -1.0, "hi_x": 2.0}}, 1)
    b = Calibration({"n": {"lo_x": -3.0, "hi_x": 1.0, "hi_y": 4.0}, "m": {"hi_out": 1.0}}, 2)
    merged = Calibration.from_json(json.loads(json.dumps(a.merge(b).to_json())))
    assert merged.samples == 3
    assert merged.stats == {"n": {"lo_x": -3.0, "hi_x": 2.0, "hi_y": 4.0}, "m": {"hi_out": 1.0}}
    with pytest.raises(CaptureError, match="not the JSON of a calibration"):
        Calibration.from_json({"stats": 3})


def test_margins_differ_with_real_calibration() -> None:
    args = (torch.randn(3, 4), torch.tensor(0.5), torch.tensor([1, 4, 2]))
    guessed, measured = tiny_plan(), tiny_plan(calibration=[(args, {}), (args, None)])
    assert guessed.options.margin > measured.options.margin > 1
    assert "example arguments" in str(guessed)
    assert "example arguments" not in str(measured)


def test_calls_of_one_run_are_one_sample_in_a_list() -> None:
    def args(seed: int) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(seed)
        return torch.randn(3, 4, generator=source), torch.tensor(0.5), torch.tensor([1, 4, 2])

    def plan(calibration: list[Any]) -> Plan:
        module = nn.Sequential(nn.Linear(4, 4), nn.SiLU()).eval()
        with torch.no_grad():
            module[0].weight.copy_(torch.arange(16.0).reshape(4, 4) / 8)
            module[0].bias.zero_()
        return make_plan(capture(module, (args(0)[0],)), calibration=calibration)

    calls = [((args(seed)[0],), {}) for seed in range(6)]
    apart, together = plan(calls), plan([calls[:3], calls[3:]])
    assert (apart.calibration.samples, together.calibration.samples) == (6, 2)
    assert apart.calibration.stats == together.calibration.stats
    assert "2 runs; so few show nothing" in str(together)
    # Any order of runs gives the same plan, and so does the calibration's JSON.
    assert plan(calls[::-1]).digest() == apart.digest()
    stored = json.loads(json.dumps(apart.calibration.to_json()))
    assert plan(stored).digest() == apart.digest()


def test_the_table_says_method_error_headroom_and_cost() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU(), nn.Softmax(-1)).eval()
    runs = [((torch.randn(64, 4),), {}) for _ in range(10)]
    text = make_plan(capture(module, runs[0][0]), calibration=runs).table()
    assert "by the tail model" in text
    row = next(line for line in text.splitlines() if " linear, silu " in line)
    assert row.split()[0] == "2"
    assert "series" in row
    assert "bits" in row
    assert "sines" in row
    assert " softmax " in text


def test_the_budget_follows_the_results_scale() -> None:
    """The same function and range; results a tenth of the size get a tenth of the absolute error."""
    errors = []
    for scale in (4.0, 0.4):
        runs = [((scale * torch.rand(64, 8) + scale,), {}) for _ in range(10)]
        plan = make_plan(capture(nn.Tanh().eval(), runs[0][0]), calibration=runs)
        (choice,) = plan.choices.values()
        errors.append(choice["error"])
    assert errors[1] < errors[0] < 2.5e-4


def test_too_large_values_are_refused_before_any_share() -> None:
    class Large(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e9

    with pytest.raises(JobError, match="use a smaller frac"):
        make_plan(capture(Large(), (torch.ones(2),)))


def test_parallel_branches_share_a_wave() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).view(2, 2, 2) for f in (self.q, self.k, self.v))
            return self.o((q + k + v).reshape(2, 4))

    plan = make_plan(capture(Heads(), (torch.randn(2, 4),)))
    groups = waves(plan.secret_nodes, plan.frontier)
    assert sorted(i for group in groups for i in group) == list(range(len(plan.secret_nodes)))
    together = [{plan.secret_nodes[i].target for i in group} for group in groups if len(group) > 1]
    assert together[0] == {"aten.linear.default"}
    assert len(next(group for group in groups if len(group) > 1)) == 3


def test_targets_of_the_table_exist() -> None:
    for target in HANDLERS:
        resolve(target)


class Eager(nn.Module):
    """Attention, RMS norm and activations as older models spell them."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))
        self.bias = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ x.transpose(-1, -2) / 2.0 + self.bias, dim=-1)
        y = weights @ x
        y = self.gain * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))
        y = 0.5 * y * (1.0 + torch.tanh(0.7978845608 * (y + 0.044715 * torch.pow(y, 3.0))))
        y = y * torch.sigmoid(1.702 * y)
        return y * 0.5 * (1.0 + torch.erf(y / 2.0**0.5))


def test_what_models_spell_out_becomes_single_calls() -> None:
    program = capture(Eager(), (torch.randn(2, 3, 4),))
    fused = fuse(program)
    assert [node.target.split(".")[1] for node in fused.nodes] == [
        "scaled_dot_product_attention", "rms_norm", "gelu", "quick_gelu", "gelu",
    ]  # fmt: skip
    values = {**program.weights, "x": torch.randn(2, 3, 4)}
    (name,) = program.output_names
    got, want = (evaluate(p.nodes, values, [name])[name] for p in (fused, program))
    torch.testing.assert_close(got, want)


def test_a_secret_position_bias_keeps_its_softmax() -> None:
    plan = make_plan(capture(Eager(), (torch.randn(2, 3, 4),)), secret="inputs+weights")
    assert secret_targets(plan)["softmax"] == 1
    assert secret_targets(plan)["matmul"] == 2
