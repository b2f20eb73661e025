"""What the plans of one text hand on to each other, in formats that all of them can do with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sfumato.graph.edges import NO_EDGES, Edges, activations, check_handed, result_type, stricter
from sfumato.graph.formats import Format
from sfumato.graph.plan import Plan

__all__ = ["Handed", "Maker", "agree_on_values", "agree_on_weights", "check_steps"]

#: Makes a plan for formats at its edges.
Maker = Callable[[Edges], Plan]
#: The row with a 1 at the chosen token, as `Choose` leaves it.
_ROW = Format("Z64", 0)
#: How often formats of weights are tried; those that still differ then are shared in both.
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Handed:
    """Formats of logits, and of keys and values, on their way from plan to plan; None where rings do not mix."""

    logits: Format | None = None
    kept: Format | None = None

    def prefill(self) -> Edges:
        """Edges of `Prefill`."""
        return Edges(results=self._results)

    def decode(self, *, hot: bool) -> Edges:
        """Edges of `Decode`."""
        if self.kept is None:
            return NO_EDGES
        return Edges({"kept": self.kept, **({"hot": _ROW} if hot else {})}, self._results)

    def choose(self) -> Edges:
        """Edges of `Choose`."""
        return NO_EDGES if self.logits is None else Edges({"logits": self.logits})

    @property
    def _results(self) -> dict[int, Format]:
        return {place: f for place, f in enumerate((self.logits, self.kept)) if f is not None}


def agree_on_values(prefill: Maker, decode: Maker | None) -> Handed:
    """The strictest formats in which calls of a prompt and of a further token leave and read what is handed on."""
    first = prefill(NO_EDGES)
    logits, kept = _result(first, 0), _result(first, 1)
    if decode is None:
        return Handed(logits, kept)
    # What its calls read in Z32 first: without a word on its cache it would take that in Z64, which serves any call.
    short = activations(decode(NO_EDGES))
    if kept.ring == "Z32" and short is not None:
        kept = stricter(kept, short)
    after = decode(Edges({"kept": kept}))
    return Handed(stricter(logits, _result(after, 0)), stricter(kept, _result(after, 1)))


def agree_on_weights(
    makers: Mapping[str, Maker], edges: Mapping[str, Edges], known: Mapping[str, Plan]
) -> dict[str, Plan]:
    """The plans, whose secret weights have the formats that these weights have in the ``known`` plans, too, wherever
    that leaves every call its room and its error budget: such weights are shared once."""
    bounds, plans = dict[str, Format](), dict[str, Plan]()
    for _ in range(_TRIES):
        plans = {name: make(replace(edges[name], weights=bounds)) for name, make in makers.items()}
        wanted = dict[str, set[Format]]()
        for plan in (*known.values(), *plans.values()):
            for weight in plan.secret_weights:
                wanted.setdefault(weight, set()).add(plan.format_of(weight))
        new = {weight: stricter(*formats) for weight, formats in wanted.items() if len(formats) > 1}
        if all(bounds.get(weight) == format for weight, format in new.items()):
            break
        bounds |= new
    return plans


def check_steps(prefill: Plan, decode: Plan | None, choose: Plan | None, *, hot: bool) -> None:
    """Refuse plans of one text that do not take what the others leave.

    Raises:
        JobError: says which value differs, and how.
    """
    for source in [plan for plan in (prefill, decode) if plan is not None]:
        if decode is not None:
            check_handed(source, 1, decode, "kept")
        if choose is not None:
            check_handed(source, 0, choose, "logits")
    if hot and choose is not None and decode is not None:
        check_handed(choose, 1, decode, "hot")


def _result(plan: Plan, place: int) -> Format:
    type = result_type(plan, place)
    return Format(str(type.ring), type.frac)
