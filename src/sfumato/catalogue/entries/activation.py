"""Sigmoid, tanh, erf, GELU, SiLU, Mish."""

from __future__ import annotations

import math
from typing import Any

from sfumato.catalogue.entries.exponential import MEASURED, measured
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.machine import Wave
from sfumato.catalogue.methods import activation as of
from sfumato.catalogue.prices import Cost

__all__ = ["ENTRIES"]

SPU_TANH = (1.2514045938932097, -0.3655987797163166, 0.17253141478140663, -0.08943445792774211,
            0.047703017901250824, -0.025830290571688078, 0.014338801903468182, -0.008541730970059077,
            0.0061230685785789475)  # fmt: skip
BOLT_TANH = (-0.0024920889620412097, 1.0542492677156243, -0.17616532856475706, -0.20093640347818847,
             0.09948747962825866, -0.013232131886235352)  # fmt: skip
CRYPTORCH_ERF = (-0.0011012511, 1.1440618495, -0.0115689833, -0.4894013351, 0.2340916322, -0.0336441749)
SECFORMER_ERF = Wave(20.0, sin=(1.25772, -0.0299154, 0.382155, -0.0519123, 0.196033, -0.0624557, 0.118029))
TANH_WAVE = Wave(
    16.0, linear=0.12503186,
    sin=(0.597807772, 0.249993014, 0.126497022, 0.0671287393, 0.0359861523, 0.0194353272, 0.0104457855,
         0.00566907941, 0.00303016567, 0.00166115831, 0.000872903587, 0.000492551782),
)  # fmt: skip
SIGMOID_WAVE = Wave(
    16.0, constant=0.5, linear=0.0624801151,
    sin=(0.249984614, 0.0670782568, 0.0194006578, 0.00566145155, 0.00163126762, 0.000492295253),
)  # fmt: skip
SIGMOID_WIDE = Wave(
    32.0, constant=0.5, linear=0.0312533,
    sin=(0.298951, 0.124973, 0.0632643, 0.0335526, 0.0180024, 0.00970993, 0.00522946, 0.00282886, 0.00152006,
         0.000826181, 0.000440367, 0.000242778, 0.000126156, 0.000100335),
)  # fmt: skip
ERF_WAVE = Wave(8.0, linear=0.250011, sin=(0.545611, 0.171788, 0.0529557, 0.013505, 0.00268844, 0.000421253))
PUMA_LEFT = (-0.5054031199708174, -0.42226581151983866, -0.11807612951181953, -0.011034134030615728)
PUMA_MIDDLE = (0.008526321541038084, 0.5, 0.3603292692789629, 0.0, -0.037688200365904236, 0.0,
               0.0018067462606141187)  # fmt: skip
P4 = (0.001620808531841547, -0.03798164612714154, 0.5410550166368381, -0.18352506127082727,
      0.020848611754127593)  # fmt: skip
#: In x^2; x / 2 is added.
NEXUS = (
    2.25775755e-4,
    0.396880960,
    -0.0637042698,
    0.00838841647,
    -7.17830961e-4,
    3.49617829e-5,
    -7.26059653e-7,
)
SHAFT_GELU = Wave(8.0, sin=(-0.0818, -0.0809, -0.0424, -0.0176, -0.0079, -0.0043, -0.0026, -0.0017))
SHAFT_SILU = Wave(
    16.0, sin=(-0.1299, -0.1220, -0.0743, -0.0394, -0.0216, -0.0118, -0.0074, -0.0044, -0.0033, -0.0021,
               -0.0018, -0.0011),
)  # fmt: skip
GELU_WAVE = Wave(
    16.0, constant=1.2980376, linear=0.5, quadratic=0.0314395,
    cos=(-0.8612208, -0.2419222, -0.1068919, -0.0514688, -0.022699, -0.0093347, -0.0031246, -0.0011254),
)  # fmt: skip
SILU_WAVE = Wave(
    16.0, constant=1.2272416, linear=0.5, quadratic=0.0314216,
    cos=(-0.9268083, -0.2145036, -0.060827, -0.0178441, -0.0051164, -0.0015364, -0.0004166, -0.0001526),
)  # fmt: skip
SPU_SILU_LEFT = (-0.3067541139982155, -0.0819767021525476, -0.0055465625580307)
SPU_SILU_MIDDLE = (
    0.0085064025895951,
    0.5,
    0.2281430841728270,
    0.0,
    -0.011113046708173,
    0.0,
    0.0002743776353465,
)
LOOSE_SILU = (7.81103786e-3, 4.97825163e-1, 2.29582614e-1, 1.58068443e-3, -1.17624371e-2, -2.50819763e-4,
              3.64227131e-4, 1.04868493e-5, -3.56049972e-6)  # fmt: skip
CIPHERDM_SILU = ((-0.52212664, -0.16910363, -0.01420163),
                 (0.03453821, 0.49379432, 0.19784596, 0.0, -0.00602401, 0.0, 0.00008032))  # fmt: skip
REFITTED_SILU = ((-0.51504435, -0.16518029, -0.01369441),
                 (0.03872406, 0.5, 0.19288399, 0.0, -0.00570959, 0.0, 0.0000737518))  # fmt: skip
CIPHERDM_MISH = ((-0.55684445, -0.18375535, -0.01572019),
                 (0.07559242, 0.5490205, 0.20152583, 0.0, -0.00735309, 0.0, 0.00010786))  # fmt: skip
BUMBLEBEE_SIGMOID = (0.49352908920523014, 0.3028510171823098, -0.06808619212463336, 0.006747908074344234,
                     -0.0002472776978734074)  # fmt: skip
#: Our even quartic for [-2.7, 2.7]: x / 2 + these powers of x^2 (least maximum error).
LOOSE_GELU = (0.02752993, 0.5, 0.30869321, 0.0, -0.01815428)

_SPU: dict[str, Any] = {"frac": 18, "protocol": "aby3"}

ENTRIES = (
    # ---- sigmoid
    Entry(
        "crypten.sigmoid", "sigmoid", "[CrypTen] code 0.4.0", "1/(1 + exp(-|x|)), 3 Newton steps",
        of.sigmoid_crypten, {}, -4.0, 4.0, "chosen: where the cost was measured", published=measured(23, 376),
    ),
    Entry(
        "crypten.sigmoid-chebyshev", "sigmoid", "[CrypTen] code 0.4.0", "tanh(x/2)/2 + 1/2, Chebyshev 32",
        of.sigmoid_chebyshev, {}, -2.0, 2.0, "derived: tanh on [-1, 1]",
    ),
    Entry("spu.sigmoid", "sigmoid", "[SPU] code 02ac612", "1/(1 + exp(-x)), 8 squarings", of.sigmoid_exp, {},
          -8.0, 8.0, "chosen", **_SPU),
    Entry("spu.sigmoid-pade", "sigmoid", "[SPU] code 02ac612", "1/(1 + exp(-x)), exp PADE", of.sigmoid_exp,
          {"pade": True}, -8.0, 8.0, "chosen", **_SPU),
    Entry("spu.sigmoid-mm1", "sigmoid", "[SPU] code 02ac612, MM1", "1/2 + x/8", of.sigmoid_line,
          {"slope": 0.125, "clip": None}, -4.0, 4.0, "chosen", **_SPU),
    Entry("spu.sigmoid-seg3", "sigmoid", "[SPU] code 02ac612, SEG3", "1/2 + x/8, clipped at 4",
          of.sigmoid_line, {"slope": 0.125, "clip": 4.0}, -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "bumblebee.sigmoid", "sigmoid", "[BumbleBee] code b9c9c86", "degree 4 in |x| below 8, mirrored",
        of.sigmoid_pieces, {"coefficients": BUMBLEBEE_SIGMOID, "reach": 8.0, "extra": 3}, -12.0, 12.0, "chosen",
        frac=18, protocol="two-party",
    ),
    Entry(
        "antchain.sigmoid", "sigmoid", "[MorseSTF] code 21b122f", "odd, degree 9", of.odd_polynomial,
        {"coefficients": (0.2159198015, -0.0082176259, 0.0001825597, -1.8848e-6, 7.2e-9), "constant": 0.5},
        -8.0, 8.0, frac=16, notes="the last coefficient is below one unit at 16 fraction bits",
        uncertain="its range is read as about 8",
    ),
    Entry("shaft.sigmoid-wave", "sigmoid", "[SHAFT], a public fork", "a line and six sines of period 16",
          of.wave_of, {"wave": SIGMOID_WAVE}, -8.0, 8.0, published=Cost(1, 128.0, MEASURED)),
    Entry("shaft.sigmoid-wide", "sigmoid", "[SHAFT] form, our fit", "a line and 14 sines of period 32",
          of.wave_of, {"wave": SIGMOID_WIDE}, -16.0, 16.0, published=Cost(1, 128.0, MEASURED)),
    # ---- tanh
    Entry(
        "crypten.tanh", "tanh", "[CrypTen] code 0.4.0", "2 sigmoid(2x) - 1", of.tanh_crypten, {}, -4.0, 4.0,
        "chosen: where the cost was measured", published=measured(23, 376),
    ),
    Entry(
        "crypten.tanh-chebyshev", "tanh", "[CrypTen] code 0.4.0", "Chebyshev 32 on [-1, 1], clipped",
        of.tanh_chebyshev, {}, -1.0, 1.0, published=measured(25, 712),
        notes="outside [-1, 1] the series grows and the clip returns -1 or 1",
    ),
    Entry("spu.tanh", "tanh", "[SPU] code 02ac612", "nine odd Chebyshev terms, clipped to [-5, 5]",
          of.tanh_clipped_chebyshev, {"coefficients": SPU_TANH, "reach": 5.0}, -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "bolt.tanh", "tanh", "[BOLT], after [CrypTorch] code", "degree 5 in |x| up to 2.855, else 1",
        of.mirrored, {"coefficients": BOLT_TANH, "reach": 2.855}, -8.0, 8.0, "chosen", frac=16,
        protocol="two-party",
    ),
    Entry("shaft.tanh-wave", "tanh", "[SHAFT], a public fork", "a line and 12 sines of period 16", of.wave_of,
          {"wave": TANH_WAVE}, -8.0, 8.0, published=Cost(1, 128.0, MEASURED)),
    # ---- erf
    Entry(
        "crypten.erf", "erf", "[CrypTen] code 0.4.0", "Taylor, 8 terms beyond x, as released", of.erf_taylor,
        {"released": True}, -1.0, 1.0, "chosen", published=measured(34, 376),
        notes="odd powers above 3 are computed as other powers",
    ),
    Entry("crypten.erf-fixed", "erf", "[CrypTen], mended", "Taylor, 8 terms beyond x", of.erf_taylor,
          {"released": False}, -1.81, 1.81, "derived: error below 0.01",
          notes="at 16 fraction bits the last two coefficients are 0"),
    Entry("spu.erf", "erf", "[SPU] code 02ac612", "1 - q(|x|)^-4 below 3, else 1", of.erf_rational, {},
          -6.0, 6.0, "chosen", **_SPU),
    Entry("cryptorch.erf", "erf", "[CrypTorch] code 74684d7", "degree 5 in |x| up to 2.33, else 1", of.mirrored,
          {"coefficients": CRYPTORCH_ERF, "reach": 2.33}, -6.0, 6.0, "chosen"),
    Entry(
        "secformer.erf", "erf", "[SecFormer] 3.3", "seven sines of period 20 up to 1.7, else 1",
        of.wave_clipped, {"wave": SECFORMER_ERF, "reach": 1.7}, -6.0, 6.0, "chosen",
        uncertain="the threshold 1.7 recalled; the released code has 2.5",
    ),
    Entry("shaft.erf-wave", "erf", "[SHAFT] form, our fit", "a line and six sines of period 8", of.wave_of,
          {"wave": ERF_WAVE}, -4.0, 4.0, published=Cost(1, 128.0, MEASURED)),
    # ---- GELU
    Entry("crypten.gelu", "gelu", "[CrypTen], as users compose it", "by its erf as released", of.gelu_erf,
          {"released": True}, -2.0, 2.0, "chosen"),
    Entry("crypten.gelu-fixed", "gelu", "[CrypTen], mended", "by its erf with the powers mended", of.gelu_erf,
          {"released": False}, -2.56, 2.56, "derived: erf below 1.81"),
    Entry(
        "crypten.gelu-tanh", "gelu", "[CrypTen], as users compose it", "tanh form, its tanh", of.gelu_tanh,
        {"how": "crypten"}, -4.0, 4.0, "chosen: where the cost was measured", published=measured(26, 416),
    ),
    Entry(
        "sdu.gelu", "gelu", "[SDU] 3.1", "tanh form, CrypTen's tanh", of.gelu_tanh, {"how": "crypten"},
        -10.0, 10.0, "stated: the plot of its Fig. 2b",
        uncertain="the exponential inside is said to take 20 iterations; CrypTen's 8 are used here",
    ),
    Entry(
        "puma.gelu", "gelu", "[PUMA] Alg. 1", "0, cubic, degree 6, x; cuts -4, -1.95, 3", of.even_piece,
        {"cuts": (-4.0, -1.95, 3.0), "left": PUMA_LEFT, "middle": PUMA_MIDDLE}, -5.0, 5.0, "chosen",
        published=Cost(58, 11040.0, "derived from code"), notes="its paper states a maximum below 0.01403",
        **_SPU,
    ),
    Entry(
        "bolt.gelu", "gelu", "[BOLT], after [CrypTorch] code", "x/2 + degree 4 in |x| up to 2.7",
        of.half_plus_even, {"coefficients": P4, "reach": 2.7}, -8.0, 8.0, "chosen", protocol="two-party",
    ),
    Entry("bolt.gelu-two", "gelu", "[BOLT], after [CrypTorch] code", "the same with two products",
          of.bolt_gelu, {}, -8.0, 8.0, "chosen", protocol="two-party"),
    Entry(
        "shaft.bolt-gelu", "gelu", "[SHAFT] code 3ceb0ee, its BOLT baseline", "two products, miswired",
        of.bolt_gelu, {"miswired": True}, -8.0, 8.0, "chosen",
        notes="the second bracket is multiplied by |x| instead of the first",
    ),
    Entry(
        "bumblebee.gelu", "gelu", "[BumbleBee] code b9c9c86", "x/2 + degree 4 in |x| up to 3", of.half_plus_even,
        {"coefficients": P4, "reach": 3.0}, -8.0, 8.0, "chosen", frac=12, bits=32, protocol="two-party",
        notes="fitted on 2.7 and cut at 3; 32-bit ring",
    ),
    Entry(
        "bumblebee.gelu-paper", "gelu", "[BumbleBee] paper, after [Nimbus] code",
        "PUMA's pieces; cuts -5, -1.97, 3", of.even_piece,
        {"cuts": (-5.0, -1.97, 3.0), "left": PUMA_LEFT, "middle": PUMA_MIDDLE}, -8.0, 8.0, "chosen", frac=18,
        protocol="two-party",
    ),
    Entry(
        "iron.gelu", "gelu", "[Iron]", "tanh form, exp by tables", of.gelu_tanh, {"how": "table"}, -8.0, 8.0,
        "chosen", frac=12, protocol="two-party", secure=False,
        published=Cost(None, None, "6 look-ups, 6 products, 5 truncations, 5 comparisons"),
        uncertain="fraction bits assumed; its tables are taken as exact",
    ),
    Entry(
        "mpcformer.gelu", "gelu", "[MPCFormer] 4.1, training code", "Quad: x^2/8 + x/4 + 1/2", of.whole_line,
        {"coefficients": (0.5, 0.25, 0.125)}, -3.0, 3.0, "chosen", published=measured(1, 8), another=True,
        notes="another activation: it needs distillation",
    ),
    Entry(
        "mpcformer.gelu-benchmark", "gelu", "[MPCFormer] benchmark code", "x^2/8 + x/2 + 1/4", of.whole_line,
        {"coefficients": (0.25, 0.5, 0.125)}, -3.0, 3.0, "chosen", published=measured(1, 8), another=True,
        notes="the benchmark swaps the last two coefficients of Quad",
    ),
    Entry(
        "secformer.gelu", "gelu", "[SecFormer] 3.3", "by erf: seven sines up to 1.7", of.gelu_erf_wave,
        {"wave": SECFORMER_ERF, "reach": 1.7}, -8.0, 8.0, "chosen", published=measured(21, 504),
        uncertain="the threshold 1.7 recalled",
    ),
    Entry(
        "secformer.gelu-released", "gelu", "[SecFormer] code 4c1db49", "by erf: seven sines up to 2.5",
        of.gelu_erf_wave, {"wave": SECFORMER_ERF, "reach": 2.5}, -8.0, 8.0, "chosen",
    ),
    Entry(
        "shaft.gelu", "gelu", "[SHAFT] code 3ceb0ee", "ReLU + eight sines of |x| below 4", of.relu_wave,
        {"wave": SHAFT_GELU, "reach": 4.0}, -8.0, 8.0, "chosen", published=measured(19, 472),
    ),
    Entry(
        "shaft.gelu-poly", "gelu", "[SHAFT] code 3ceb0ee", "ReLU + degree 4 in |x| below 3",
        of.relu_polynomial,
        {"coefficients": (0.00410626, -0.55386347, 0.5658561, -0.19719836, 0.02328962),
         "reach": 3.0},
        -8.0, 8.0, "chosen", published=measured(20, 496),
    ),
    Entry(
        "cryptorch.gelu", "gelu", "[CrypTorch] code 74684d7, order 2", "x/2 + degree 2 in |x| up to 2.2",
        of.half_plus_even,
        {"coefficients": (-0.03161286950386981, 0.2597658446632754, 0.11594076368157785), "reach": 2.2},
        -8.0, 8.0, "chosen",
    ),
    Entry("nexus.gelu", "gelu", "[NEXUS] code e15058c", "even powers to 12 on [-3.5, 3.5]", of.middle_even,
          {"cuts": (-3.5, 3.5), "coefficients": NEXUS}, -8.0, 8.0, "chosen", frac=28, protocol="ckks",
          cut_constants=False, notes="28 fraction bits stand for the precision of CKKS"),
    Entry(
        "sigma.gelu", "gelu", "[SIGMA] code", "ReLU - T[|x|], 8 bits of which 6 fraction", of.gelu_residual,
        {"name": "gelu", "reach": 4.0, "frac": 6}, -8.0, 8.0, "chosen", frac=12, protocol="fss", secure=False,
    ),
    Entry(
        "curl.gelu", "gelu", "[Curl] code 1cc35ac", "ReLU - T[|x|], 64 entries, straight between",
        of.gelu_residual, {"name": "gelu", "reach": 4.0, "frac": 4, "straight": True}, -8.0, 8.0, "chosen",
        protocol="fss", secure=False, uncertain="its wavelet compression is not modelled",
    ),
    Entry(
        "nimbus.gelu", "gelu", "[Nimbus] code", "0, degree 2, x; cuts -1.8, 0.5", of.middle_only,
        {"cuts": (-1.8, 0.5),
         "coefficients": (-0.006946478426716862, 0.32421075145645123, 0.17025471961795552)},
        -8.0, 8.0, "chosen", frac=13, bits=32, protocol="two-party",
        notes="fitted to a distribution of inputs, one layer's; meant for light fine-tuning",
    ),
    Entry("spu.gelu", "gelu", "[SPU], lowered from JAX", "tanh form, its tanh", of.gelu_tanh,
          {"how": "spu", "coefficients": SPU_TANH}, -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "usg-precise.gelu", "gelu", "[USG] 2.2", "PUMA's four segments", of.even_piece,
        {"cuts": (-4.0, -1.95, 3.0), "left": PUMA_LEFT, "middle": PUMA_MIDDLE}, -8.0, 8.0, "chosen", frac=18,
        protocol="two-party", uncertain="identified by its segments and degree",
    ),
    Entry(
        "usg-loose.gelu", "gelu", "[USG] 2.2", "three segments, degree 4 on [-2.7, 2.7]", of.even_piece,
        {"cuts": (-2.7, 2.7), "left": (), "middle": LOOSE_GELU}, -8.0, 8.0, "chosen", frac=18,
        protocol="two-party",
        uncertain="coefficients and cuts are not readable; our fit of that form stands in",
    ),
    Entry(
        "comet.gelu", "gelu", "[Comet]", "(x + sqrt(x^2 + 1/2))/2", of.smooth_maximum,
        {"mu": math.sqrt(0.5)}, -8.0, 8.0, "chosen", another=True, notes="a smooth maximum: needs training",
        uncertain="its start for rsqrt is not modelled; CrypTen's with 5 steps is used",
    ),
    Entry("shaft.gelu-wave", "gelu", "[SHAFT] form, our fit", "a parabola and eight cosines of period 16",
          of.wave_of, {"wave": GELU_WAVE}, -8.0, 8.0, published=Cost(1, 128.0, MEASURED)),
    # ---- SiLU
    Entry(
        "crypten.silu", "silu", "[CrypTen], as users compose it", "x sigmoid(x)", of.silu_product,
        {"how": "crypten"}, -4.0, 4.0, "chosen: where the cost was measured", published=measured(24, 392),
    ),
    Entry("spu.silu", "silu", "[SPU], lowered from JAX", "x sigmoid(x)", of.silu_product, {"how": "spu"},
          -8.0, 8.0, "chosen", **_SPU),
    Entry(
        "puma.silu", "silu", "[PUMA] for LLaMA; [SPU] example", "0, degree 2, degree 6, x; cuts -8, -4, 4",
        of.even_piece, {"cuts": (-8.0, -4.0, 4.0), "left": SPU_SILU_LEFT, "middle": SPU_SILU_MIDDLE},
        -12.0, 12.0, "chosen", notes="a step of 0.072 at 4", **_SPU,
    ),
    Entry(
        "cipherdm.silu", "silu", "[CipherDM], authors' code", "0, degree 2, degree 6, x; cuts -6, -2, 6",
        of.even_piece, {"cuts": (-6.0, -2.0, 6.0), "left": CIPHERDM_SILU[0], "middle": CIPHERDM_SILU[1]},
        -12.0, 12.0, "chosen", notes="a step of 0.06 at 6 and of 0.019 at -6", **_SPU,
    ),
    Entry(
        "cipherdm.silu-fixed", "silu", "[CipherDM], mended", "the same form, refitted", of.even_piece,
        {"cuts": (-6.0, -2.0, 6.0), "left": REFITTED_SILU[0], "middle": REFITTED_SILU[1],
         "extra": 6}, -12.0, 12.0,
        "chosen", **_SPU,
    ),
    Entry(
        "bumblebee.silu", "silu", "[BumbleBee] code b9c9c86", "x times a sigmoid of degree 4 below 8",
        of.silu_pieces, {"coefficients": BUMBLEBEE_SIGMOID, "reach": 8.0, "extra": 3}, -12.0, 12.0, "chosen", frac=18,
        protocol="two-party",
    ),
    Entry(
        "cryptorch.silu", "silu", "[CrypTorch] code 74684d7, degree 5", "x/2 + degree 5 in |x| up to 10",
        of.half_plus_even,
        {"coefficients": (-0.011633682541851762, 0.04172072904060847, 0.26287081795168915,
                          -0.055805147372078076, 0.005180352157862565, -0.00017703117270809605),
         "reach": 10.0},
        -12.0, 12.0, "chosen",
    ),
    Entry(
        "cryptorch.silu-4", "silu", "[CrypTorch] code 74684d7, order 4", "two products, |x| up to 6.5",
        of.two_products,
        {"g": (2.2609795175477085, -3.937152879526602, 3.172725065372014, -4.595969693299374,
               4.5052863722554),
         "reach": 6.5, "scale": 6.5},
        -12.0, 12.0, "chosen", uncertain="the cut is read as the scale",
    ),
    Entry(
        "cryptorch.silu-2", "silu", "[CrypTorch] code 74684d7, order 2", "degree 2 in |x| up to 4.25",
        of.half_plus_even,
        {"coefficients": (-0.061824197242733751, 1.2900018198094088, 0.8988761597422655), "reach": 4.25,
         "scale": 4.25},
        -12.0, 12.0, "chosen", uncertain="the cut is read as the scale",
    ),
    Entry(
        "shaft.silu", "silu", "[SHAFT] code 3ceb0ee", "ReLU + 12 sines of |x| below 8", of.relu_wave,
        {"wave": SHAFT_SILU, "reach": 8.0}, -12.0, 12.0, "chosen", published=measured(19, 472),
    ),
    Entry(
        "sigma.silu", "silu", "[SIGMA] code", "ReLU - T[|x|], 10 bits of which 6 fraction", of.gelu_residual,
        {"name": "silu", "reach": 16.0, "frac": 6}, -12.0, 12.0, "chosen", frac=12, protocol="fss",
        secure=False,
    ),
    Entry(
        "usg-precise.silu", "silu", "[USG] 2.2; [SPU] example", "four segments; cuts -8, -4, 4", of.even_piece,
        {"cuts": (-8.0, -4.0, 4.0), "left": SPU_SILU_LEFT, "middle": SPU_SILU_MIDDLE}, -12.0, 12.0, "chosen",
        frac=18, protocol="two-party", uncertain="identified by its segments and degrees",
    ),
    Entry(
        "usg-loose.silu", "silu", "[USG] 2.2", "0, degree 8, x; cuts -5.4, 4", of.middle_only,
        {"cuts": (-5.4, 4.0), "coefficients": LOOSE_SILU, "extra": 8}, -12.0, 12.0, "chosen", frac=18,
        protocol="two-party",
        uncertain="the paper's coefficients are not readable; a minimax fit stands in",
        notes="the cuts leave steps of 0.072 at 4 and 0.024 at -5.4 whatever the fit",
    ),
    Entry("shaft.silu-wave", "silu", "[SHAFT] form, our fit", "a parabola and eight cosines of period 16",
          of.wave_of, {"wave": SILU_WAVE}, -8.0, 8.0, published=Cost(1, 128.0, MEASURED)),
    # ---- Mish
    Entry(
        "cipherdm.mish", "mish", "[CipherDM], authors' code", "0, degree 2, degree 6, x; cuts -6, -2, 6",
        of.even_piece, {"cuts": (-6.0, -2.0, 6.0), "left": CIPHERDM_MISH[0], "middle": CIPHERDM_MISH[1]},
        -12.0, 12.0, "chosen", notes="a step of 0.127 at 6; its released code never installs it", **_SPU,
    ),
)  # fmt: skip
