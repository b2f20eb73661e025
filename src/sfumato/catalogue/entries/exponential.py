"""exp and log."""

from __future__ import annotations

import numpy as np

from sfumato.catalogue.entry import Entry
from sfumato.catalogue.machine import Wave
from sfumato.catalogue.methods import exponential as of
from sfumato.catalogue.prices import Cost

__all__ = [
    "CHEXP",
    "ENTRIES",
    "EVEN_P3",
    "EVEN_P4",
    "EXP_WAVE",
    "LOOSE_EXP",
    "MEASURED",
    "NIMBUS_EXP",
    "measured",
]

MEASURED = "measured with the released code, two parties"

#: CipherDM's Chebyshev coefficients on [-14, 0].
CHEXP = (0.14021878, 0.27541278, 0.22122865, 0.14934221, 0.0907736, 0.04369614, 0.02087868, 0.00996535)
#: Degree 4 on [-5, 0], minimax.
LOOSE_EXP = (0.99438463, 0.93291916, 0.36863989, 0.0686062, 0.00486775)
NIMBUS_EXP = (0.9708981428645548, 0.8318065569430768, 0.26332572942924737, 0.0291786417536755)
#: Minimax for exp on [-7/4, 0].
EVEN_P3 = (0.9986677627, 0.9733441983, 0.4151312279, 0.0735557948)
EVEN_P4 = (0.9998844469, 0.9964932175, 0.4828389062, 0.1364222712, 0.0181590618)
#: exp on [-16, 0] by eight sine and cosine pairs of period 32.
EXP_WAVE = Wave(
    32.0,
    sin=(1.78386, 1.63102, 2.17211, 0.335284, -1.3888, -0.383814, 0.169371, 0.0255556),
    cos=(1.53901, 0.6231, -0.59779, -2.196, -0.583737, 0.600041, 0.14213, -0.0247951),
    constant=1.49765,
)


def interpolated(degree: int = 7) -> tuple[float, ...]:
    """The Chebyshev interpolation of exp on [-14, 0] of this degree."""
    count = degree + 1
    angle = (np.arange(count) + 0.5) * np.pi / count
    y = np.exp(7.0 * (np.cos(angle) - 1.0))
    found = [2.0 / count * float(np.sum(y * np.cos(k * angle))) for k in range(count)]
    return (found[0] / 2, *found[1:])


def measured(rounds: int, sent_bytes: float) -> Cost:
    """A cost measured per element, bytes sent by each of two parties."""
    return Cost(rounds, 16.0 * sent_bytes, MEASURED)


ENTRIES = (
    Entry(
        "crypten.exp", "exp", "[CrypTen] App. A; code 0.4.0", "(1 + x/2^8)^256", of.exp_limit, {"n": 8},
        -16.0, 0.0, "chosen: where the cost was measured", published=measured(8, 64),
        notes="diverges below -512; the error grows as x^2 2^-9 and as rounding 2^(8-f)",
    ),
    Entry(
        "crypten.exp-fixed", "exp", "[CrypTen], mended", "(1 + x/2^7)^128, 0 below -14", of.exp_limit,
        {"n": 7, "cut": -14.0}, -600.0, 0.0, "ours: anything a mask may add",
        notes="7 squarings are best at 16 fraction bits; one comparison ends the divergence",
    ),
    Entry(
        "sdu.exp", "exp", "[SDU] App. B", "(1 + x/2^20)^(2^20)", of.exp_limit, {"n": 20}, -10.0, 0.0,
        "stated: the plot of its Fig. 2b", notes="20 squarings at 16 fraction bits return 1 nearly everywhere",
        uncertain="the 20 iterations are quoted in a review; ring and fraction bits are not readable, "
        "CrypTen's are assumed",
    ),
    Entry(
        "puma.exp", "exp", "[PUMA] Alg. 2", "(1 + x/2^5)^32, 0 below -14", of.exp_limit,
        {"n": 5, "cut": -14.0}, -14.0, 0.0, frac=18, protocol="aby3",
    ),
    Entry(
        "bumblebee.exp", "exp", "[BumbleBee] paper", "(1 + x/2^6)^64, 0 below -13", of.exp_limit,
        {"n": 6, "cut": -13.0}, -13.0, 0.0, frac=18, protocol="two-party",
        uncertain="n = 6 and -13 after a third-party port; the shipped code has n = 5 and -14",
    ),
    Entry(
        "bumblebee.exp-shipped", "exp", "[BumbleBee] code b9c9c86", "(1 + x/2^5)^32, 0 below -14",
        of.exp_limit, {"n": 5, "cut": -14.0}, -14.0, 0.0, frac=18, protocol="two-party",
    ),
    Entry(
        "cipherdm.exp", "exp", "[CipherDM], authors' code", "Chebyshev degree 7 on [-14, 0], 0 below",
        of.exp_chebyshev, {"coefficients": CHEXP, "cut": -14.0}, -14.0, 0.0, frac=18, protocol="aby3",
        notes="0.9515 at 0, and negative down to -0.016 near -11.8",
    ),
    Entry(
        "cipherdm.exp-fixed", "exp", "[CipherDM], mended", "the same form, interpolated", of.exp_chebyshev,
        {"coefficients": interpolated(), "cut": -14.0}, -14.0, 0.0, frac=18, protocol="aby3",
        notes="the same cost with the coefficients of an interpolation",
    ),
    Entry(
        "spu.exp", "exp", "[SPU] code 02ac612", "(1 + x/2^8)^256", of.exp_limit, {"n": 8}, -14.0, 0.0,
        "chosen", frac=18, protocol="aby3", published=Cost(26, 6144.0, "derived from code"),
    ),
    Entry(
        "spu.exp-pade", "exp", "[SPU] code 02ac612", "2^(x log2 e): whole bits, degree 5 on the fraction",
        of.exp_pade, {}, -22.18, 0.0, "chosen: the side that softmax uses", frac=18, protocol="aby3",
        notes="clipped at 22.18 on both sides",
    ),
    Entry(
        "nimbus.exp", "exp", "[Nimbus] code", "a cubic above -3.9, else 0", of.exp_polynomial,
        {"coefficients": NIMBUS_EXP, "cut": -3.9}, -14.0, 0.0, "chosen", frac=13, bits=32, protocol="two-party",
        notes="fitted to a distribution of inputs, one layer's; meant for light fine-tuning",
    ),
    Entry(
        "usg-loose.exp", "exp", "[USG] 2.2", "degree 4 on [-5, 0], 0 below", of.exp_polynomial,
        {"coefficients": LOOSE_EXP, "cut": -5.0}, -14.0, 0.0, "chosen", frac=18, protocol="two-party",
        uncertain="the paper's coefficients are not readable; a minimax fit stands in",
    ),
    Entry(
        "usg-precise.exp", "exp", "[USG] 2.2, [BumbleBee]", "(1 + x/2^6)^64, 0 below -13", of.exp_limit,
        {"n": 6, "cut": -13.0}, -13.0, 0.0, frac=18, protocol="two-party",
        uncertain="described only as of BumbleBee's type",
    ),
    Entry(
        "sigma.exp", "exp", "[SIGMA] code", "two tables of 8 bits, multiplied", of.exp_tables,
        {"reach": 16.0, "frac": 12}, -16.0, 0.0, frac=12, protocol="fss", secure=False,
        uncertain="12 fraction bits are assumed",
    ),
    Entry(
        "curl.exp", "exp", "[Curl] code", "two tables of 256 entries, multiplied", of.exp_tables,
        {"reach": 64.0, "frac": 10}, -64.0, 0.0, frac=16, protocol="fss", secure=False,
        uncertain="the split of the index is assumed as SIGMA's, on 64 as in its range check",
    ),
    Entry(
        "shaft.exp-wave", "exp", "[SHAFT], a public fork's form", "constant and eight sine and cosine pairs",
        of.exp_wave, {"wave": EXP_WAVE}, -16.0, 0.0, frac=16, notes="one opening; useless outside its range",
        published=Cost(1, 128.0, MEASURED),
    ),
    Entry(
        "even.exp-p3", "exp", "ours", "p3(x/8)^8, 0 below -14", of.exp_even_power,
        {"coefficients": EVEN_P3, "cut": -14.0}, -14.0, 0.0, frac=18, protocol="aby3", cut_constants=False,
        notes="an even power is never negative",
    ),
    Entry(
        "even.exp-p4", "exp", "ours", "p4(x/8)^8, 0 below -14", of.exp_even_power,
        {"coefficients": EVEN_P4, "cut": -14.0}, -14.0, 0.0, frac=18, protocol="aby3", cut_constants=False,
    ),
    Entry(
        "crypten.log", "log", "[CrypTen] code 0.4.0", "two Householder steps of order 8", of.log_crypten, {},
        1e-2, 1e2, "chosen: where the cost was measured, and below", published=measured(32, 368),
    ),
    Entry(
        "crypten.log-small", "log", "[CrypTen] code 0.4.0, input_in_01", "log(100 x) - log 100", of.log_small,
        {}, 1e-3, 1.0,
    ),
    Entry(
        "spu.log", "log", "[SPU] code 02ac612, MINMAX", "exponent, and degree 8 on the mantissa",
        of.log_minmax, {}, 1e-3, 1e4, "chosen", frac=18, protocol="aby3",
    ),
    Entry(
        "spu.log-pade", "log", "[SPU] code 02ac612, PADE", "exponent, and P/Q on the mantissa", of.log_pade,
        {}, 1e-3, 1e4, "chosen", frac=18, protocol="aby3",
    ),
)  # fmt: skip
