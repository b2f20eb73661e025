"""No secrecy: the same fixed-point words in one process, with the truncation error of a real protocol.

For tests, calibration and large quality sweeps. Its rounding is drawn from a keyed stream, so runs repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import RangeError, TypeMismatch
from sfumato.protocol.base import Bilinear, Exponential, Protocol, Series, Unclosed, Window, plane_bytes
from sfumato.protocol.rep3_evaluate import check_domain, check_exponential
from sfumato.ring.fixed import decode
from sfumato.ring.planes import from_plane, to_planes
from sfumato.ring.prg import stream_words
from sfumato.session.session import Session
from sfumato.types import B8, Z32, Z64, Ring, Secret, Shared, SharedIndex, TruncationError

__all__ = ["Plain"]

_KEY = b"sfumato plain rounding".ljust(32, b"\0")


class Plain(Protocol):
    """One party, real words, stochastic rounding as in ``rep3``: floor, or ceiling with probability equal to
    the fraction.

    ``wraps``: a word beyond the range of a truncation or of a function goes on, wrong, as it does in ``rep3``, instead
    of ending the run. Published functions need that: some powers overflow where a bit of zero then takes them out.
    """

    name = "plain"
    parties = 1
    truncation = TruncationError(max_ulp=1.0, bias_ulp=0.0, headroom_bits=2)

    def __init__(self, *, fused: bool = True, wraps: bool = False) -> None:
        super().__init__(fused=fused)
        self._wraps = wraps

    async def share(self, s: Session, x: Tensor | None, owner: int, type: Secret) -> Shared:
        assert x is not None
        return Shared(type, (x,))

    async def reveal(self, s: Session, x: Shared, to: tuple[int, ...]) -> Tensor | None:
        return x.parts[0]

    def summand(self, s: Session, x: Shared) -> Tensor:
        return x.parts[0]

    def add_public(self, s: Session, x: Shared, c: Tensor) -> Shared:
        words = x.parts[0] + c if x.ring.kind == "Z" else x.parts[0] ^ c
        return Shared(Secret(x.ring, x.frac, tuple(words.shape)), (words,))

    def inject(self, s: Session, x: Shared, ring: Ring) -> tuple[Shared, ...]:
        type = Secret(ring, x.frac if ring.kind == x.ring.kind else 0, x.shape)
        return (Shared(type, (x.parts[0].to(ring.dtype),)),)

    async def bilinear(self, s: Session, f: Bilinear, x: Shared, y: Shared) -> Shared:
        ring = self._same_ring(x, y)
        words = f(x.parts[0], y.parts[0]).to(ring.dtype)
        return Shared(Secret(ring, x.frac + y.frac, tuple(words.shape)), (words,))

    async def look_up(self, s: Session, x: Shared, at: SharedIndex) -> Shared:
        """The rows themselves; ``at`` holds the numbers.

        Raises:
            RangeError: a number is no row; names the path.
        """
        self._check_look_up(x, at)
        numbers, table = at.parts[0], x.parts[0]
        shape = (*at.shape, *x.shape[1:])
        if table.device.type == "meta":
            return _nothing(x.ring, x.frac, shape)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < at.type.rows:
            raise RangeError(
                f"a number to look up at {s.path} lies outside the {at.type.rows} rows of its table"
            )
        return Shared(Secret(x.ring, x.frac, shape), (table[numbers.reshape(at.shape)],))

    def shorten(self, s: Session, x: Shared, frac: int) -> Shared:
        """Rounded to nearest.

        Raises:
            RangeError: a value does not fit Z32; names the path.
        """
        drop, words = x.frac - frac, x.parts[0]
        if x.ring != Z64 or not 0 <= drop <= 32:
            raise TypeMismatch(f"{x.type} cannot be shortened to {frac} fraction bits in Z32")
        if words.device.type != "meta":
            words = (words + ((1 << drop) >> 1)) >> drop
            if words.numel() and int(words.abs().max()) >= 1 << 31:
                raise RangeError(
                    f"a value at {s.path} does not fit 32 bits with {frac} fraction bits; calibrate anew"
                )
        return Shared(Secret(Z32, frac, x.shape), (words.to(Z32.dtype),))

    async def truncate(self, s: Session, x: Shared, bits: int, *, ring: Ring | None = None) -> Shared:
        """Domain: |word| < 2^(k-2), asserted but with ``wraps``. Error: |e| < 1 ulp, mean 0, the distribution of rep3's
        ``close``.

        Raises:
            RangeError: a word left the range in which truncation is right; names the path.
        """
        words, ring = x.parts[0], ring or x.ring
        if (
            x.ring.kind != "Z"
            or ring.kind != "Z"
            or not (ring.bits >= x.ring.bits or x.ring.bits - bits >= ring.bits)
        ):
            raise TypeMismatch(f"a truncation by {bits} bits cannot take {x.ring} to {ring}; cast afterwards")
        if not 0 <= bits < x.ring.bits:
            raise TypeMismatch(f"a truncation of {x.ring} drops 0 to {x.ring.bits - 1} bits, not {bits}")
        type = Secret(ring, x.frac - bits, x.shape)
        if words.device.type == "meta":
            return Shared(type, (torch.empty(x.shape, dtype=ring.dtype, device="meta"),))
        limit = 1 << (x.ring.bits - 2)
        low, high = (int(end) for end in words.aminmax()) if words.numel() else (0, 0)
        if not (self._wraps or (high < limit and low > -limit)):
            raise RangeError(
                f"a value before truncation at {s.path} needs more than {x.ring.bits - 2} bits; "
                "use fewer fraction bits, a wider ring, or calibrate on inputs like this one"
            )
        if bits:
            # In one buffer: sweeps of thousands of images spend most of their time here.
            noise = stream_words(_KEY, f"{s.path}|round", x.ring, x.shape)
            words = noise.bitwise_and_((1 << bits) - 1).add_(words).bitwise_right_shift_(bits)
        return Shared(type, (words.to(ring.dtype),))

    async def sign_bits(self, s: Session, x: Shared, window: Window) -> Shared:
        window.check(x.ring)
        plane = to_planes(x.parts[0], 1, window.shift + window.bits - 1)[0]
        return Shared(Secret(B8, 0, (plane_bytes(x.type.numel),)), (plane,))

    async def bits_to_words(self, s: Session, plane: Shared, ring: Ring, shape: tuple[int, ...]) -> Shared:
        return Shared(Secret(ring, 0, shape), (from_plane(plane.parts[0], shape, ring.dtype),))

    async def evaluate_all(
        self,
        s: Session,
        series: Sequence[Series],
        x: Shared | Unclosed,
        *,
        frac: int | None = None,
        ring: Ring | None = None,
    ) -> tuple[Shared, ...]:
        """Each series in float64 on the decoded value, with noise of the deviation that rep3's rounded sines have,
        rounded once as the closing truncation does, with its headroom.

        Raises:
            RangeError: a result leaves the words in which rep3 sums it up; names the path.
        """
        x, known = await self._argument(s, x)
        frac, ring = x.frac if frac is None else frac, ring or x.ring
        check_domain(series, x.type, ring, frac, known)
        return tuple(
            [
                await self._rounded(s, g(decode(x.parts[0], x.frac)), g.noise, g.scale, g.word, frac, ring, i)
                if x.parts[0].device.type != "meta"
                else _nothing(ring, frac, x.shape)
                for i, g in enumerate(series)
            ]
        )

    async def exponential(
        self, s: Session, spec: Exponential, x: Shared | Unclosed, *, frac: int, ring: Ring | None = None
    ) -> Shared:
        """exp in float64 on the decoded value, rounded as rep3's factors and closing truncation are.

        Raises:
            RangeError: a value leaves the specification's range; names the path.
        """
        x, known = await self._argument(s, x)
        ring = ring or x.ring
        check_exponential(spec, x.type, ring, frac, known)
        if x.parts[0].device.type == "meta":
            return _nothing(ring, frac, x.shape)
        value = decode(x.parts[0], x.frac)
        if value.numel() and not (float(value.min()) >= spec.lo and float(value.max()) <= spec.hi):
            raise RangeError(
                f"an exponential at {s.path} was planned for [{spec.lo:g}, {spec.hi:g}] and its argument is outside; "
                "calibrate on inputs like this one"
            )
        exact = torch.exp(value)
        noise = exact * spec.error / 3.0
        return await self._rounded(s, exact, noise, spec.frac_out, spec.word, frac, ring, 0)

    async def _argument(self, s: Session, x: Shared | Unclosed) -> tuple[Shared, int]:
        """The argument of a function, and how many bits of it rep3 would know."""
        if isinstance(x, Shared):
            return x, x.ring.bits
        return await x.closed(self, s.fork("close")), x.known

    async def _rounded(
        self,
        s: Session,
        exact: Tensor,
        noise: Tensor | float,
        scale: int,
        word: int,
        frac: int,
        ring: Ring,
        which: int,
    ) -> Shared:
        """Real numbers as words of ``word`` bits at ``scale``, with this much noise, closed to ``frac`` bits."""
        uniform = (
            stream_words(_KEY, f"{s.path}|noise{which}", Z64, tuple(exact.shape)).to(torch.float64) / 2.0**63
        )
        # a uniform draw in [-1, 1] has deviation 1 / sqrt(3)
        words = (exact + uniform * math.sqrt(3.0) * noise) * 2.0**scale
        limit = 2.0 ** (word - 2)
        if self._wraps:
            words = words.nan_to_num(0.0).clamp(
                -limit, limit
            )  # wrong, as in rep3, where it is another wrong value
        elif exact.numel() and not bool((words.abs() < limit).all()):
            raise RangeError(
                f"a function's value at {s.path} needs more than {word - 2 - scale} integer bits; "
                "use fewer fraction bits, or calibrate on inputs like this one"
            )
        fine = Shared(Secret(Z64, scale, tuple(exact.shape)), (words.round().to(torch.int64),))
        kept = min(frac, scale)
        y = await self.truncate(s.fork(f"round{which}"), fine, scale - kept)
        return self.lift(Shared(Secret(ring, kept, y.shape), (y.parts[0].to(ring.dtype),)), frac)


def _nothing(ring: Ring, frac: int, shape: tuple[int, ...]) -> Shared:
    return Shared(Secret(ring, frac, shape), (torch.empty(shape, dtype=ring.dtype, device="meta"),))
