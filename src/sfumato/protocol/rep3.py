"""Semi-honest replicated three-party sharing: x = x0 + x1 + x2, party i holds (x_i, x_{i+1}).

No two parties collude. Sources: [AFL16] (replication, zero shares); the fused truncations and the
one-opening evaluation are argued move by move in docs/security/rep3.md, budgets in docs/design/003.
Inside a primitive parties play roles 0, 1, 2 (``Session.role``); ``turn`` rotates them, so load balances.
Bits below are totals over the three parties per element, k = ring bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.base import (
    Bilinear,
    Exponential,
    Linear,
    Protocol,
    Series,
    Term,
    Unclosed,
    Window,
    plane_bytes,
)
from sfumato.protocol.rep3_bits import bits_to_words, less_bits
from sfumato.protocol.rep3_close import Additive, close, open_product, replicate, zero_share
from sfumato.protocol.rep3_evaluate import evaluate, exponential
from sfumato.protocol.rep3_look_up import look_up
from sfumato.protocol.rep3_sign import bit_words, select_by_bit, select_largest, share_plane, sign_shares
from sfumato.ring.closing import shorten
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z32, Z64, Ring, Secret, Shared, SharedIndex, TruncationError

__all__ = ["Rep3"]


class Rep3(Protocol):
    """Replicated three-party protocol. Every message hides under a stream that its receiver lacks."""

    name = "rep3"
    parties = 3
    truncation = TruncationError(max_ulp=1.0, bias_ulp=0.0, headroom_bits=2)

    def __init__(self, *, fused: bool = True, two_way: bool = False) -> None:
        """``two_way``: openings under masks that do not depend on the secret, so that what role 2 deals can be made
        ahead of time; a masked value then travels both ways.
        """
        super().__init__(fused=fused)
        self.two_way = two_way

    # ---- in and out ----------------------------------------------------------------------------------------

    async def share(self, s: Session, x: Tensor | None, owner: int, type: Secret) -> Shared:
        """Cost: 1 round, k bits. Exact. Leaks: nothing; the one message is x minus a stream its receiver does
        not know.

        The owner's two components are c_owner (stream with the party before it) and the rest; component
        owner+2 is 0.
        """
        role = (s.party - owner) % 3
        peer = (owner + 1) % 3
        zero = torch.zeros(type.shape, dtype=type.ring.dtype, device=s.device)
        roles = ((owner - s.turn) % 3, (owner + 2 - s.turn) % 3)
        if role == 1:
            (rest,) = await s.exchange(
                [], [Receive(owner, "rest", type.shape, type.ring.dtype, type.ring.bits)]
            )
            return Shared(type, (rest, zero))
        mask = s.prg("share", roles, type.ring, type.shape)
        if role == 2:
            return Shared(type, (zero, mask))
        assert x is not None
        rest = _minus(type.ring, x, mask)
        await s.exchange([Send(peer, "rest", rest, type.ring.bits)])
        return Shared(type, (mask, rest))

    async def reveal(self, s: Session, x: Shared, to: tuple[int, ...]) -> Tensor | None:
        """Cost: 1 round, k bits per receiving party. Exact. Leaks: the value, to the parties in ``to`` alone.

        The message is the receiver's missing component: a function of the value and what it holds already.
        """
        bits, dtype = x.ring.bits, x.ring.dtype
        before, after = (s.party - 1) % 3, (s.party + 1) % 3
        # Party i lacks component i+2, which party i+2 holds first and party i+1 holds second.
        sends = [Send(after, "component", x.parts[0], bits)] if after in to else []
        receives = [Receive(before, "component", x.shape, dtype, bits)] if s.party in to else []
        got = await s.exchange(sends, receives)
        if not receives:
            return None
        return _plus(x.ring, _plus(x.ring, x.parts[0], x.parts[1]), got[0])

    def summand(self, s: Session, x: Shared) -> Tensor:
        """x_i plus a zero share, so that the three summands are uniform but for their sum. Leaks: nothing
        else.
        """
        return _plus(x.ring, x.parts[0], zero_share(s, x.ring, x.shape))

    # ---- local ---------------------------------------------------------------------------------------------

    def add_public(self, s: Session, x: Shared, c: Tensor) -> Shared:
        """Component 0 takes the constant: parties 0 (first part) and 2 (second) hold it. Local, exact."""
        first, second = x.parts
        if s.party == 0:
            first = _plus(x.ring, first, c)
        elif s.party == 2:
            second = _plus(x.ring, second, c)
        shape = torch.broadcast_shapes(x.shape, c.shape)
        if shape != x.shape:
            first, second = first.broadcast_to(shape), second.broadcast_to(shape)
        return Shared(Secret(x.ring, x.frac, tuple(shape)), (first, second))

    def inject(self, s: Session, x: Shared, ring: Ring) -> tuple[Shared, ...]:
        """Component j becomes a sharing whose only non-zero component is j. Local. Leaks: nothing."""
        type = Secret(ring, x.frac if ring.kind == x.ring.kind else 0, x.shape)
        zero = torch.zeros(x.shape, dtype=ring.dtype, device=x.parts[0].device)
        first, second = (part.to(ring.dtype) for part in x.parts)
        place = {s.party: (first, zero), (s.party + 2) % 3: (zero, zero), (s.party + 1) % 3: (zero, second)}
        return tuple(Shared(type, place[j]) for j in range(3))

    # ---- products and truncation ---------------------------------------------------------------------------

    async def bilinear(self, s: Session, f: Bilinear, x: Shared, y: Shared) -> Shared:
        """Cost: 1 round, 3k bits. Leaks: nothing; each message carries a zero share its receiver lacks half
        of.

        Exact. Source: [AFL16], with the product of sums folded into two local products a party.
        """
        ring = self._same_ring(x, y)
        (a, b), (c, d) = x.parts, y.parts
        z = _plus(ring, f(a, _plus(ring, c, d)), f(b, c)).to(ring.dtype)
        return await replicate(s, z, ring, x.frac + y.frac)

    async def look_up(self, s: Session, x: Shared, at: SharedIndex) -> Shared:
        """Cost: 1 round, 3k bits an element of the result, whatever the table's size. Leaks: nothing. Exact.

        Source: [BGI16]; docs/security/rep3.md, "look_up".
        """
        self._check_look_up(x, at)
        return await look_up(s, x, at)

    async def bilinear_truncate(
        self,
        s: Session,
        f: Bilinear,
        x: Shared,
        y: Shared,
        bits: int,
        *,
        plus: Shared | None = None,
        more: Sequence[Term] = (),
        ring: Ring | None = None,
    ) -> Shared:
        """Cost: 3 rounds, 3k + f + 2 bits, five local products in all; into a ring of k' bits k + 2k' + (k' - k) + f +
        2, and ``more`` adds local work alone. Leaks: nothing.

        Error: floor or ceiling, |e| < 1 ulp, mean 0. Range: |f(x, y) + plus| < 2^(k-2) in words. Source:
        [GeoTrunc25], [AFL16]; docs/security/rep3.md, "bilinear_truncate".
        """
        if not self.fused:
            return await super().bilinear_truncate(s, f, x, y, bits, plus=plus, more=more, ring=ring)
        operands = [x, y, *(z for _, u, v in more for z in (u, v))]
        source = self._same_ring(*operands, *([] if plus is None else [plus]))
        u = await open_product(s, f, x, y, plus, more)
        return await close(s, u, bits, source, x.frac + y.frac - bits, ring)

    async def linear_truncate(
        self,
        s: Session,
        f: Linear,
        x: Shared,
        bits: int,
        *,
        shape: tuple[int, ...],
        plus: Shared | None = None,
        gain_frac: int = 0,
    ) -> Shared:
        """Cost: 2 rounds, 2k + f + 2 bits, two local maps in all. Leaks: nothing.

        Error: floor or ceiling, |e| < 1 ulp, mean 0. Range: |f(x) + plus| < 2^(k-2) in words. Source:
        [GeoTrunc25]; docs/security/rep3.md, "truncate".
        """
        if not self.fused:
            return await super().linear_truncate(s, f, x, bits, shape=shape, plus=plus, gain_frac=gain_frac)
        u = Additive.fold(s, f, x, shape)
        if plus is not None:
            self._same_ring(x, plus)
            u = u.plus(s, plus)
        return await close(s, u, bits, x.ring, x.frac + gain_frac - bits)

    def shorten(self, s: Session, x: Shared, frac: int) -> Shared:
        """Local, free. Error: within 2 units of 2^-frac, deviation 1/2, mean 0 if the components are uniform (one of
        zeros, as what a party shares has, gives a bias of half a unit). Range: |x| < 2^(31 - frac), at most 32 bits
        dropped. Leaks: nothing.

        A wrap of the components is a multiple of 2^(64 - drop), and so vanishes mod 2^32. Source: [Ditto] 2.3; own: one
        component rounds to nearest and gets the two halves that the others lose.
        """
        drop = x.frac - frac
        if x.ring != Z64 or not 0 <= drop <= 32:
            raise TypeMismatch(f"{x.type} cannot be shortened to {frac} fraction bits in Z32")
        rounding = 3 << (drop - 1) if drop else 0

        def moved(part: Tensor, add: int) -> Tensor:
            return s.local(x.shape, Z32.dtype, lambda: shorten(part, add, drop))

        parts = [moved(part, rounding if (s.party + i) % 3 == 0 else 0) for i, part in enumerate(x.parts)]
        return Shared(Secret(Z32, frac, x.shape), tuple(parts))

    async def truncate(self, s: Session, x: Shared, bits: int, *, ring: Ring | None = None) -> Shared:
        """Cost: 2 rounds, 2k + (k - k_in) + f + 2 bits, k of the result's ring. Leaks: nothing.

        Error: floor or ceiling, |e| < 1 ulp, mean 0; bits = 0 is exact. Range: |word| < 2^(k_in - 2). Source:
        [GeoTrunc25]; docs/security/rep3.md, "truncate".
        """
        return await close(s, Additive.fold(s, _identity, x, x.shape), bits, x.ring, x.frac - bits, ring)

    # ---- bits ----------------------------------------------------------------------------------------------

    async def sign_bits(self, s: Session, x: Shared, window: Window) -> Shared:
        """Cost: 2 + levels rounds, 97 bits and 3 rounds at m = 16; see :func:`sign_shares`. Not fused: a carry
        tree of gates, :func:`less_bits`. Leaks: nothing.
        """
        if not self.fused:
            return await less_bits(s, x, window)
        bit = await sign_shares(s.fork("open"), x, window)
        return await share_plane(s, bit, plane_bytes(x.type.numel))

    async def bits_to_words(self, s: Session, plane: Shared, ring: Ring, shape: tuple[int, ...]) -> Shared:
        """Cost: 2 rounds, 3k + 2 bits. Exact. Leaks: nothing."""
        return await bits_to_words(s, plane, ring, shape)

    async def less_than_zero(
        self, s: Session, x: Shared, window: Window, *, ring: Ring | None = None
    ) -> Shared:
        """Cost: 3 + levels rounds; 289 bits and 4 rounds at m = 16, k = 64. Leaks: nothing."""
        if not self.fused:
            return await super().less_than_zero(s, x, window, ring=ring)
        bit = await sign_shares(s.fork("sign"), x, window)
        return await bit_words(s.fork("b2a"), bit, ring or x.ring, x.shape)

    async def select_negative(self, s: Session, x: Shared, window: Window, y: Shared | None = None) -> Shared:
        """Cost: 3 + levels rounds; 4k + 2 bits and the sign's, 353 bits and 4 rounds at m = 16, k = 64; 3k
        for each further y. Leaks: nothing.
        """
        y = x if y is None else y
        if not self.fused:
            return await super().select_negative(s, x, window, y)
        bit = await sign_shares(s.fork("sign"), x, window)
        return await select_by_bit(s.fork("select"), bit, y, x.shape)

    async def select_largest(self, s: Session, x: Shared, window: Window, y: Shared | None = None) -> Shared:
        """Cost: 4 + levels rounds; 1,113 bits and 5 rounds for four candidates at m = 16, k = 64, 681 for three.
        Leaks: nothing.
        """
        y = x if y is None else y
        if not self.fused or x.shape[0] not in (3, 4):
            return await super().select_largest(s, x, window, y)
        return await select_largest(s, x, window, y)

    # ---- one opening ---------------------------------------------------------------------------------------

    async def evaluate_all(
        self,
        s: Session,
        series: Sequence[Series],
        x: Shared | Unclosed,
        *,
        frac: int | None = None,
        ring: Ring | None = None,
    ) -> tuple[Shared, ...]:
        """3 rounds; see :func:`sfumato.protocol.rep3_evaluate.evaluate`. The same with ``fused=False``: it has no form
        on the plain moves, and a caller who wants none of it composes polynomials instead.
        """
        x = await self._closed(s, x)
        frac, ring = x.frac if frac is None else frac, ring or x.ring
        return await evaluate(self, s, series, x, frac, ring, two_way=self.two_way)

    async def exponential(
        self, s: Session, spec: Exponential, x: Shared | Unclosed, *, frac: int, ring: Ring | None = None
    ) -> Shared:
        """3 rounds; see :func:`sfumato.protocol.rep3_evaluate.exponential`."""
        x = await self._closed(s, x)
        return await exponential(self, s, spec, x, frac, ring or x.ring, two_way=self.two_way)

    async def _closed(self, s: Session, x: Shared | Unclosed) -> Shared | Unclosed:
        """The argument of a function: a product is not opened before it is closed on the plain moves."""
        return x if self.fused or isinstance(x, Shared) else await x.closed(self, s.fork("close"))

    # ---- at the client -------------------------------------------------------------------------------------

    @staticmethod
    def split(words: Tensor, ring: Ring, masks: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Components of a value for two uniform masks: (mask0, mask1, words - mask0 - mask1)."""
        return masks[0], masks[1], _minus(ring, _minus(ring, words, masks[0]), masks[1])

    @staticmethod
    def combine(components: Sequence[Tensor], ring: Ring) -> Tensor:
        """The value of three components."""
        return _plus(ring, _plus(ring, components[0], components[1]), components[2])


def _identity(part: Tensor) -> Tensor:
    return part


def _plus(ring: Ring, a: Tensor, b: Tensor) -> Tensor:
    return a + b if ring.kind == "Z" else a ^ b


def _minus(ring: Ring, a: Tensor, b: Tensor) -> Tensor:
    return a - b if ring.kind == "Z" else a ^ b
