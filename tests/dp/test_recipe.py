"""Settings of a fine-tuning: what they imply, what is refused, and how a ledger keeps them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from sfumato.dp.accountant import spent
from sfumato.dp.recipe import Recipe
from sfumato.errors import JobError

RECIPE = Recipe(epsilon=10.0, batch=500, epochs=10.0)


def test_steps_and_rate() -> None:
    assert RECIPE.sample_rate(2000) == 0.25
    assert RECIPE.steps(2000) == 40
    assert replace(RECIPE, epochs=0.01).steps(2000) == 1
    assert replace(RECIPE, batch=2000).sample_rate(2000) == 1.0
    with pytest.raises(JobError, match="batch is 500, but there are 499 records; take about 8"):
        RECIPE.event(499)


def test_the_noise_of_a_budget() -> None:
    recipe = replace(RECIPE, epochs=1.0, delta=1e-3)
    event = recipe.event(1000)
    assert (event.sample_rate, event.steps) == (0.5, 2)
    assert spent([event], recipe.delta).epsilon <= 10.0
    assert replace(recipe, epsilon=math.inf).event(1000).noise_multiplier == 0.0
    assert not replace(recipe, epsilon=math.inf).private
    with pytest.raises(JobError, match="at most 100, not 101"):
        replace(recipe, epsilon=101.0).event(1000)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be more than 0"),
        ({"epsilon": -1.0}, "epsilon is -1"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"delta": 0.0}, "delta is 0.0"),
        ({"delta": 0.5}, "delta is 0.5; it must be more than 0 and at most 0.1"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"batch": 0}, "batch is 0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"clip": math.inf}, "clip is inf"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"draws": 0}, "draws is 0"),
        ({"physical": 0}, "physical is 0"),
        ({"interval": 0}, "interval is 0"),
        ({"average": 1.0}, "are shares from 0 to below 1"),
        ({"drop": -0.1}, "are shares from 0 to below 1"),
        ({"decay": "linear"}, "decay is 'cosine' or 'constant'"),
        ({"precision": "float16"}, "precision 'float32' or 'bfloat16'"),
    ],
)
def test_impossible_settings(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        replace(RECIPE, **change)


def test_as_a_ledger_keeps_it() -> None:
    for recipe in (RECIPE, replace(RECIPE, epsilon=math.inf, what="lora", rank=4)):
        held = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
        assert Recipe.from_json(held) == recipe
    with pytest.raises(JobError, match="not settings of a recipe: captions, speed"):
        Recipe.from_json({**RECIPE.to_json(), "speed": 3, "captions": []})
