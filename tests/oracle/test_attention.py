"""Softmax and attention against float64: row lengths, methods, masks, grouped heads, public operands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops import attention as attention_module
from sfumato.ops.attention import attention
from sfumato.ops.masks import split_mask
from sfumato.ops.softmax import SoftmaxPlan, plan_softmax, softmax
from sfumato.ops.tiles import DEFAULT_TILES
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3


def planned(scores: torch.Tensor, *, reach: float = 1.0, method: str | None = None) -> SoftmaxPlan:
    rows = scores.amax(-1)
    lo, hi = float(scores.min()) - 1, float(scores.max()) + 1
    plan = plan_softmax(
        scores.shape[-1], lo, hi, float(rows.min()) - 0.5, float(rows.max()) + 0.5, reach=reach, method=method
    )
    return SoftmaxPlan.from_dict(json.loads(json.dumps(plan.to_dict())))


def variation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().sum(-1).max()) / 2


@pytest.mark.parametrize("method", ["offset", "max"])
@pytest.mark.parametrize("keys", [1, 7, 77, 1024])
def test_softmax_rows(run, normal, keys: int, method: str) -> None:
    x = normal(6, keys) * 3
    plan = planned(x, method=method)
    for p in (Rep3(), Plain()):
        found = run(p, lambda q, s, v: softmax(q, s, v, -1, plan), x).value
        assert variation(found, x.softmax(-1)) <= 2e-3
        assert float((found.sum(-1) - 1).abs().max()) <= 1e-3 + keys * 2.0**-18


def test_rows_that_differ_by_more_than_an_offset_allows_take_the_tournament(protocol, run, normal) -> None:
    x = normal(4, 33) + torch.tensor([[-15.0], [-3.0], [0.0], [12.0]], dtype=torch.float64)
    plan = planned(x)
    assert plan.method == "max"
    found = run(protocol, lambda p, s, v: softmax(p, s, v, -1, plan), x).value
    assert variation(found, x.softmax(-1)) <= 2e-3


def test_softmax_over_an_inner_axis_with_a_mask(protocol, run, normal) -> None:
    x = normal(3, 9, 5)
    allowed = torch.rand(9, 1, generator=torch.Generator().manual_seed(2)) > 0.4
    plan = planned(x.movedim(1, -1))
    found = run(protocol, lambda p, s, v: softmax(p, s, v, 1, plan, allowed=allowed), x).value
    expected = x.masked_fill(~allowed, -torch.inf).softmax(1)
    assert float((found - expected).abs().max()) <= 1e-3


def masks(kind: str) -> dict:
    generator = torch.Generator().manual_seed(5)
    keep = (torch.rand(9, 9, generator=generator) > 0.4) | torch.eye(9, dtype=torch.bool)
    if kind == "bool":
        return {"mask": keep}
    bias = torch.randn(2, 1, 9, 9, generator=generator, dtype=torch.float64)
    if kind == "bias":
        return {"mask": bias}
    return {"mask": torch.where(keep, bias, -torch.inf if kind == "infinite" else -1e4)}


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bias", "infinite", "large"])
def test_attention_with_masks(protocol, run, normal, kind: str) -> None:
    q, k, v = normal(2, 3, 9, 16) * 1.5, normal(2, 3, 9, 16), normal(2, 3, 9, 5) * 2
    ours = {"none": {}, "causal": {"causal": True}}.get(kind) if kind in ("none", "causal") else masks(kind)
    mask = ours.get("mask")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
    plan = planned(q @ k.transpose(-1, -2) / 4, reach=float(v.abs().max()) * 1.2)
    wide = plan_softmax(9, plan.lo - 4, plan.hi + 4, plan.lo, plan.hi + 4, reach=plan.reach)
    found = run(protocol, lambda p, s, a, b, c: attention(p, s, a, b, c, wide, **ours), q, k, v).value
    assert float((found - expected).abs().max()) <= 1e-3 * float(v.abs().max())


def test_cross_attention_with_a_scale_and_public_keys(protocol, run, normal) -> None:
    q, k, v = normal(1, 2, 10, 8) * 2, normal(1, 2, 77, 8), normal(1, 2, 77, 8)
    plan = planned(q @ k.transpose(-1, -2) * 0.5, reach=6.0)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    found = run(protocol, lambda p, s, a, b, c: attention(p, s, a, b, c, plan, scale=0.5), q, k, v).value
    public = run(protocol, lambda p, s, a: attention(p, s, a, k, v, plan, scale=0.5), q).value
    assert float((found - expected).abs().max()) <= 3e-3
    assert float((public - expected).abs().max()) <= 3e-3


def test_grouped_queries(protocol, run, normal) -> None:
    q, k, v = normal(2, 6, 5, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8)
    plan = planned(q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 8**0.5, reach=6.0)
    found = run(protocol, lambda p, s, a, b, c: attention(p, s, a, b, c, plan, grouped=True), q, k, v).value
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert float((found - expected).abs().max()) <= 3e-3


def test_softmax_costs_its_products(run, normal) -> None:
    x = normal(32, 128) * 0.5
    plan = planned(x)
    assert plan.method == "offset"
    found = run(Rep3(), lambda p, s, v: softmax(p, s, v, -1, plan), x)
    assert (plan.exp.clip, plan.exp.squarings) == (False, 0)
    # One exponential and one product per score; a row's reciprocal, buckets and all, is 3,000 bits at most.
    assert found.bits / x.numel() <= plan.exp.bits + 3 * 64 + plan.exp.frac + plan.inverse.frac + 3000 / 128
    assert found.rounds <= 3 + 9 + 3 + 1


def test_masks_split_into_what_is_allowed_and_what_is_added() -> None:
    assert split_mask(torch.ones(3, 3, dtype=torch.bool)) == (None, None)
    allowed, bias = split_mask(torch.tensor([[0.0, -1e4], [0.5, -torch.inf]]))
    assert allowed is not None
    assert allowed.tolist() == [[True, False], [True, False]]
    assert bias is not None
    assert bias.tolist() == [[0.0, 0.0], [0.5, 0.0]]


def test_refusals(run, normal) -> None:
    with pytest.raises(RangeError, match="calibrate"):
        plan_softmax(4, 1.0, 0.0, 0.0, 0.0)
    with pytest.raises(RangeError, match="methods"):
        plan_softmax(4, -1.0, 1.0, 0.0, 1.0, method="magic")
    x = normal(2, 5)
    plan = planned(x)
    with pytest.raises(TypeMismatch, match="rows of 5"):
        run(Rep3(), lambda p, s, v: softmax(p, s, v, -1, plan), normal(2, 6))
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(RangeError, match="masked entirely"):
        run(Rep3(), lambda p, s, v: softmax(p, s, v, -1, plan, allowed=nothing), x)


@pytest.mark.parametrize("causal", [False, True])
def test_long_sequences_go_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, run, causal: bool) -> None:
    """Blocks bound what is in memory at a time; the result is the same function of the same rows."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 24, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = q @ k.mT / 8**0.5
    low, high = float(scores.min()) - 0.5, float(scores.max()) + 0.5
    plan = plan_softmax(24, low, high, -2.0, high, reach=8.0)
    seen: list[tuple[int, ...]] = []
    whole = attention_module._attend

    async def counted(p, s, part, *rest):
        seen.append(tuple(part.shape))
        return await whole(p, s, part, *rest)

    monkeypatch.setattr(attention_module, "_attend", counted)
    monkeypatch.setattr(attention_module, "DEFAULT_TILES", replace(DEFAULT_TILES, scores=2 * 24 * 5))
    found = run(Plain(), lambda p, s, *x: attention(p, s, *x, plan, causal=causal), q, k, v).value
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert {shape[1] for shape in seen} <= {4, 5}
    assert len(seen) == 5
    assert float((found - exact).abs().max()) < 2e-3
