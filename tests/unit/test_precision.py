"""The study of precision: single layers in Z64, the search under a budget, and fake quantization against the engine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import sfumato as sf
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.study.precision import Sensitivity, Subject, layers_of, narrow, search, sensitivity
from sfumato.study.scales import (
    Imitation,
    Weights,
    channel_tops,
    dropped,
    finest_unit,
    tensor_steps,
    weight_steps,
)

VOCABULARY, TOKENS, ROWS = 40, 6, 4
ENGINE = Weights("as the engine")
LOOKED_AT = ("word_embeddings", "attention.self", "intermediate.dense", "output.LayerNorm", "classifier")


class Classifier(nn.Module):
    """A tiny BERT's logits; weights are large enough for its layers to matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=TOKENS,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config).eval().requires_grad_(False)
        for weight in self.model.parameters():
            weight.mul_(8.0 if weight.dim() == 2 else 1.0)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids).logits
        return logits


def ids(seed: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(
            0, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed)
        )
    }


RANGES = [ids(seed) for seed in range(10, 16)]


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, calls = Classifier().eval(), [ids(1), ids(2)]
    program = sf.capture(model, (), calls[0])
    plan = sf.make_plan(
        program, secret="inputs+weights", profile="fast", calibration=[((), call) for call in RANGES]
    )
    return Subject.of(model, program, plan.calibration, calls)


@pytest.fixture(scope="module")
def rows(subject: Subject) -> list[Sensitivity]:
    """Of the layers around attention, and of two more."""
    base = narrow("fast")
    every = layers_of(subject.plan(base), base)
    return sensitivity(subject, layers=[name for name in every if name.endswith(LOOKED_AT)])


def test_a_layer_is_kept_in_z64_between_the_narrow_and_the_wide_plan(subject: Subject) -> None:
    base = narrow("fast")
    layers = layers_of(subject.plan(base), base)
    layer = next(name for name in layers if name.endswith("intermediate.dense"))
    kept = replace(base, wide=frozenset({layer}))
    wide = replace(base, wide=frozenset(layers))
    assert set(layers) - set(layers_of(subject.plan(kept), kept)) == {layer}
    assert layers_of(subject.plan(wide), wide) == []
    assert subject.megabytes(base) < subject.megabytes(kept) < subject.megabytes(wide)
    assert subject.error(wide) < subject.error(kept)


def test_sensitivity_names_every_layer_once_by_error_per_byte(
    subject: Subject, rows: list[Sensitivity]
) -> None:
    assert len({row.layer for row in rows}) == len(rows) >= len(LOOKED_AT) - 1
    assert all(row.layer.endswith(LOOKED_AT) for row in rows)
    assert [row.price for row in rows] == sorted((row.price for row in rows), reverse=True)
    narrow_plan = narrow("fast")
    kept = replace(narrow_plan, wide=frozenset(row.layer for row in rows))
    assert 0.0 < max(row.own for row in rows) < 3.0 * subject.error(narrow_plan)
    assert subject.error(kept) < subject.error(narrow_plan)
    assert all(row.added != 0.0 and row.saved != 0.0 for row in rows)


@pytest.mark.parametrize(("part", "fracs"), [(0.1, (None,)), (0.6, (None, 11))])
def test_a_search_stays_within_its_budget(
    subject: Subject, rows: list[Sensitivity], part: float, fracs: tuple[int | None, ...]
) -> None:
    base = narrow("fast")
    widest = replace(base, wide=frozenset(row.layer for row in rows))
    least, most = subject.error(widest), subject.error(base)
    budget = least + part * (most - least)
    found = search(subject, rows, budget, fracs=fracs)
    assert subject.distance(subject.logits(found.plan)) == found.point.error <= budget
    assert found.point.megabytes == subject.megabytes(found.scheme) <= subject.megabytes(widest)
    again = Plan.from_json(json.loads(json.dumps(found.plan.to_json())), found.plan.program.weights)
    assert again.formats == found.plan.formats


def test_a_budget_below_z64_is_refused(subject: Subject, rows: list[Sensitivity]) -> None:
    with pytest.raises(JobError, match="layers in Z64 the logits err by"):
        search(subject, rows, 1e-9)


def test_a_scheme_needs_mixed_rings(subject: Subject) -> None:
    with pytest.raises(JobError, match="give ring='mixed' with it, not 'Z64'"):
        subject.plan(narrow("fast"), ring="Z64")


# ---- scales ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One linear layer with columns of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense = nn.Linear(24, 10)
        self.dense.weight.data *= 2.0 ** torch.linspace(-4, 3, 10)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.dense(x)
        return found


def layer() -> tuple[Layer, Plan, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = Layer().eval().requires_grad_(False)
    calls = [
        {"x": 3.0 * torch.randn(8, 24, generator=torch.Generator().manual_seed(seed))} for seed in range(5)
    ]
    plan = sf.make_plan(
        sf.capture(model, (), calls[0]), secret="inputs+weights", profile="fast", ring="mixed",
        calibration=[((), call) for call in calls[1:]], scheme=narrow("fast", 12),
    )  # fmt: skip
    return model, plan, channel_tops(plan, calls[1:]), calls[1]


def test_fake_quantization_is_the_engine_on_a_linear_layer() -> None:
    _, plan, tops, call = layer()
    imitation = Imitation(plan)
    steps = weight_steps(plan, tops, ENGINE, imitation.steps)
    (name,) = steps
    node = next(n for n in plan.secret_nodes if n.name == name)
    assert float(steps[name]) == 2.0 ** -plan.format_of(node.args[1].name).frac
    unit = 2.0 ** -plan.format_of(name).frac
    run = sf.run(plan, (), call, backend="plain").outputs.to(torch.float64)
    fake = imitation(call, steps)
    # The same words before the truncation: each of the two is floor or ceiling of the same number.
    assert float((run - fake).abs().max()) <= unit
    assert torch.equal((fake / unit).round(), fake / unit)


def test_finer_grids_lose_less_and_cost_what_they_drop() -> None:
    model, plan, tops, call = layer()
    imitation, wanted = Imitation(plan), model(**call).to(torch.float64)

    def error(how: Weights) -> float:
        return float((imitation(call, weight_steps(plan, tops, how, imitation.steps)) - wanted).norm())

    coarse = Weights("8 bits", bits=8)
    by_row = Weights("8 bits a row", bits=8, rows=True)
    assert error(by_row) < error(coarse) / 1.5
    assert error(ENGINE) < error(coarse) / 1.5
    eight = weight_steps(plan, tops, Weights("2^-8", frac=8), imitation.steps)
    nine = weight_steps(plan, tops, Weights("2^-9", frac=9), imitation.steps)
    assert dropped(plan, nine) - dropped(plan, eight) == 8 * 10 / 8  # a bit for each result
    ((name, _),) = eight.items()
    x = imitation.steps[next(n for n in plan.secret_nodes if n.name == name).args[0].name]
    own = weight_steps(plan, tops, ENGINE, imitation.steps)[name]
    for free, rows in ((True, False), (False, True), (True, True)):
        how = replace(ENGINE, free=free, rows=rows)
        step = weight_steps(plan, tops, how, imitation.steps)[name]
        assert bool((step <= own).all())
        # ... and sums still fit, with the plan's slack.
        assert bool((2.0 * tops["dense.weight"][:, None] / (step * x) <= 2.0**30 * 1.001).all())


def test_activations_by_tensor_are_finer_than_the_common_scale(subject: Subject) -> None:
    base = narrow("fast", 8)
    plan = subject.plan(base)
    steps, _ = tensor_steps(plan)
    assert min(steps.values()) < 2.0**-8
    tops = channel_tops(plan, RANGES)
    sizes = [s["hi_deviation"] for s in plan.calibration.stats.values() if "hi_deviation" in s]
    largest = max(sizes) * plan.options.margin / (finest_unit(plan) * 2.0**-8)
    assert largest**2 == pytest.approx(2.0**28)  # as fine as the squares of a norm leave

    def error(imitation: Imitation) -> float:
        weights = weight_steps(plan, tops, ENGINE, imitation.steps)
        return subject.distance(torch.stack([imitation(call, weights) for call in subject.calls]))

    assert error(Imitation(plan, own=steps)) < error(Imitation(plan))
    engine = subject.distance(subject.logits(plan))
    assert engine / 3 < error(Imitation(plan)) < 3 * engine
