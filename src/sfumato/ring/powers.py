"""Integer exponentials of opened values: bit-identical on every machine, no float library in sight.

exp(n r) for a rational rate r is a product of table entries over the digits of n; tables come from exact big-integer
arithmetic. Mantissas have 30 bits and exponents are kept apart, so accuracy is relative over any number of octaves.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sfumato.ring import native

__all__ = ["DIGIT_BITS", "chosen", "exponentials", "rows"]

#: Fraction bits of mantissas: two of them multiply within a word.
_MANTISSA = 29
#: Bits of the lower digits; the top digit takes the rest, 4 to 12.
DIGIT_BITS = 9
_BIG = 256
_CHUNK = 1 << 15


@lru_cache(maxsize=1)
def _ln2() -> int:
    """ln 2 scaled by 2^(2 _BIG): twice the inverse hyperbolic tangent of 1/3."""
    term, total, k = (1 << 2 * _BIG) // 3, 0, 1
    while term:
        total += term // k
        term //= 9
        k += 2
    return 2 * total


def _exp_big(numerator: int, denominator: int) -> tuple[int, int]:
    """exp(numerator / denominator) as (mantissa in [2^_BIG, 2^(_BIG + 1)), exponent)."""
    scaled = (numerator << 2 * _BIG) // denominator
    exponent = scaled // _ln2()
    x = (scaled - exponent * _ln2()) >> _BIG  # in [0, ln 2)
    total, term, k = 0, 1 << _BIG, 0
    while term:
        total += term
        k += 1
        term = (term * x >> _BIG) // k
    return _normal(total, exponent)


def _normal(value: int, exponent: int) -> tuple[int, int]:
    """The same number with its mantissa in [2^_BIG, 2^(_BIG + 1))."""
    spare = value.bit_length() - 1 - _BIG
    return (value >> spare if spare > 0 else value << -spare), exponent + spare


@lru_cache(maxsize=512)
def _digit(denominator: int, start: int, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Mantissas, in [2^29, 2^30], and exponents of exp((start + i step) / denominator), i = 0..count - 1."""
    (value, exponent), (factor, more) = _exp_big(start, denominator), _exp_big(step, denominator)
    drop = _BIG - _MANTISSA
    pairs = []
    for _ in range(count):
        pairs.append(((value + (1 << (drop - 1))) >> drop, exponent))
        value, exponent = _normal(value * factor >> _BIG, exponent + more)
    table = torch.tensor(pairs, dtype=torch.int64)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def rows(n: Tensor, bits: int, denominator: int, start: int, scale: int, blocks: int) -> Tensor:
    """round(2^scale exp((start + m_v) / denominator)), m_v = (n + (v + 1) 2^(bits - blocks)) mod 2^bits, for every
    block v; (2^blocks, *n.shape) int64.

    n holds words in [0, 2^bits), 4 <= bits <= 48. Results that need more than 61 bits are meaningless. Relative error
    2^-27, and half a unit.
    """
    out = torch.empty((1 << blocks, *n.shape), dtype=torch.int64, device=n.device)
    if n.device.type == "meta":
        return out
    made = native.powers(n, _digits(bits), blocks, scale, _joined(denominator, start, bits))
    if made is not None:
        return made.reshape(out.shape)
    *lower, high_bits = _digits(bits)
    tables, below = [], 0
    for width in lower:
        tables.append((below, width, *_digit(denominator, 0, 1 << below, 1 << width)))
        below += width
    high, high_exp = _digit(denominator, start, 1 << below, 1 << high_bits)
    mask, turn, half = (1 << high_bits) - 1, high_bits - blocks, 1 << (_MANTISSA - 1)
    flat, target = n.reshape(-1), out.reshape(out.shape[0], -1)
    for i in range(0, flat.numel(), _CHUNK):
        piece = flat[i : i + _CHUNK]
        near = torch.full_like(piece, 1 << _MANTISSA)
        shift = torch.full_like(piece, scale - _MANTISSA)
        for offset, width, mantissas, exponents in tables:
            index = (piece >> offset) & ((1 << width) - 1)
            near, more = _normal_words((near * mantissas[index] + half) >> _MANTISSA)
            shift += exponents[index] + more
        top = piece >> below
        for v in range(1 << blocks):
            index = (top + ((v + 1) << turn)) & mask if blocks else top
            product = (near * high[index] + half) >> _MANTISSA
            target[v, i : i + _CHUNK] = _shifted(product, shift + high_exp[index])
    return out


@lru_cache(maxsize=256)
def _joined(denominator: int, start: int, bits: int) -> Tensor:
    """Mantissas and exponents of every digit, the lowest first, in one tensor."""
    *lower, high_bits = _digits(bits)
    tables, below = [], 0
    for width in lower:
        tables += [*_digit(denominator, 0, 1 << below, 1 << width)]
        below += width
    return torch.cat([*tables, *_digit(denominator, start, 1 << below, 1 << high_bits)])


def chosen(words: Tensor, block: int, factor: Tensor, table: Tensor, word: int) -> Tensor:
    """table[words >> block] * factor elementwise, mod 2^``word`` and sign-extended to the table's machine words.

    words, factor (n,) int64; table (rows, n) int64 or int32 -> (n,) of the table's dtype.
    """
    spare = table.element_size() * 8 - word
    made = native.chosen(words, block, spare, factor, table)
    if made is not None:
        return made
    entry = table.gather(0, (words >> block)[None])[0] * factor.to(table.dtype)
    return (entry << spare) >> spare if spare else entry


def exponentials(n: Tensor, bits: int, denominator: int, start: int, scale: int) -> Tensor:
    """round(2^scale exp((start + n) / denominator)); shape kept, int64. As :func:`rows`."""
    return rows(n, bits, denominator, start, scale, 0)[0]


def _digits(bits: int) -> tuple[int, ...]:
    """Widths of the digits, lowest first; the top one is at least as wide as the most block bits."""
    count = max(0, -(-(bits - DIGIT_BITS - 3) // DIGIT_BITS))
    return (*[DIGIT_BITS] * count, bits - count * DIGIT_BITS)


def _normal_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissas below 2^31 back to [2^29, 2^30], and the exponents that this moves."""
    more = words >> (_MANTISSA + 1)
    return (words + more) >> more, more


def _shifted(words: Tensor, shift: Tensor) -> Tensor:
    """words * 2^shift, rounded to nearest where the shift goes right; beyond a word's bits the left shift saturates."""
    right = (-shift).clamp_(0, 40)
    half = (torch.ones_like(right) << right) >> 1
    return ((words + half) >> right) << shift.clamp(0, 30)
