"""The table of one function: every entry's errors and costs, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sfumato.catalogue import entries_of, function, get
from sfumato.catalogue.defects import curve_of, defects_of, remarks_of
from sfumato.catalogue.entry import Entry
from sfumato.catalogue.measure import Errors, on_rep3, recorded, recorded_errors, scaling, stated_errors
from sfumato.catalogue.ours import Own, own_methods
from sfumato.catalogue.prices import PRICES, Cost

__all__ = ["MAIN_SOURCE", "Line", "lines_of", "to_json"]

#: The recorded source that tables tell; the page and JSON have all.
MAIN_SOURCE = "embedded"


@dataclass(frozen=True, slots=True)
class Line:
    """One method's line. ``exact``: largest error of the formula alone; ``recorded`` by source; ``priced`` by
    protocol, from unit prices."""

    name: str
    source: str
    what: str
    lo: float
    hi: float
    range_is: str
    frac: int
    ring_bits: int
    stated: Errors
    exact: float
    recorded: Mapping[str, Errors]
    multiplications: float
    comparisons: float
    cost: Cost
    priced: Mapping[str, Cost]
    rep3: Cost | None
    trust: str
    notes: str
    uncertain: str
    another: bool

    @property
    def main(self) -> Errors | None:
        """On the main recorded source, where it has the function."""
        return self.recorded.get(MAIN_SOURCE)


def _line(entry: Entry) -> Line:
    found = {
        record.source: recorded_errors(entry, record)
        for record in recorded(entry.function)
        if record.rows or not entry.of.rows
    }
    return Line(
        entry.name, entry.source, entry.what, entry.lo, entry.hi, entry.range_is, entry.frac, entry.bits,
        stated_errors(entry), stated_errors(entry, exact=True).max, found, entry.multiplications(),
        entry.comparisons(), entry.cost(), _priced(entry), on_rep3(entry), PRICES[entry.protocol].trust,
        entry.notes, entry.uncertain, entry.another,
    )  # fmt: skip


def _priced(entry: Entry) -> dict[str, Cost]:
    found = {name: entry.derived(protocol=name) for name, prices in PRICES.items() if prices.of}
    return {name: cost for name, cost in found.items() if cost.bits is not None}


def _own(own: Own) -> Line:
    return Line(
        own.name, "this library", own.what, own.lo, own.hi, "planned: the recorded range", own.frac, 64,
        own.stated, own.error, own.recorded, float("nan"), float("nan"), own.cost, {}, own.cost,
        "semi-honest, one of three corrupt", own.notes, "", False,
    )  # fmt: skip


def lines_of(name: str, *, ours: bool = True) -> list[Line]:
    """The lines of a function: published methods in the order of the papers, then our own."""
    found = [_line(entry) for entry in entries_of(name)]
    return found + ([_own(own) for own in own_methods(function(name).name)] if ours else [])


def to_json(name: str) -> dict[str, Any]:
    """Everything about one function, as JSON types."""
    known = function(name)
    kernel = {"reciprocal": "sdu.reciprocal-d64", "rsqrt": "sdu.rsqrt-d64"}.get(known.name)
    return {
        "function": known.name,
        "error": "relative" if known.relative else "total variation of a row" if known.name == "softmax"
        else "absolute",
        "methods": [_clean(asdict(line)) for line in lines_of(name)],
        "defects": [
            {"key": d.key, "title": d.title, "entries": list(d.entries), "source": d.source,
             "measured": curve_of(d).measured, "what": curve_of(d).what}
            for d in defects_of(known.name)
        ],
        "remarks": [{"text": remark.text, "source": remark.source} for remark in remarks_of(known.name)],
        "recorded": [
            {"source": r.source, "note": r.note, "count": r.count, "low": r.low, "high": r.high,
             "quantiles": dict(r.quantiles)}
            for r in recorded(known.name)
        ],
        "scaling": [] if kernel is None else [
            {**asdict(point), "law": point.law} for point in scaling(get(kernel))
        ],
    }  # fmt: skip


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _clean(v) for key, v in value.items()}
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value
