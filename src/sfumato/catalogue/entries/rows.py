"""Softmax and layer norm."""

from __future__ import annotations

from typing import Any

from sfumato.catalogue.entries.exponential import CHEXP, EVEN_P4, LOOSE_EXP, NIMBUS_EXP, measured
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.methods import exponential, inverse
from sfumato.catalogue.methods import rows as of
from sfumato.catalogue.prices import Cost

__all__ = ["ENTRIES"]

_SPU: dict[str, Any] = {"frac": 18, "protocol": "aby3"}
_TWO: dict[str, Any] = {"frac": 18, "protocol": "two-party"}


def _softmax(exp: Any, exp_options: dict[str, Any], reciprocal: Any, **options: Any) -> dict[str, Any]:
    return {
        "exp": exp, "exp_options": exp_options, "reciprocal": reciprocal,
        "reciprocal_options": options.pop("reciprocal_options", {}), **options,
    }  # fmt: skip


_NORMALISED = {"signed": False}
_LIMIT5 = _softmax(
    exponential.exp_limit, {"n": 5, "cut": -14.0}, inverse.reciprocal_normalised,
    reciprocal_options=_NORMALISED, epsilon=1e-6,
)  # fmt: skip

ENTRIES = (
    Entry(
        "crypten.softmax", "softmax", "[CrypTen] code 0.4.0", "max, exp with 8 squarings, Newton 10",
        of.softmax_max, _softmax(exponential.exp_limit, {"n": 8}, inverse.reciprocal_newton), -8.0, 8.0,
        "chosen", published=measured(116, 744),
        notes="published cost at 128 scores, with an argmax that softmax never uses; diverges for sums above 256",
    ),
    Entry(
        "sdu.softmax", "softmax", "[SDU] 3.1", "CrypTen's, the sum divided by 64", of.softmax_max,
        _softmax(exponential.exp_limit, {"n": 8}, inverse.reciprocal_scaled, reciprocal_options={"d": 64.0}),
        -8.0, 8.0, "chosen", uncertain="d = 64 is ours, right for up to 4,096 scores",
    ),
    Entry(
        "sdu.softmax-doubted", "softmax", "[SDU] 3.1, App. B", "20 squarings, the sum divided by 4,096",
        of.softmax_max,
        _softmax(exponential.exp_limit, {"n": 20}, inverse.reciprocal_scaled, reciprocal_options={"d": 4096.0}),
        -8.0, 8.0, "chosen", uncertain="the settings that the reviewers doubted; d at the number of keys is a guess",
        notes="20 squarings lose every bit of a 16-bit fraction, and d = 4,096 leaves 6 % at a sum of 1",
    ),
    Entry("puma.softmax", "softmax", "[PUMA] Alg. 2", "max, exp with 5 squarings above -14, one division a row",
          of.softmax_max, _LIMIT5, -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "ditto.softmax", "softmax", "[Ditto] 2.5; code d7b1e2c", "PUMA's, the division by 5 Goldschmidt steps",
        of.softmax_max,
        _softmax(exponential.exp_limit, {"n": 5, "cut": -14.0}, inverse.reciprocal_normalised,
                 reciprocal_options={"signed": False, "steps": 5}, epsilon=1e-6),
        -8.0, 8.0, "chosen", notes="the maximum is found in 32 bits with 8 of fraction, the rest in 64 with 18",
        **_SPU,
    ),
    Entry(
        "cipherdm.softmax", "softmax", "[CipherDM], authors' code", "max, Chebyshev degree 7, division",
        of.softmax_max,
        _softmax(exponential.exp_chebyshev, {"coefficients": CHEXP, "cut": -14.0},
                 inverse.reciprocal_normalised),
        -8.0, 8.0, "chosen", notes="denominators can be negative; the script as published never installs it",
        **_SPU,
    ),
    Entry(
        "cipherdm.softmax-clamped", "softmax", "[CipherDM], mended", "the same, negative exponentials made 0",
        of.softmax_max,
        _softmax(exponential.exp_chebyshev, {"coefficients": CHEXP, "cut": -14.0, "clamped": True},
                 inverse.reciprocal_normalised),
        -8.0, 8.0, "chosen", notes="one comparison more, and denominators are positive", **_SPU,
    ),
    Entry(
        "cipherdm.softmax-even", "softmax", "[CipherDM], mended", "p4(x/8)^8 in place of the series",
        of.softmax_max,
        _softmax(exponential.exp_even_power, {"coefficients": EVEN_P4, "cut": -14.0},
                 inverse.reciprocal_normalised),
        -8.0, 8.0, "chosen", notes="never negative, at as many products", **_SPU,
    ),
    Entry(
        "bumblebee.softmax", "softmax", "[BumbleBee] paper", "max, exp with 6 squarings above -13, division",
        of.softmax_max,
        _softmax(exponential.exp_limit, {"n": 6, "cut": -13.0}, inverse.reciprocal_normalised,
                 reciprocal_options=_NORMALISED),
        -8.0, 8.0, "chosen", uncertain="n and cut after a third-party port", **_TWO,
    ),
    Entry(
        "mpcformer.softmax-2quad", "softmax", "[MPCFormer] 4.1", "(x + 5)^2 over its row sum", of.softmax_quad,
        {}, -3.0, 3.0, "chosen", published=Cost(40, None, "rounds measured with the released code"),
        another=True, notes="another function: it needs distillation; CrypTen's reciprocal diverges on its sums",
    ),
    Entry(
        "mpcformer.softmax-2relu", "softmax", "[MPCFormer] 4.1", "ReLU(x) over its row sum", of.softmax_relu,
        {}, -3.0, 3.0, "chosen", published=Cost(48, None, "rounds measured with the released code"),
        another=True, notes="another function: it needs distillation",
    ),
    Entry(
        "secformer.softmax-2quad", "softmax", "[SecFormer] 3.3", "2Quad by Goldschmidt, eta 5000, 13 steps",
        of.softmax_quad_goldschmidt, {"eta": 5000.0, "steps": 13}, -3.0, 3.0, "chosen",
        published=Cost(27, None, "rounds measured with CrypTen"), another=True,
        notes="another function: it needs distillation", uncertain="eta and steps recalled, not re-read",
    ),
    Entry(
        "secformer.softmax-2quad-released", "softmax", "[SecFormer] code 4c1db49",
        "2Quad by Goldschmidt without deflation", of.softmax_quad_goldschmidt, {"eta": 1.0, "steps": 13},
        -3.0, 3.0, "chosen", another=True, notes="diverges: the sums are above 2",
    ),
    Entry(
        "shaft.softmax", "softmax", "[SHAFT] code 3ceb0ee", "16 Euler steps from uniform, scores in [-4, 12]",
        of.softmax_ode, {"steps": 16, "low": -4.0, "high": 12.0}, -4.0, 12.0, published=measured(41, 976),
        notes="constant rounds; needs many more steps for peaked rows",
    ),
    Entry("spu.softmax", "softmax", "[SPU], lowered from JAX", "max, exp with 8 squarings, division",
          of.softmax_max,
          _softmax(exponential.exp_limit, {"n": 8}, inverse.reciprocal_normalised,
                   reciprocal_options=_NORMALISED),
          -8.0, 8.0, "chosen", **_SPU),
    Entry("spu.softmax-pade", "softmax", "[SPU], exp PADE", "max, exp by whole bits, division", of.softmax_max,
          _softmax(exponential.exp_pade, {}, inverse.reciprocal_normalised, reciprocal_options=_NORMALISED),
          -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "iron.softmax", "softmax", "[Iron]", "tree maximum, exp by tables, reciprocal", of.softmax_max,
        _softmax(exponential.exp_tables, {"reach": 16.0, "frac": 12}, inverse.reciprocal_normalised,
                 reciprocal_options=_NORMALISED),
        -8.0, 8.0, "chosen", frac=12, protocol="two-party", secure=False,
        uncertain="fraction bits and table sizes assumed",
    ),
    Entry(
        "sigma.softmax", "softmax", "[SIGMA] code", "tournament, exp and reciprocal by tables", of.softmax_max,
        _softmax(exponential.exp_tables, {"reach": 16.0, "frac": 12}, inverse.reciprocal_table,
                 reciprocal_options={"frac": 6, "high": 1024.0}),
        -8.0, 8.0, "chosen", frac=12, protocol="fss", secure=False, uncertain="12 fraction bits assumed",
    ),
    Entry(
        "nimbus.softmax", "softmax", "[Nimbus] code", "max, a cubic above -3.9, division", of.softmax_max,
        _softmax(exponential.exp_polynomial, {"coefficients": NIMBUS_EXP, "cut": -3.9},
                 inverse.reciprocal_normalised, reciprocal_options=_NORMALISED),
        -8.0, 8.0, "chosen", notes="meant for light fine-tuning; division here at 18 fraction bits", **_TWO,
    ),
    Entry(
        "usg-precise.softmax", "softmax", "[USG] 2.2", "max, exp with 6 squarings above -13, division",
        of.softmax_max,
        _softmax(exponential.exp_limit, {"n": 6, "cut": -13.0}, inverse.reciprocal_normalised,
                 reciprocal_options=_NORMALISED),
        -8.0, 8.0, "chosen", uncertain="described only as of BumbleBee's type", **_TWO,
    ),
    Entry(
        "usg-loose.softmax", "softmax", "[USG] 2.2", "max, degree 4 above -5, division", of.softmax_max,
        _softmax(exponential.exp_polynomial, {"coefficients": LOOSE_EXP, "cut": -5.0},
                 inverse.reciprocal_normalised, reciprocal_options=_NORMALISED),
        -8.0, 8.0, "chosen", uncertain="the exponential is a stand-in", **_TWO,
    ),
    # ---- layer norm
    Entry(
        "crypten.layer-norm", "layer_norm", "[CrypTen], as users compose it", "sqrt().reciprocal()",
        of.layer_norm, {"rsqrt": of.rsqrt_by_root, "options": {}, "exact_mean": True}, -8.0, 8.0, "chosen",
        published=Cost(58, 272.0, "measured with the released code, two parties, rows of 768"),
    ),
    Entry(
        "crypten.layer-norm-rsqrt", "layer_norm", "[CrypTen], as users compose it", "inv_sqrt, 3 steps",
        of.layer_norm, {"rsqrt": of.rsqrt_steps, "options": {"steps": 3}, "exact_mean": True}, -8.0, 8.0,
        "chosen", published=Cost(19, 260.8, "measured with the released code, two parties, rows of 768"),
    ),
    Entry(
        "sdu.layer-norm", "layer_norm", "[SDU] 3.1", "inv_sqrt of var/4", of.layer_norm,
        {"rsqrt": inverse.rsqrt_scaled, "options": {"d": 4.0}, "exact_mean": True}, -8.0, 8.0, "chosen",
        uncertain="d per layer is not readable; 4 is ours",
    ),
    Entry(
        "secformer.layer-norm", "layer_norm", "[SecFormer] 3.3", "Goldschmidt, eta 2000, 11 steps",
        of.layer_norm,
        {"rsqrt": inverse.rsqrt_goldschmidt, "options": {"eta": 2000.0, "steps": 11}, "exact_mean": True},
        -8.0, 8.0, "chosen", published=Cost(34, None, "rounds measured with CrypTen, rows of 768"),
        uncertain="eta and steps recalled, not re-read",
    ),
    Entry(
        "shaft.layer-norm", "layer_norm", "[SHAFT] code 3ceb0ee", "inv_sqrt, 5 steps", of.layer_norm,
        {"rsqrt": of.rsqrt_steps, "options": {"steps": 5}, "exact_mean": True}, -8.0, 8.0, "chosen",
    ),
    Entry(
        "spu.layer-norm", "layer_norm", "[SPU], lowered from JAX; [PUMA] 4.4", "normalised rsqrt",
        of.layer_norm, {"rsqrt": inverse.rsqrt_normalised, "options": {}, "exact_mean": False}, -8.0, 8.0,
        "chosen", notes="1/n is cut to 18 fraction bits: 0.9375 for n = 40,960", **_SPU,
    ),
)  # fmt: skip
