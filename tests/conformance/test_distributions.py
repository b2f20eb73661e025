"""Rounding errors have the distribution that the protocol states, mean included.

Each test draws with fixed keys and asks for a p-value above 1e-7 (or five standard errors); the last tests show that a
biased variant would not pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import protocol_suite as suite

from sfumato.ops.elementary import ExpPlan, plan_exp, plan_inverse
from sfumato.ops.fit import fit_series
from sfumato.protocol import rep3_evaluate
from sfumato.protocol.base import Exponential, Protocol, Series
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.protocol.rep3_close import Additive, close
from sfumato.ring import powers, trig
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Ring, Shared

N, BINS = 40_000, 16
SURE = 1e-7


def p_value(statistic: float, degrees: int) -> float:
    """That a chi-square variable is as large."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2.0)))


def ceiling_p(fraction: Tensor, up: Tensor) -> float:
    """Chi-square over bins of the fraction: is the ceiling taken with probability equal to the fraction?"""
    statistic, degrees = 0.0, 0
    for i in range(BINS):
        inside = (fraction >= i / BINS) & (fraction < (i + 1) / BINS)
        f = fraction[inside]
        variance = float((f * (1 - f)).sum())
        if variance < 10:
            continue
        statistic += (float(up[inside].sum()) - float(f.sum())) ** 2 / variance
        degrees += 1
    return p_value(statistic, degrees) if degrees else 1.0


def check_rounding(exact: Tensor, result: Tensor, bits: int, ring: Ring) -> None:
    """Floor or ceiling of ``exact`` / 2^bits, the ceiling as often as the fraction says, and apart from the value."""
    up = ((result.long() - (exact >> bits)) << (64 - ring.bits)) >> (64 - ring.bits)
    assert bool(((up == 0) | (up == 1)).all())
    fraction = (exact & ((1 << bits) - 1)).double() / 2.0**bits
    assert bool((up[fraction == 0] == 0).all())
    for part in (exact >= 0, exact < 0):
        if int(part.sum()) > 1000:
            assert ceiling_p(fraction[part], up[part].double()) > SURE


def words(bits: int, seed: int = 0, count: int = N) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(1 << bits) + 1, 1 << bits, count))


def reconstruct(main: Callable[[Session], object], p: Protocol) -> Tensor:
    outputs, _ = simulate(main, parties=p.parties)
    return suite.combine(p, outputs)


@pytest.mark.parametrize("p", [Rep3(), Rep3(fused=False), Plain()], ids=["rep3", "rep3-moves", "plain"])
@pytest.mark.parametrize("move", ["truncate", "bilinear_truncate", "linear_truncate"])
@pytest.mark.parametrize(("ring", "bits"), [(Z64, 18), (Z32, 9), (Z64, 3)], ids=str)
def test_truncations(p: Protocol, move: str, ring: Ring, bits: int) -> None:
    a, b = words(14).to(ring.dtype), words(12, 1).to(ring.dtype)

    async def main(s: Session) -> Shared:
        x, y = (
            suite.shares(p, s.party, [w] if p.parties == 1 else suite.components(w, ring, i), ring, 20)
            for i, w in enumerate((a, b))
        )
        if move == "truncate":
            return await p.truncate(s, x, bits)
        if move == "bilinear_truncate":
            return await p.bilinear_truncate(s, torch.mul, x, y, bits)
        return await p.linear_truncate(s, lambda u: 5 * u, x, bits, shape=x.shape, gain_frac=2)

    exact = {"truncate": a.long(), "bilinear_truncate": a.long() * b.long(), "linear_truncate": 5 * a.long()}[
        move
    ]
    check_rounding(exact, reconstruct(main, p), bits, ring)


@pytest.mark.parametrize(
    ("width", "bits", "ring"),
    [(24, 7, Z32), (24, 7, Z64), (32, 0, Z64), (33, 1, Z32), (37, 12, Z64), (46, 14, Z32), (46, 10, Z32),
     (63, 40, Z64), (63, 29, Z32), (64, 31, Z32), (64, 33, Z64)],
)  # fmt: skip
def test_close_of_words_of_any_width(width: int, bits: int, ring: Ring) -> None:
    """Values up to 2^(width - 2), summands uniform in words of the width; with and without a wrap that can tell."""
    exact = words(width - 2) if width - 2 - bits < ring.bits - 1 else words(bits + ring.bits - 2)
    half = 1 << (width - 1)
    drawn = np.random.default_rng(3).integers(-half, half, N, dtype=np.int64)
    first = torch.from_numpy(drawn)
    spare = 64 - width
    second = ((exact - first) << spare) >> spare
    dtype = torch.int32 if width <= 32 else torch.int64

    async def main(s: Session) -> Shared:
        held = {0: first.to(dtype), 1: second.to(dtype), 2: None}[s.role]
        return await close(s, Additive(held, (N,)), bits, width, 3, ring)

    check_rounding(exact, reconstruct(main, Rep3()), bits, ring)


@pytest.mark.parametrize("width", [24, 25, 32, 33, 46, 63, 64])
def test_close_at_the_edges_of_its_words(width: int) -> None:
    """u0 at each edge and quarter of the word, values at the ends of their range: never off by more than a unit."""
    half, quarter = 1 << (width - 1), 1 << (width - 2)
    near = torch.arange(-3, 4)
    edges = torch.cat([near + e for e in (-half + 3, -quarter, 0, quarter, half - 4)])
    values = torch.cat([near[near >= 0] - quarter + 1, near, quarter - 1 - near[near >= 0]])
    first, exact = (t.reshape(-1) for t in torch.meshgrid(edges, values, indexing="ij"))
    spare, dtype = 64 - width, torch.int32 if width <= 32 else torch.int64
    second = ((exact - first) << spare) >> spare
    for bits in (0, 1, 5, width - 3, width - 1):
        for swapped in (False, True):
            pair = (second, first) if swapped else (first, second)

            async def main(s: Session, pair: Sequence[Tensor] = pair, bits: int = bits) -> Shared:
                held = None if s.role == 2 else pair[s.role].to(dtype)
                return await close(s, Additive(held, tuple(exact.shape)), bits, width, 3, Z64)

            result = reconstruct(main, Rep3())
            up = result - (exact >> bits)
            assert bool(((up == 0) | ((up == 1) & (exact & ((1 << bits) - 1) != 0))).all())


# ---- evaluate and exponential ------------------------------------------------------------------------------


def opened(p: Protocol, spec: Series | Exponential, x: Tensor, argument: int, frac: int) -> Tensor:
    """The move's words with ``frac`` fraction bits; masks are the same for every ``frac``."""
    parts = [x] if p.parties == 1 else suite.components(x, Z64, 2)

    async def main(s: Session) -> Shared:
        held = suite.shares(p, s.party, parts, Z64, argument)
        if isinstance(spec, Exponential):
            return await p.exponential(s, spec, held, frac=frac)
        return await p.evaluate(s, spec, held, frac=frac)

    return reconstruct(main, p)


def uniform(lo: float, hi: float, frac: int, seed: int = 5) -> Tensor:
    g = np.random.default_rng(seed)
    return torch.from_numpy(g.integers(round(lo * 2**frac), round(hi * 2**frac), N, endpoint=True))


SERIES = {
    "silu": (fit_series(torch.nn.functional.silu, -8.0, 8.0, tolerance=5e-5), 18),
    "loose tanh": (fit_series(torch.tanh, -4.0, 4.0, tolerance=1e-2), 18),
    "reciprocal": (plan_inverse(1, 1.0, 8.0).series, 24),
}


def noise_of(p: Protocol, name: str) -> tuple[float, float, Series]:
    """Mean and deviation of the sum before its truncation, and the series."""
    g, frac = SERIES[name]
    x = uniform(g.lo, g.hi, frac)
    found = opened(p, g, x, frac, g.scale).double() / 2.0**g.scale
    error = found - g(x.double() / 2.0**frac)
    return float(error.mean()), float(error.std()), g


@pytest.mark.parametrize("p", [Rep3(), Rep3(two_way=True), Plain()], ids=["rep3", "two ways", "plain"])
@pytest.mark.parametrize("name", SERIES)
def test_an_evaluation_has_the_noise_that_its_series_names(p: Protocol, name: str) -> None:
    """Deviation within 10 % of ``Series.noise``, mean within five standard errors of 0."""
    mean, deviation, g = noise_of(p, name)
    assert deviation == pytest.approx(g.noise, rel=0.1)
    assert abs(mean) < 5 * g.noise / N**0.5


@pytest.mark.parametrize("name", SERIES)
def test_noise_has_no_mean_at_any_argument(name: str) -> None:
    """Over masks, for each of a few arguments: a cosine's rounding error hardly depends on the cosine."""
    g, frac = SERIES[name]
    step = 2.0**-g.dealt
    size = sum((c * c + s * s) ** 0.5 for c, s in zip(g.cos, g.sin, strict=True))
    for at in (g.lo, 0.3 * g.lo + 0.7 * g.hi, g.hi):
        word = round(at * 2**frac)
        found = opened(Rep3(), g, torch.full((N,), word), frac, g.scale).double() / 2.0**g.scale
        mean = float((found - g(torch.tensor(word / 2.0**frac))).mean())
        # What is left of a quantised cosine in its own harmonic: a fifth of a step to the power 3/2 at most.
        assert abs(mean) < 5 * g.noise / N**0.5 + 0.2 * size * step**1.5


@pytest.mark.parametrize("name", SERIES)
def test_an_evaluation_is_rounded_like_a_truncation(name: str) -> None:
    g, frac = SERIES[name]
    x = uniform(g.lo, g.hi, frac)
    check_rounding(opened(Rep3(), g, x, frac, g.scale), opened(Rep3(), g, x, frac, 12), g.scale - 12, Z64)


PLANS = [
    plan_exp(-4.0, 1.0),
    plan_exp(-16.0, 0.0),
    plan_exp(-30.0, 0.0),
    plan_exp(-3.0, 5.0, tolerance=1e-5),
    plan_exp(-1.0, 0.5, tolerance=1e-6),
]


def relative_errors(p: Protocol, spec: Exponential) -> Tensor:
    """Relative errors before truncation, where relative accuracy is promised."""
    lo = max(spec.lo, -20.0)
    x = uniform(lo, spec.hi - 2.0**-spec.frac, spec.frac)
    exact = torch.exp(x.double() / 2.0**spec.frac)
    return opened(p, spec, x, spec.frac, spec.frac_out).double() / 2.0**spec.frac_out / exact - 1.0


@pytest.mark.parametrize("p", [Rep3(), Rep3(two_way=True), Plain()], ids=["rep3", "two ways", "plain"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.lo:g}..{plan.hi:g}")
def test_an_exponential_keeps_its_relative_error(p: Protocol, plan: ExpPlan) -> None:
    """Two factors, each rounded by half of the error at most: never beyond it, deviation below that of two uniform
    draws, mean within five standard errors of 0.
    """
    error = relative_errors(p, plan.core)
    assert float(error.abs().max()) <= plan.core.error * 1.02
    assert float(error.std()) <= plan.core.error / 6**0.5
    assert abs(float(error.mean())) < 5 * float(error.std()) / N**0.5


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.lo:g}..{plan.hi:g}")
def test_an_exponential_is_rounded_like_a_truncation(plan: ExpPlan) -> None:
    spec = plan.core
    x = uniform(spec.lo, spec.hi - 2.0**-spec.frac, spec.frac)
    frac = max(10, spec.frac_out - spec.word + 2)
    exact, found = (opened(Rep3(), spec, x, spec.frac, f) for f in (spec.frac_out, frac))
    check_rounding(exact, found, spec.frac_out - frac, Z64)


# ---- power -------------------------------------------------------------------------------------------------


def test_a_biased_rounding_is_caught() -> None:
    """Floors, halves and a ceiling that is 3 % too frequent."""
    g = np.random.default_rng(8)
    fraction = torch.from_numpy(g.random(N))
    draw = torch.from_numpy(g.random(N))
    assert ceiling_p(fraction, (draw < fraction).double()) > SURE
    for biased in (
        draw < 0,
        draw < 0.5,
        draw < fraction + 0.03,
        draw < fraction * 0.95,
        draw < fraction**1.1,
    ):
        assert ceiling_p(fraction, biased.double()) < SURE


def test_sines_that_are_floored_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def floored(mask: Tensor, bits: int, count: int, frac: int, dtype: torch.dtype) -> Tensor:
        cos, sin = trig.harmonics(mask, bits, count)
        return torch.stack([cos, sin], 1).flatten(0, 1).bitwise_right_shift(trig.SCALE_BITS - frac).to(dtype)

    monkeypatch.setattr(rep3_evaluate.trig, "dealt", floored)
    _, deviation, g = noise_of(Rep3(), "loose tanh")
    assert deviation > 1.2 * g.noise


def test_exponentials_that_are_floored_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def floored(n: Tensor, bits: int, denominator: int, start: int, scale: int, blocks: int) -> Tensor:
        return rows(n, bits, denominator, start, scale + 10, blocks) >> 10

    rows = powers.rows
    monkeypatch.setattr(rep3_evaluate.powers, "rows", floored)
    error = relative_errors(Rep3(), PLANS[0].core)
    assert abs(float(error.mean())) > 50 * float(error.std()) / N**0.5
