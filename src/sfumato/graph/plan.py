"""Plans: a program, where each value lives, and how each secret call is computed. JSON-able, hashed, the same
for all parties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.calibrate import Calibration, calibrate
from sfumato.graph.evaluate import evaluate
from sfumato.graph.expand import expand_attention
from sfumato.graph.formats import Format, Formats, formats_from_json, formats_to_json, options_at
from sfumato.graph.fuse import fuse
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.look_up import index_problems, is_index, rows_of
from sfumato.graph.order import Order, ordered
from sfumato.graph.places import Place, Placed, place
from sfumato.graph.program import Node, Program, digest_of
from sfumato.graph.published import PAPERS, QUAD, as_quad, entry_choice, methods_of, note_of
from sfumato.graph.quantize import SCHEMES, Scheme, quantize
from sfumato.graph.summary import grouped, table_text
from sfumato.graph.tails import FEW_RUNS
from sfumato.graph.watches import SLACK, Watch, watch_calls
from sfumato.types import Index, Ring, Secret

__all__ = ["PROFILES", "ClientValues", "LoadValues", "Plan", "client_side", "load_side", "make_plan"]

FORMAT = 4
#: Named error budgets; the numeric handlers read the name. Profiles of papers come later.
PROFILES = ("precise", "fast", *PAPERS)
_MARGIN, _WIDE_MARGIN = 1.25, 1.5
#: Probability, by the tail model, that a run of a plan leaves its calibration, and that one call does.
_RISK, _RISK_OF_A_CALL = 1e-2, 1e-4
_NOTHING_LEFT = (
    "nothing is left to compute under the protocol: the client computes every value by itself; "
    "relocate=False or secret='inputs+weights' changes that"
)
_FROM_EXAMPLES = (
    f"ranges come from the capture's example arguments alone, with a margin of {_WIDE_MARGIN:g}; "
    "give calibration=[(args, kwargs), ...] with real inputs"
)
#: Client values that are 0/1 words by construction.
_WHOLE_TARGETS = frozenset(("sfumato.one_hot", "sfumato.positions_one_hot", "sfumato.to_float"))


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
        whole = node is not None and node.target in _WHOLE_TARGETS
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
            problems = _problems(Placed(plan.program, plan.places, plan.per_call))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CaptureError(f"this is not the JSON of a plan ({type(error).__name__})") from error
        _refuse(plan.program.title, problems)
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


def make_plan(
    program: Program,
    secret: str = "inputs",
    public: Iterable[str] = (),
    profile: str = "precise",
    calibration: Calibration | Sequence[Any] | Mapping[str, Any] | None = None,
    client_known: Iterable[str] = (),
    frac: int = 18,
    ring: str = "Z64",
    relocate: bool = True,
    methods: Mapping[str, str] | None = None,
    public_weights: Iterable[str] = (),
) -> Plan:
    """Decide what is secret, what runs where, and how.

    ``secret``: ``"inputs"`` or ``"inputs+weights"``. ``public``: arguments that everyone may see (0-d tensors
    are public anyway). ``client_known``: arguments that the client holds in clear, so that what follows from
    them alone runs at its side; integer arguments always count. ``relocate=False`` keeps that to table
    look-ups: the rest of a text encoder, say, then runs under the protocol. ``calibration``: ``[(args,
    kwargs), ...]``, one entry for each independent run, or a list of calls where a run has several, such as the steps
    of a trajectory; a `Calibration`, or its JSON. Ranges follow from it by the tail model of docs/design/008.
    ``profile``: an error budget, ``precise`` or ``fast``, or a paper of the catalogue, whose approximations then
    replace ours. ``methods``: single entries of the catalogue by function, ``{"gelu": "puma.gelu"}``.
    ``public_weights``: patterns of weights that are public although weights are secret, such as those of a pre-trained
    prefix (``"bert.embeddings.*"``): what they make of the client's own values runs at the client, the rest as with
    public weights ([Marill] 4.2).
    ``ring``: ``"Z64"``, ``"Z32"``, or ``"mixed"``, where each call works in the smaller ring that its range and the
    profile allow; ``ditto`` mixes by its paper's map, and always.

    Raises:
        JobError: an unknown option or argument name.
        CaptureError: every call that cannot run on secrets, each with its module path; or a program without a
        secret.
    """
    if profile not in PROFILES:
        raise JobError(f"there is no profile {profile!r}; use one of {', '.join(PROFILES)}")
    published = methods_of(profile, methods or {})
    options = _options(secret, profile, frac, ring, calibration is None)
    scheme = _scheme(profile, ring)
    options = replace(options, mixed=scheme is not None)
    fused = (
        as_quad(fuse(program)) if published.get("gelu") == QUAD and profile not in PAPERS else fuse(program)
    )
    placed = place(
        fused, secret=secret, public=_names(public), client_known=_names(client_known), relocate=relocate,
        public_weights=_names(public_weights),
    )  # fmt: skip
    if scheme is not None and scheme.expand:
        placed = expand_attention(placed)
    _refuse(program.title, _problems(placed))
    notes: list[str] = []
    measured = _calibration(program, placed, calibration, notes)
    options = _with_risk(options, measured, calibration is None, notes)
    formats: Formats = {}
    choices, problems = dict[str, Mapping[str, Any]](), []
    if scheme is not None:
        mixed = quantize(placed, measured, options, scheme)
        placed, formats, choices = mixed.placed, mixed.formats, dict(mixed.choices)
        notes.append(_mixture(placed, formats))
    common = Format(options.ring, options.frac)
    for node in placed.program.nodes:
        choose = HANDLERS[node.target].choose if placed.places[node.name] is Place.SECRET else None
        replaced = entry_choice(node, published) if choose is not None else None
        if replaced is not None:
            choices[node.name] = replaced
        elif choose is not None and node.name not in choices:
            own = options_at(options, formats.get(node.name, common))
            try:
                choices[node.name] = choose(node, measured.of(node), own)
            except CaptureError as error:
                problems.append(f"{node.target} at {node.module_path or 'the root'}: {error}")
    _refuse(program.title, problems)
    notes += note_of(profile, published)
    notes += _headroom(placed, measured, options, formats)
    if not any(w is Place.SECRET for w in placed.places.values()):
        notes.append(_NOTHING_LEFT)
    notes += _weights_in_clear(placed, secret)
    watches = watch_calls(placed, measured, choices, options)
    return Plan(
        placed.program,
        placed.places,
        placed.per_call,
        choices,
        options,
        watches,
        formats,
        measured,
        tuple(notes),
    )


def _scheme(profile: str, ring: str) -> Scheme | None:
    """How a plan mixes rings, if it does."""
    found = SCHEMES.get(profile)
    if ring == "mixed" and found is None:
        raise JobError(f"the profile {profile} has no mixture of rings; use {', '.join(sorted(SCHEMES))}")
    return found if ring == "mixed" or (found is not None and found.fixed) else None


def _mixture(placed: Placed, formats: Formats) -> str:
    """A note on how many calls work where."""
    calls = [n for n in placed.program.nodes if placed.places[n.name] is Place.SECRET]
    casts = [n for n in calls if n.target in ("sfumato.shorten", "sfumato.widen")]
    inside = [n for n in calls if not HANDLERS[n.target].local and n.target != "sfumato.widen"]
    short = [n for n in inside if formats[n.name].ring == "Z32"]
    up = sum(n.target == "sfumato.widen" for n in casts)
    return (
        f"mixed rings: {len(short)} of {len(inside)} interactive calls in Z32; {len(casts) - up} casts down, "
        f"which are free, and {up} up"
    )


def _weights_in_clear(placed: Placed, secret: str) -> list[str]:
    """A note that names the tensors of the model which every party sees although the weights are secret."""
    if secret != "inputs+weights":
        return []
    seen = [
        i.source
        for i in placed.program.inputs
        if i.kind != "user" and i.shape != () and placed.places[i.name] is Place.PUBLIC
    ]
    shown = ", ".join(seen[:6]) + (" and others" if len(seen) > 6 else "")
    return (
        [f"in the clear although weights are secret (whole numbers, or not part of a checkpoint): {shown}"]
        if seen
        else []
    )


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _options(secret: str, profile: str, frac: int, ring: str, guessed: bool) -> Options:
    if ring not in ("Z64", "Z32", "mixed"):
        raise JobError(f"there is no ring {ring!r} for a plan; use 'Z64', 'Z32' or 'mixed'")
    ring = "Z32" if ring == "Z32" else "Z64"
    most = 24 if ring == "Z64" else 12
    if not 4 <= frac <= most:
        raise JobError(f"frac must lie between 4 and {most} in {ring}, not {frac}")
    return Options(secret, profile, frac, ring, _WIDE_MARGIN if guessed else _MARGIN)


def _with_risk(options: Options, measured: Calibration, guessed: bool, notes: list[str]) -> Options:
    """The options with the tail model's risk, unless ranges come from examples or from a calibration without
    sketches."""
    calls = len(measured.sketches)
    if guessed or calls == 0:
        return options
    risk = min(_RISK_OF_A_CALL, _RISK / calls)
    few = "" if measured.samples >= FEW_RUNS else "; so few show nothing of how runs differ"
    notes.append(
        f"ranges from {measured.samples} run{'s' * (measured.samples != 1)}{few}: by the tail model (excesses decay at "
        f"least exponentially, at the rate seen) a run leaves one of {calls} calls' ranges with probability "
        f"{risk * calls:.1g} at most, where margins are not capped"
    )
    return replace(options, risk=risk)


def _watch(row: Sequence[Any]) -> Watch:
    name, lo, hi, frac, ranged, ring = row
    return Watch(str(name), float(lo), float(hi), int(frac), bool(ranged), str(Ring.named(ring)))


def _problems(placed: Placed) -> list[str]:
    """Every secret call that cannot run, one line each, and results that would give the weights away."""
    found = []
    for node in placed.program.nodes:
        if placed.places[node.name] is not Place.SECRET:
            continue
        handler = HANDLERS.get(node.target)
        where = f"{node.target} at {node.module_path or 'the root'} ({node.name})"
        if handler is None:
            found.append(f"{where}: no protocol for it on a secret")
            continue
        reason = handler.supports(node, _flags(placed, node)) if handler.supports else None
        if reason:
            found.append(f"{where}: {reason}{_remedy(placed, node)}")
    secret = (n for n in placed.program.nodes if placed.places[n.name] is Place.SECRET)
    found += index_problems(secret, {n.name: n for n in placed.program.nodes})
    for name in placed.program.output_names:
        if placed.places[name] is Place.OWNER:
            found.append(
                f"the result {name} follows from secret weights alone; revealing it would give them away"
            )
    return found


def _remedy(placed: Placed, node: Node) -> str:
    """Which arguments would have to be public, where the secret part of a call is the client's own."""
    mine = [name for name in node.refs() if placed.places[name] is Place.CLIENT]
    if not mine:
        return ""
    origins = set(mine)
    for other in reversed(placed.program.nodes):
        if other.name in origins:
            origins.update(other.refs())
    arguments = [
        i.source
        for i in placed.program.user_inputs
        if i.name in origins and placed.places[i.name] is Place.CLIENT
    ]
    return f"; it would run with public={tuple(arguments)!r}"


def _flags(placed: Placed, node: Node) -> tuple[bool, ...]:
    def hidden(arg: Any) -> bool:
        if isinstance(arg, tuple) and hasattr(arg, "_fields"):
            return placed.places[arg[0]] is not Place.PUBLIC
        return any(hidden(a) for a in arg) if isinstance(arg, tuple) else False

    return tuple(hidden(a) for a in (*node.args, *node.kwargs.values()))


def _refuse(title: str, problems: Sequence[str]) -> None:
    if problems:
        raise CaptureError(
            f"{title} cannot run on secrets; {len(problems)} calls are not supported:", problems
        )


def _calibration(
    program: Program,
    placed: Placed,
    given: Calibration | Sequence[Any] | Mapping[str, Any] | None,
    notes: list[str],
) -> Calibration:
    if isinstance(given, Calibration):
        return given
    if isinstance(given, Mapping):
        return Calibration.from_json(given)
    if given is None:
        if not program.examples:
            raise JobError(
                "this program carries no example arguments; give calibration=[(args, kwargs), ...]"
            )
        notes.append(_FROM_EXAMPLES)
        return calibrate(placed, [_example(program)])
    total = Calibration()
    for run in given:
        calls = run if _is_group(run) else [run]
        seen = calibrate(placed, (program.bind(tuple(args), kwargs) for args, kwargs in calls))
        total = total.merge(seen.as_one_run())
    if not total.samples:
        raise JobError("calibration= holds no samples")
    return total


def _is_group(run: Any) -> bool:
    """Whether an entry of a calibration lists the calls of one run, rather than being the (args, kwargs) of one."""
    return isinstance(run, list) and all(isinstance(call, tuple) and len(call) == 2 for call in run)


def _example(program: Program) -> dict[str, Tensor]:
    return {i.name: program.examples[i.name].to(i.dtype) for i in program.user_inputs}


def _headroom(placed: Placed, measured: Calibration, options: Options, formats: Formats) -> list[str]:
    """A note on how far the largest value is from the ring's end: |x| 2^(2 frac) must stay below 2^(bits - 2). What a
    mixed plan has in Z32 was held to its own room."""
    common = Format(options.ring, options.frac)
    limit = 2.0 ** (Ring.named(options.ring).bits - 2 - 2 * options.frac)
    tops = [
        (measured.of(n).get("hi_out", 0.0), n)
        for n in placed.program.nodes
        if placed.places[n.name] is Place.SECRET and formats.get(n.name, common).ring == common.ring
    ]
    top, node = max(tops, key=lambda pair: pair[0], default=(0.0, None))
    if node is None:
        return []
    if top * options.margin >= limit:
        raise JobError(
            f"{node.name} ({node.module_path or 'the root'}) reaches {top:.3g}, but {options.ring} "
            f"at frac={options.frac} holds products below {limit:.3g}; use a smaller frac or another ring"
        )
    watched = (
        f"the certificate refuses runs beyond {SLACK:g} times that"
        if SLACK * top < limit
        else "no room to spare"
    )
    return [
        f"largest secret value seen: {top:.3g} at {node.name}; products may reach {limit:.3g} "
        f"(|x| 2^{2 * options.frac} < ring / 4), and {watched}"
    ]


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
