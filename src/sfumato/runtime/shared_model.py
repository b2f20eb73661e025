"""A shared model as a client learns of it, and as a party loads its approved plans."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from sfumato.errors import CaptureError, JobError
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan
from sfumato.runtime.canonical import canonical
from sfumato.runtime.components import component, held_by
from sfumato.runtime.handles import Loaded
from sfumato.runtime.policy import Approval, Host, ModelId, Part, check_offers, opens
from sfumato.runtime.store import StoredModel, digest_of_file
from sfumato.runtime.weights import MappedWeights, content_key
from sfumato.runtime.wire import tensor_bytes
from sfumato.types import Ring, Secret, Shared

__all__ = ["Description", "SharedModels", "client_constants", "pack_files", "read_description"]

#: The entry of the client's files that holds constants of plans, by the digest of their content.
_CONSTANTS = ".constants"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*\Z")


@dataclass(frozen=True)
class Description:
    """What a client gets of a shared model: everything but its secret weights.

    ``offers``: settings, parts (names to plan digests) and which parts' results may be opened; ``plans`` by digest,
    with the constants that the client's own computations need and no other weights.
    """

    name: str
    share_id: str
    offers: tuple[dict[str, Any], ...]
    files: dict[str, bytes]
    plans: dict[str, Plan]


def client_constants(plan: Plan) -> dict[str, Tensor]:
    """The weights that `client_side` of this plan reads: public ones, never one that the owner keeps secret."""
    mine = [n for n in plan.program.nodes if plan.places[n.name] in (Place.PUBLIC, Place.CLIENT)]
    needed = {n for n in plan.program.output_names if plan.places[n] is not Place.SECRET}
    for node in reversed(mine):
        if node.name in plan.per_call or node.name in needed:
            needed.update(node.refs())
    found = [i.name for i in plan.program.inputs if i.kind != "user" and i.name in needed]
    assert all(plan.places[name] is Place.PUBLIC for name in found)
    return {name: plan.program.weights[name] for name in found}


# ---- the client's files -------------------------------------------------------------------------------------------


def pack_files(files: Mapping[str, bytes], constants: Mapping[str, Tensor]) -> bytearray:
    """Files and constants (by :func:`content_key`) as one: an index, then their bytes.

    Raises:
        JobError: a file's name would lead out of a folder.
    """
    for name in files:
        _check_file(name)
    content = {**files, _CONSTANTS: bytes_of({k: t.detach().contiguous() for k, t in constants.items()})}
    index = canonical({name: len(data) for name, data in content.items()})
    packed = bytearray(len(index).to_bytes(8, "little")) + index
    for name in sorted(content):
        packed += content[name]
    return packed


def _unpacked(data: memoryview) -> dict[str, bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    sizes = json.loads(bytes(data[8:start]))
    found = {}
    for name in sorted(sizes):
        if name != _CONSTANTS:
            _check_file(name)
        found[name] = bytes(data[start : start + sizes[name]])
        start += sizes[name]
    return found


def _check_file(name: str) -> None:
    if not _FILE.match(name):
        raise JobError(f"a file of a model cannot be called {name[:80]!r}; use plain names and folders")


# ---- descriptions -------------------------------------------------------------------------------------------------


def described(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What all clients of a model may know of its manifest."""
    return {name: manifest[name] for name in ("name", "share", "offers", "plans", "constants", "files")}


def description_digest(description: Mapping[str, Any]) -> str:
    """Hex digest that the parties are compared by."""
    return digest_of_file(iter([canonical(description)]))


def read_description(replies: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]) -> Description:
    """Put together what the three parties answered.

    Raises:
        JobError: they do not say the same of the model, or nothing that this release can read.
    """
    try:
        return _read(replies)
    except (KeyError, TypeError, ValueError, IndexError, CaptureError, SafetensorError) as error:
        raise JobError(
            f"the parties describe the model in a way that this release cannot read ({type(error).__name__})"
        ) from None


def _read(replies: Sequence[tuple[Mapping[str, Any], Sequence[Tensor]]]) -> Description:
    fields, tensors = replies[0]
    given = fields["description"]
    if any(reply["digest"] != description_digest(given) for reply, _ in replies):
        raise JobError(
            f"the parties hold different shares of {given['name']}; its owner must share it again and replace it"
        )
    data = tensor_bytes(tensors[0])
    if digest_of_file(iter([data])) != given["files"]:
        raise JobError(f"party 0 sent other files of {given['name']} than the parties agreed on; try again")
    files = _unpacked(data)
    constants = tensors_of(files.pop(_CONSTANTS))
    plans = {}
    for digest, document in given["plans"].items():
        weights = {name: constants[key] for name, key in given["constants"][digest].items()}
        plans[digest] = Plan.from_json(document, weights)
        if plans[digest].digest() != digest:
            raise JobError(f"a plan of {given['name']} is not the one that its owner approved")
    check_offers(given["offers"], plans)
    return Description(given["name"], given["share"], tuple(given["offers"]), files, plans)


# ---- at a party ---------------------------------------------------------------------------------------------------


class SharedModels:
    """The models of a party's store as one session sees them: each weight is decrypted once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._opened: dict[tuple[str, str], StoredModel] = {}  # by name and share id, as a client asks for it
        self._shares: dict[tuple[ModelId, int], Shared] = {}

    def describe(self, name: str) -> tuple[dict[str, Any], list[Tensor]]:
        """The reply to a client that may use the model.

        Raises:
            JobError: it may not, or there is none.
        """
        model = self._open(name)
        description = described(model.manifest)
        fields: dict[str, Any] = {"digest": description_digest(description)}
        if model.party != 0:
            return fields, []
        return {**fields, "description": description}, [
            torch.frombuffer(model.client_file(), dtype=torch.uint8)
        ]

    def load(self, named: Mapping[str, str]) -> Loaded:
        """An approved plan with the model's weights, every bit of them checked.

        Raises:
            JobError: not this client's, not this share of the model, or not approved by its owner.
        """
        model = self._open(named["model"], named["share"])
        manifest, digest = model.manifest, named["plan"]
        document = manifest["plans"].get(digest)
        if document is None:
            raise JobError(f"the owner of {model.name} has not approved this plan; describe the model again")
        try:
            plan = Plan.from_json(document)
        except CaptureError as error:
            raise JobError(f"a plan of {model.name} does not run in this release ({error})") from None
        if Approval.of(plan, manifest["offers"]).to_json() != manifest["approvals"].get(digest):
            raise JobError(f"the owner of {model.name} has not approved this plan as it is kept here")
        held: dict[str, Any] = self._public(model, manifest["public"][digest])
        for weight, item in manifest["secret"][digest].items():
            held[weight] = self._share(model, item, plan.secret_type(weight))
        return Loaded(plan, held, Part(ModelId.of(manifest), opens(manifest["offers"], digest)))

    def close(self) -> None:
        """Forget them."""
        self._opened.clear()
        self._shares.clear()

    def _open(self, name: str, share: str = "") -> StoredModel:
        if self._host.store is None:
            raise JobError("these parties keep no models; models of a cluster need the cluster's parties")
        model = self._opened.get((name, share))
        if model is None:
            model = self._host.store.open(name, self._host.client)
        if share and model.manifest["share"] != share:
            raise JobError(
                f"party {model.party} holds another share of {name} than the one described; describe it again, and if "
                "that does not help its owner must share it again and replace it"
            )
        self._opened[name, model.manifest["share"]] = model
        return model

    def _share(self, model: StoredModel, item: int, type: Secret) -> Shared:
        key = (ModelId.of(model.manifest), item)
        if key not in self._shares:
            data, parts, at = model.unsealed(item), [], 0
            ring, frac, shape = model.manifest["items"][item]
            kept = Secret(Ring.named(ring), frac, tuple(shape))
            for dtype, size in held_by(model.party, kept):
                count = math.prod(size)
                if at + count * dtype.itemsize > len(data):
                    model.refuse()
                whole = (
                    torch.frombuffer(data, dtype=dtype, count=count, offset=at)
                    if count
                    else torch.empty(0, dtype=dtype)
                )
                parts.append(component(kept, f"weight {item}", whole.reshape(size)))
                at += count * dtype.itemsize
            self._shares[key] = Shared(kept, tuple(parts))
        share = self._shares[key]
        if share.type != type:
            model.refuse()
        return share

    @staticmethod
    def _public(model: StoredModel, names: Mapping[str, str]) -> dict[str, Any]:
        if not names:
            return {}
        try:
            mapped = MappedWeights(model.public_path, names)
            found = {name: mapped[name] for name in mapped}
        except (OSError, SafetensorError, JobError):
            model.refuse()
        if any(content_key(tensor) != names[name] for name, tensor in found.items()):
            model.refuse()
        return found
