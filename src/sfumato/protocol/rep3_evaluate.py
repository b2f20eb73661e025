"""A univariate function by one opening: role 2 deals sines of a mask, roles 0 and 1 open the masked value.

One-way form: the mask is t = x2 + r with r from the stream of roles 0 and 2, so x - t = x0 + x1 - r is known
to role 0 without a message and one message tells role 1. Role 2 never sees it. Argument in
docs/security/rep3.md, "evaluate". Source: [SHAFT] for sine series by one opening; own: exact short polynomial
coefficients, so that only sines are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Protocol, Series
from sfumato.protocol.rep3_close import Additive, close
from sfumato.ring import trig
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z64, Secret, Shared

__all__ = ["check_domain", "evaluate", "series_scale"]

#: Fraction bits of the dealt sines.
_DEALT = 22
#: Fraction bits of a series' coefficients; with sines of 30 bits, products of coefficients below 8 fit a
#: word.
_COEFFICIENT = 28
#: Elements whose harmonics are worked on at a time: they stay in cache.
_CHUNK = 1 << 14


def series_scale(frac: int) -> int:
    """Fraction bits before the closing truncation: x^2 times a 16-bit coefficient."""
    return 2 * frac + Series.POLY_FRAC


def check_domain(series: Series, type: Secret) -> None:
    """Raise ``TypeMismatch`` unless a value of this type can be put into the series."""
    if type.ring != Z64:
        raise TypeMismatch(f"evaluate works in Z64, not in {type.ring}; cast first")
    if not 0 <= type.frac <= 20:
        raise TypeMismatch(f"evaluate takes 0 to 20 fraction bits, not {type.frac}; truncate first")
    if not 12 <= series.period_log2 + type.frac <= 50:
        raise TypeMismatch(
            f"a period of 2^{series.period_log2} with {type.frac} fraction bits is "
            "outside the sine table's 12 to 50 bits"
        )


async def evaluate(p: Protocol, s: Session, series: Series, x: Shared, frac: int) -> Shared:
    """series(x) with ``frac`` fraction bits. Domain: the series' interval; x in Z64 with at most 20 fraction
    bits.

    Cost: 3 rounds; 64 (opening) + 64 per harmonic and sine or cosine + 64 (x^2, if any) + truncation 2*64 +
    f' + 2. Opens period_log2 + frac bits instead of 64 if there is no x^2. Range: |series| < 2^(62 - 2 frac -
    16). Error: the fit's plus about 2^-22 per unit of sum |coefficients| plus one ulp. Leaks: nothing; role 2
    knows the mask and receives nothing.
    """
    check_domain(series, x.type)
    scale = series_scale(x.frac)
    if series.centre:
        x = p.add_public(s, x, p.encode(x, -series.centre))
    period_bits = series.period_log2 + x.frac
    harmonics = len(series.cos)
    squared = series.quadratic != 0.0
    # A full opening is needed for x^2 alone; sines need the phase, and fewer bits travel.
    opened_bits = 64 if squared else period_bits
    rows = 2 * harmonics + squared
    shape, dealt_shape = x.shape, (rows, *x.shape)
    first, second = x.parts
    poly = round(series.linear * 2**Series.POLY_FRAC) << x.frac
    square = round(series.quadratic * 2**Series.POLY_FRAC)
    if s.role == 2:
        mask = first + s.prg("t", (0, 2), Z64, shape)
        table = _dealt(mask, period_bits, harmonics, squared) - s.prg("dealt", (0, 2), Z64, dealt_shape)
        await s.exchange([Send(s.at(1), "dealt", table, 64)])
        return await close(s, Additive(None, shape), scale - frac, Z64, frac)
    if s.role == 0:
        known = first + second
        mask = s.prg("t", (0, 2), Z64, shape)
        delta = known - mask
        await s.exchange([Send(s.at(1), "delta", delta, opened_bits)])
        table = s.prg("dealt", (0, 2), Z64, dealt_shape)
        u = known * poly
        u += round(series.constant * 2.0**scale)
        if squared:
            u += square * (delta * delta + 2 * delta * mask + table[-1])
    else:
        delta, table = await s.exchange(
            [],
            [
                Receive(s.at(0), "delta", shape, torch.int64, opened_bits),
                Receive(s.at(2), "dealt", dealt_shape, torch.int64, 64),
            ],
        )
        u = second * poly
        if squared:
            u += square * (2 * delta * second + table[-1])
    _add_sines(u, series, delta, period_bits, table, scale - _DEALT)
    return await close(s, Additive(u, shape), scale - frac, Z64, frac)


def _chunks(words: Tensor) -> list[slice]:
    return [slice(i, i + _CHUNK) for i in range(0, words.numel(), _CHUNK)]


def _dealt(mask: Tensor, period_bits: int, count: int, squared: bool) -> Tensor:
    """cos and sin of the mask's harmonics (interleaved rows), scaled by 2^22, then the square of the mask."""
    out = torch.empty((2 * count + squared, *mask.shape), dtype=torch.int64, device=mask.device)
    if mask.device.type == "meta":
        return out
    flat, rows = mask.reshape(-1), out.reshape(out.shape[0], -1)
    drop = trig.SCALE_BITS - _DEALT
    half = 1 << (drop - 1)
    for piece in _chunks(flat):
        cos, sin = trig.harmonics(flat[piece], period_bits, count)
        rows[0 : 2 * count : 2, piece] = cos.add_(half).bitwise_right_shift_(drop)
        rows[1 : 2 * count : 2, piece] = sin.add_(half).bitwise_right_shift_(drop)
        if squared:
            torch.mul(flat[piece], flat[piece], out=rows[-1, piece])
    return out


def _add_sines(u: Tensor, series: Series, delta: Tensor, period_bits: int, table: Tensor, scale: int) -> None:
    """Add sum_k c_k cos(k(d + t)) + s_k sin(k(d + t)) to u in place, by the addition theorem.

    Public factors are integers scaled by 2^``scale`` from integer sines and 2^28-scaled coefficients,
    bit-identical at both roles.
    """
    if u.device.type == "meta" or not series.cos:
        return
    count = len(series.cos)
    c = _coefficients(series.cos)
    d = _coefficients(series.sin)
    drop = trig.SCALE_BITS + _COEFFICIENT - scale
    flat_u, flat_delta, rows = u.view(-1), delta.reshape(-1), table.reshape(table.shape[0], -1)
    for piece in _chunks(flat_delta):
        cos, sin = trig.harmonics(flat_delta[piece], period_bits, count)
        with_cos, with_sin = cos * c, sin * -c
        if any(series.sin):
            with_cos += sin * d
            with_sin += cos * d
        for factor, first in ((with_cos, 0), (with_sin, 1)):
            scaled = factor.bitwise_right_shift_(drop) if drop >= 0 else factor.bitwise_left_shift_(-drop)
            flat_u[piece] += scaled.mul_(rows[first : 2 * count : 2, piece]).sum(0)


def _coefficients(values: tuple[float, ...]) -> Tensor:
    return torch.tensor([round(v * 2.0**_COEFFICIENT) for v in values], dtype=torch.int64).unsqueeze(1)
