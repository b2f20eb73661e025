"""What shared models of several parts have in common: files for clients, and plans that parties load from their own
store."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sfumato.errors import JobError
from sfumato.graph.places import Place
from sfumato.graph.plan import Plan
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend
from sfumato.runtime.shared_model import Description
from sfumato.runtime.sharing import ModelToShare

__all__ = ["caller_of", "fetched", "files_in", "in_clear", "load_part", "stored_bytes", "write_files"]


# ---- at the owner ------------------------------------------------------------------------------------------


def files_in(folder: Path, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
    """A folder's files by relative path, those with one of the ``suffixes``; configurations without the folder that the
    owner keeps the model in."""
    return {
        path.relative_to(folder).as_posix(): _without_origin(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (suffixes is None or path.suffix in suffixes)
    }


def _without_origin(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".json" or b"name_or_path" not in data:
        return data
    known = {k: v for k, v in json.loads(data).items() if not k.endswith("name_or_path")}
    return json.dumps(known, indent=2, sort_keys=True).encode()


def stored_bytes(model: ModelToShare) -> int:
    """About what the parties will keep together: one component of every secret weight at two of them (seeds stand for
    the others), and public weights and files at each."""
    secret, public = dict[tuple[str, str], int](), dict[tuple[str, str], int]()
    for offer in model.offers:
        for part, digest in offer["parts"].items():
            plan = model.plans[digest]
            types = plan.program.types
            secret |= {
                (part, n): 2 * math.prod(types[n][0]) * plan.secret_type(n).ring.dtype.itemsize
                for n in plan.secret_weights
            }
            public |= {(part, n): math.prod(types[n][0]) * types[n][1].itemsize for n in plan.constants}
    return sum(secret.values()) + 3 * (sum(public.values()) + sum(map(len, model.files.values())))


def in_clear(part: str, plan: Plan) -> list[str]:
    """Names of the model's tensors that are public in a plan."""
    return [
        f"{part}: {i.source}"
        for i in plan.program.inputs
        if i.kind != "user" and i.shape != () and plan.places[i.name] is Place.PUBLIC
    ]


# ---- at a client -------------------------------------------------------------------------------------------


def fetched(
    name: str,
    *,
    cluster: str | Path | None,
    keys: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    decided: Sequence[str] = (),
) -> Description:
    """What a short session says of the model ``name``. ``decided``: arguments of the caller that the owner decides.

    Raises:
        JobError: no such model for this client, no cluster, or an argument that is not the client's.
    """
    if decided:
        raise JobError(f"the owner of cluster:{name} decides on {decided[0]}; leave it out")
    if cluster is None:
        raise JobError(
            f"cluster:{name} is at the parties of a cluster; give its file, cluster='.../cluster.toml'"
        )
    with open_backend(cluster=cluster, keys=keys, options=options) as backend:
        return backend.describe(name)


def caller_of(description: Description) -> str:
    """Which call opens a shared model, by the parts of its offers."""
    parts = {part for offer in description.offers for part in offer["parts"]}
    reference = f"'cluster:{description.name}'"
    if "unet" in parts:
        return f"SecurePipeline.from_pretrained({reference})"
    return f"sfumato.deploy({reference})" if "model" in parts else f"SecureModel.from_pretrained({reference})"


def write_files(description: Description, folder: Path, suffixes: Collection[str]) -> None:
    """The owner's files, in this folder.

    Raises:
        JobError: one of another kind, which could hold code, or whose name leads elsewhere.
    """
    for name, data in description.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in name.split("/") or path.suffix not in suffixes:
            raise JobError(
                f"the owner of cluster:{description.name} shared a file of a kind that is not taken; ask for another "
                "share"
            )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def load_part(backend: Backend, description: Description, name: str, plan: Plan) -> None:
    """Have the parties take a part's weights from their store; on shapes, stand-ins of the same types do."""
    if backend.device == "meta":
        backend.load(name, _on_shapes(plan))
    else:
        digest = next(digest for digest, known in description.plans.items() if known is plan)
        backend.load_shared(name, description, digest)


def _on_shapes(plan: Plan) -> Plan:
    """The plan with zeros for weights, which take no memory."""
    zeros = {
        i.name: torch.zeros((), dtype=i.dtype).expand(i.shape)
        for i in plan.program.inputs
        if i.kind != "user"
    }
    return replace(plan, program=replace(plan.program, weights=zeros))
