"""Which layers of a model want 64-bit words: sensitivity layer by layer, and a search for the lightest mixed plan.

A layer is what one module computes, or one call of a forward function. Errors are by the plan's arithmetic in the clear
(backend ``plain``), whose rounding is the protocol's; bytes and rounds are exact, by a run on shapes.

Source: [Ditto] 2.2 decides by kind of layer; order by measured error over bytes as in HAWQ-type searches is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sfumato.api import Deployment, estimate
from sfumato.errors import JobError
from sfumato.graph.calibrate import Calibration
from sfumato.graph.handlers.smooth import ACTIVATED
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.graph.program import Program
from sfumato.graph.quantize import SCHEMES, Scheme
from sfumato.runtime.remote import open_backend

__all__ = [
    "Found",
    "Point",
    "Sensitivity",
    "Subject",
    "layers_of",
    "narrow",
    "search",
    "sensitivity",
    "short_frac",
]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Point:
    """What a plan costs and loses. ``megabytes`` (1e6 bytes) of all parties and ``rounds``, of one call. ``error``:
    relative L2 error of the logits against float; ``agreement``: share of the examples with the class of float."""

    megabytes: float
    rounds: int
    error: float
    agreement: float

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)


def _logits(outputs: Any) -> Tensor:
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found.detach().to(torch.float64)


@dataclass(frozen=True)
class Subject:
    """A captured classifier with its ranges, and the inputs on which plans are compared.

    ``calls``: keyword arguments of the module, one for each call. ``wanted``: the logits (calls, batch, classes) of the
    module in float.
    """

    program: Program
    calibration: Calibration
    calls: Sequence[Mapping[str, Tensor]]
    wanted: Tensor
    profile: str = "fast"
    secret: str = "inputs+weights"
    _known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        model: torch.nn.Module, program: Program, calibration: Calibration,
        calls: Sequence[Mapping[str, Tensor]], profile: str = "fast", secret: str = "inputs+weights",
    ) -> Subject:  # fmt: skip
        """With the logits of the module itself."""
        with torch.no_grad():
            wanted = torch.stack([_logits(model(**call)) for call in calls])
        return Subject(program, calibration, calls, wanted, profile, secret)

    def plan(self, scheme: Scheme | None = None, **options: Any) -> Plan:
        """A plan of this model: mixed as ``scheme`` says, or by the profile's own rule."""
        given = {"profile": self.profile, "ring": "mixed", **options}
        return make_plan(
            self.program, secret=self.secret, calibration=self.calibration, scheme=scheme, **given
        )

    def logits(self, plan: Plan) -> Tensor:
        """(calls, batch, classes) by the plan's arithmetic in the clear; words that overflow wrap, as the parties'."""
        backend = open_backend("plain", options={"wraps": True, "certificate": False})
        with Deployment(plan, backend) as deployment:
            inputs: Sequence[Mapping[str, Any]] = self.calls
            return torch.stack([_logits(deployment(**call)) for call in inputs])

    def distance(self, found: Tensor, wanted: Tensor | None = None) -> float:
        """L2 distance of logits, to those of float unless others are given, over the L2 norm of those of float."""
        return float((found - (self.wanted if wanted is None else wanted)).norm() / self.wanted.norm())

    def agreement(self, found: Tensor) -> float:
        """The share of the examples with float's class."""
        return float((found.argmax(-1) == self.wanted.argmax(-1)).double().mean())

    def point(self, plan: Plan, found: Tensor | None = None) -> Point:
        """Cost and error of a plan; ``found``: its logits, if known."""
        found, cost = self.logits(plan) if found is None else found, estimate(plan)
        return Point(sum(cost.bytes_sent) / 1e6, cost.rounds, self.distance(found), self.agreement(found))

    # ---- by scheme: each is planned, counted and run once -----------------------------------------------------

    def megabytes(self, scheme: Scheme) -> float:
        """Of all parties, one call."""
        return self._once("megabytes", scheme, lambda: sum(estimate(self.plan(scheme)).bytes_sent) / 1e6)

    def outputs(self, scheme: Scheme) -> Tensor:
        """Logits (calls, batch, classes)."""
        return self._once("outputs", scheme, lambda: self.logits(self.plan(scheme)))

    def error(self, scheme: Scheme) -> float:
        """Relative L2 error of the logits against float."""
        return self.distance(self.outputs(scheme))

    def _once(self, what: str, scheme: Scheme, make: Callable[[], Any]) -> Any:
        if (what, scheme) not in self._known:
            self._known[what, scheme] = make()
        return self._known[what, scheme]


def narrow(profile: str, frac: int | None = None) -> Scheme:
    """The scheme in which every call that has room in Z32 goes there, whatever it loses to rounding.

    ``frac``: fraction bits of activations there; norms whose squares have no room for so many stay in Z64. Default: the
    profile's, or fewer, with which all norms fit.
    """
    scheme = replace(SCHEMES[profile], loss=math.inf)
    return scheme if frac is None else replace(scheme, frac=frac, least=frac)


def short_frac(plan: Plan) -> int:
    """Fraction bits of activations in Z32, or the plan's where nothing is there."""
    formats = [plan.format_of(n.name) for n in plan.secret_nodes]
    return max((f.frac for f in formats if f.ring == "Z32"), default=plan.options.frac)


def layers_of(plan: Plan, scheme: Scheme) -> list[str]:
    """Layers with a call in Z32, in the order of the program: module paths, and names of calls outside of modules. A
    linear layer that was joined with its activation counts by the module that its weight belongs to."""
    found = list[str]()
    for node in plan.secret_nodes:
        if plan.format_of(node.name).ring != "Z32":
            continue
        if node.target == ACTIVATED:
            owner, known, _ = node.args[1].name.partition(".weight")
            found += [owner if known else "", node.module_path or node.name]
        elif node.target in scheme.short:
            found.append(node.module_path or node.name)
    return [name for name in dict.fromkeys(found) if name]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one layer does to the result and to the bill.

    ``own``: relative L2 change of the logits when this layer alone goes to Z32, all others being in Z64; ``error`` and
    ``agreement``: of that plan against float; ``saved``: megabytes that it saves with its casts, below 0 where those
    cost more. ``kept_error``: error of the plan that keeps only this layer in Z64, and ``added``: megabytes of that
    over the plan without, which are what Z32 saves here among neighbours in Z32. All for one call.
    """

    layer: str
    own: float
    error: float
    agreement: float
    saved: float
    kept_error: float
    added: float

    @property
    def price(self) -> float:
        """Own error over megabytes saved among neighbours in Z32; infinite where nothing is."""
        return self.own / self.added if self.added > 0.0 else math.inf

    @property
    def order(self) -> float:
        """Where a search keeps Z64 first: own squared error (independent errors add up so) over the bytes that Z64
        adds among layers in Z32."""
        return self.own**2 / self.added if self.added > 0.0 else math.inf


def sensitivity(
    subject: Subject, scheme: Scheme | None = None, *,
    layers: Sequence[str] | None = None, progress: Progress | None = None,
) -> list[Sensitivity]:  # fmt: skip
    """One row a layer, by error per byte saved, the largest first.

    ``scheme``: who may be in Z32 (default :func:`narrow` of the subject's profile). ``layers``: those to look at
    (default: all).
    """
    base = narrow(subject.profile) if scheme is None else scheme
    every = layers_of(subject.plan(base), base)
    wide = replace(base, wide=frozenset(every))
    least, most = subject.outputs(wide), subject.megabytes(wide)
    rows, looked = list[Sensitivity](), every if layers is None else list(layers)
    for done, layer in enumerate(looked):
        if progress is not None:
            progress("layers", done, len(looked))
        alone, kept = (
            replace(base, wide=wide.wide - {layer}),
            replace(base, wide=base.wide | {layer}),
        )
        found = subject.outputs(alone)
        rows.append(
            Sensitivity(
                layer, subject.distance(found, least), subject.distance(found), subject.agreement(found),
                most - subject.megabytes(alone), subject.error(kept),
                subject.megabytes(kept) - subject.megabytes(base),
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: row.price, reverse=True)


@dataclass(frozen=True)
class Found:
    """What a search found: a plan like any other (it can be saved), and the layers that it keeps in Z64 on purpose."""

    plan: Plan
    scheme: Scheme
    point: Point
    wide: tuple[str, ...]
    frac: int


def search(
    subject: Subject, rows: Sequence[Sensitivity], budget: float, *, fracs: Sequence[int | None] = (None,)
) -> Found:
    """The lightest mixed plan found whose measured error stays within ``budget`` (relative L2, of the logits).

    Greedy by :attr:`Sensitivity.order`: the fewest first layers in Z64 with which the budget holds. Then each of them,
    and each layer beside one of them, changes its ring if that saves bytes and the budget still holds. ``fracs``:
    fraction bits of activations in Z32 to try (None: as :func:`narrow`).

    Raises:
        JobError: even with all layers of ``rows`` in Z64 the error is larger.
    """
    order = [row.layer for row in sorted(rows, key=lambda row: row.order, reverse=True)]
    schemes = [narrow(subject.profile, frac) for frac in fracs]
    widest = replace(schemes[0], wide=frozenset(order))
    if subject.error(widest) > budget:
        raise JobError(
            f"with {len(order)} layers in Z64 the logits err by {subject.error(widest):.2g}, more than the budget "
            f"{budget:g}; give a larger budget, or another profile than {subject.profile}"
        )
    found = [_lightest(subject, scheme, order, budget) for scheme in schemes]
    found = [scheme for scheme in found if subject.error(scheme) <= budget]
    best = min(found, key=subject.megabytes)
    plan = subject.plan(best)
    kept = tuple(layer for layer in order if layer in best.wide)
    return Found(plan, best, subject.point(plan, subject.outputs(best)), kept, short_frac(plan))


def _lightest(subject: Subject, scheme: Scheme, order: Sequence[str], budget: float) -> Scheme:
    """The lightest found at one scale of activations."""

    def holds(layers: frozenset[str]) -> bool:
        return subject.error(replace(scheme, wide=layers)) <= budget

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(frozenset(order[:middle])) else (middle + 1, high)
    wide = frozenset(order[:high])
    near = layers_of(subject.plan(scheme), scheme)
    beside = {n for pair in pairwise(near) if wide & set(pair) for n in pair}
    for layer in [name for name in reversed(order) if name in wide | beside]:
        changed = wide ^ {layer}
        lighter = subject.megabytes(replace(scheme, wide=changed)) < subject.megabytes(
            replace(scheme, wide=wide)
        )
        if lighter and holds(changed):
            wide = changed
    return replace(scheme, wide=wide)
