"""Every operation against float64 on drawn shapes, ranges and edge values: the error that its docstring states.

Rounding that a docstring counts at four deviations is asked for at six and a half. Draws repeat from run to run; for
more of them: ``SFUMATO_FUZZ=20 pytest tests/oracle/test_fuzz.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ops import basic, compare
from sfumato.ops.activation import FUNCTIONS, hardsigmoid, hardswish, plan_smooth, smooth
from sfumato.ops.attention import attention
from sfumato.ops.basic import Conv
from sfumato.ops.elementary import exp, plan_exp, plan_inverse, reciprocal, rsqrt, sqrt
from sfumato.ops.norm import group_norm, layer_norm, plan_norm, rms_norm
from sfumato.ops.softmax import plan_softmax, softmax
from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3

ULP = 2.0**-18
TIMES = int(os.environ.get("SFUMATO_FUZZ", "1"))
PROTOCOLS = (Rep3(), Plain(), Rep3(two_way=True))
protocols = st.sampled_from(PROTOCOLS)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
seeds = st.integers(0, 2**31)


def fuzz(examples: int) -> Callable:
    return settings(max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1)


def grid(x: Tensor, lo: float = -math.inf, hi: float = math.inf) -> Tensor:
    """The nearest values of 18 fraction bits inside [lo, hi]."""
    words = torch.round(x * 2**18)
    if math.isfinite(hi - lo):
        words = words.clamp(math.ceil(lo * 2**18), math.floor(hi * 2**18))
    return words / 2**18


def draw(shape: tuple[int, ...], lo: float, hi: float, seed: int) -> Tensor:
    """Values in [lo, hi], a third of them edges: both ends, one unit inside, and what lies about zero."""
    g = torch.Generator().manual_seed(seed)
    x = lo + (hi - lo) * torch.rand(shape, generator=g, dtype=torch.float64)
    edges = torch.tensor([lo, hi, lo + ULP, hi - ULP, 0.0, ULP, -ULP, 1.0, -1.0], dtype=torch.float64)
    picked = edges[torch.randint(len(edges), shape, generator=g)]
    return grid(torch.where(torch.rand(shape, generator=g) < 0.33, picked, x), lo, hi)


def within(found: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= bound).all()), float(((found - expected).abs() / bound).max())


# ---- activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@fuzz(12)
@given(
    p=protocols,
    shape=shapes,
    lo=st.sampled_from([-100.0, -30.0, -9.0, -5.5, -2.0, -0.25, 0.5]),
    length=st.sampled_from([0.5, 3.0, 7.25, 16.0, 130.0]),
    tolerance=st.sampled_from([5e-5, 5e-4, 1e-2]),
    seed=seeds,
)
def test_activation(
    run, name: str, p: Protocol, shape: tuple, lo: float, length: float, tolerance: float, seed: int
) -> None:
    lo = abs(lo) if name in ("log", "sqrt") else lo
    hi = lo + length
    try:
        plan = plan_smooth(name, lo, hi, tolerance=tolerance)
    except RangeError:
        assume(False)
    x = draw(shape, lo, hi, seed)
    found = run(p, lambda q, s, v: smooth(q, s, v, plan), x).value
    bound = plan.error + 6.5 * plan.series.noise + ULP
    if plan.method == "clamped":
        # The clip's comparisons see differences up to bound + |limit|; tails are straight to within 1e-5.
        limit = max(abs(plan.series.lo), abs(plan.series.hi))
        bound += 1e-5 + ULP + compare.band(plan.bound + limit, 18)
    within(found, FUNCTIONS[name].f(x), bound)


@fuzz(12)
@given(p=protocols, shape=shapes, bound=st.sampled_from([4.0, 20.0]), seed=seeds)
def test_hard_gates(run, p: Protocol, shape: tuple, bound: float, seed: int) -> None:
    x = draw(shape, -bound, bound, seed)
    band = compare.band(bound + 3.0, 18)
    found = run(p, lambda q, s, v: hardsigmoid(q, s, v, bound), x).value
    within(found, F.hardsigmoid(x), band / 6 + 2 * ULP + 3 * 2.0**-20)
    found = run(p, lambda q, s, v: hardswish(q, s, v, bound), x).value
    within(found, F.hardswish(x), (x.abs() + 2) * 2 * ULP + x.abs() * band / 6 + x.abs() * 3 * 2.0**-20)


# ---- exp, inverses -----------------------------------------------------------------------------------------


@fuzz(60)
@given(
    p=protocols,
    shape=shapes,
    lo=st.sampled_from([-700.0, -60.0, -33.0, -16.0, -4.0, -0.5, 1.0]),
    length=st.sampled_from([2.0**-18, 0.03, 1.0, 4.0, 11.0, 40.0]),
    tolerance=st.sampled_from([1e-5, 5e-4, 1e-2]),
    frac=st.sampled_from([None, 12, 18, 26]),
    seed=seeds,
)
def test_exp(
    run, p: Protocol, shape: tuple, lo: float, length: float, tolerance: float, frac: int | None, seed: int
) -> None:
    hi = lo + length
    try:
        plan = plan_exp(lo, hi, tolerance=tolerance)
    except RangeError:
        assume(False)
    assert plan.error <= tolerance * 1.001
    x = draw(shape, lo, hi, seed)
    found = run(p, lambda q, s, v: exp(q, s, v, plan, frac=frac), x).value
    unit = 2.0**-plan.frac + (0.0 if frac is None else 2.0**-frac)
    size = x.exp().clamp_min(math.exp(plan.floor)) if plan.clip else x.exp()
    below = (size - x.exp()) if plan.clip else 0.0
    within(found, x.exp(), 1.03 * plan.error * size + below + unit)


@fuzz(60)
@given(
    p=protocols,
    shape=shapes,
    root=st.sampled_from([1, 2]),
    lo=st.sampled_from([0.004, 0.1, 1.0, 37.0]),
    ratio=st.sampled_from([1.0, 2.5, 30.0, 1000.0, 20000.0]),
    seed=seeds,
)
def test_reciprocal_rsqrt_sqrt(
    run, p: Protocol, shape: tuple, root: int, lo: float, ratio: float, seed: int
) -> None:
    hi = lo * ratio
    plan = plan_inverse(root, lo * 0.99, hi * 1.01)
    assert plan.error <= 3e-5
    g = torch.Generator().manual_seed(seed)
    x = grid(
        torch.exp(math.log(lo) + math.log(ratio) * torch.rand(shape, generator=g, dtype=torch.float64)),
        lo,
        hi * 1.005,
    )
    op = reciprocal if root == 1 else rsqrt
    found = run(p, lambda q, s, v: op(q, s, v, plan), x).value
    within(found, x ** (-1 / root), 1.5 * plan.error * x ** (-1 / root) + 2 * ULP)
    if root == 2:
        found = run(p, lambda q, s, v: sqrt(q, s, v, plan), x).value
        within(found, x**0.5, 1.6 * plan.error * x**0.5 + 2 * ULP)


# ---- softmax and attention ---------------------------------------------------------------------------------


@fuzz(40)
@given(
    p=protocols,
    rows=st.integers(1, 4),
    keys=st.integers(1, 40),
    deviation=st.sampled_from([0.1, 1.0, 4.0, 12.0]),
    apart=st.sampled_from([0.0, 2.0, 10.0]),
    method=st.sampled_from([None, "max"]),
    masked=st.booleans(),
    seed=seeds,
)
def test_softmax(
    run,
    p: Protocol,
    rows: int,
    keys: int,
    deviation: float,
    apart: float,
    method: str | None,
    masked: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = grid(torch.randn(rows, keys, generator=g, dtype=torch.float64) * deviation)
    x = x + apart * torch.arange(rows, dtype=torch.float64)[:, None]
    allowed = torch.rand(rows, keys, generator=g) > 0.4
    allowed[:, 0] = True
    seen = x.masked_fill(~allowed, -torch.inf) if masked else x
    top = seen.amax(-1)
    plan = plan_softmax(
        keys, float(x.min()), float(x.max()), float(top.min()), float(top.max()), method=method
    )
    found = run(p, lambda q, s, v: softmax(q, s, v, -1, plan, allowed=allowed if masked else None), x).value
    expected = seen.softmax(-1)
    assert float((found - expected).abs().sum(-1).max()) / 2 <= 5e-3 + 5e-4 + keys * ULP
    within(found, expected, 2 * 5e-4 * expected + 5e-4)


@fuzz(30)
@given(
    p=protocols,
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 9), st.integers(1, 5)),
    sharp=st.sampled_from([0.3, 1.0, 3.0]),
    size=st.sampled_from([0.1, 1.0, 50.0]),
    mask=st.sampled_from(["none", "bool", "large"]),
    public=st.booleans(),
    seed=seeds,
)
def test_attention(
    run, p: Protocol, lead: tuple, sizes: tuple, sharp: float, size: float, mask: str, public: bool, seed: int
) -> None:
    length, keys, width, out = sizes
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*lead, n, width, generator=g, dtype=torch.float64) * sharp for n in (length, keys))
    v = torch.randn(*lead, keys, out, generator=g, dtype=torch.float64) * size
    q, k, v = grid(q), grid(k), grid(v)
    keep = torch.rand(length, keys, generator=g) > 0.4
    keep[:, 0] = True
    given_mask = {"none": None, "bool": keep, "large": torch.where(keep, 0.0, -1e4).double()}[mask]
    scores = q @ k.mT / width**0.5
    rows = (scores if mask == "none" else scores.masked_fill(~keep, -torch.inf)).amax(-1)
    reach = float(v.abs().max()) + ULP
    low, high = float(scores.min()) - 0.01, float(scores.max()) + 0.01
    plan = plan_softmax(keys, low, high, float(rows.min()) - 0.01, float(rows.max()) + 0.01, reach=reach)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=given_mask)
    if public:
        found = run(p, lambda r, s, a: attention(r, s, a, k, v, plan, mask=given_mask), q).value
    else:
        found = run(p, lambda r, s, a, b, c: attention(r, s, a, b, c, plan, mask=given_mask), q, k, v).value
    within(found, expected, 1e-3 * max(reach, 2.0**-6) + 2 * ULP)


# ---- norms -------------------------------------------------------------------------------------------------


@fuzz(40)
@given(
    p=protocols,
    kind=st.sampled_from(["group", "layer", "rms"]),
    rows=st.integers(1, 3),
    channels=st.integers(1, 4),
    inner=st.integers(2, 20),
    size=st.sampled_from([0.03, 1.0, 30.0]),
    offset=st.sampled_from([0.0, 1.5]),
    affine=st.sampled_from(["none", "public", "secret"]),
    plus=st.booleans(),
    seed=seeds,
)
def test_norms(
    run, p: Protocol, kind: str, rows: int, channels: int, inner: int, size: float, offset: float, affine: str,
    plus: bool, seed: int,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: grid(torch.randn(*shape, generator=g, dtype=torch.float64))  # noqa: E731
    eps = 1e-5
    if kind == "group":
        x = grid(normal(rows, 2 * channels, inner) * size + offset * size)
        square = x.reshape(rows, 2, -1).var(-1, unbiased=False)
        shape, count = (2 * channels,), channels * inner
    else:
        x = grid(normal(rows, channels, inner) * size + offset * size)
        square = x.var(-1, unbiased=False) if kind == "layer" else x.square().mean(-1)
        shape, count = (inner,), inner
    assume(float(square.min()) > 1e-4)
    gamma, beta, extra = (grid(normal(*shape) * 0.5 + 1), normal(*shape), normal(*x.shape))
    plan = plan_norm(count, float(square.min()) / 1.3, float(square.max()) * 1.3, eps)
    wide, narrow = (gamma, beta) if affine != "none" else (None, None)
    secrets = ([gamma, beta] if affine == "secret" else []) + ([extra] if plus else [])

    async def op(q, s, v, *rest):
        a, b = (rest[0], rest[1]) if affine == "secret" else (wide, narrow)
        more = rest[-1] if plus else None
        if kind == "group":
            return await group_norm(q, s, v, 2, a, b, plan, plus=more)
        if kind == "layer":
            return await layer_norm(q, s, v, 1, a, b, plan, plus=more)
        return await rms_norm(q, s, v, 1, a, plan, plus=more)

    found = run(p, op, x, *secrets).value
    if kind == "group":
        normed = F.group_norm(x, 2, None, None, eps)
        expected = F.group_norm(x, 2, wide, narrow, eps)
    elif kind == "layer":
        normed, expected = F.layer_norm(x, shape, None, None, eps), F.layer_norm(x, shape, wide, narrow, eps)
    else:
        normed, expected = F.rms_norm(x, shape, None, eps), F.rms_norm(x, shape, wide, eps)
    reach = max(1.0, float(normed.abs().max())) * (
        1.0 if wide is None else max(1.0, float(gamma.abs().max()))
    )
    # Down to a variance of 1e-4 the error is 1e-4 of the range; x's own rounding, over its deviation, comes on top.
    own = 4 * ULP / float(square.min()) ** 0.5
    within(found, expected + extra if plus else expected, (1e-4 + own) * reach + 2 * ULP)


# ---- comparisons -------------------------------------------------------------------------------------------


@fuzz(40)
@given(
    p=protocols,
    shape=shapes,
    bound=st.sampled_from([0.5, 8.0, 1000.0]),
    bits=st.sampled_from([8, 16, 24]),
    seed=seeds,
)
def test_relu_and_clamp(run, p: Protocol, shape: tuple, bound: float, bits: int, seed: int) -> None:
    x = draw(shape, -bound, bound, seed)
    band = compare.band(bound, 18, bits)
    found = run(p, lambda q, s, v: compare.relu(q, s, v, bound, bits=bits), x).value
    within(found, x.relu(), band)
    low, high = -bound / 3, bound / 4
    wide = compare.band(bound + bound / 3, 18, bits)
    found = run(p, lambda q, s, v: compare.clamp(q, s, v, low, high, bound, bits=bits), x).value
    within(found, x.clamp(low, high), wide + ULP)
    found = run(p, lambda q, s, v: compare.less_than_zero(q, s, v, bound, bits=bits), x).value
    sure = (x < 0) | (x >= band)
    assert torch.equal(found[sure], (x < 0).double()[sure])


@fuzz(40)
@given(
    p=protocols,
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    dim=st.integers(-3, 2),
    bound=st.sampled_from([1.0, 100.0]),
    ties=st.booleans(),
    seed=seeds,
)
def test_maximum_and_argmax(
    run, p: Protocol, shape: tuple, dim: int, bound: float, ties: bool, seed: int
) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    x = draw(shape, -bound, bound, seed)
    x = grid((x * 4 / bound).round() * bound / 4) if ties else x
    slack = compare.band(2 * bound, 18) * math.ceil(math.log2(max(2, shape[dim])))
    top = x.amax(dim, keepdim=True)
    found = run(p, lambda q, s, v: compare.maximum(q, s, v, dim, bound), x).value
    assert bool((found <= top).all())
    within(found, top, slack)
    where = run(p, lambda q, s, v: compare.argmax(q, s, v, dim, bound), x).value
    within(x.gather(dim, where.long()), top, slack)


# ---- products ----------------------------------------------------------------------------------------------


@fuzz(30)
@given(
    p=protocols,
    lead=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 6)),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    public=st.booleans(),
    seed=seeds,
)
def test_matmul(run, p: Protocol, lead: tuple, sizes: tuple, size: float, public: bool, seed: int) -> None:
    n, k, m = sizes
    a, b = draw((*lead, n, k), -size, size, seed), draw((k, m), -1.0, 1.0, seed + 1)
    if public:
        found = run(p, lambda q, s, v: basic.matmul(q, s, v, b), a).value
    else:
        found = run(p, lambda q, s, v, w: basic.matmul(q, s, v, w), a, b).value
    within(found, a @ b, ULP * 1.001)  # b has 18 fraction bits, fewer than public factors keep


@fuzz(25)
@given(
    p=protocols,
    groups=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    public=st.booleans(),
    seed=seeds,
)
def test_conv(
    run, p: Protocol, groups: int, channels: tuple, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple,
    public: bool, seed: int,
) -> None:  # fmt: skip
    x = draw((2, groups * channels[0], 6, 5), -4.0, 4.0, seed)
    w, bias = (
        draw((groups * channels[1], channels[0], *kernel), -1.0, 1.0, seed + 1),
        draw((groups * channels[1],), -1, 1, seed),
    )
    geometry = Conv(stride, padding, dilation, groups)
    if public:
        found = run(p, lambda q, s, v: basic.conv(q, s, v, w, bias, geometry), x).value
    else:
        found = run(p, lambda q, s, v, k, b: basic.conv(q, s, v, k, b, geometry), x, w, bias).value
    within(found, F.conv2d(x, w, bias, stride, padding, dilation, groups), ULP * 1.001)


@fuzz(40)
@given(
    p=protocols,
    shape=shapes,
    cut=st.integers(0, 3),
    size=st.sampled_from([0.1, 5.0, 900.0]),
    c=st.floats(-300, 300),
    seed=seeds,
)
def test_mul_scale_and_mean(
    run, p: Protocol, shape: tuple, cut: int, size: float, c: float, seed: int
) -> None:
    x, y = draw(shape, -size, size, seed), draw(shape[cut:], -3.0, 3.0, seed + 1)
    found = run(p, lambda q, s, v, w: basic.mul(q, s, v, w), x, y).value
    within(found, x * y, ULP)
    found = run(p, lambda q, s, v: basic.mul(q, s, v, y), x).value
    within(found, x * y, ULP * 1.001)
    found = run(p, lambda q, s, v: basic.scale(q, s, v, c), x).value
    significant = 2.0**-20 * max(abs(c), 2.0**-30) if abs(c) > 2.0**-10 else 2.0**-30
    within(found, x * c, ULP + x.abs() * significant)

    async def mean(q, s, v):
        total = q.linear(lambda part: part.sum(), v)
        return await basic.scale(q, s, total, 1.0 / v.type.numel)

    found = run(p, mean, x).value
    within(found, x.mean(), ULP + float(x.sum().abs()) / x.numel() * 2.0**-19)
