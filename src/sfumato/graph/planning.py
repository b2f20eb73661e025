"""From a captured program to a plan: places, ranges, rings, methods, and what the certificate watches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.activated import join_activations
from sfumato.graph.calibrate import Calibration, calibrate
from sfumato.graph.edges import NO_EDGES, Edges
from sfumato.graph.expand import expand_attention
from sfumato.graph.fold import fold_norms
from sfumato.graph.formats import Format, Formats, options_at
from sfumato.graph.fuse import fuse
from sfumato.graph.handlers import HANDLERS, Options
from sfumato.graph.places import Place, Placed, place
from sfumato.graph.plan import Plan
from sfumato.graph.program import Program
from sfumato.graph.published import PAPERS, QUAD, as_quad, entry_choice, methods_of, note_of
from sfumato.graph.quantize import SCHEMES, Scheme, quantize
from sfumato.graph.supported import problems_of, refuse
from sfumato.graph.tails import FEW_RUNS
from sfumato.graph.watches import SLACK, watch_calls
from sfumato.types import Ring

__all__ = ["PROFILES", "make_plan"]

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
    scheme: Scheme | None = None,
    edges: Edges = NO_EDGES,
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
    profile allow; ``ditto`` mixes by its paper's map, and always. ``scheme``: how, instead of the profile's own, as in
    ``replace(SCHEMES["fast"], wide=frozenset({"classifier"}))``, which keeps that module in Z64. ``edges``: formats
    that a mixed plan has to take and to give, of values and weights that it has in common with others.

    Raises:
        JobError: an unknown option or argument name, or edges that cannot be had.
        CaptureError: every call that cannot run on secrets, each with its module path; or a program without a
        secret.
    """
    if profile not in PROFILES:
        raise JobError(f"there is no profile {profile!r}; use one of {', '.join(PROFILES)}")
    published = methods_of(profile, methods or {})
    options = _options(secret, profile, frac, ring, calibration is None)
    scheme = _scheme(profile, ring, scheme)
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
    unfolded = placed
    if scheme is not None and not scheme.fixed:
        placed = fold_norms(placed, _names_of(calibration))
    refuse(program.title, problems_of(placed))
    notes: list[str] = []
    if calibration is not None and not isinstance(calibration, Calibration | Mapping):
        calibration = list(calibration)
    measured = _calibration(program, placed, calibration, notes)
    options = _with_risk(options, measured, calibration is None, notes)
    if unfolded is not placed and not isinstance(calibration, Calibration | Mapping):
        # Ranges serve other plans of the model, too, whose norms keep their gains.
        measured = measured.completed(_calibration(program, unfolded, calibration, []))
    formats = dict[str, Format]()
    choices, problems = dict[str, Mapping[str, Any]](), []
    if scheme is not None:
        mixed = quantize(placed, measured, options, scheme, edges)
        placed, formats, choices = mixed.placed, dict(mixed.formats), dict(mixed.choices)
        notes.append(_mixture(placed, formats))
    elif edges != NO_EDGES:
        raise JobError("edges are formats of a plan of mixed rings; give ring='mixed' with them")
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
    refuse(program.title, problems)
    if options.profile not in PAPERS:
        placed = join_activations(placed, measured, options, formats, choices)
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


def _scheme(profile: str, ring: str, given: Scheme | None) -> Scheme | None:
    """How a plan mixes rings, if it does."""
    if given is not None and ring != "mixed":
        raise JobError(f"scheme= says how rings mix; give ring='mixed' with it, not {ring!r}")
    found = SCHEMES.get(profile) if given is None else given
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


def _names_of(given: Calibration | Sequence[Any] | Mapping[str, Any] | None) -> frozenset[str] | None:
    """The calls that a calibration knows, if one was measured before."""
    if isinstance(given, Mapping):
        given = Calibration.from_json(given)
    return frozenset(given.stats) if isinstance(given, Calibration) else None


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
