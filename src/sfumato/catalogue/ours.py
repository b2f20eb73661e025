"""This library's own methods beside the published ones: planned for the recorded range, run by three simulated
parties, cost counted. Only planners and operations that plans use are called, so the numbers follow the code."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.catalogue.entry import FUNCTIONS
from sfumato.catalogue.measure import Errors, Recorded, grid, recorded, rows
from sfumato.catalogue.prices import Cost
from sfumato.catalogue.words import Reals
from sfumato.errors import RangeError
from sfumato.ops.activation import plan_smooth, smooth
from sfumato.ops.elementary import exp, plan_exp, plan_inverse, reciprocal, rsqrt, sqrt
from sfumato.ops.norm import layer_norm, plan_norm
from sfumato.ops.softmax import plan_softmax, softmax
from sfumato.protocol.base import Protocol
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Z64, Secret, Shared

__all__ = ["Own", "own_methods"]

FRAC = 18
_POINTS = 1000
_ROW = 128
Op = Callable[[Protocol, Session, Shared], Awaitable[Shared]]


@dataclass(frozen=True, slots=True)
class Own:
    """One planned method. ``error``: what the plan promises; ``stated``: measured on the planned range."""

    name: str
    function: str
    what: str
    lo: float
    hi: float
    frac: int
    error: float
    stated: Errors
    recorded: Mapping[str, Errors]
    cost: Cost
    notes: str
    curve: tuple[Reals, Reals]


def own_methods(function: str) -> list[Own]:
    """Our methods for one function: none where the planner has none or refuses the range."""
    return list(_own_methods(function))


@lru_cache(maxsize=32)
def _own_methods(function: str) -> tuple[Own, ...]:
    found = []
    for tolerance, label in ((None, "sfumato"), (2e-3, "sfumato, loose")):
        try:
            found.append(
                _own(function, tolerance, f"{label}.{function.replace('_', '-')}".replace(", ", "-"))
            )
        except RangeError:
            continue
    return tuple(found)


def _range(function: str) -> tuple[float, float]:
    """The embedded pipeline's range, with the margin that calibration takes; a usual one without a record."""
    record = next((r for r in recorded(function) if r.source == "embedded"), None)
    known = FUNCTIONS[function]
    if record is None:
        return known.lo, known.hi
    if known.log:
        return record.low / 1.5, record.high * 1.5
    margin = 0.1 * (record.high - record.low)
    return (record.low - margin, 0.0) if function == "exp" else (record.low - margin, record.high + margin)


def _own(function: str, tolerance: float | None, name: str) -> Own:
    lo, hi = _range(function)
    known = FUNCTIONS[function]
    op, error, what = _planned(function, lo, hi, {} if tolerance is None else {"tolerance": tolerance})
    shape = (16, _ROW) if known.rows else (3000,)
    _, rounds, bits = _run(op, np.ones(shape), "meta")
    cost = Cost(rounds, bits / float(np.prod(shape)), "counted: rep3, Z64")
    x = rows(64, _ROW, 2.0 if function == "softmax" else 1.0) if known.rows else grid(known, lo, hi, _POINTS)
    y, _, _ = _run(op, x, "cpu")
    assert y is not None
    each = _each(function, y, known.truth(x))
    stated = Errors(float(each.max()), float(each.mean()), float(np.sqrt((each**2).mean())))
    curve = (x, each) if not known.rows else (np.zeros(0), np.zeros(0))
    notes = "" if tolerance is None else f"planned with tolerance {tolerance:g}"
    return Own(
        name, function, what, lo, hi, FRAC, error, stated, _on_recorded(function, op), cost, notes, curve
    )


def _planned(function: str, lo: float, hi: float, options: dict[str, Any]) -> tuple[Op, float, str]:
    """The operation with its plan closed over, the plan's error, and how it works."""
    if function == "exp":
        exponential = plan_exp(lo, hi, **options)
        return (lambda p, s, x: exp(p, s, x, exponential, frac=FRAC)), exponential.error, "one opening"
    if function in ("reciprocal", "rsqrt", "sqrt"):
        inverse = plan_inverse(1 if function == "reciprocal" else 2, lo, hi, **options)
        of = {"reciprocal": reciprocal, "rsqrt": rsqrt, "sqrt": sqrt}[function]
        return (lambda p, s, x: of(p, s, x, inverse)), inverse.error, "normalised, a series"
    if function == "softmax":
        record = next(r for r in recorded("softmax") if r.source == "embedded")
        tops = [max(row) for row in record.rows]
        weights = plan_softmax(_ROW, lo, hi, min(min(tops), hi) - 1.0, hi, method="max", **options)
        return (
            (lambda p, s, x: softmax(p, s, x, -1, weights)),
            weights.exp.error,
            "maximum, exp, one division a row",
        )
    if function == "layer_norm":
        variance = next(r for r in recorded("rsqrt") if r.source == "embedded")
        # Rows of other lengths are planned apart.
        norm = plan_norm(_ROW, variance.low / 1.5, variance.high * 1.5, 1e-5, **options)
        return (
            (lambda p, s, x: layer_norm(p, s, x, 1, None, None, norm)),
            norm.inverse.error,
            "1/n as a view, rsqrt",
        )
    plan = plan_smooth(function, lo, hi, **options)
    return (lambda p, s, x: smooth(p, s, x, plan)), plan.error, f"one opening, {plan.method}"


def _run(op: Op, x: Reals, device: str) -> tuple[Reals | None, int, int]:
    protocol, values = Rep3(), torch.from_numpy(np.ascontiguousarray(x))
    kind = Secret(Z64, FRAC, tuple(values.shape))

    async def main(s: Session) -> tuple[Tensor | None, int, int]:
        secret = await protocol.share(s.fork("in"), encode(values.to(device), Z64, FRAC), 0, kind)
        clock, sent = s.clock, s.ledger.bytes_sent
        y = await op(protocol, s.fork("op"), secret)
        after, more = s.clock, s.ledger.bytes_sent - sent
        # The simulation's clock is one number: every session here is whole.
        assert isinstance(clock, int)
        assert isinstance(after, int)
        words = await protocol.reveal(s.fork("out"), y, (0, 1, 2))
        return (None if device == "meta" or words is None else decode(words, y.frac)), after - clock, more

    results, _ = simulate(main, device=device)
    value = results[0][0]
    opened = None if value is None else value.numpy()
    return opened, max(r[1] for r in results), 8 * sum(r[2] for r in results)


def _each(function: str, y: Reals, truth: Reals) -> Reals:
    """The error per value, or per row, as the catalogue tells it."""
    error = np.abs(y - truth)
    if function == "softmax":
        return np.asarray(error.sum(-1) / 2)
    if function == "layer_norm":
        return np.asarray(error.max(-1))
    return error / np.abs(truth) if FUNCTIONS[function].relative else error


def _on_recorded(function: str, op: Op) -> dict[str, Errors]:
    """Weighted over the recorded histogram of the source that was planned for."""
    record = next((r for r in recorded(function) if r.source == "embedded"), None)
    if record is None or function == "layer_norm":
        return {}
    each, weight = _weighted(function, op, record)
    total = weight / weight.sum()
    mean, square = float((each * total).sum()), float((each**2 * total).sum())
    return {record.source: Errors(float(each.max()), mean, math.sqrt(square))}


def _weighted(function: str, op: Op, record: Recorded) -> tuple[Reals, Reals]:
    known = FUNCTIONS[function]
    if known.rows:
        found = []
        for row in record.rows:
            x = np.array([row])
            y, _, _ = _run(op, x, "cpu")
            assert y is not None
            found.append(float(_each(function, y, known.truth(x))[0]))
        return np.array(found), np.ones(len(found))
    edges, counts = np.array(record.edges), np.array(record.counts, dtype=np.float64)
    held = counts > 0
    low, high = edges[:-1][held, None], edges[1:][held, None]
    within = (np.arange(8) + 0.5) / 8
    x = low * (high / low) ** within if known.log else low + (high - low) * within
    y, _, _ = _run(op, x.ravel(), "cpu")
    assert y is not None
    return _each(function, y, known.truth(x.ravel())), np.repeat(counts[held], 8)
