"""Products in 32-bit words: the local shortening, the products, when a plan takes them, and what watches them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.errors import RangeError, TypeMismatch
from sfumato.ops.basic import Conv, Short, conv, matmul
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.types import Z32

FRAC = 18


def noise(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size


def test_shortening_is_local_and_errs_by_half_a_unit_without_bias(run) -> None:
    x, frac = noise(60_000, size=3.0), 10

    async def shortened(p, s, v):
        # a fresh product has uniform components
        one = p.add_public(s, p.linear(lambda part: part * 0, v), p.encode(v, torch.ones(v.shape)))
        uniform = await p.bilinear_truncate(s.fork("fresh"), torch.mul, v, one, FRAC)
        short = p.shorten(s, uniform, frac)
        assert short.ring == Z32
        return await p.cast(s.fork("up"), short, v.ring)

    found = run(Rep3(), shortened, x)
    error = (found.value - x) * 2.0**frac
    assert float(error.abs().max()) <= 2.0
    assert abs(float(error.mean())) < 0.02
    assert 0.4 < float(error.std()) < 0.62


def test_only_what_vanishes_is_dropped(run) -> None:
    x = noise(8)

    async def too_far(p, s, v):
        return p.shorten(s, p.lift(v, 40), 4)

    with pytest.raises(TypeMismatch, match="shortened"):
        run(Rep3(), too_far, x)
    with pytest.raises(RangeError, match="32 bits"):
        run(Plain(), lambda p, s, v: _later(p.shorten(s, v, 16)), x * 2.0**16)


async def _later(x):
    return x


@pytest.mark.parametrize("protocol", [Rep3(), Rep3(fused=False), Plain()], ids=["rep3", "moves", "plain"])
def test_a_short_matrix_product_is_as_good_as_its_operands(protocol, run) -> None:
    x, w, b = noise(24, 64), noise(64, 20, seed=1, size=0.125), noise(20, seed=2)

    async def product(p, s, v):
        left, right, plus = _parts(p, v, (24, 64), (64, 20), (20,))
        return await matmul(p, s, left, right, plus=plus, short=Short(10, 13))

    found = run(protocol, product, torch.cat([x.reshape(-1), w.reshape(-1), b])).value
    exact = x @ w + b
    assert float((found - exact).norm() / exact.norm()) < 2e-3
    assert float((found - exact).norm() / exact.norm()) > 1e-5  # it is the short product that ran


@pytest.mark.parametrize("protocol", [Rep3(), Plain()], ids=["rep3", "plain"])
def test_a_short_convolution_too(protocol, run) -> None:
    x, w = noise(1, 8, 9, 9), noise(6, 8, 3, 3, seed=1, size=0.12)

    async def convolved(p, s, v):
        left, right = _parts(p, v, (1, 8, 9, 9), (6, 8, 3, 3))
        return await conv(p, s, left, right, None, Conv((1, 1), (1, 1), (1, 1)), short=Short(10, 13))

    found = run(protocol, convolved, torch.cat([x.reshape(-1), w.reshape(-1)])).value
    exact = torch.nn.functional.conv2d(x, w, padding=1)
    assert float((found - exact).norm() / exact.norm()) < 2e-3


def _parts(p, v, *shapes):
    """One flat secret as several."""
    parts, start = [], 0
    for shape in shapes:
        size = int(torch.Size(shape).numel())
        parts.append(p.linear(lambda t, a=start, b=size, sh=shape: t[a : a + b].reshape(sh), v))
        start += size
    return parts


def wide() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(256, 256).eval().requires_grad_(False), torch.randn(256, 256)


def test_a_plan_takes_them_where_the_budget_allows() -> None:
    module, x = wide()
    program = sf.capture(module, (x,))

    def methods(**options):
        plan = sf.make_plan(program, calibration=[((x,), {})], **options)
        return {str(c.get("method")) for c in plan.choices.values()}

    assert "32-bit product" in methods(secret="inputs+weights", profile="fast")
    assert "32-bit product" not in methods(secret="inputs+weights", profile="precise")
    assert "32-bit product" not in methods(secret="inputs", profile="fast")
    plan = sf.make_plan(program, secret="inputs+weights", profile="fast", calibration=[((x,), {})])
    run = sf.run(plan, (x,), backend="simulate")
    found, exact = run.outputs.double(), module(x).double()
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 1.5e-3
    assert sf.estimate(plan).bytes_sent == run.cost.bytes_sent


def test_sums_that_leave_their_words_are_refused() -> None:
    module, x = wide()
    plan = sf.make_plan(
        sf.capture(module, (x,)), secret="inputs+weights", profile="fast", calibration=[((x,), {})]
    )
    with pytest.raises(RangeError, match="linear"):
        sf.run(plan, (x * 40,), backend="simulate")
