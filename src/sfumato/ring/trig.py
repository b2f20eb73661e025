"""Integer sines of opened values: bit-identical on every machine, no float library in sight.

A word's phase is its value modulo a power of two. The high bits look up a table made by exact big-integer
rotations, the low bits use two Taylor terms, harmonics follow by rotation; all in integers scaled by 2^30.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sfumato.ring import native

__all__ = ["COEFFICIENT_BITS", "SCALE_BITS", "dealt", "harmonics", "table_digest", "weighted"]

#: Fraction bits of the sines and cosines returned here.
SCALE_BITS = 30
_TABLE_BITS = 11
_BIG = 200


@lru_cache
def _two_pi(bits: int) -> int:
    """2*pi scaled by 2^bits, by Machin's formula in integers."""

    def arctan_inverse(n: int) -> int:
        one = 1 << (bits + 16)
        term = one // n
        total, sign, k = term, -1, 3
        while term:
            term //= n * n
            total += sign * (term // k)
            sign, k = -sign, k + 2
        return total

    return (8 * (4 * arctan_inverse(5) - arctan_inverse(239))) >> 16


@lru_cache(maxsize=1)
def _table() -> tuple[Tensor, Tensor]:
    """cos and sin of 2*pi*i / 2^11 for every i, rounded to 2^-30; (2048,) int64 each."""
    angle = _two_pi(_BIG) >> _TABLE_BITS
    cos_step, sin_step, term, k = 0, 0, 1 << _BIG, 0
    while term:
        if k % 2 == 0:
            cos_step += term if k % 4 == 0 else -term
        else:
            sin_step += term if k % 4 == 1 else -term
        k += 1
        term = (term * angle >> _BIG) // k
    c, s = 1 << _BIG, 0
    cosines, sines = [], []
    half = 1 << (_BIG - SCALE_BITS - 1)
    for _ in range(1 << _TABLE_BITS):
        cosines.append((c + half) >> (_BIG - SCALE_BITS))
        sines.append((s + half) >> (_BIG - SCALE_BITS))
        c, s = (c * cos_step - s * sin_step) >> _BIG, (s * cos_step + c * sin_step) >> _BIG
    return torch.tensor(cosines), torch.tensor(sines)


def table_digest() -> int:
    """A check value of the table, for the handshake."""
    cosines, sines = _table()
    return int((cosines * torch.arange(1, cosines.numel() + 1)).sum() ^ (sines * 3).sum())


def _phase(period_bits: int) -> tuple[int, int, int, int, int]:
    """How a word's phase splits: bits of the period, below the table's, of these too many, missing to the table's, and
    the small angle's unit.
    """
    low_bits = max(period_bits - _TABLE_BITS, 0)
    # The small angle in units of 2^-44 (it is below 2*pi/2^11, so products stay far below 2^63).
    # Of a long period its top 31 bits are enough, and leave 2*pi more than 22 bits of its own.
    spare = max(low_bits - 31, 0)
    unit = _two_pi(62 - low_bits + spare) >> _TABLE_BITS
    return period_bits, low_bits, spare, max(_TABLE_BITS - period_bits, 0), unit


def harmonics(words: Tensor, period_bits: int, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2*pi*k*words / 2^period_bits for k = 1..count; (count, *shape) int64, scaled by 2^30.

    Error below 2^-23 for count up to 40, growing in proportion to the harmonic. ``period_bits`` is at least
    12 and at most 50.
    """
    if words.device.type == "meta":
        empty = torch.empty((count, *words.shape), dtype=torch.int64, device="meta")
        return empty, empty
    _, low_bits, spare, lift, unit = _phase(period_bits)
    phase = words.to(torch.int64) & ((1 << period_bits) - 1)
    high = (phase >> low_bits) << lift
    cosines, sines = _table()
    c0, s0 = cosines[high], sines[high]
    small = (phase & ((1 << low_bits) - 1)) >> spare
    angle = (small * unit) >> 18
    a30 = angle >> 14
    square = (a30 * a30) >> SCALE_BITS
    cos_small = (1 << SCALE_BITS) - (square >> 1)
    sin_small = a30 - ((square * a30) >> SCALE_BITS) // 6
    half = 1 << (SCALE_BITS - 1)
    c1 = (c0 * cos_small - s0 * sin_small + half) >> SCALE_BITS
    s1 = (s0 * cos_small + c0 * sin_small + half) >> SCALE_BITS
    cos = torch.empty((count, *words.shape), dtype=torch.int64)
    sin = torch.empty_like(cos)
    cos[0], sin[0] = c1, s1
    for k in range(1, count):
        torch.add(cos[k - 1] * c1 - sin[k - 1] * s1, half, out=cos[k]).bitwise_right_shift_(SCALE_BITS)
        torch.add(sin[k - 1] * c1 + cos[k - 1] * s1, half, out=sin[k]).bitwise_right_shift_(SCALE_BITS)
    return cos, sin


#: Fraction bits of a series' coefficients inside :func:`weighted`: with sines of 30 bits, products of coefficients
#: below 8 fit a word.
COEFFICIENT_BITS = 28
#: Elements worked on at a time: their harmonics stay in cache.
_CHUNK = 1 << 13


def dealt(mask: Tensor, period_bits: int, count: int, frac: int, dtype: torch.dtype) -> Tensor:
    """cos and sin of the mask's harmonics 1..count, interleaved, rounded half up to ``frac`` <= 30 fraction bits.

    mask (n,) int64 -> (2 count, n) ``dtype`` (int64 or int32).
    """
    if mask.device.type == "meta":
        return torch.empty((2 * count, mask.numel()), dtype=dtype, device="meta")
    done = native.dealt(mask, _phase(period_bits), *_table(), count, SCALE_BITS - frac, dtype)
    return _dealt(mask, period_bits, count, frac, dtype) if done is None else done


def _dealt(mask: Tensor, period_bits: int, count: int, frac: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty((2 * count, mask.numel()), dtype=dtype, device=mask.device)
    drop = SCALE_BITS - frac
    half = (1 << drop) >> 1
    for start in range(0, mask.numel(), _CHUNK):
        piece = slice(start, start + _CHUNK)
        cos, sin = harmonics(mask[piece], period_bits, count)
        out[0::2, piece] = cos.add_(half).bitwise_right_shift_(drop)
        out[1::2, piece] = sin.add_(half).bitwise_right_shift_(drop)
    return out


def weighted(
    delta: Tensor, period_bits: int, table: Tensor, cos: Sequence[int], sin: Sequence[int], frac: int
) -> Tensor:
    """sum_k a_k table[2 k] + b_k table[2 k + 1] mod 2^64 or 2^32, the table's words.

    a_k = cos[k] cos((k + 1) d) + sin[k] sin((k + 1) d) and b_k = sin[k] cos((k + 1) d) - cos[k] sin((k + 1) d) for the
    phase d of ``delta``, coefficients scaled by 2^28 and below 2^31 in size, rounded half up to ``frac`` fraction bits.
    delta (n,) int64, table (2 count, n) int64 or int32 -> (n,) of the table's dtype.
    """
    if delta.device.type == "meta" or not cos:
        return torch.zeros(delta.numel(), dtype=table.dtype, device=delta.device)
    drop = SCALE_BITS + COEFFICIENT_BITS - frac
    done = native.weighted(delta, _phase(period_bits), *_table(), table, cos, sin, drop)
    return _weighted(delta, period_bits, table, cos, sin, drop) if done is None else done


def _weighted(
    delta: Tensor, period_bits: int, table: Tensor, cos: Sequence[int], sin: Sequence[int], drop: int
) -> Tensor:
    out = torch.zeros(delta.numel(), dtype=table.dtype, device=delta.device)
    half = 1 << (drop - 1)
    c, s = torch.tensor(cos).unsqueeze(1), torch.tensor(sin).unsqueeze(1)
    for start in range(0, delta.numel(), _CHUNK):
        piece = slice(start, start + _CHUNK)
        wave_cos, wave_sin = harmonics(delta[piece], period_bits, len(cos))
        a = (wave_cos * c).add_(wave_sin * s).add_(half).bitwise_right_shift_(drop)
        b = (wave_cos * s).sub_(wave_sin * c).add_(half).bitwise_right_shift_(drop)
        total = (a * table[0::2, piece]).sum(0) + (b * table[1::2, piece]).sum(0)
        out[piece] = total.to(table.dtype)
    return out
