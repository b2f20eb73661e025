"""The protocol interface: seven moves on shares, and defaults built on them.

``await`` may cost a round; a plain call is local. A move masks what it sends, so no caller can forget to.
Everything above (numerics, graphs, samplers) is written once over this interface.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.errors import TypeMismatch
from sfumato.protocol.series import Exponential, Series
from sfumato.ring.fixed import encode
from sfumato.session.session import Session
from sfumato.types import Z32, Z64, Ring, Secret, Shared, SharedIndex, TruncationError

__all__ = ["Bilinear", "Exponential", "Linear", "Protocol", "Series", "Term", "Unclosed", "Window"]

Linear = Callable[..., Tensor]
Bilinear = Callable[[Tensor, Tensor], Tensor]
#: A product to be added to another one: f, x, y.
Term = tuple[Bilinear, Shared, Shared]


@dataclass(frozen=True, slots=True)
class Window:
    """The bits a comparison looks at: ``bits`` of them above ``shift``.

    Right for words in [-2^(shift+bits-1) + 2^shift, 2^(shift+bits-1)) (without the + 2^shift if shift is 0),
    except that a word in [0, 2^shift) may count as negative: the window's error band of one unit, above zero
    only.
    """

    shift: int
    bits: int

    def __post_init__(self) -> None:
        if not (self.shift >= 0 and self.bits >= 2 and self.shift + self.bits <= 64):
            raise ValueError(f"no comparison window of {self.bits} bits above bit {self.shift}")

    def check(self, ring: Ring) -> None:
        """Raise ``TypeMismatch`` unless the window lies inside the ring's words."""
        if ring.kind != "Z" or self.shift + self.bits > ring.bits:
            raise TypeMismatch(
                f"a window of {self.bits} bits above bit {self.shift} does not lie inside {ring}"
            )


@dataclass(frozen=True, slots=True)
class Unclosed:
    """A product, or a public linear map, that a function of one opening takes before its truncation.

    The argument is (f(x, y) (+ plus)) >> bits, read with ``frac`` fraction bits, plus ``offset``; without y it is
    (f(x) (+ plus)) >> bits. ``shape`` is f's, ``plus`` has f's scale and broadcasts. Only ``known`` bits of it are
    right: a function is fitted for that. ``pick`` chooses elements of the argument, which ``seen`` gets as shares.
    """

    f: Callable[..., Tensor]
    x: Shared
    y: Shared | None
    shape: tuple[int, ...]
    bits: int
    frac: int
    plus: Shared | None = None
    offset: float | Tensor = 0.0
    pick: Callable[[Tensor], Tensor] | None = None
    seen: Callable[[Shared], None] | None = None

    def __post_init__(self) -> None:
        if not (self.x.ring.kind == "Z" and 0 <= self.bits < self.x.ring.bits):
            raise TypeMismatch(f"a product in {self.x.ring} cannot drop {self.bits} bits before its opening")

    @property
    def type(self) -> Secret:
        """The argument's type."""
        return Secret(self.x.ring, self.frac, self.shape)

    @property
    def ring(self) -> Ring:
        """The ring of the product, and by default of what is made of it."""
        return self.x.ring

    @property
    def known(self) -> int:
        """Low bits of the argument's words that its summands add up to: what is above them is a wrap's."""
        return self.x.ring.bits - self.bits

    async def closed(self, p: Protocol, s: Session) -> Shared:
        """The argument by a product and its truncation."""
        if self.y is None:
            gain = self.frac + self.bits - self.x.frac
            z = await p.linear_truncate(
                s, self.f, self.x, self.bits, shape=self.shape, plus=self.plus, gain_frac=gain
            )
        else:
            z = await p.bilinear_truncate(s, self.f, self.x, self.y, self.bits, plus=self.plus)
        z = z.viewed(self.frac)
        if isinstance(self.offset, Tensor) or self.offset:
            z = p.add_public(s, z, p.encode(z, self.offset))
        if self.pick is not None and self.seen is not None:
            self.seen(p.linear(self.pick, z))
        return z


class Protocol(ABC):
    """Seven moves and what follows from them.

    ``fused=False`` keeps products, linear maps, their truncations and signs on the plain moves: slower, and the
    base for malicious security. :meth:`evaluate` is one move either way.
    """

    name: ClassVar[str]
    parties: ClassVar[int]
    truncation: ClassVar[TruncationError]

    def __init__(self, *, fused: bool = True) -> None:
        self.fused = fused

    # ---- the seven moves -----------------------------------------------------------------------------------

    @abstractmethod
    async def share(self, s: Session, x: Tensor | None, owner: int, type: Secret) -> Shared:
        """Share the owner's ring words (``x`` is None elsewhere)."""

    @abstractmethod
    async def reveal(self, s: Session, x: Shared, to: tuple[int, ...]) -> Tensor | None:
        """Open to the parties ``to``: ring words there, None elsewhere."""

    @abstractmethod
    def summand(self, s: Session, x: Shared) -> Tensor:
        """This party's fresh summand of x for a receiver outside the parties (a client): all of them add up
        to x, and together they say nothing else. Local; the receiver gets k bits from each party.
        """

    def linear(self, f: Linear, *xs: Shared, frac: int | None = None, ring: Ring | None = None) -> Shared:
        """Any ring-linear f of secrets of one ring, on each component. Local. ``frac`` names the result's
        scale if f changes it, ``ring`` its ring if f reduces words to a smaller one.
        """
        source = self._same_ring(*xs)
        ring = ring or source
        # torch sums int32 words into int64; the ring's words are what is left mod 2^k.
        parts = tuple(
            f(*components).to(ring.dtype) for components in zip(*(x.parts for x in xs), strict=True)
        )
        return Shared(Secret(ring, xs[0].frac if frac is None else frac, tuple(parts[0].shape)), parts)

    @abstractmethod
    def add_public(self, s: Session, x: Shared, c: Tensor) -> Shared:
        """x + c for public ring words c (broadcast against x). Local."""

    @abstractmethod
    async def bilinear(self, s: Session, f: Bilinear, x: Shared, y: Shared) -> Shared:
        """Any bilinear f of two secrets of one ring, fresh shares, no truncation: scales add."""

    @abstractmethod
    async def truncate(self, s: Session, x: Shared, bits: int, *, ring: Ring | None = None) -> Shared:
        """Drop ``bits`` fraction bits; the result may live in a wider ring."""

    @abstractmethod
    def inject(self, s: Session, x: Shared, ring: Ring) -> tuple[Shared, ...]:
        """Each component of x as a sharing of its own in another ring (words reduced or sign-extended).
        Local.
        """

    # ---- written on top, overridable -----------------------------------------------------------------------

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
        """(f(x, y) + plus) >> bits, in ``ring`` (default: x's); ``plus`` has the product's scale. f may end in a public
        linear map. ``more``: products (g, u, v) of the same shape and scale, which are added for nothing.
        """
        z = await self.bilinear(s.fork("mul"), f, x, y)
        for i, (g, u, v) in enumerate(more):
            z = self.add(z, await self.bilinear(s.fork(f"mul{i}"), g, u, v))
        if plus is not None:
            z = self.add(z, plus.viewed(z.frac))
        return await self.truncate(s.fork("trunc"), z, bits, ring=ring)

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
        """(f(x) + plus) >> bits for a public linear f to ``shape`` that multiplies by constants of
        ``gain_frac`` bits.

        f runs only at the parties that need it, so it may encode its constants when called.
        """
        z = self.linear(f, x, frac=x.frac + gain_frac)
        if plus is not None:
            z = self.add(z, plus.viewed(z.frac))
        return await self.truncate(s, z, bits)

    @abstractmethod
    def shorten(self, s: Session, x: Shared, frac: int) -> Shared:
        """x in Z32 with ``frac`` fraction bits at most x's, each component rounded by itself. Local."""

    async def cast(self, s: Session, x: Shared, ring: Ring) -> Shared:
        """The same value in another Z ring. Z64 -> Z32 is local (|word| < 2^30 asked); Z32 -> Z64 costs 162
        bits.
        """
        if ring == x.ring:
            return x
        if x.ring == Z64 and ring == Z32:
            parts = tuple(part.to(torch.int32) for part in x.parts)
            return Shared(replace(x.type, ring=Z32), parts)
        if x.ring == Z32 and ring == Z64:
            return await self.truncate(s, x, 0, ring=Z64)
        raise TypeMismatch(f"no cast from {x.ring} to {ring}; use a2b and b2a between Z and B rings")

    @abstractmethod
    async def sign_bits(self, s: Session, x: Shared, window: Window) -> Shared:
        """The sign bit of every element as a bit plane in B8 (eight elements a byte, padded): shape (ceil(n /
        8),).
        """

    @abstractmethod
    async def bits_to_words(self, s: Session, plane: Shared, ring: Ring, shape: tuple[int, ...]) -> Shared:
        """A bit plane as 0/1 words of a Z ring (frac 0): b2a of single bits."""

    async def less_than_zero(
        self, s: Session, x: Shared, window: Window, *, ring: Ring | None = None
    ) -> Shared:
        """[x < 0] as 0/1 words with frac 0, judged on the window's bits."""
        plane = await self.sign_bits(s.fork("sign"), x, window)
        return await self.bits_to_words(s.fork("b2a"), plane, ring or x.ring, x.shape)

    async def select_negative(self, s: Session, x: Shared, window: Window, y: Shared | None = None) -> Shared:
        """[x < 0] * y, judged on the window's bits; y defaults to x, or has the shape (..., *x.shape) and x's
        ring: one sign chooses from many.
        """
        y = x if y is None else y
        bit = await self.less_than_zero(s.fork("sign"), x, window, ring=y.ring)
        return await self.select(s.fork("select"), bit, y)

    async def select_largest(self, s: Session, x: Shared, window: Window, y: Shared | None = None) -> Shared:
        """The element of y (..., r, *S) at which x (r, *S) is largest, judged on the window's bits of differences;
        y defaults to x, or has its ring. Below the true maximum by at most ceil(log2 r) bands.
        """
        y = x if y is None else y
        lead = y.shape[: len(y.shape) - len(x.shape)]
        count = math.prod(lead)
        whole = self.linear(
            lambda u, v: torch.cat([u[None], v.reshape(count, *u.shape)]), x, y.viewed(x.frac)
        )  # (1 + q, r, *S)
        level = 0
        while (r := whole.shape[1]) > 1:
            even = r - r % 2
            gap = self.linear(lambda w: w[:, 0:even:2] - w[:, 1:even:2], whole)  # noqa: B023
            first = self.linear(lambda w: w[0], gap)
            lag = await self.select_negative(s.fork(f"level{level}"), first, window, gap)
            whole = self.linear(
                lambda w, d: torch.cat([w[:, 0:even:2] - d, w[:, even:]], 1),  # noqa: B023
                whole,
                lag,
            )
            level += 1
        return self.linear(lambda w: w[1:, 0].reshape((*lead, *w.shape[2:])), whole).viewed(y.frac)

    async def select(self, s: Session, bit: Shared, x: Shared, y: Shared | None = None) -> Shared:
        """bit ? x : y elementwise for 0/1 words of frac 0; y defaults to zero. Exact, one product."""
        difference = x if y is None else self.sub(x, y)
        chosen = await self.bilinear(s, torch.mul, bit, difference)
        return chosen if y is None else self.add(chosen, y)

    async def look_up(self, s: Session, x: Shared, at: SharedIndex) -> Shared:
        """Rows of the table x (rows, *rest), (*at.shape, *rest): those of the client's secret numbers. Exact.

        ``at`` is in x's ring or in a wider one. A protocol need not have this move: a product with one-hot rows, which
        the client shares as words, finds the same.
        """
        raise TypeMismatch(f"{self.name} has no look-up by secret row numbers; share one-hot rows instead")

    @abstractmethod
    async def evaluate_all(
        self,
        s: Session,
        series: Sequence[Series],
        x: Shared | Unclosed,
        *,
        frac: int | None = None,
        ring: Ring | None = None,
    ) -> tuple[Shared, ...]:
        """Univariate functions of one secret, elementwise, from one opening: :class:`Series` of equal centre and
        period, with ``frac`` (default: x's) fraction bits, in ``ring`` (default: x's). Of a product that is not closed
        the truncation is saved.
        """

    async def evaluate(
        self,
        s: Session,
        series: Series,
        x: Shared | Unclosed,
        *,
        frac: int | None = None,
        ring: Ring | None = None,
    ) -> Shared:
        """One univariate function given as a :class:`Series`; see :meth:`evaluate_all`."""
        (y,) = await self.evaluate_all(s, (series,), x, frac=frac, ring=ring)
        return y

    @abstractmethod
    async def exponential(
        self, s: Session, spec: Exponential, x: Shared | Unclosed, *, frac: int, ring: Ring | None = None
    ) -> Shared:
        """exp(x) with relative accuracy on the specification's range, elementwise, with ``frac`` fraction bits."""

    # ---- local conveniences --------------------------------------------------------------------------------

    def add(self, x: Shared, y: Shared) -> Shared:
        """x + y with broadcasting; scales must agree."""
        self._same_frac(x, y)
        return self.linear(torch.add if x.ring.kind == "Z" else torch.bitwise_xor, x, y)

    def sub(self, x: Shared, y: Shared) -> Shared:
        """x - y with broadcasting; scales must agree."""
        self._same_frac(x, y)
        return self.linear(torch.sub if x.ring.kind == "Z" else torch.bitwise_xor, x, y)

    def lift(self, x: Shared, frac: int) -> Shared:
        """The same value with more fraction bits: an exact local shift. The range shrinks by as many bits."""
        if frac < x.frac:
            raise TypeMismatch(
                f"{frac} fraction bits are fewer than the {x.frac} there are; truncate instead"
            )
        if frac == x.frac:
            return x
        bits = frac - x.frac
        return self.linear(lambda part: part << bits, x, frac=frac)

    def encode(self, x: Shared, c: Tensor | float, frac: int | None = None) -> Tensor:
        """Public reals as ring words fit for x (its ring, its device)."""
        tensor = torch.as_tensor(c, dtype=torch.float64) if not isinstance(c, Tensor) else c
        if x.parts and x.parts[0].device.type == "meta":
            tensor = tensor.to("meta")
        return encode(tensor, x.ring, x.frac if frac is None else frac)

    @staticmethod
    def _check_look_up(x: Shared, at: SharedIndex) -> None:
        if x.ring.kind != "Z" or x.ring.bits > at.type.ring.bits or x.shape[:1] != (at.type.rows,):
            raise TypeMismatch(f"{at.type} do not pick rows of a table {x.type}")

    @staticmethod
    def _same_ring(*xs: Shared) -> Ring:
        rings = {x.ring for x in xs}
        if len(rings) != 1:
            raise TypeMismatch(f"secrets of different rings {sorted(map(str, rings))}; cast one of them")
        return xs[0].ring

    @staticmethod
    def _same_frac(*xs: Shared) -> None:
        fracs = {x.frac for x in xs}
        if len(fracs) != 1:
            raise TypeMismatch(f"secrets of different scales {sorted(fracs)}; lift the smaller one")


def plane_bytes(count: int) -> int:
    """Bytes of a bit plane of ``count`` elements."""
    return -(-count // 8)
