"""Measurements: error on a range and on recorded values, cost on ``rep3``, and the law of the scaling factor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from sfumato.catalogue.entry import Entry, Function
from sfumato.catalogue.prices import Cost
from sfumato.catalogue.shares import secure
from sfumato.catalogue.words import Reals
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Z64, Secret, Shared

__all__ = [
    "Errors",
    "Recorded",
    "ScalingPoint",
    "error_curve",
    "grid",
    "on_rep3",
    "on_shares",
    "recorded",
    "recorded_errors",
    "rows",
    "scaling",
    "stated_errors",
]

_POINTS = 4001
#: Errors are told up to this one.
_LARGEST = 1e100
_PER_BIN = 16


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest, mean and root-mean-square error; relative where the function's is told so. ``outside``: the
    share of values beyond the entry's range."""

    max: float
    mean: float
    rms: float
    outside: float = 0.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """Inputs of one function in one model: a histogram, tails, and for rows a few rows as they were."""

    function: str
    source: str
    note: str
    count: int
    low: float
    high: float
    quantiles: Mapping[str, float]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...] = ()

    def share_outside(self, lo: float, hi: float) -> float:
        """The share of recorded values below ``lo`` or above ``hi``, bins taken as even inside."""
        edges, counts = np.array(self.edges), np.array(self.counts, dtype=np.float64)
        width = np.maximum(edges[1:] - edges[:-1], 1e-300)
        inside = np.clip((np.minimum(edges[1:], hi) - np.maximum(edges[:-1], lo)) / width, 0.0, 1.0)
        share = 1.0 - float((counts * inside).sum() / counts.sum())
        # What fits entirely is not to be told as 1e-16.
        return 0.0 if lo <= self.low and hi >= self.high else max(0.0, share)


@lru_cache(maxsize=1)
def _recorded() -> tuple[Recorded, ...]:
    text = files("sfumato.catalogue").joinpath("recorded.json").read_text(encoding="utf-8")
    return tuple(
        Recorded(
            item["function"], item["source"], item["note"], item["count"], item["low"], item["high"],
            item["quantiles"], tuple(item["edges"]), tuple(item["counts"]),
            tuple(tuple(row) for row in item.get("rows", ())),
        )
        for item in json.loads(text)["records"]
    )  # fmt: skip


def recorded(function: str) -> tuple[Recorded, ...]:
    """What was recorded of a function's inputs, by source."""
    return tuple(record for record in _recorded() if record.function == function)


# ---- points ------------------------------------------------------------------------------------------------


def grid(function: Function, lo: float, hi: float, points: int = _POINTS) -> Reals:
    """Points from lo to hi, even on the function's axis."""
    if function.log:
        return np.exp(np.linspace(np.log(lo), np.log(hi), points))
    return np.linspace(lo, hi, points)


def rows(count: int, length: int, deviation: float, seed: int = 5) -> Reals:
    """Rows of normal scores, the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return (deviation * torch.randn(count, length, generator=generator, dtype=torch.float64)).numpy()


# ---- errors ------------------------------------------------------------------------------------------------


def error_curve(entry: Entry, x: Reals, frac: int | None = None, *, exact: bool = False) -> Reals:
    """The error at every point; relative where the function's is told so. ``exact``: of the formula alone."""
    truth = entry.of.truth(x)
    error = np.abs((entry.exact(x) if exact else entry.approximate(x, frac)) - truth)
    if entry.of.relative:
        error = np.minimum(np.nan_to_num(error, nan=_LARGEST), _LARGEST) / np.abs(truth)
    # A formula that leaves float64 is infinitely wrong.
    return np.minimum(np.nan_to_num(error, nan=_LARGEST), _LARGEST)


def _row_errors(entry: Entry, x: Reals, *, exact: bool = False) -> Errors:
    """Of softmax: total variation of each row. Of a norm: the largest error of each row."""
    error = error_curve(entry, x, exact=exact)
    each = error.sum(-1) / 2 if entry.function == "softmax" else error.max(-1)
    return Errors(float(each.max()), float(each.mean()), float(np.sqrt((each**2).mean())))


def stated_errors(entry: Entry, *, exact: bool = False) -> Errors:
    """On the entry's range. Rows: 64 of 128 scores of deviation 2, as total variation (norms: of deviation 1,
    largest error)."""
    if entry.of.rows:
        return _row_errors(entry, rows(64, 128, 2.0 if entry.function == "softmax" else 1.0), exact=exact)
    error = error_curve(entry, grid(entry.of, entry.lo, entry.hi), exact=exact)
    return Errors(float(error.max()), float(error.mean()), float(np.sqrt((error**2).mean())))


def recorded_errors(entry: Entry, record: Recorded) -> Errors:
    """On recorded values: every bin at 16 points, weighted by its count; rows as they were recorded."""
    if entry.of.rows:
        found = [_row_errors(entry, np.array([row])) for row in record.rows]
        each = np.array([e.max for e in found])
        outside = record.share_outside(entry.lo, entry.hi) if entry.function == "softmax" else 0.0
        return Errors(float(each.max()), float(each.mean()), float(np.sqrt((each**2).mean())), outside)
    edges, counts = np.array(record.edges), np.array(record.counts, dtype=np.float64)
    held = counts > 0
    within = (np.arange(_PER_BIN) + 0.5) / _PER_BIN
    low, high = edges[:-1][held, None], edges[1:][held, None]
    x = low * (high / low) ** within if entry.of.log else low + (high - low) * within
    error = error_curve(entry, x.ravel()).reshape(x.shape)
    weight = (counts[held] / counts.sum())[:, None] / _PER_BIN
    mean, square = float((error * weight).sum()), float((error**2 * weight).sum())
    return Errors(float(error.max()), mean, float(np.sqrt(square)), record.share_outside(entry.lo, entry.hi))


# ---- on shares ---------------------------------------------------------------------------------------------


def on_shares(entry: Entry, x: Reals, *, device: str = "cpu") -> tuple[Reals | None, int, int]:
    """The entry run by three simulated parties: the opened result, rounds, and bits of all of them."""
    protocol, values = Rep3(), torch.from_numpy(np.ascontiguousarray(x))
    kind = Secret(Z64, entry.frac, tuple(values.shape))

    async def main(s: Session) -> tuple[Any, int, int]:
        given = encode(values.to(device), Z64, entry.frac)
        secret: Shared = await protocol.share(s.fork("in"), given, 0, kind)
        clock, sent = s.clock, s.ledger.bytes_sent
        y = await secure(protocol, s.fork("entry"), secret, entry)
        after, more = s.clock, s.ledger.bytes_sent - sent
        # The simulation's clock is one number: every session here is whole.
        assert isinstance(clock, int)
        assert isinstance(after, int)
        words = await protocol.reveal(s.fork("out"), y, (0, 1, 2))
        return (
            (None if device == "meta" or words is None else decode(words, y.frac).numpy()),
            after - clock,
            more,
        )

    results, _ = simulate(main, device=device)
    return results[0][0], max(r[1] for r in results), 8 * sum(r[2] for r in results)


@lru_cache(maxsize=512)
def _measured_cost(name: str, row: int) -> tuple[int, float] | None:
    from sfumato.catalogue import get

    entry = get(name)
    if not entry.secure:
        return None
    shape = (16, row) if entry.of.rows else (1024,)
    _, rounds, bits = on_shares(entry, np.ones(shape), device="meta")
    return rounds, bits / float(np.prod(shape))


def on_rep3(entry: Entry, row: int = 128) -> Cost | None:
    """What the entry costs as it runs here, under our three-party protocol; None when it needs tables."""
    found = _measured_cost(entry.name, row)
    return None if found is None else Cost(found[0], found[1], "counted: rep3, Z64")


# ---- the scaling factor ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """At divisor d, f fraction bits and x: the measured relative error, and the law's two terms.

    ``kernel`` is rho(x / d), the formula's own error; ``rounding`` is 2^-f d / x, half of it for a root. The
    result's own grain, 2^-f x (2^-f sqrt(x)), comes on top and is told apart.
    """

    d: float
    frac: int
    x: float
    measured: float
    kernel: float
    rounding: float
    grain: float

    @property
    def law(self) -> float:
        """rho(x / d) + 2^-f d / x, or half of the second term for a root."""
        return self.kernel + self.rounding


def scaling(
    kernel: Entry,
    *,
    divisors: tuple[float, ...] = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0),
    fracs: tuple[int, ...] = (16, 18, 20),
    points: tuple[float, ...] = (1.0, 16.0, 256.0),
) -> list[ScalingPoint]:
    """The relative error of (1 / d) R(x / d), each the largest over 200 values within 5 % of x."""
    found, root = [], kernel.function == "rsqrt"
    for frac in fracs:
        for d in divisors:
            entry = replace(kernel, options={**kernel.options, "d": d})
            for x in points:
                near = x * (1.0 + 0.05 * np.linspace(-1.0, 1.0, 200))
                error = error_curve(entry, near, frac)
                own = error_curve(entry, near, exact=True)
                found.append(
                    ScalingPoint(
                        d, frac, x, float(error.max()), float(own.max()),
                        2.0**-frac * d / x / (2 if root else 1), 2.0**-frac * (x**0.5 if root else x),
                    )
                )  # fmt: skip
    return found
