"""The commands by which a client drives the parties: frozen, canonical, and hashed so that the parties can
compare them.

A command holds only what all three parties must agree on. What differs per party (shares) travels beside it,
as attachments.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor

from sfumato.errors import JobError
from sfumato.link.base import public_text
from sfumato.runtime.wire import canonical, tensor_bytes

__all__ = [
    "Affine",
    "Call",
    "Certify",
    "Close",
    "Command",
    "Describe",
    "Drop",
    "Load",
    "Put",
    "PutIndex",
    "Reveal",
    "Stats",
    "Term",
    "WeightSpec",
    "WeightsSpec",
    "digest",
    "from_message",
    "to_message",
]

_HANDLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./#:+-]{0,254}\Z")
_RINGS = ("Z32", "Z64", "B64")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Name and public type of one weight."""

    name: str
    ring: str
    frac: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightsSpec:
    """The public weights of a plan. ``public``: the same float tensors for all parties (attached, part of the digest).

    ``stored``: a file of this host that the parties map, named by its content. Secret weights come by `Put`.
    ``model``: those of a model that its owner shared, secret ones included; the plan is named, too:
    ``{"model": name, "share": share id, "plan": digest}``.
    """

    form: Literal["public", "stored", "model"]
    items: tuple[WeightSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Keep a plan and its weights under ``name``."""

    name: str
    plan: dict[str, Any]
    weights: WeightsSpec


@dataclass(frozen=True, slots=True)
class Describe:
    """What the owner of ``model`` offers: plans and files for clients (party 0), their digest (all)."""

    model: str


@dataclass(frozen=True, slots=True)
class Put:
    """The client's value becomes ``handle``; the shares are attached, each party its own."""

    handle: str
    ring: str
    frac: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PutIndex:
    """The client's row numbers of a table of ``rows`` rows become ``handle``; keys of ``form`` are attached, each party
    its own. Only a look-up of a plan takes such a value."""

    handle: str
    ring: str
    rows: int
    shape: tuple[int, ...]
    form: str


@dataclass(frozen=True, slots=True)
class Call:
    """Run the loaded plan ``name`` under ``path``. ``inputs``: argument to handle; ``publics``: argument to
    public tensor; ``samples``: the handle of what a certificate will look at, if the plan is watched."""

    name: str
    path: str
    inputs: dict[str, str]
    publics: dict[str, Tensor]
    outputs: tuple[str, ...]
    samples: str | None = None


@dataclass(frozen=True, slots=True)
class Certify:
    """Every party sends the client its component of how many samples were outside their ranges, by watched call,
    and forgets the samples. ``runs``: handles of samples by plan; ``path`` is new in this session."""

    path: str
    runs: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of `Affine`: a ring word times rows ``start:stop`` of a handle (all rows when None)."""

    handle: str
    coefficient: int
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Affine:
    """``handle`` becomes the sum of the terms plus ``constant`` (words), truncated by ``frac_bits``, under
    ``path``."""

    handle: str
    terms: tuple[Term, ...]
    frac_bits: int
    path: str
    constant: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reveal:
    """Every party sends the client its component of ``handle``."""

    handle: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget ``handle``."""

    handle: str


@dataclass(frozen=True, slots=True)
class Stats:
    """Ledger, time and memory of the session so far."""


@dataclass(frozen=True, slots=True)
class Close:
    """End the session."""


Command = Load | Describe | Put | PutIndex | Call | Certify | Affine | Reveal | Drop | Stats | Close


def to_message(command: Command, attachments: Sequence[Tensor] = ()) -> tuple[dict[str, Any], list[Tensor]]:
    """(header, tensors) of a command and one party's attachments."""
    header, tensors = _describe(command)
    return {**header, "common": len(tensors)}, [*tensors, *attachments]


def from_message(header: Mapping[str, Any], tensors: Sequence[Tensor]) -> tuple[Command, list[Tensor]]:
    """(command, attachments) of a message; ``JobError`` with one sentence when a field is missing, unknown or
    wrong."""
    fields = _Fields(header)
    name = fields.take("command", str)
    common = fields.take("common", int)
    if not 0 <= common <= len(tensors):
        raise JobError("a command counts more public tensors than it carries")
    shared, attachments = list(tensors[:common]), list(tensors[common:])
    read = _READERS.get(name)
    if read is None:
        raise JobError(f"there is no command {public_text(name)[:40]!r}")
    command = read(fields, shared)
    if shared:
        raise JobError(f"the command {name} carries public tensors it does not use")
    fields.done()
    return command, attachments


def digest(command: Command, attachments: Sequence[Tensor] = ()) -> bytes:
    """16 bytes that are equal exactly when parties got the same command (BLAKE2b of its canonical form and
    public tensors).

    Attachments are the parties' own business, except public weights: all must hold the same words.
    """
    header, tensors = _describe(command)
    if isinstance(command, Load) and command.weights.form == "public":
        tensors = [*tensors, *attachments]
    state = hashlib.blake2b(canonical(header), digest_size=16, person=b"sfumato-command")
    for tensor in tensors:
        state.update(canonical([str(tensor.dtype), list(tensor.shape)]))
        state.update(tensor_bytes(tensor))
    return state.digest()


def _describe(command: Command) -> tuple[dict[str, Any], list[Tensor]]:
    name = type(command).__name__
    match command:
        case Load():
            items = [[w.name, w.ring, w.frac, list(w.shape)] for w in command.weights.items]
            weights = {"form": command.weights.form, "items": items}
            return {"command": name, "name": command.name, "plan": command.plan, "weights": weights}, []
        case Describe():
            return {"command": name, "model": command.model}, []
        case Put():
            return {
                "command": name,
                "handle": command.handle,
                "ring": command.ring,
                "frac": command.frac,
                "shape": list(command.shape),
            }, []
        case PutIndex():
            return {
                "command": name,
                "handle": command.handle,
                "ring": command.ring,
                "rows": command.rows,
                "shape": list(command.shape),
                "form": command.form,
            }, []
        case Call():
            names = sorted(command.publics)
            return {
                "command": name,
                "name": command.name,
                "path": command.path,
                "inputs": dict(command.inputs),
                "publics": names,
                "outputs": list(command.outputs),
                "samples": [] if command.samples is None else [command.samples],
            }, [command.publics[n] for n in names]
        case Certify():
            runs = [[plan, list(handles)] for plan, handles in command.runs]
            return {"command": name, "path": command.path, "runs": runs}, []
        case Affine():
            terms = [[t.handle, t.coefficient, t.start, t.stop] for t in command.terms]
            return {
                "command": name,
                "handle": command.handle,
                "terms": terms,
                "frac_bits": command.frac_bits,
                "path": command.path,
                "constant": command.constant is not None,
            }, [] if command.constant is None else [command.constant]
        case Reveal() | Drop():
            return {"command": name, "handle": command.handle}, []
        case _:
            return {"command": name}, []


class _Fields:
    """The fields of a header, taken one by one; what is left over is an error."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._left = dict(header)

    def take(self, name: str, kind: type[T]) -> T:
        value = self._left.pop(name, None)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise JobError(f"the field {name!r} of a command is missing or not a {kind.__name__}")
        return value

    def handle(self, name: str) -> str:
        return _handle(self.take(name, str))

    def strings(self, name: str) -> list[str]:
        return [_handle(v) for v in self.take(name, list)]

    def ring(self) -> str:
        return _ring(self.take("ring", str))

    def done(self) -> None:
        if self._left:
            raise JobError(f"a command has the unknown field {public_text(sorted(self._left)[0])[:40]!r}")


def _handle(value: Any) -> str:
    if not isinstance(value, str) or not _HANDLE.match(value):
        raise JobError("a name or path must be 1 to 255 letters, digits or any of _ . / # : + -")
    return value


def _ring(value: Any) -> str:
    if value not in _RINGS:
        raise JobError(f"a ring must be one of {', '.join(_RINGS)}")
    return str(value)


def _frac(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 64:
        raise JobError("fraction bits must be a whole number from 0 to 63")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > 16
        or not all(type(n) is int and 0 <= n < 2**48 for n in value)
    ):
        raise JobError("a shape must be a list of at most 16 sizes")
    return tuple(value)


def _rows(value: Any, what: str, length: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != length:
        raise JobError(f"{what} must be a list of {length} fields")
    return value


def _read_load(fields: _Fields, _: list[Tensor]) -> Load:
    spec = _Fields(fields.take("weights", dict))
    form, rows = spec.take("form", str), spec.take("items", list)
    spec.done()
    if form not in ("public", "stored", "model"):
        raise JobError("the form of weights must be public, stored or model")
    items = []
    for row in rows:
        name, ring, frac, shape = _rows(row, "a weight", 4)
        items.append(WeightSpec(_handle(name), _ring(ring), _frac(frac), _shape(shape)))
    plan = fields.take("plan", dict)
    if form == "model" and (items or set(plan) != {"model", "share", "plan"} or not _all_text(plan.values())):
        raise JobError("a shared model is loaded by its name, share and plan digest alone")
    return Load(fields.handle("name"), plan, WeightsSpec(form, tuple(items)))  # type: ignore[arg-type]


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _read_describe(fields: _Fields, _: list[Tensor]) -> Describe:
    return Describe(fields.take("model", str))


def _read_put(fields: _Fields, _: list[Tensor]) -> Put:
    return Put(
        fields.handle("handle"),
        fields.ring(),
        _frac(fields.take("frac", int)),
        _shape(fields.take("shape", list)),
    )


def _read_put_index(fields: _Fields, _: list[Tensor]) -> PutIndex:
    rows = fields.take("rows", int)
    if not 0 < rows < 2**48:
        raise JobError("the rows of a table must be a whole number above 0")
    return PutIndex(
        fields.handle("handle"),
        fields.ring(),
        rows,
        _shape(fields.take("shape", list)),
        fields.take("form", str),
    )


def _read_call(fields: _Fields, shared: list[Tensor]) -> Call:
    inputs = {_handle(k): _handle(v) for k, v in fields.take("inputs", dict).items()}
    names = fields.strings("publics")
    if len(names) != len(shared) or len(set(names)) != len(names):
        raise JobError("a call names other public tensors than it carries")
    publics = dict(zip(names, shared, strict=True))
    shared.clear()
    samples = fields.strings("samples")
    if len(samples) > 1:
        raise JobError("a call has one handle for its samples, or none")
    return Call(
        fields.handle("name"),
        fields.handle("path"),
        inputs,
        publics,
        tuple(fields.strings("outputs")),
        samples[0] if samples else None,
    )


def _read_certify(fields: _Fields, _: list[Tensor]) -> Certify:
    runs = []
    for row in fields.take("runs", list):
        plan, handles = _rows(row, "a certificate's row", 2)
        if not isinstance(handles, list):
            raise JobError("a certificate's row must list handles")
        runs.append((_handle(plan), tuple(_handle(handle) for handle in handles)))
    return Certify(fields.handle("path"), tuple(runs))


def _read_affine(fields: _Fields, shared: list[Tensor]) -> Affine:
    terms = []
    for row in fields.take("terms", list):
        handle, coefficient, start, stop = _rows(row, "a term", 4)
        if type(coefficient) is not int or not -(2**63) <= coefficient < 2**64:
            raise JobError("a coefficient must be a ring word")
        if (start is None) != (stop is None) or (
            start is not None
            and not (type(start) is int and type(stop) is int and 0 <= start <= stop < 2**48)
        ):
            raise JobError("rows of a term must be given as 0 <= start <= stop, or not at all")
        terms.append(Term(_handle(handle), coefficient, start, stop))
    constant = None
    if fields.take("constant", bool):
        if not shared:
            raise JobError("an affine command announces a constant it does not carry")
        constant = shared.pop(0)
    frac_bits = _frac(fields.take("frac_bits", int))
    return Affine(fields.handle("handle"), tuple(terms), frac_bits, fields.handle("path"), constant)


_READERS: dict[str, Any] = {
    "Load": _read_load,
    "Describe": _read_describe,
    "Put": _read_put,
    "PutIndex": _read_put_index,
    "Call": _read_call,
    "Certify": _read_certify,
    "Affine": _read_affine,
    "Reveal": lambda fields, _: Reveal(fields.handle("handle")),
    "Drop": lambda fields, _: Drop(fields.handle("handle")),
    "Stats": lambda fields, _: Stats(),
    "Close": lambda fields, _: Close(),
}
