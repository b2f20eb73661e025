"""What a session may do: which plans an owner approved, what of their results may be opened, and to whom.

An owner approves a plan by three digests: of its program, of the plan, and of the output policy. A machine keeps with
every value the closures that lie on it (none: the client may open it) and asks the functions here. Nothing needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sfumato.errors import JobError
from sfumato.runtime.canonical import canonical
from sfumato.runtime.store import ModelStore

if TYPE_CHECKING:
    from sfumato.graph.plan import Plan

__all__ = [
    "OPEN",
    "Approval",
    "Closure",
    "Host",
    "Label",
    "ModelId",
    "Part",
    "after_own",
    "check_offers",
    "check_open",
    "opens",
]


@dataclass(frozen=True, slots=True)
class Approval:
    """Hex digests of what an owner lets run: a program, the plan made of it, and whether its results may be opened."""

    program: str
    plan: str
    policy: str

    @staticmethod
    def of(plan: Plan, offers: Sequence[Mapping[str, Any]]) -> Approval:
        """The owner's, of a plan that is part of these offers."""
        digest = plan.digest()
        policy = canonical({"opens": opens(offers, digest)})
        return Approval(plan.program.digest(), digest, hashlib.blake2b(policy, digest_size=32).hexdigest())

    def to_json(self) -> dict[str, str]:
        """As it stands in a manifest."""
        return {"program": self.program, "plan": self.plan, "policy": self.policy}


def opens(offers: Sequence[Mapping[str, Any]], digest: str) -> bool:
    """Whether some offer lets the results of this plan be opened."""
    return any(
        part in offer["reveal"] for offer in offers for part, plan in offer["parts"].items() if plan == digest
    )


def check_offers(offers: Any, plans: Iterable[str]) -> None:
    """``JobError`` unless the offers name parts by plan, reveal parts of their own, and cover exactly ``plans``."""
    wrong = "an offer must have settings, parts (names to plan digests) and reveal (names of its parts)"
    if not isinstance(offers, list | tuple) or not offers:
        raise JobError("a model is shared with at least one offer")
    for offer in offers:
        if not isinstance(offer, Mapping) or set(offer) != {"settings", "parts", "reveal"}:
            raise JobError(wrong)
        settings, parts, reveal = offer["settings"], offer["parts"], offer["reveal"]
        if not isinstance(settings, Mapping) or not isinstance(parts, Mapping) or not parts:
            raise JobError(wrong)
        if not isinstance(reveal, list | tuple):
            raise JobError(wrong)
        if not all(isinstance(name, str) for name in (*parts, *parts.values(), *reveal)):
            raise JobError(wrong)
        if not set(reveal) <= set(parts):
            raise JobError(wrong)
    offered = {digest for offer in offers for digest in offer["parts"].values()}
    if offered != set(plans):
        raise JobError("the plans of a model must be exactly those that its offers name")


# ---- labels -------------------------------------------------------------------------------------------------------


class ModelId(NamedTuple):
    """One share of one model. The share id alone names none: its owner chooses it, and others are told of it. The party
    takes ``owner`` from the certificate of who shared the model."""

    owner: str
    name: str
    share_id: str

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> ModelId:
        """Of a model at this party."""
        return ModelId(manifest["owner"], manifest["name"], manifest["share"])


@dataclass(frozen=True, slots=True)
class Closure:
    """A model on whose secret weights a value depends in a way its owner has not opened. ``foreign``: it went through a
    plan that this owner has not approved, and stays closed for good."""

    model: ModelId
    foreign: bool = False


Label = frozenset[Closure]
OPEN: Label = frozenset()


@dataclass(frozen=True, slots=True)
class Part:
    """An approved plan as a session has loaded it."""

    model: ModelId
    opens: bool

    def after(self, inputs: Iterable[Label]) -> Label:
        """The label of its results: other models' closures stay; its own goes where the owner opens the part."""
        kept = self.judged(inputs)
        return kept if self.opens else kept | {Closure(self.model)}

    def judged(self, inputs: Iterable[Label]) -> Label:
        """The label of its certificate: what it counts is in the approved plan, so only others' closures count."""
        return frozenset(
            Closure(c.model, True) if c.model != self.model else c
            for label in inputs
            for c in label
            if c.model != self.model or c.foreign
        )


def after_own(inputs: Iterable[Label]) -> Label:
    """The label of the results of a client's own plan, and of its certificate."""
    return frozenset(Closure(c.model, True) for label in inputs for c in label)


def check_open(label: Label, what: str) -> None:
    """``JobError`` unless the client may open a value with this label."""
    for closure in sorted(label, key=lambda c: (c.model.name, c.model)):
        raise JobError(f"the owner of {closure.model.name} does not let {what} be opened")


# ---- the party's own terms ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Host:
    """What the operator has decided for a session, and no client may: its store, who the client is, whose plans run."""

    store: ModelStore | None = None
    client: str = ""
    programs: Literal["any", "approved"] = "any"

    @staticmethod
    def of(party: int, given: Mapping[str, Any] | None) -> Host:
        """From a worker's options: ``store`` and ``key`` (paths, or empty), ``client`` (identity), ``programs``."""
        given = given or {}
        store = ModelStore(Path(given["store"]), given["key"], party) if given.get("store") else None
        programs: Literal["any", "approved"] = "any" if given.get("programs", "any") == "any" else "approved"
        return Host(store, str(given.get("client", "")), programs)

    def check_own_plan(self) -> None:
        """``JobError`` where only approved plans run."""
        if self.programs == "approved":
            raise JobError("these parties run models that their owners have shared, not plans of clients")
