"""From an additive sharing between roles 0 and 1 back to replicated shares, dropping fraction bits on the
way.

Role 2 deals: it knows two random bits and never sees what they mask. See docs/security/rep3.md, "close".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import Bilinear, Linear, Term
from sfumato.ring.closing import judge, rounded_down, rounded_up
from sfumato.session.session import Receive, Send, Session
from sfumato.types import B8, Ring, Secret, Shared

__all__ = ["Additive", "close", "open_product", "replicate", "reshare", "without_wrap", "zero_share"]


def zero_share(s: Session, ring: Ring, shape: tuple[int, ...]) -> Tensor:
    """This party's summand of zero: its stream with the next role minus (or xor) its stream with the one
    before. Local.
    """
    after, before = (s.role + 1) % 3, (s.role + 2) % 3
    ahead = s.prg("zero", (min(s.role, after), max(s.role, after)), ring, shape)
    behind = s.prg("zero", (min(s.role, before), max(s.role, before)), ring, shape)
    return s.local(shape, ring.dtype, lambda: ahead - behind if ring.kind == "Z" else ahead ^ behind)


async def replicate(s: Session, z: Tensor, ring: Ring, frac: int) -> Shared:
    """A summand at each party as fresh replicated shares of their sum. Cost: 1 round, 3k bits. Each message carries a
    zero share of which its receiver lacks half.
    """
    shape = tuple(z.shape)
    zero = zero_share(s, ring, shape)
    z = z + zero if ring.kind == "Z" else z ^ zero
    before, after = (s.party - 1) % 3, (s.party + 1) % 3
    (other,) = await s.exchange(
        [Send(before, "z", z, ring.bits)], [Receive(after, "z", shape, ring.dtype, ring.bits)]
    )
    return Shared(Secret(ring, frac, shape), (z, other))


@dataclass(frozen=True, slots=True)
class Additive:
    """u0 + u1 at roles 0 and 1 (``words`` is None at role 2), not yet safe to send."""

    words: Tensor | None
    shape: tuple[int, ...]

    @staticmethod
    def fold(s: Session, f: Linear, x: Shared, shape: tuple[int, ...]) -> Additive:
        """f(x) as u0 = f(x0 + x1) + z at role 0, u1 = f(x2) - z at role 1: two local maps in all, none at
        role 2.

        z comes from the stream of roles 0 and 1. It hides nothing; it makes the rounding error of the closing
        truncation independent of how x is shared (a fresh input or a constant has a component of zeros).
        """
        if s.role == 2:
            return Additive(None, shape)
        first, second = x.parts
        summed = s.local(x.shape, x.ring.dtype, lambda: first + second) if s.role == 0 else second
        words = f(summed).to(x.ring.dtype)
        if tuple(words.shape) != shape:
            raise TypeMismatch(
                f"a linear map gave shape {list(words.shape)} where {list(shape)} was declared"
            )
        z = s.prg("split", (0, 1), x.ring, shape)
        return Additive(s.local(shape, x.ring.dtype, lambda: words + z if s.role == 0 else words - z), shape)

    def plus(self, s: Session, x: Shared) -> Additive:
        """Add a replicated value of the same scale (broadcast into this shape)."""
        if self.words is None:
            return self
        first, second = x.parts
        words = self.words + (first + second if s.role == 0 else second)
        if tuple(words.shape) != self.shape or words.dtype != self.words.dtype:
            raise TypeMismatch(
                f"{x.type} cannot be added to a result of shape {list(self.shape)} in another ring or shape"
            )
        return Additive(words, self.shape)


async def open_product(
    s: Session, f: Bilinear, x: Shared, y: Shared, plus: Shared | None, more: Sequence[Term] = ()
) -> Additive:
    """f(x, y) (+ plus) as an additive sharing of roles 0 and 1. Cost: 1 round, k bits. Five products in all. ``more``
    products of its shape are added to it before anything is sent.

    Role 2 sends its summand under a stream it has with role 0, which role 0 adds back: role 1 sees a uniform
    word.
    """
    ring, role = x.ring, s.role
    z = _summand(s, f, x, y)
    for g, u, v in more:
        z = z + _summand(s, g, u, v)
    z = z.to(ring.dtype)
    shape = tuple(z.shape)
    bits = ring.bits
    if role == 1:
        (masked,) = await s.exchange([], [Receive(s.at(2), "z2", shape, ring.dtype, bits)])
        return _added(s, Additive(s.local(shape, ring.dtype, lambda: z + masked), shape), plus)
    mask = s.prg("zero02", (0, 2), ring, shape)
    if role == 0:
        return _added(s, Additive(s.local(shape, ring.dtype, lambda: z + mask), shape), plus)
    await s.exchange([Send(s.at(1), "z2", s.local(shape, ring.dtype, lambda: z - mask), bits)])
    return Additive(None, shape)


def _summand(s: Session, f: Bilinear, x: Shared, y: Shared) -> Tensor:
    """This role's part of the nine products of components."""
    (a, b), (c, d) = x.parts, y.parts
    if s.device == "meta":
        return f(a, c)
    if s.role == 0:
        return f(a + b, c + d)
    return f(a, d) + (f(b, c + d) if s.role == 1 else f(b, c))


def _added(s: Session, u: Additive, plus: Shared | None) -> Additive:
    return u if plus is None else u.plus(s, plus)


async def close(
    s: Session, u: Additive, bits: int, source: Ring | int, frac: int, ring: Ring | None = None
) -> Shared:
    """(u0 + u1) / 2^bits as replicated shares in ``ring``; ``source``: the ring of u0 + u1, or the bits of its words.

    Words of other widths than a ring's are kept sign-extended. Where a wrap cannot reach the result (k - bits >= k'),
    nothing is dealt for it, and ``ring`` may be narrower than the source.

    The ring's wrap w of u0 + u1 is p - a*b for bits a, p known to role 0 and b to role 1, if |value| <
    2^(k-2); a*b is one private product of two bits with role 2's help. Role 0 rounds up, role 1 rounds down.

    Cost: 2 rounds, 2k' + (k' - k) + bits + 2 bits, k' = bits of ``ring``; 2k' and 1 round if no wrap can tell.
    Error: floor or ceiling of the exact quotient; the ceiling with probability equal to the fraction
    when u1 is uniform, so |e| < 1 ulp, mean 0, and a quotient without remainder is exact. Cannot fail in its
    range.
    Leaks: nothing; every message hides under a stream of its sender with a party that is not its
    receiver.
    Source: [GeoTrunc25] for the two-party wrap, [AFL16] for the sharing; the sign form p - a*b and
    the two-bit product are our own (docs/design/003).

    Raises:
        TypeMismatch: a boolean ring, a ring narrower than another ring that a wrap reaches, or ``bits`` outside
            [0, k).
    """
    if isinstance(source, Ring):
        ring = ring or source
        if source.kind != "Z" or ring.kind != "Z" or not _reaches(source, bits, ring):
            raise TypeMismatch(f"a truncation by {bits} bits cannot take {source} to {ring}; cast afterwards")
        source = source.bits
    assert ring is not None
    k, shape = source, u.shape
    if not 0 <= bits < k:
        raise TypeMismatch(f"a truncation of {k}-bit words drops 0 to {k - 1} bits, not {bits}")
    width = ring.bits - k + bits
    if width <= 0:
        return await reshare(s, without_wrap(s, u, bits, ring), shape, ring, frac)
    if s.role == 2:
        ra, rb = _bit(s, "ra", (0, 2), shape), _bit(s, "rb", (1, 2), shape)
        dealt0 = s.prg("ab", (0, 2), ring, shape)
        dealt1 = s.local(shape, ring.dtype, lambda: (ra & rb).to(ring.dtype) - dealt0)
        await s.exchange([Send(s.at(1), "ab", dealt1, width)])
        return await reshare(s, None, shape, ring, frac)
    assert u.words is not None
    words = u.words
    if s.role == 0:
        ra = _bit(s, "ra", (0, 2), shape)
        dealt = s.prg("ab", (0, 2), ring, shape)
        judged = s.local(shape, torch.uint8, lambda: judge(words, k, bits))
        own = s.local(shape, torch.uint8, lambda: (judged & 1) ^ ra)
        (other,) = await s.exchange(
            [Send(s.at(1), "a", own, 1)], [Receive(s.at(1), "b", shape, torch.uint8, 1)]
        )
        y = s.local(
            shape,
            ring.dtype,
            lambda: rounded_up(words, k, bits, ring.dtype, judged, own ^ other, other, dealt),
        )
    else:
        rb = _bit(s, "rb", (1, 2), shape)
        own = s.local(shape, torch.uint8, lambda: (words < 0).to(torch.uint8) ^ rb)
        other, dealt = await s.exchange(
            [Send(s.at(0), "b", own, 1)],
            [Receive(s.at(0), "a", shape, torch.uint8, 1), Receive(s.at(2), "ab", shape, ring.dtype, width)],
        )
        y = s.local(
            shape, ring.dtype, lambda: rounded_down(words, k, bits, ring.dtype, own, other, rb, dealt)
        )
    return await reshare(s, y, shape, ring, frac)


def _reaches(source: Ring, bits: int, ring: Ring) -> bool:
    """Whether words less ``bits`` bits can be told in ``ring``: all of them, or all that ``ring`` holds."""
    return ring.bits >= source.bits or source.bits - bits >= ring.bits


def without_wrap(s: Session, u: Additive, bits: int, ring: Ring) -> Tensor | None:
    """The summands' quotients where a wrap is a multiple of the result's 2^k': role 0 rounds up, role 1 down."""
    if u.words is None:
        return None
    words, up = u.words, 1 if s.role == 0 and bits else 0
    return s.local(
        u.shape, ring.dtype, lambda: (((words - up) >> bits) + up if bits else words).to(ring.dtype)
    )


def _bit(s: Session, name: str, roles: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """A random bit per element, as bytes."""
    words = s.prg(name, roles, B8, shape)
    return s.local(shape, torch.uint8, lambda: words & 1)


async def reshare(s: Session, y: Tensor | None, shape: tuple[int, ...], ring: Ring, frac: int) -> Shared:
    """y0 + y1 at roles 0 and 1 as replicated shares. Cost: 1 round, 2k bits. Each message hides under a
    stream of its sender with role 2.
    """
    type = Secret(ring, frac, shape)
    bits = ring.bits
    if s.role == 2:
        return Shared(type, (s.prg("c2", (1, 2), ring, shape), s.prg("c0", (0, 2), ring, shape)))
    assert y is not None
    name, peer, mask = ("c0", 1, (0, 2)) if s.role == 0 else ("c2", 0, (1, 2))
    own = s.prg(name, mask, ring, shape)
    mine = s.local(shape, ring.dtype, lambda: y - own)
    (theirs,) = await s.exchange(
        [Send(s.at(peer), f"y{s.role}", mine, bits)],
        [Receive(s.at(peer), f"y{peer}", shape, ring.dtype, bits)],
    )
    both = s.local(shape, ring.dtype, lambda: mine + theirs)
    return Shared(type, (own, both) if s.role == 0 else (both, own))
