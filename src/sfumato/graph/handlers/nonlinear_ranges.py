"""What the non-linear handlers share: calibrated ranges with their margins, tolerances by profile, rings and
scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import CaptureError, RangeError
from sfumato.graph.handlers.kinds import Context, Options, Stats
from sfumato.graph.program import Node
from sfumato.session.session import Session
from sfumato.types import Z64, Shared

__all__ = [
    "Tolerances",
    "argument",
    "bound_of",
    "chosen",
    "in_range",
    "in_z64",
    "like",
    "range_of",
    "short_down",
    "short_up",
    "tolerances",
    "widened",
]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class Tolerances(NamedTuple):
    """Largest errors that a profile accepts: absolute of smooth functions, relative of exp and of
    reciprocals."""

    smooth: float
    exp: float
    inverse: float


_PROFILES = {"precise": Tolerances(5e-5, 1e-4, 2e-5), "fast": Tolerances(5e-4, 2e-3, 5e-4)}


def tolerances(options: Options) -> Tolerances:
    """The profile's tolerances.

    Raises:
        CaptureError: a profile without approximations of its own.
    """
    found = _PROFILES.get(options.profile)
    if found is None:
        raise CaptureError(
            f"the profile {options.profile!r} has no approximation for this call; use 'precise' or 'fast'"
        )
    return found


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def in_range(args: Args, kwargs: Kwargs, out: Tensor) -> dict[str, float]:
    """Measure: the first argument's smallest and largest value."""
    x = args[0].to(torch.float64)
    return {} if x.numel() == 0 else {"lo_in": float(x.min()), "hi_in": float(x.max())}


def widened(lo: float, hi: float, margin: float) -> tuple[float, float]:
    """[lo, hi] with ``margin - 1`` of its size more on each side, rounded outwards to short numbers."""
    span = max(hi - lo, 2.0**-8 * max(1.0, abs(lo), abs(hi)), 0.125)
    step = 2.0 ** (math.floor(math.log2(span)) - 4)
    more = (margin - 1.0) * span
    return math.floor((lo - more) / step) * step, math.ceil((hi + more) / step) * step


def short_up(x: float) -> float:
    """The next number above a positive x with four significant bits: plans say little of what was measured."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.ceil(mantissa * 16), exponent - 4)


def short_down(x: float) -> float:
    """The next number below a positive x with four significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(mantissa * 16), exponent - 4)


def range_of(node: Node, stats: Stats, options: Options) -> tuple[float, float]:
    """The calibrated range of the first argument with its margin.

    Raises:
        CaptureError: the call was not calibrated.
    """
    if "lo_in" not in stats:
        raise CaptureError(f"{node.name} was not calibrated; give calibration inputs that reach it")
    return widened(stats["lo_in"], stats["hi_in"], options.margin)


def bound_of(node: Node, stats: Stats, options: Options) -> float:
    """A bound on |first argument|, with the margin."""
    lo, hi = range_of(node, stats, options)
    return max(abs(lo), abs(hi), 2.0**-6)


def chosen(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a planner; a range that cannot be planned is a problem of the capture."""
    try:
        return make()
    except RangeError as error:
        raise CaptureError(str(error)) from error


async def in_z64(ctx: Context, s: Session, x: Any) -> Any:
    """A secret at the plan's scale in Z64, where the numerics live; whatever is public passes."""
    if not isinstance(x, Shared):
        return x
    x = ctx.protocol.lift(x, ctx.frac) if x.frac == 0 else x
    return await ctx.protocol.cast(s, x, Z64)


async def like(ctx: Context, s: Session, y: Shared) -> Shared:
    """A result in the plan's ring."""
    return await ctx.protocol.cast(s, y, ctx.ring)
