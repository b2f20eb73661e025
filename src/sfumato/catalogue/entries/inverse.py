"""Reciprocal, inverse square root, square root."""

from __future__ import annotations

from sfumato.catalogue.entries.exponential import measured
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.methods import inverse as of
from sfumato.catalogue.methods import rows
from sfumato.catalogue.prices import Cost

__all__ = ["ENTRIES", "SDU_DIVISORS", "scaled"]

#: Divisors d that SDU's reciprocal is listed with.
SDU_DIVISORS = (4, 16, 64, 4096)


def scaled(d: float, *, frac: int = 16, root: bool = False) -> Entry:
    """SDU's scaling of CrypTen's kernel by the public divisor d."""
    if root:
        return Entry(
            f"sdu.rsqrt-d{d:g}", "rsqrt", "[SDU] 3.1", f"S(x/{d:g})/sqrt({d:g}), 3 steps", of.rsqrt_scaled,
            {"d": d}, 0.085 * d, 159.0 * d, "derived from the kernel's", frac,
            notes="exact for norms apart from rounding", uncertain="the form follows from a review's sqrt(d)",
        )  # fmt: skip
    return Entry(
        f"sdu.reciprocal-d{d:g}", "reciprocal", "[SDU] 3.1", f"R(x/{d:g})/{d:g}, 10 steps",
        of.reciprocal_scaled, {"d": d}, 1e-3 * d, 86.0 * d, "derived: where its kernel keeps 10 % at f = 16",
        frac,
        notes="rho(x/d) + 2^-f d/x: take the smallest d that covers the range",
        uncertain="which d the paper uses in which layer is not readable",
    )  # fmt: skip


ENTRIES = (
    Entry(
        "crypten.reciprocal", "reciprocal", "[CrypTen] App. A; code 0.4.0", "10 Newton steps, any sign",
        of.reciprocal_newton, {"signed": True}, 1e-3, 500.0, "stated by its maintainers, about 500",
        published=measured(38, 552), notes="diverges from 256.5 on: exp(1 - 2x) leaves its range",
    ),
    Entry(
        "crypten.reciprocal-positive", "reciprocal", "[CrypTen] code 0.4.0, all_pos", "10 Newton steps",
        of.reciprocal_newton, {}, 0.1, 100.0, "chosen: where the cost was measured", published=measured(28, 304),
    ),
    Entry(
        "crypten.reciprocal-log", "reciprocal", "[CrypTen] code 0.4.0, method log", "exp(-log x)",
        of.reciprocal_log, {}, 0.1, 100.0, "chosen",
    ),
    Entry(
        "crypten.reciprocal-small", "reciprocal", "[CrypTen] code 0.4.0, input_in_01", "64 R(64 x)",
        of.reciprocal_small, {}, 1e-3, 1.0,
    ),
    Entry(
        "crypten.reciprocal-fixed", "reciprocal", "[CrypTen], mended", "R(x/64)/64", of.reciprocal_scaled,
        {"d": 64.0}, 1.0, 4096.0, "ours: row sums of up to 4,096 exponentials",
    ),
    *(scaled(float(d)) for d in SDU_DIVISORS),
    Entry(
        "secformer.reciprocal", "reciprocal", "[SecFormer] 3.3", "Goldschmidt, eta 5000, 13 steps",
        of.reciprocal_goldschmidt, {"eta": 5000.0, "steps": 13}, 5.0, 9995.0, "derived from eta",
        notes="1 is only 13 units of 2^-16 after deflation", uncertain="eta and steps recalled, not re-read",
    ),
    Entry(
        "secformer.reciprocal-released", "reciprocal", "[SecFormer] code 4c1db49",
        "Goldschmidt without deflation, 13 steps", of.reciprocal_goldschmidt, {"eta": 1.0, "steps": 13},
        1.0, 4096.0, "chosen: sums that softmax gives it", notes="diverges from 2 on",
    ),
    Entry(
        "spu.reciprocal", "reciprocal", "[SPU] code 02ac612", "normalised, 2 Goldschmidt steps",
        of.reciprocal_normalised, {"steps": 2}, 1e-3, 4096.0,
        "chosen: where 1/x keeps six bits; stated: below 2^18", frac=18, protocol="aby3",
        published=Cost(51, 12500.0, "derived from code"), notes="the input must stay below 2^f",
    ),
    Entry(
        "ditto.reciprocal", "reciprocal", "[Ditto] code d7b1e2c", "normalised, 5 Goldschmidt steps",
        of.reciprocal_normalised, {"steps": 5}, 1e-3, 4096.0,
        "chosen: where 1/x keeps six bits; stated: below 2^18", frac=18, protocol="aby3",
    ),
    Entry(
        "sigma.reciprocal", "reciprocal", "[SIGMA] code", "a table on 16 bits, 6 of them fraction",
        of.reciprocal_table, {"frac": 6, "high": 1024.0}, 1.0, 1024.0, frac=12, protocol="fss", secure=False,
    ),
    Entry(
        "crypten.rsqrt", "rsqrt", "[CrypTen] App. A; code 0.4.0", "3 Newton steps", of.rsqrt_newton,
        {"steps": 3}, 0.1, 100.0, "chosen: where the cost was measured", published=measured(17, 184),
        notes="below 1 % only on [0.085, 159]; garbage above 200",
    ),
    Entry(
        "crypten.rsqrt-by-root", "rsqrt", "[CrypTen], as users compose it", "sqrt().reciprocal()",
        rows.rsqrt_by_root, {}, 0.1, 100.0, "chosen: where the cost was measured", published=measured(56, 752),
    ),
    *(scaled(float(d), root=True) for d in (4, 64)),
    Entry(
        "shaft.rsqrt", "rsqrt", "[SHAFT] code 3ceb0ee", "CrypTen's, 5 Newton steps", of.rsqrt_newton,
        {"steps": 5}, 0.0185, 184.0, published=measured(23, 264),
    ),
    Entry(
        "shaft.rsqrt-8", "rsqrt", "[CrypTen] with 8 steps", "CrypTen's, 8 Newton steps", of.rsqrt_newton,
        {"steps": 8}, 0.0017, 199.0,
    ),
    Entry(
        "secformer.rsqrt", "rsqrt", "[SecFormer] 3.3", "Goldschmidt, eta 2000, 11 steps",
        of.rsqrt_goldschmidt, {"eta": 2000.0, "steps": 11}, 2.0, 5890.0, "derived from eta",
        uncertain="eta and steps recalled, not re-read",
    ),
    Entry(
        "secformer.rsqrt-released", "rsqrt", "[SecFormer] code 4c1db49",
        "Goldschmidt without deflation, 8 steps", of.rsqrt_goldschmidt, {"eta": 1.0, "steps": 8},
        0.011, 10.0, "chosen: variances that layers have", notes="diverges from 3 on",
    ),
    Entry(
        "cryptorch.rsqrt", "rsqrt", "[CrypTorch] code 74684d7", "CrypTen's, started from 0.05 above 100",
        of.rsqrt_restarted, {}, 0.085, 400.0,
    ),
    Entry(
        "cryptorch.rsqrt-v2", "rsqrt", "[CrypTorch] code 74684d7", "CrypTen's on x, x/100 or x/10,000",
        of.rsqrt_reduced, {}, 0.085, 1e6,
    ),
    Entry(
        "spu.rsqrt", "rsqrt", "[SPU] code 02ac612", "normalised, degree 4", of.rsqrt_normalised, {},
        1e-3, 2.0**16, "chosen", frac=18, protocol="aby3",
        published=Cost(38, 14200.0, "derived from code"),
    ),
    Entry(
        "spu.rsqrt-cheap", "rsqrt", "[SPU] code 02ac612", "normalised, degree 2", of.rsqrt_normalised,
        {"coefficients": of.RSQRT_CHEAP}, 1e-3, 2.0**16, "chosen", frac=18, protocol="aby3",
    ),
    Entry(
        "sigma.rsqrt", "rsqrt", "[SIGMA] code", "a table of 2^13: 7 mantissa and 6 exponent bits",
        of.rsqrt_table, {"mantissa": 7}, 1e-3, 1e6, "chosen", frac=12, protocol="fss", secure=False,
    ),
    Entry(
        "quxu.rsqrt-taylor", "rsqrt", "[QuXu23]", "first-order start at 10, 7 Newton steps", of.rsqrt_taylor,
        {"a": 10.0, "steps": 7}, 0.1, 29.0, "derived: 0 < x < 3a", protocol="ckks", cut_constants=False,
        uncertain="the expansion's degree and point were not read; first order and 10 are ours",
    ),
    Entry(
        "quxu.rsqrt-rational", "rsqrt", "[QuXu23]", "(u + 3)/(3u + 1) at 1, 2 Newton steps",
        of.rsqrt_rational, {"a": 1.0, "steps": 2, "division": 6}, 0.1, 4.5, "ours",
        protocol="ckks", cut_constants=False,
        uncertain="the rational function was not read; the [1/1] form at 1 is ours",
    ),
    Entry(
        "crypten.sqrt", "sqrt", "[CrypTen] code 0.4.0", "x rsqrt(x)", of.sqrt_newton, {}, 0.1, 100.0,
        "chosen: where the cost was measured", published=measured(18, 200),
    ),
    Entry(
        "spu.sqrt", "sqrt", "[SPU] code 02ac612", "rsqrt and one Goldschmidt step", of.sqrt_normalised, {},
        1e-3, 2.0**16, "chosen", frac=18, protocol="aby3",
    ),
)  # fmt: skip
