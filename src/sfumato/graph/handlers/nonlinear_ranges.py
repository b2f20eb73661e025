"""What the non-linear handlers share: calibrated ranges with their margins, tolerances by profile, rings and
scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CaptureError, RangeError
from sfumato.graph.handlers.kinds import Context, Options, Stats
from sfumato.graph.program import Node
from sfumato.ops import compare
from sfumato.session.session import Session
from sfumato.types import Z64, Shared

__all__ = [
    "Budget",
    "Measured",
    "argument",
    "bound_of",
    "budget",
    "chosen",
    "in_range",
    "in_z64",
    "is_short",
    "like",
    "log_range",
    "positive",
    "range_of",
    "room",
    "seen",
    "short_down",
    "short_up",
    "spread",
    "usual",
    "widened",
    "window_bits",
]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Measured = Mapping[str, float | Tensor]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a profile allows one call: the L2 error of its result, over the L2 size of the result.

    Results of one call share a scale (the root of their mean square in the calibration run where it was smallest), so
    the planners get largest errors: a fit that ripples evenly has half of its largest error on average. No call is
    asked for more than four units of the plan's last bit, or one of the few that a value in Z32 has. ``words``: the
    same for a call in the narrow ring of a mixed plan, where the rounding of its operands counts.
    """

    relative: float
    words: float

    @property
    def largest(self) -> float:
        """Relative largest error of an exponential, or of a reciprocal that multiplies a row."""
        return 2.0 * self.relative

    def of_rows(self, *, short: bool) -> float:
        """Relative largest error of the weights of a row."""
        return 2.0 * self.words if short else self.largest

    def smooth(self, scale: float, frac: int, *, short: bool = False) -> float:
        """Absolute largest error of a function whose results have this scale."""
        known = short_down(scale) if scale > 0.0 else 0.0
        return (
            max(2.0 * self.words * known, 2.0**-frac)
            if short
            else max(self.largest * known, 2.0 ** (2 - frac))
        )

    def band(self, scale: float) -> float:
        """How close to zero a comparison may err. A value in [0, band) that is taken for a negative one costs as much
        as itself; with at most one value in ``scale`` per unit of length there, that is band^3 / (3 scale) in the mean
        square, which may be (relative scale)^2."""
        return (3.0 * self.relative**2) ** (1.0 / 3.0) * scale


_BUDGETS = {"precise": Budget(1e-4, 5e-4), "fast": Budget(1e-3, 4e-3)}


def budget(options: Options) -> Budget:
    """The profile's budget; under a paper's profile, what the paper does not replace is held to that of ``precise``."""
    return _BUDGETS.get(options.profile, _BUDGETS["precise"])


def argument(args: Args, kwargs: Kwargs, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def in_range(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    """Measure: the first argument."""
    return {"in": args[0].to(torch.float64)}


def positive(args: Args, kwargs: Kwargs, out: Tensor) -> Measured:
    """Measure: the first argument, and its logarithms where it is positive throughout."""
    x = args[0].to(torch.float64)
    return {"in": x, "log_in": x.log2()} if x.numel() and float(x.min()) > 0.0 else {"in": x}


#: A range is widened by so much of its size at least, on each side; by more if few runs were seen.
_FLOOR, _FLOOR_OF_ONE_RUN = 0.02, 0.05
#: ... and by so much at most where so many runs were seen.
_MOST, _MANY_RUNS = 0.5, 16


#: Share of the values that a function in Z32 owes its accuracy.
_OFTEN = 0.99


def usual(stats: Stats, key: str, *, often: bool = False) -> tuple[float, float]:
    """What calibration saw of a quantity, and the smallest margin, rounded outwards to short numbers. ``often``: where
    99 of 100 of its values lie, if a sketch tells."""
    lo, hi = stats[f"lo_{key}"], stats[f"hi_{key}"]
    sketch = stats.sketches.get(key)
    if often and sketch is not None:
        return sketch.values.central(_OFTEN)
    step = 2.0 ** (math.frexp(max(hi - lo, 2.0**-8 * max(1.0, abs(lo), abs(hi))))[1] - 7)
    return math.floor(lo / step - 1.0) * step, math.ceil(hi / step + 1.0) * step


def widened(
    stats: Stats, key: str, options: Options, *, least: float = 0.125, most: float | None = None
) -> tuple[float, float]:
    """The range of a quantity in future runs, by the tail model, rounded outwards to short numbers.

    Without enough runs a side is widened by ``most`` at most (default: the plan's whole margin), and by exactly that
    without a model. Ranges smaller than ``least`` are treated as that large.
    """
    lo, hi = stats[f"lo_{key}"], stats[f"hi_{key}"]
    span = max(hi - lo, 2.0**-8 * max(1.0, abs(lo), abs(hi)), least)
    most = (options.margin - 1.0) * span if most is None else most
    below, above = _more(stats, key, options, span, most)
    step = 2.0 ** (math.frexp(span)[1] - 7)
    return math.floor((lo - below) / step) * step, math.ceil((hi + above) / step) * step


def _more(stats: Stats, key: str, options: Options, span: float, most: float) -> tuple[float, float]:
    """By how much each side of a quantity's range is widened."""
    sketch = stats.sketches.get(key)
    if sketch is None or options.risk <= 0.0:
        return most, most
    lo, hi, risk = stats[f"lo_{key}"], stats[f"hi_{key}"], options.risk / 2  # half on each side
    floor = max(_FLOOR, _FLOOR_OF_ONE_RUN / math.sqrt(sketch.runs)) * span
    if sketch.runs >= _MANY_RUNS:
        most = max(most, _MOST * span)
    below, above = (max(x, floor) for x in (lo - sketch.below(lo, risk), sketch.above(hi, risk) - hi))
    return min(below, most), min(above, most)


def log_range(stats: Stats, key: str, options: Options) -> tuple[float, float]:
    """The range of a positive quantity whose logarithms (base 2) were measured as ``key``: margins are factors, and
    never reach zero. Without enough runs they are the plan's margin cubed at most."""
    low, high = widened(stats, key, options, least=0.5, most=3.0 * math.log2(options.margin))
    return short_down(2.0**low), short_up(2.0**high)


def short_up(x: float) -> float:
    """The next number above a positive x with four significant bits: plans say little of what was measured."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.ceil(mantissa * 16), exponent - 4)


def short_down(x: float) -> float:
    """The next number below a positive x with four significant bits."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(mantissa * 16), exponent - 4)


def range_of(node: Node, stats: Stats, options: Options) -> tuple[float, float]:
    """The range of the first argument in future runs.

    Raises:
        CaptureError: the call was not calibrated.
    """
    seen(node, stats, "in")
    return widened(stats, "in", options)


def seen(node: Node, stats: Stats, key: str) -> None:
    """
    Raises:
        CaptureError: calibration did not measure this quantity of the call.
    """
    if f"lo_{key}" not in stats:
        raise CaptureError(f"{node.name} was not calibrated; give calibration inputs that reach it")


def bound_of(node: Node, stats: Stats, options: Options) -> float:
    """A bound on |first argument| in future runs."""
    lo, hi = range_of(node, stats, options)
    return max(abs(lo), abs(hi), 2.0**-6)


def spread(stats: Stats, key: str) -> float:
    """A scale for what comparisons of a quantity may cost: that of the results, at most an eighth of its range."""
    size = (stats[f"hi_{key}"] - stats[f"lo_{key}"]) / 8
    return min(size, stats.get("lo_scale", size))


#: The fewest and the most bits that a comparison looks at.
_FEWEST_BITS, _MOST_BITS = 8, 20


def window_bits(bound: float, band: float, frac: int) -> int:
    """The fewest bits of a comparison of values up to ``bound`` that errs below ``band`` alone.

    Raises:
        RangeError: the bound does not fit the ring.
    """
    for bits in range(_FEWEST_BITS, _MOST_BITS):
        if compare.band(bound, frac, bits) <= band:
            return bits
    return _MOST_BITS


def room(largest: float, frac: int) -> int:
    """Bits of the word, sign included, that holds values up to ``largest`` with ``frac`` fraction bits."""
    return math.frexp(largest)[1] + frac + 1


def chosen(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a planner; a range that cannot be planned is a problem of the capture."""
    try:
        return make()
    except RangeError as error:
        raise CaptureError(str(error)) from error


def is_short(options: Options) -> bool:
    """Whether a call works in the narrow ring of a mixed plan. A plan that is in Z32 as a whole has calls of the rows
    compute in Z64."""
    return options.mixed and options.ring == "Z32"


async def in_z64(ctx: Context, s: Session, x: Any) -> Any:
    """A secret at the plan's scale in Z64, where the numerics live; whatever is public passes."""
    if not isinstance(x, Shared):
        return x
    x = ctx.protocol.lift(x, ctx.frac) if x.frac == 0 else x
    return await ctx.protocol.cast(s, x, Z64)


async def like(ctx: Context, s: Session, y: Shared) -> Shared:
    """A result in the plan's ring."""
    return await ctx.protocol.cast(s, y, ctx.ring)
