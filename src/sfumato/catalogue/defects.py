"""Known defects of published methods, each with the curve that shows it and a number that a test holds.

Every curve is computed here, with the model of :mod:`~sfumato.catalogue.words` or the formula alone; nothing is
copied from a figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from sfumato.catalogue import get
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.measure import error_curve, rows, scaling
from sfumato.catalogue.methods.activation import power_released
from sfumato.catalogue.words import Reals

__all__ = ["DEFECTS", "REMARKS", "Curve", "Defect", "Remark", "curve_of", "defects_of", "remarks_of"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Named lines over one x. ``measured`` is the number that stands for the defect, and ``what`` says of what."""

    x: Reals
    lines: tuple[tuple[str, Reals], ...]
    x_label: str
    y_label: str
    measured: float
    what: str
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Defect:
    """A statement about some entries, where it was found, and its curve."""

    key: str
    function: str
    title: str
    entries: tuple[str, ...]
    source: str
    curve: Callable[[], Curve]


def _values(entry: Entry, x: Reals) -> tuple[tuple[str, Reals], ...]:
    return (("exact", entry.of.truth(x)), (entry.name, entry.approximate(x)))


@dataclass(frozen=True, slots=True)
class Remark:
    """A defect that no curve shows: wiring, security, what was timed."""

    function: str
    text: str
    source: str


# ---- exp ---------------------------------------------------------------------------------------------------


def _twenty_squarings() -> Curve:
    n = np.arange(4, 21, dtype=np.float64)
    x = np.linspace(-10.0, 0.0, 2001)
    base = get("crypten.exp")
    lines = []
    for frac in (16, 18, 24):
        worst = [float(error_curve(replace(base, options={"n": int(k)}), x, frac).max()) for k in n]
        lines.append((f"f = {frac}", np.array(worst)))
    return Curve(
        n, tuple(lines), "squarings n", "largest error on [-10, 0]", float(lines[0][1][-1]),
        "error at n = 20 and f = 16", log_y=True,
    )  # fmt: skip


def _exp_diverges() -> Curve:
    x = np.linspace(-600.0, 0.0, 2401)
    entry = get("crypten.exp")
    y = np.maximum(np.abs(entry.approximate(x)), 2.0**-16)
    return Curve(
        x, (("crypten.exp", y), ("exact", np.maximum(np.exp(x), 2.0**-16))), "x", "value, at least 2^-16",
        float(np.abs(entry.approximate(np.array([-600.0]))).max()), "value at -600, where exp is 0", log_y=True,
    )  # fmt: skip


def _positive_exp() -> Curve:
    x = np.linspace(0.0, 10.0, 401)
    entry = get("crypten.exp")
    relative = np.abs(entry.exact(x) / np.exp(x) - 1.0)
    return Curve(
        x, (("(1 + x/2^8)^256", np.maximum(relative, 1e-6)),), "x", "relative error", float(relative[-1]),
        "relative error at 10", log_y=True,
    )  # fmt: skip


def _chebyshev_negative() -> Curve:
    x = np.linspace(-14.0, 0.0, 1401)
    entry, mended = get("cipherdm.exp"), get("cipherdm.exp-fixed")
    y = entry.approximate(x)
    lines = (
        (f"{entry.name} - exact", y - np.exp(x)),
        (f"{mended.name} - exact", mended.approximate(x) - np.exp(x)),
        ("below this the value is negative", np.maximum(-np.exp(x), -0.05)),
    )
    return Curve(x, lines, "x", "error", float(y.min()), "smallest value; exp is positive")


def _softmax_negative() -> Curve:
    deviations = np.linspace(0.5, 4.0, 15)
    names = ("cipherdm.softmax", "puma.softmax", "bumblebee.softmax", "spu.softmax")
    lines = []
    for name in names:
        entry = get(name)
        lines.append((name, np.array([_variation(entry, rows(64, 196, float(s))) for s in deviations])))
    at = int(np.argmin(np.abs(deviations - 2.0)))
    return Curve(
        deviations, tuple(lines), "standard deviation of 196 scores", "total variation, mean of 64 rows",
        float(lines[0][1][at]), "total variation of cipherdm.softmax at deviation 2; at most 1 is sensible",
        log_y=True,
    )  # fmt: skip


def _variation(entry: Entry, x: Reals) -> float:
    return float((np.abs(entry.approximate(x) - entry.of.truth(x)).sum(-1) / 2).mean())


# ---- reciprocal and rsqrt ----------------------------------------------------------------------------------


def _reciprocal_above_256() -> Curve:
    x = np.exp(np.linspace(np.log(1e-3), np.log(500.0), 1201))
    entry = get("crypten.reciprocal-positive")
    return Curve(
        x,
        ((f"{entry.name}, f = 16", np.clip(error_curve(entry, x), 1e-6, 1e18)),
         (f"{entry.name}, f = 20", np.clip(error_curve(entry, x, 20), 1e-6, 1e18)),
         ("the formula alone", np.clip(error_curve(entry, x, exact=True), 1e-6, 1e18))),
        "x", "relative error", float(error_curve(entry, np.array([260.0]))[0]), "relative error at 260",
        log_x=True, log_y=True,
    )  # fmt: skip


def _reciprocal_rounds() -> Curve:
    x = np.linspace(20.0, 256.0, 945)
    entry, lines = get("crypten.reciprocal-positive"), []
    for frac in (16, 18):
        worst = np.max([np.abs(entry.approximate(x, frac, salt=s) * x - 1.0) for s in range(20)], 0)
        lines.append((f"f = {frac}, worst of 20 roundings", np.clip(worst, 1e-4, 1e6)))
    diverged = x[lines[0][1] > 2.0]
    return Curve(
        x, tuple(lines), "x", "relative error", float(diverged[0]) if len(diverged) else float("inf"),
        "is where some rounding makes it diverge at f = 16; the formula holds to 256", log_y=True,
    )  # fmt: skip


def _scaling_costs() -> Curve:
    divisors, fracs = tuple(2.0**i for i in range(14)), (16, 18, 20)
    found = scaling(get("sdu.reciprocal-d64"), divisors=divisors, fracs=fracs, points=(4.0,))
    lines = []
    for frac in fracs:
        points = [point for point in found if point.frac == frac]
        lines.append((f"measured, f = {frac}", np.array([point.measured for point in points])))
        lines.append((f"law, f = {frac}", np.array([point.law for point in points])))
    return Curve(
        np.array(divisors), tuple(lines), "divisor d", "relative error of 1/x at x = 4", float(lines[0][1][12]),
        f"relative error at d = 4096, f = 16, x = 4; the law says {lines[1][1][12]:.3f}", log_x=True, log_y=True,
    )  # fmt: skip


def _rsqrt_range() -> Curve:
    x = np.exp(np.linspace(np.log(1e-4), np.log(400.0), 1201))
    lines = tuple(
        (name, np.clip(error_curve(get(name), x), 1e-6, 1e6))
        for name in ("crypten.rsqrt", "shaft.rsqrt", "shaft.rsqrt-8", "cryptorch.rsqrt-v2")
    )
    return Curve(
        x, lines, "x", "relative error", float(error_curve(get("crypten.rsqrt"), np.array([0.02]))[0]),
        "relative error of crypten.rsqrt at 0.02", log_x=True, log_y=True,
    )  # fmt: skip


def _no_deflation() -> Curve:
    x = np.exp(np.linspace(np.log(1e-2), np.log(100.0), 801))
    released, deflated = get("secformer.reciprocal-released"), get("secformer.reciprocal")
    lines = (
        (released.name, np.clip(error_curve(released, x), 1e-6, 1e9)),
        (
            f"{deflated.name}, of {deflated.options['eta']:g} x",
            np.clip(error_curve(deflated, 5000.0 * x), 1e-6, 1e9),
        ),
    )
    return Curve(
        x, lines, "x", "relative error", float(error_curve(released, np.array([2.5]))[0]),
        "relative error at 2.5", log_x=True, log_y=True,
    )  # fmt: skip


def _quad_sum() -> Curve:
    lengths = np.array([4, 6, 8, 10, 12, 16, 24, 32, 64, 128], dtype=np.float64)
    lines = []
    for name in ("mpcformer.softmax-2quad", "secformer.softmax-2quad"):
        entry, worst = get(name), []
        for n in lengths:
            x = rows(32, int(n), 1.0)
            q = (x + 5.0) ** 2
            worst.append(float(np.abs(entry.approximate(x) - q / q.sum(-1, keepdims=True)).max()))
        lines.append((name, np.maximum(np.array(worst), 1e-6)))
    return Curve(
        lengths, tuple(lines), "row length", "largest distance from (x+5)^2 / sum", float(lines[0][1][-1]),
        "distance at 128 scores, whose squares sum to about 3,300", log_x=True, log_y=True,
    )  # fmt: skip


# ---- activations -------------------------------------------------------------------------------------------


def _odd_powers() -> Curve:
    x = np.linspace(-1.0, 1.0, 401)
    fifth = Entry("crypten.pow5", "tanh", "", "", power_released, {"p": 5})
    y = fifth.approximate(x)
    return Curve(
        x, (("x^5", x**5), ("pow(5) as released: x^6", y)), "x", "power", float(np.abs(y - x**5).max()),
        "largest error of pow(5) on [-1, 1]",
    )  # fmt: skip


def _erf() -> Curve:
    x = np.linspace(0.0, 3.0, 301)
    lines = tuple(
        (name, np.clip(np.abs(get(name).approximate(x) - get(name).of.truth(x)), 1e-6, 1e9))
        for name in ("crypten.erf", "crypten.erf-fixed", "spu.erf", "secformer.erf")
    )
    entry = get("crypten.erf")
    worst = np.abs(entry.approximate(np.linspace(-1, 1, 401)) - entry.of.truth(np.linspace(-1, 1, 401))).max()
    return Curve(x, lines, "x", "error", float(worst), "largest error of crypten.erf on [-1, 1]", log_y=True)


def _steps(name: str, lo: float, hi: float, cut: float) -> Callable[[], Curve]:
    def curve() -> Curve:
        entry, x = get(name), np.linspace(lo, hi, 1201)
        error = entry.exact(x) - entry.of.truth(x)
        near = np.array([cut - 2.0**-16, cut + 2.0**-16])
        value = entry.exact(near) - entry.of.truth(near)
        return Curve(
            x, ((f"{name} - exact", error),), "x", "error", float(np.abs(value).max()), f"error at {cut:g}"
        )

    return curve


def _miswired() -> Curve:
    x = np.linspace(-4.0, 4.0, 801)
    wrong, right = get("shaft.bolt-gelu"), get("bolt.gelu-two")
    lines = (*_values(wrong, x), (right.name, right.approximate(x)))
    return Curve(
        x, lines, "x", "GELU(x)", float(error_curve(wrong, x).max()), "largest error of the miswired form"
    )


def _cut_at_three() -> Curve:
    x = np.linspace(-4.0, 4.0, 1601)
    shipped = get("bumblebee.gelu")
    refitted = replace(
        shipped, name="refitted on [0, 3]",
        options={"coefficients": (0.00166924, -0.03884156, 0.54328225, -0.18527376, 0.02125965), "reach": 3.0},
    )  # fmt: skip
    lines = tuple((e.name, error_curve(e, x, exact=True)) for e in (shipped, refitted))
    return Curve(x, lines, "x", "error of the formula", float(lines[0][1].max()), "largest error as shipped")


def _last_coefficient() -> Curve:
    x = np.linspace(-12.0, 12.0, 961)
    entry = get("cryptorch.silu")
    lines = (
        ("formula", np.maximum(error_curve(entry, x, exact=True), 1e-5)),
        ("16 fraction bits", np.maximum(error_curve(entry, x, 16), 1e-5)),
        ("22 fraction bits", np.maximum(error_curve(entry, x, 22), 1e-5)),
    )
    return Curve(
        x, lines, "x", "error", float(lines[1][1].max()), "largest error at 16 fraction bits", log_y=True
    )


def _quad() -> Curve:
    x = np.linspace(-6.0, 6.0, 601)
    paper, swapped = get("mpcformer.gelu"), get("mpcformer.gelu-benchmark")
    lines = (*_values(paper, x), ("benchmark code, swapped", swapped.approximate(x)))
    inside = np.abs(x) <= 3.0
    return Curve(
        x, lines, "x", "activation", float(np.abs(lines[1][1] - lines[0][1])[inside].max()),
        "distance of Quad from GELU on [-3, 3]",
    )  # fmt: skip


# ---- rows --------------------------------------------------------------------------------------------------


def _ode() -> Curve:
    deviations = np.linspace(0.5, 4.0, 8)
    base = get("shaft.softmax")
    lines = []
    for steps in (16, 32, 128):
        entry = replace(base, options={**base.options, "steps": steps})
        worst = [
            float(np.abs(entry.approximate(x) - entry.of.truth(x)).max())
            for x in (rows(32, 128, float(s)) for s in deviations)
        ]
        lines.append((f"{steps} steps", np.array(worst)))
    at = int(np.argmin(np.abs(deviations - 2.0)))
    return Curve(
        deviations, tuple(lines), "standard deviation of 128 scores", "largest error of a weight",
        float(lines[0][1][at]), "error of 16 steps at deviation 2", log_y=True,
    )  # fmt: skip


def _argmax() -> Curve:
    n = np.array([77, 128, 1024, 4096], dtype=np.float64)
    measured = 16.0 * np.array([706.0, 744.0, 694.0, 654.0])
    plain = np.array([get("crypten.softmax").derived(int(k)).bits or 0.0 for k in n])
    return Curve(
        n, (("released code, measured", measured), ("a plain tournament, unit prices", plain)), "row length",
        "bits per score", float(measured[1] / plain[1]), "times the bits of a plain maximum at 128 scores",
        log_x=True,
    )  # fmt: skip


def _mean() -> Curve:
    n = np.array([768, 1024, 2560, 5120, 10240, 20480, 40960, 81920], dtype=np.float64)
    lines = tuple((f"f = {f}", np.floor(2.0**f / n) * n / 2.0**f) for f in (18, 22))
    return Curve(
        n, lines, "group size n", "mean of n ones", float(lines[0][1][6]), "mean of 40,960 ones at f = 18",
        log_x=True,
    )  # fmt: skip


DEFECTS: tuple[Defect, ...] = (
    Defect("twenty-squarings", "exp", "20 squarings at 16 fraction bits return 1: n has to be about f/2",
           ("sdu.exp",), "[SDU], quoted by its reviewers", _twenty_squarings),
    Defect("exp-below-512", "exp", "the limit form explodes below -2^(n+1): a mask of -10,000 destroys a row",
           ("crypten.exp", "spu.exp"), "[CrypTen], [SPU]", _exp_diverges),
    Defect("exp-positive", "exp", "the limit form loses relative accuracy as x^2: 17 % at 10",
           ("crypten.exp", "spu.exp"), "[CrypTen], [SPU]", _positive_exp),
    Defect("chebyshev-negative", "exp", "CipherDM's exponential is 0.95 at 0 and negative near -12",
           ("cipherdm.exp",), "[CipherDM], authors' code", _chebyshev_negative),
    Defect("softmax-negative", "softmax", "with it, row sums come near 0 or below, and weights leave [0, 1]",
           ("cipherdm.softmax",), "[CipherDM], authors' code", _softmax_negative),
    Defect("reciprocal-256", "reciprocal", "Newton's start explodes above 256: softmax over 4,096 scores diverges",
           ("crypten.reciprocal", "crypten.softmax"), "[CrypTen]", _reciprocal_above_256),
    Defect("reciprocal-rounding", "reciprocal",
           "at 16 fraction bits the start's own rounding ends the range well below 256",
           ("crypten.reciprocal", "sdu.reciprocal-d64"), "[CrypTen]", _reciprocal_rounds),
    Defect("scaling-rounds", "reciprocal", "dividing by d costs 2^-f d / x of relative accuracy",
           ("sdu.reciprocal-d4096",), "[SDU] 3.1", _scaling_costs),
    Defect("rsqrt-range", "rsqrt", "three steps hold on [0.085, 159] alone; above 200 the sign is lost",
           ("crypten.rsqrt", "shaft.rsqrt"), "[CrypTen], [SHAFT]", _rsqrt_range),
    Defect("no-deflation", "reciprocal", "released Goldschmidt division has no deflation and diverges from 2 on",
           ("secformer.reciprocal-released", "secformer.softmax-2quad-released"), "[SecFormer] code",
           _no_deflation),
    Defect("quad-sum", "softmax", "2Quad's sums pass 256, where CrypTen's reciprocal diverges",
           ("mpcformer.softmax-2quad",), "[MPCFormer] code", _quad_sum),
    Defect("odd-powers", "erf", "CrypTen's odd powers above 3 are wrong: x^5 is x^6, x^7 is x^9",
           ("crypten.erf", "crypten.gelu"), "[CrypTen] code 0.4.0", _odd_powers),
    Defect("erf-series", "erf", "its erf is wrong by 0.23 on [-1, 1]; mended, the series still ends at 1.8",
           ("crypten.erf", "crypten.erf-fixed"), "[CrypTen] code 0.4.0", _erf),
    Defect("gelu-step", "gelu", "PUMA's GELU: 0.0195 off where the polynomial meets x; its paper says 0.01403",
           ("puma.gelu",), "[PUMA] Alg. 1", _steps("puma.gelu", -5.0, 5.0, 3.0)),
    Defect("gelu-miswired", "gelu", "a BOLT baseline with one factor exchanged is off by 16",
           ("shaft.bolt-gelu",), "[SHAFT] code 3ceb0ee", _miswired),
    Defect("gelu-cut", "gelu", "coefficients fitted on 2.7 are cut at 3; refitted they lose a fifth of the error",
           ("bumblebee.gelu",), "[BumbleBee] code b9c9c86", _cut_at_three),
    Defect("quad-not-gelu", "gelu", "Quad is another activation, and its benchmark swaps two coefficients",
           ("mpcformer.gelu", "mpcformer.gelu-benchmark"), "[MPCFormer] code", _quad),
    Defect("silu-step", "silu", "four-segment SiLU is 0.072 off at 4, where it steps",
           ("puma.silu", "usg-precise.silu"), "[SPU] example, [USG]", _steps("puma.silu", -10.0, 8.0, 4.0)),
    Defect("silu-step-6", "silu", "CipherDM's SiLU is 0.07 off at 6, where it steps by 0.06",
           ("cipherdm.silu",), "[CipherDM], authors' code", _steps("cipherdm.silu", -10.0, 10.0, 6.0)),
    Defect("silu-coefficient", "silu", "a last coefficient of 11 units of 2^-16 times |x|^5 ruins the fit",
           ("cryptorch.silu",), "[CrypTorch] coefficients, at 16 fraction bits", _last_coefficient),
    Defect("mish-step", "mish", "CipherDM's Mish steps by 0.127 at 6",
           ("cipherdm.mish",), "[CipherDM], authors' code", _steps("cipherdm.mish", -10.0, 10.0, 6.0)),
    Defect("ode-peaked", "softmax", "16 Euler steps are not enough for peaked rows",
           ("shaft.softmax",), "[SHAFT] code 3ceb0ee", _ode),
    Defect("unused-argmax", "softmax", "CrypTen's softmax computes a one-hot argmax and throws it away",
           ("crypten.softmax",), "[CrypTen] code 0.4.0", _argmax),
    Defect("mean-cut", "layer_norm", "1/n cut to 18 fraction bits: the mean of 40,960 ones is 0.9375",
           ("spu.layer-norm",), "[SPU]", _mean),
)  # fmt: skip


REMARKS: tuple[Remark, ...] = (
    Remark("softmax", "the published script installs CipherDM's softmax disabled, so that only SiLU is replaced",
           "[CipherDM], authors' code"),
    Remark("softmax", "its baseline called PUMA subtracts the maximum after the exponential: about cost, not values",
           "[SecFormer] code 4c1db49"),
    Remark("mish", "the released code assigns Mish to a local name and never installs it",
           "[CipherDM], authors' code"),
    Remark("gelu", "the opened value is reduced mod 2 pi although the sines have period 20, which divides no ring",
           "[SecFormer] code 4c1db49"),
    Remark("gelu", "its mask has 1,024 values and the masked input is opened whole: x is hidden statistically at best",
           "[SecFormer] code 4c1db49"),
    Remark("gelu", "the dealer draws the mask within one period and the masked input is opened whole: x shows to "
           "within a period", "[SHAFT] code 3ceb0ee"),
    Remark("tanh", "the Fourier form passes m where the period 2^m is meant", "[SHAFT] code 3ceb0ee"),
    Remark("sigmoid", "9 squarings are set around a reciprocal that calls no exp: no effect", "[CrypTen] code 0.4.0"),
    Remark("layer_norm", "published times replace LayerNorm by BatchNorm: the variance and its root are not in them",
           "[MPCFormer] benchmark code"),
)  # fmt: skip


@lru_cache(maxsize=64)
def _curve(key: str) -> Curve:
    return next(defect for defect in DEFECTS if defect.key == key).curve()


def curve_of(defect: Defect) -> Curve:
    """The defect's curve, computed once."""
    return _curve(defect.key)


def defects_of(function: str) -> list[Defect]:
    """The defects that concern a function."""
    return [defect for defect in DEFECTS if defect.function == function]


def remarks_of(function: str) -> list[Remark]:
    """The remarks that concern a function."""
    return [remark for remark in REMARKS if remark.function == function]
