"""Sharing a model: its owner splits every secret weight between the three parties, which keep it at rest.

Two phases: each party writes a draft and says what it has; the owner compares, then all commit. The parties need no
links among each other. Weights travel one by one, so that neither side holds the model twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sfumato.errors import JobError, LinkError, SfumatoError
from sfumato.graph.plan import Plan, load_side
from sfumato.link.base import CLIENT, Link
from sfumato.link.identity import client_identity
from sfumato.link.tls import TlsLink
from sfumato.ring.fixed import encode
from sfumato.runtime.canonical import canonical
from sfumato.runtime.cluster import Cluster, Limits, link_limits
from sfumato.runtime.components import held_by, split
from sfumato.runtime.control import as_raised
from sfumato.runtime.names import check_name
from sfumato.runtime.places import Places, new_run
from sfumato.runtime.policy import Approval, check_offers
from sfumato.runtime.shared_model import client_constants, pack_files
from sfumato.runtime.store import CLIENT_FILE, PUBLIC_FILE, Draft, ModelStore, digest_of_file
from sfumato.runtime.weights import FILE_TYPES, content_key, file_head, weight_key
from sfumato.runtime.wire import MessageStream, tensor_bytes
from sfumato.types import Ring, Secret

__all__ = ["ModelToShare", "receive_model", "send_model", "share_model"]

Progress = Callable[[int, int], None]

#: Weights that are on their way and that the parties have not confirmed.
_AHEAD = 4
_TERMS = frozenset(
    ("name", "share", "shared_at", "clients", "offers", "plans", "approvals", "constants", "secret", "items", "public",
     "tensors", "files")
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelToShare:
    """What an owner gives to the parties.

    ``plans`` by digest, weights attached; ``offers``: ``{"settings", "parts": names to plan digests, "reveal": names
    of parts whose results may be opened}``; ``files`` go to clients; ``clients``: names of those who may use it (None:
    all); ``replace``: instead of the owner's model of this name.
    """

    name: str
    plans: Mapping[str, Plan]
    offers: Sequence[Mapping[str, Any]]
    files: Mapping[str, bytes]
    clients: Sequence[str] | None = None
    replace: bool = False


# ---- the owner's side ---------------------------------------------------------------------------------------------


def send_model(
    links: Sequence[Link], model: ModelToShare, limits: Limits, progress: Progress | None = None
) -> str:
    """Share a model over one link to each party; its share id.

    ``progress(done, total)``: bytes of the model that all parties have written.

    Raises:
        JobError: a plan without its weights, an offer of no plan, a party that refuses (its reason), or parties that
            got different models; nothing is kept then.
        LinkError: a party was lost. The text says which parties have the model, where it was committing.
    """
    outgoing = _Outgoing(model)
    parties = [_Party(index, link, limits) for index, link in enumerate(links)]
    try:
        _transfer(parties, outgoing, progress)
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, SfumatoError) else f"the owner stopped ({type(error).__name__})"
        )
        for party in parties:
            party.link.abort(reason)
        raise
    _commit(parties, model.name)
    return outgoing.share_id


class _Outgoing:
    """The terms of a model and what must be sent. Weights are evaluated twice, plan by plan: once to know what there is
    (here), once to send it, so that no two plans' weights are in memory together."""

    def __init__(self, model: ModelToShare) -> None:
        check_name(model.name)
        check_offers(model.offers, model.plans)
        self.model, self.share_id = model, secrets.token_hex(16)
        self._items: dict[tuple[str, str, int], int] = {}
        items: list[list[Any]] = []
        tensors: dict[str, tuple[str, list[int]]] = {}
        constants: dict[str, Tensor] = {}
        named: dict[str, dict[str, dict[str, Any]]] = {"secret": {}, "public": {}, "constants": {}}
        for digest, plan in model.plans.items():
            if plan.digest() != digest:
                raise JobError("the plans of a model are given by their own digests")
            values = load_side(plan)
            secret, public, mine = (group.setdefault(digest, {}) for group in named.values())
            for name, tensor in values.secrets.items():
                key = weight_key(tensor, plan.secret_type(name))
                secret[name] = self._items.setdefault(key, len(items))
                if secret[name] == len(items):
                    type = plan.secret_type(name)
                    items.append([str(type.ring), type.frac, list(type.shape)])
            for name, tensor in values.publics.items():
                public[name] = content_key(tensor)
                tensors[public[name]] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in client_constants(plan).items():
                mine[name] = content_key(tensor)
                constants[mine[name]] = tensor
        self.client_file = pack_files(model.files, constants)
        terms: dict[str, Any] = {
            "name": model.name,
            "share": self.share_id,
            "shared_at": int(time.time()),
            "clients": None if model.clients is None else [_identity(name) for name in model.clients],
            "offers": [dict(offer) for offer in model.offers],
            "plans": {digest: plan.for_parties() for digest, plan in model.plans.items()},
            "approvals": {d: Approval.of(p, model.offers).to_json() for d, p in model.plans.items()},
            **named,
            "items": items,
            # Wide types first, so that each tensor of the file begins at a multiple of its own size.
            "tensors": sorted(
                ([key, *rest] for key, rest in tensors.items()),
                key=lambda row: (-getattr(torch, row[1]).itemsize, row[0]),
            ),
            "files": digest_of_file(iter([self.client_file])),
        }
        try:
            self.terms: dict[str, Any] = json.loads(canonical(terms))  # as the parties will read it
        except (TypeError, ValueError):
            raise JobError("the settings of an offer must be what JSON can hold") from None
        self.nbytes = len(self.client_file) + sum(_size(dtype, shape) for dtype, shape in tensors.values())
        self.nbytes += sum(_size(Ring.named(ring).dtype, shape) for ring, _, shape in items)

    def messages(self) -> Iterator[tuple[dict[str, Any], list[list[Tensor]], int]]:
        """(header, attachments by party, bytes of the model in it), one weight at a time."""
        data = torch.frombuffer(self.client_file, dtype=torch.uint8)
        yield {"client": True}, [[data]] * 3, data.numel()
        places = {row[0]: i for i, row in enumerate(self.terms["tensors"])}
        sent = set[int]()
        for plan in self.model.plans.values():
            values = load_side(plan)
            while values.publics:
                _, tensor = values.publics.popitem()
                place = places.pop(content_key(tensor), None)
                if place is not None:
                    yield {"public": place}, [[tensor]] * 3, tensor.numel() * tensor.element_size()
            while values.secrets:
                name, tensor = values.secrets.popitem()
                type = plan.secret_type(name)
                item = self._items[weight_key(tensor, type)]
                if item not in sent:
                    sent.add(item)
                    words = encode(tensor, type.ring, type.frac)
                    yield {"item": item}, split(words, type.ring), words.numel() * words.element_size()


def _identity(client: str) -> str:
    return client if client.startswith("sfumato://") else client_identity(client)


def _size(dtype: torch.dtype | str, shape: Sequence[int]) -> int:
    width = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return math.prod(shape) * int(width.itemsize)


class _Party:
    """The owner's conversation with one party, over a link of its own: what happens at one does not hide the others."""

    def __init__(self, index: int, link: Link, limits: Limits) -> None:
        self.index, self.link = index, link
        self._stall_s = limits.stall_s
        self._stream = MessageStream(link, index, limits.max_message_bytes, limits.max_frame_bytes)

    def send(self, header: dict[str, Any], tensors: Sequence[Tensor] = ()) -> None:
        with self._named():
            self._stream.send(header, tensors)

    def receive(self, what: str) -> dict[str, Any]:
        with self._named():
            return self._stream.receive(self._stall_s, what, self._stall_s)[0]

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except LinkError as error:
            raise as_raised(error) from None


def _transfer(parties: Sequence[_Party], outgoing: _Outgoing, progress: Progress | None) -> None:
    """All but the commit."""
    for party in parties:
        party.send({"terms": outgoing.terms, "replace": outgoing.model.replace})
    for party in parties:
        party.receive("its consent to a model")
    unconfirmed: list[int] = []
    done = 0

    def confirm(left: int) -> None:
        nonlocal done
        while len(unconfirmed) > left:
            for party in parties:
                party.receive("word that it has written a weight")
            done += unconfirmed.pop(0)
            if progress is not None:
                progress(done, outgoing.nbytes)

    for header, attachments, size in outgoing.messages():
        for party, tensors in zip(parties, attachments, strict=True):
            party.send(header, tensors)
        del attachments
        unconfirmed.append(size)
        confirm(_AHEAD)
    confirm(0)
    for party in parties:
        party.send({"finish": True})
    expected = _digest(outgoing.terms)
    if any(party.receive("the digest of its draft").get("digest") != expected for party in parties):
        raise JobError("the parties received different models; nothing was kept")


def _commit(parties: Sequence[_Party], name: str) -> None:
    failed: dict[int, SfumatoError] = {}
    for party in parties:
        with _noted(failed, party):
            party.send({"commit": True})
    for party in parties:
        if party.index not in failed:
            with _noted(failed, party):
                party.receive("word that it has committed")
    if failed:
        first = next(iter(failed.values()))
        have = [party.index for party in parties if party.index not in failed]
        raise type(first)(
            f"the model {name!r} is complete at {_listed(have)} and perhaps not at {_listed(sorted(failed))} "
            f"({first}); share it again and replace it (model share --replace)"
        )


@contextlib.contextmanager
def _noted(failed: dict[int, SfumatoError], party: _Party) -> Iterator[None]:
    try:
        yield
    except SfumatoError as error:
        failed[party.index] = error


def _listed(parties: Sequence[int]) -> str:
    if not parties:
        return "no party"
    return f"part{'y' if len(parties) == 1 else 'ies'} {' and '.join(map(str, parties))}"


# ---- a party's side -----------------------------------------------------------------------------------------------


def receive_model(
    stream: MessageStream, store: ModelStore, owner: str, *, idle_s: float, stall_s: float
) -> str:
    """Take a model that ``owner`` (the identity in its certificate) shares, and keep it; its name.

    Raises:
        JobError: the name is another owner's, the disk is full, or what came is not a model; nothing is kept then.
        LinkError: the owner is gone; nothing is kept then.
    """
    header, _ = stream.receive(idle_s, "the terms of a model", stall_s)
    terms, replace = _checked(header)
    with store.draft(terms["name"], owner, terms["share"], replace=replace) as draft:
        stream.send({})
        with draft.plain(PUBLIC_FILE) as public:
            incoming = _Incoming(draft, store.party, terms, public)
            while True:
                header, tensors = stream.receive(idle_s, "a weight", stall_s)
                if "finish" in header:
                    break
                incoming.take(header, tensors)
                del tensors
                stream.send({})
        incoming.check_whole()
        stream.send({"digest": _digest(terms)})
        header, _ = stream.receive(idle_s, "the owner's commit", stall_s)
        if header.get("commit") is not True:
            raise JobError("the owner did not commit the model it sent")
        draft.commit(terms)
    stream.send({"done": True})
    return str(terms["name"])


class _Incoming:
    """What has come of a model, written to its draft as it comes."""

    def __init__(self, draft: Draft, party: int, terms: Mapping[str, Any], public: BinaryIO) -> None:
        self._draft, self._party, self._public = draft, party, public
        self._files: str = terms["files"]
        self._items = dict(enumerate(terms["items"]))
        self._tensors: dict[int, tuple[str, int]] = {}
        public.write(file_head(terms["tensors"]))
        at = public.tell()
        for index, (key, dtype, shape) in enumerate(terms["tensors"]):
            self._tensors[index] = key, at
            at += _size(dtype, shape)
        self._client = False

    def take(self, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        """One message; ``JobError`` when it is not one that is still missing."""
        match header:
            case {"client": True} if not self._client and _looks(tensors, [(torch.uint8, None)]):
                data = tensor_bytes(tensors[0])
                if digest_of_file(iter([data])) != self._files:
                    raise JobError("the files of a model came changed")
                with self._draft.plain(CLIENT_FILE) as file:
                    file.write(data)
                self._client = True
            case {"item": int(item)} if item in self._items:
                ring, frac, shape = self._items.pop(item)
                if not _looks(tensors, held_by(self._party, Secret(Ring.named(ring), frac, tuple(shape)))):
                    raise JobError(f"the share of weight {item} does not look as announced")
                self._draft.seal(item, [tensor_bytes(tensor) for tensor in tensors])
            case {"public": int(index)} if index in self._tensors and len(tensors) == 1:
                key, at = self._tensors.pop(index)
                if content_key(tensors[0]) != key:
                    raise JobError("a public weight of a model came changed")
                self._public.seek(at)
                self._public.write(tensor_bytes(tensors[0]))
            case _:
                raise JobError("an owner sent something that is not a missing part of its model")

    def check_whole(self) -> None:
        """``JobError`` when something is missing."""
        if self._items or self._tensors or not self._client:
            raise JobError("an owner finished before its whole model had come")


def _looks(tensors: Sequence[Tensor], expected: Sequence[tuple[torch.dtype, tuple[int, ...] | None]]) -> bool:
    return len(tensors) == len(expected) and all(
        tensor.dtype == dtype and (shape is None or tuple(tensor.shape) == shape)
        for tensor, (dtype, shape) in zip(tensors, expected, strict=True)
    )


def _digest(terms: Mapping[str, Any]) -> str:
    """Of what all parties hold alike: everything but the shares."""
    return hashlib.blake2b(canonical(terms), digest_size=32, person=b"sfumato-model").hexdigest()


def _checked(header: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The terms that an owner announces, and whether they replace others.

    Raises:
        JobError: a field is missing, unknown or wrong, or a plan is not the one that the owner approves.
    """
    try:
        terms, replace = dict(header["terms"]), header["replace"]
        if set(header) != {"terms", "replace"} or set(terms) != _TERMS or type(replace) is not bool:
            raise ValueError
        check_name(terms["name"])
        check_offers(terms["offers"], terms["plans"])
        clients = terms["clients"]
        if clients is not None and not all(isinstance(c, str) for c in _list(clients)):
            raise ValueError
        if (
            not all(isinstance(terms[name], str) for name in ("share", "files"))
            or type(terms["shared_at"]) is not int
        ):
            raise ValueError
        types = [
            Secret(Ring.named(ring), _count(frac), _shape(shape))
            for ring, frac, shape in _list(terms["items"])
        ]
        if not all(isinstance(key, str) and dtype in FILE_TYPES for key, dtype, _ in _list(terms["tensors"])):
            raise ValueError
        shapes = {key: _shape(shape) for key, _, shape in terms["tensors"]}
        if len(shapes) != len(terms["tensors"]):
            raise ValueError
        for digest, document in terms["plans"].items():
            plan = Plan.from_json(document)
            if (
                plan.digest() != digest
                or Approval.of(plan, terms["offers"]).to_json() != terms["approvals"][digest]
            ):
                raise JobError("a plan of the model is not the one that its owner approves")
            secret, public = terms["secret"][digest], terms["public"][digest]
            if any(types[_count(item)] != plan.secret_type(name) for name, item in secret.items()):
                raise ValueError
            if set(secret) != set(plan.secret_weights) or set(public) != set(plan.constants):
                raise ValueError
            if not set(public.values()) <= set(shapes) or not all(
                isinstance(key, str) for key in dict(terms["constants"][digest]).values()
            ):
                raise ValueError
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise JobError("this is not the announcement of a model that this release can keep") from None
    return terms, replace


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_count(size) for size in _list(value))


def share_model(
    cluster: Cluster, keys: Path | str, model: ModelToShare, *, progress: Progress | None = None
) -> str:
    """Share a model with the parties of a cluster, as the owner whose folder ``keys`` is; its share id.

    Raises:
        JobError, LinkError: see :func:`send_model`.
    """
    places = Places(cluster, keys, "share", new_run(), {})
    links = [
        TlsLink(CLIENT, {party: sock}, link_limits(cluster)) for party, sock in sorted(places.sockets.items())
    ]
    try:
        return send_model(links, model, cluster.limits, progress)
    finally:
        for link in links:
            link.close()
        places.close()
