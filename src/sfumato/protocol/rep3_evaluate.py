"""A univariate function by one opening: role 2 deals sines of a mask, roles 0 and 1 open the masked value.

One-way form: the mask is t = x2 + r with r from the stream of roles 0 and 2, so x - t = x0 + x1 - r is known to role 0
without a message and one message tells role 1. Role 2 never sees it. Argument in docs/security/rep3.md, "evaluate".
Source: digest mpc-friendly 6.8, design.md 5; own: exact short polynomial coefficients, so that only sines are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Protocol, Series
from sfumato.protocol.rep3_close import Additive, close
from sfumato.ring import trig
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z64, Shared

__all__ = ["evaluate", "series_scale"]

#: Fraction bits of the dealt sines.
_DEALT = 22


def series_scale(frac: int) -> int:
    """Fraction bits before the closing truncation: x^2 times a 16-bit coefficient."""
    return 2 * frac + Series.POLY_FRAC


async def evaluate(p: Protocol, s: Session, series: Series, x: Shared, frac: int) -> Shared:
    """series(x) with ``frac`` fraction bits. Domain: the series' interval; x in Z64 with at most 20 fraction bits.

    Cost: 3 rounds; 64 (opening) + 64 per harmonic and sine or cosine + 64 (x^2, if any) + truncation 2*64 + f' + 2.
    Error: the fit's plus about 2^-22 per unit of sum |coefficients| plus one ulp. Leaks: nothing.
    """
    if x.ring != Z64:
        raise TypeMismatch(f"evaluate works in Z64, not in {x.ring}; cast first")
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
    poly = int(round(series.linear * 2**Series.POLY_FRAC)) << x.frac
    square = int(round(series.quadratic * 2**Series.POLY_FRAC))
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
        u += int(round(series.constant * 2.0**scale))
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


def _dealt(mask: Tensor, period_bits: int, count: int, squared: bool) -> Tensor:
    """cos and sin of the mask's harmonics (interleaved rows), scaled by 2^22, then the square of the mask."""
    cos, sin = trig.harmonics(mask, period_bits, count)
    drop = trig.SCALE_BITS - _DEALT
    out = torch.empty((2 * count + squared, *mask.shape), dtype=torch.int64, device=mask.device)
    half = 1 << (drop - 1)
    out[0 : 2 * count : 2] = (cos + half) >> drop
    out[1 : 2 * count : 2] = (sin + half) >> drop
    if squared:
        out[-1] = mask * mask
    return out


def _add_sines(u: Tensor, series: Series, delta: Tensor, period_bits: int, table: Tensor, scale: int) -> None:
    """Add sum_k c_k cos(k(d + t)) + s_k sin(k(d + t)) to u in place, by the addition theorem.

    Public factors are integers scaled by 2^``scale`` from integer sines and 2^30-scaled coefficients, bit-identical at
    both roles.
    """
    if u.device.type == "meta":
        return
    count = len(series.cos)
    cos, sin = trig.harmonics(delta, period_bits, count)
    drop = 2 * trig.SCALE_BITS - 2 - scale
    for k in range(count):
        c = int(round(series.cos[k] * 2.0 ** (trig.SCALE_BITS - 2)))
        d = int(round(series.sin[k] * 2.0 ** (trig.SCALE_BITS - 2)))
        if c == 0 and d == 0:
            continue
        with_cos = _scaled(cos[k] * c + sin[k] * d, drop)
        with_sin = _scaled(cos[k] * d - sin[k] * c, drop)
        u += with_cos * table[2 * k]
        u += with_sin * table[2 * k + 1]


def _scaled(words: Tensor, drop: int) -> Tensor:
    return words >> drop if drop >= 0 else words << -drop
