"""Plans: a program, where each value lives, and how each secret call is computed. JSON-able, hashed, the same
for all parties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.evaluate import evaluate
from sfumato.graph.formats import WHOLE, Format, Formats, formats_from_json, formats_to_json, options_at
from sfumato.graph.handlers import Options
from sfumato.graph.look_up import is_index, rows_of
from sfumato.graph.order import Order, ordered
from sfumato.graph.places import Place, Placed
from sfumato.graph.program import Node, Program, digest_of
from sfumato.graph.summary import grouped, table_text
from sfumato.graph.supported import problems_of, refuse
from sfumato.graph.watches import Watch
from sfumato.types import Index, Ring, Secret

__all__ = ["ClientValues", "LoadValues", "Plan", "client_side", "load_side"]

FORMAT = 5


#: What stays with whoever made a plan.
_MEASURED = ("calibration", "notes")


@dataclass(frozen=True)
class Plan:
    """What all parties agree on before a share moves. ``program`` is the captured one after the rewrites of
    the places pass."""

    program: Program
    places: Mapping[str, Place]
    per_call: frozenset[str]
    choices: Mapping[str, Mapping[str, Any]]
    options: Options
    watches: Mapping[str, Watch] = field(default_factory=dict)
    formats: Formats = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    notes: tuple[str, ...] = ()

    # ---- what goes where -----------------------------------------------------------------------------------

    @cached_property
    def secret_nodes(self) -> tuple[Node, ...]:
        """The calls that the parties run, in program order."""
        return tuple(n for n in self.program.nodes if self.places[n.name] is Place.SECRET)

    @cached_property
    def frontier(self) -> tuple[str, ...]:
        """Values that the parties need from outside, in order of first use; a secret input that is a result
        counts."""
        computed = {n.name for n in self.secret_nodes}
        used = dict.fromkeys(name for n in self.secret_nodes for name in n.refs())
        results = [n for n in self.program.output_names if self.places[n] is Place.SECRET]
        return tuple(name for name in dict.fromkeys([*used, *results]) if name not in computed)

    @cached_property
    def client_inputs(self) -> tuple[str, ...]:
        """Frontier values that the client shares at each call: secret arguments, and what it computed in
        clear."""
        return tuple(n for n in self.frontier if self.places[n] in (Place.SECRET, Place.CLIENT))

    @cached_property
    def public_inputs(self) -> tuple[str, ...]:
        """Frontier values that the client sends in clear at each call."""
        return tuple(n for n in self.frontier if self.places[n] is Place.PUBLIC and n in self.per_call)

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """Public frontier values from weights and constants alone: sent once, at load."""
        return tuple(n for n in self.frontier if self.places[n] is Place.PUBLIC and n not in self.per_call)

    @cached_property
    def secret_weights(self) -> tuple[str, ...]:
        """Frontier values that the model owner shares once, at load."""
        return tuple(n for n in self.frontier if self.places[n] is Place.OWNER)

    @cached_property
    def secret_outputs(self) -> tuple[str, ...]:
        """Results that the parties hold as shares, in order; `execute` returns them so."""
        return tuple(n for n in self.program.output_names if self.places[n] is Place.SECRET)

    @cached_property
    def order(self) -> Order:
        """In which order the secret calls run, the same at all parties; worked out once per process."""
        return ordered(self.secret_nodes, self.frontier, self.secret_outputs)

    def secret_type(self, name: str) -> Secret:
        """Ring, fraction bits and shape under which a frontier value is shared."""
        shape, _ = self.program.types[name]
        node = self._by_name.get(name)
        whole = node is not None and node.target in WHOLE
        ring, frac = self.format_of(name)
        return Secret(Ring.named(ring), 0 if whole else frac, shape)

    def format_of(self, name: str) -> Format:
        """Ring and fraction bits of a secret value."""
        return self.formats.get(name, Format(self.options.ring, self.options.frac))

    def options_of(self, name: str) -> Options:
        """The plan's options as the call of this name reads them."""
        return options_at(self.options, self.format_of(name))

    def index_type(self, name: str) -> Index | None:
        """What a frontier value is shared as where it holds row numbers; None where it holds words."""
        node = self._by_name.get(name)
        if node is None or not is_index(node):
            return None
        return Index(Ring.named(self.options.ring), rows_of(node), node.shape)

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {n.name: n for n in self.program.nodes}

    @cached_property
    def cached_constants(self) -> dict[str, Tensor]:
        """Constants that the client's own calls read, computed once in this process."""
        mine = [n for n in self.program.nodes if self.places[n.name] in (Place.PUBLIC, Place.CLIENT)]
        fixed = [n for n in mine if n.name not in self.per_call]
        names = {n.name for n in fixed}
        results = {n for n in self.program.output_names if n in names}
        keep = results | {r for n in mine if n.name in self.per_call for r in n.refs() if r in names}
        return evaluate(_needed(fixed, keep), self.program.weights, keep)

    # ---- text, JSON, identity ------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict without weights."""
        return {
            "format": FORMAT,
            "program": self.program.to_json(),
            "places": {n: str(w) for n, w in self.places.items()},
            "per_call": sorted(self.per_call),
            "choices": {n: dict(c) for n, c in self.choices.items()},
            "options": asdict(self.options),
            "watches": {n: list(w) for n, w in self.watches.items()},
            "formats": formats_to_json(self.formats),
            "calibration": self.calibration.to_json(),
            "notes": list(self.notes),
        }

    def for_parties(self) -> dict[str, Any]:
        """What the parties get: `to_json` without what was measured on the way. Exact extremes of activations, and with
        secret weights of parameters, stay with whoever made the plan; choices and watches hold short numbers."""
        return {k: v for k, v in self.to_json().items() if k not in _MEASURED}

    @staticmethod
    def from_json(data: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> Plan:
        """Read and verify what `to_json` wrote.

        Raises:
            CaptureError: not a plan of this format, or one that this release cannot run.
        """
        try:
            if data["format"] != FORMAT:
                raise CaptureError(f"a plan of format {data['format']!r}; this release reads format {FORMAT}")
            plan = Plan(
                Program.from_json(data["program"], weights),
                {str(n): Place(w) for n, w in data["places"].items()},
                frozenset(data["per_call"]),
                {str(n): dict(c) for n, c in data["choices"].items()},
                Options(**data["options"]),
                {str(n): _watch(row) for n, row in data["watches"].items()},
                formats_from_json(data["formats"]),
                Calibration.from_json(data["calibration"]) if "calibration" in data else Calibration(),
                tuple(data.get("notes", ())),
            )
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CaptureError(f"this is not the JSON of a plan ({type(error).__name__})") from error
        if set(plan.places) != set(plan.program.types):
            raise CaptureError("this plan does not place every value of its program")
        if {key.partition(".")[0] for key in plan.watches} - {n.name for n in plan.secret_nodes}:
            raise CaptureError("this plan watches a call that the parties do not run")
        if any(plan.index_type(watch.name) is not None for watch in plan.watches.values()):
            raise CaptureError("this plan watches row numbers, which are no words")
        try:
            Ring.named(plan.options.ring)
            problems = problems_of(Placed(plan.program, plan.places, plan.per_call))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CaptureError(f"this is not the JSON of a plan ({type(error).__name__})") from error
        refuse(plan.program.title, problems)
        return plan

    def digest(self) -> str:
        """Hex BLAKE2b over everything that decides what the parties do; what was measured on the way is left
        out."""
        return digest_of(self.for_parties())

    def table(self) -> str:
        """What runs where, with which method, error, headroom and cost, and why nothing leaks by what was moved."""
        runs = Counter(str(self.places[n.name]) for n in self.program.nodes)
        inputs = [(i.source, str(self.places[i.name]), i.shape) for i in self.program.user_inputs]
        moved = len([n for n in self.program.nodes if self.places[n.name] is Place.CLIENT])
        groups = grouped(self.secret_nodes, self.choices, self.calibration, self.options)
        return table_text(self.program.title, self.options, inputs, runs, groups, moved, self.notes)

    def __str__(self) -> str:
        return self.table()


def _watch(row: Sequence[Any]) -> Watch:
    name, lo, hi, frac, ranged, ring = row
    return Watch(str(name), float(lo), float(hi), int(frac), bool(ranged), str(Ring.named(ring)))


# ---- the two sides that compute in clear -------------------------------------------------------------------


@dataclass(frozen=True)
class ClientValues:
    """Floats of one call at the client: to share, to publish, and the results that need no protocol at
    all."""

    secrets: dict[str, Tensor]
    publics: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class LoadValues:
    """Floats of a load: ``secrets`` are shared by the model owner once, ``publics`` go to every party in
    clear."""

    secrets: dict[str, Tensor]
    publics: dict[str, Tensor]


def client_side(
    plan: Plan, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, held: Iterable[str] = ()
) -> ClientValues:
    """Evaluate the client's and the per-call public part of a call, in float32.

    ``held`` names secret inputs whose shares the parties have already; their values here are not used.

    Raises:
        JobError: an argument that does not fit the capture; one sentence.
    """
    program = plan.program
    values = program.bind(tuple(args), kwargs)
    outputs = [n for n in program.output_names if plan.places[n] is not Place.SECRET]
    shared = [n for n in plan.client_inputs if n not in set(held)]
    keep = {*shared, *plan.public_inputs, *outputs}
    mine = [
        n for n in program.nodes
        if plan.places[n.name] in (Place.PUBLIC, Place.CLIENT) and n.name in plan.per_call
    ]  # fmt: skip
    known = {**program.weights, **plan.cached_constants, **values}
    found = evaluate(_needed(mine, keep), known, keep)
    return ClientValues(
        {n: found[n] for n in shared},
        {n: found[n] for n in plan.public_inputs},
        {n: found[n] for n in outputs},
    )


def load_side(plan: Plan, weights: Mapping[str, Tensor] | None = None) -> LoadValues:
    """Evaluate what depends on the weights alone: the constants of the frontier, and the owner's values to
    share."""
    weights = plan.program.weights if weights is None else weights
    missing = [i.name for i in plan.program.inputs if i.kind != "user" and i.name not in weights]
    if missing:
        raise JobError(f"{len(missing)} weights are missing, {missing[0]} among them")
    keep = {*plan.constants, *plan.secret_weights}
    fixed = [
        n for n in plan.program.nodes
        if plan.places[n.name] in (Place.PUBLIC, Place.OWNER) and n.name not in plan.per_call
    ]  # fmt: skip
    found = evaluate(_needed(fixed, keep), weights, keep)
    return LoadValues({n: found[n] for n in plan.secret_weights}, {n: found[n] for n in plan.constants})


def _needed(nodes: Sequence[Node], keep: Iterable[str]) -> list[Node]:
    """Those of ``nodes``, in order, that ``keep`` depends on."""
    needed, kept = set(keep), list[Node]()
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.refs())
            kept.append(node)
    return kept[::-1]
