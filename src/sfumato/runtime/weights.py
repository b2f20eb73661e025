"""Public weights of one host: a safetensors file that the processes map into memory and share."""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import JobError
from sfumato.runtime.wire import canonical, tensor_bytes
from sfumato.types import Secret

__all__ = ["FILE_TYPES", "MappedWeights", "content_key", "file_head", "opened", "stored", "weight_key"]

_NAME = re.compile(r"[0-9a-f]{32}\Z")
#: What safetensors calls the types that such a file holds.
FILE_TYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip


class MappedWeights(Mapping[str, Tensor]):
    """Tensors read from the file when asked for; the pages belong to the file, not to the process.

    ``names``: what to call the file's tensors, where they have other names there.
    """

    def __init__(self, path: Path, names: Sequence[str] | Mapping[str, str]) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
        missing = set(self._names.values()) - set(self._file.keys())
        if missing:
            raise JobError(f"the weights file lacks {sorted(missing)[0]}")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(self._names[name])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def content_key(tensor: Tensor) -> str:
    """Hex digest of a tensor's dtype, shape and words: what a public weight is called where it is kept once."""
    head = canonical([str(tensor.dtype), list(tensor.shape)])
    state = hashlib.blake2b(len(head).to_bytes(8, "little") + head, digest_size=32, person=b"sfumato-tensor")
    state.update(tensor_bytes(tensor))
    return state.hexdigest()


def weight_key(tensor: Tensor, type: Secret) -> tuple[str, str, int]:
    """By this who has a secret weight knows equal ones; a digest of a weight never leaves its owner."""
    return content_key(tensor), str(type.ring), type.frac


def file_head(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """The beginning of a safetensors file of these tensors (key, dtype as ``float32``, shape); their bytes follow in
    this order."""
    head: dict[str, Any] = {}
    at = 0
    for key, dtype, shape in tensors:
        end = at + math.prod(shape) * getattr(torch, dtype).itemsize
        head[key] = {"dtype": FILE_TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Write weights into the folder under their content's digest; returns the name for :func:`opened`."""
    scratch = folder / f"{secrets.token_hex(8)}.part"  # sessions of one cluster write here at the same time
    try:
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, scratch)
        name = _digest(scratch)
        scratch.replace(folder / f"{name}.safetensors")
    finally:
        scratch.unlink(missing_ok=True)
    return name


def opened(folder: Path, name: str, names: Sequence[str]) -> MappedWeights:
    """Map a file written by :func:`stored`, after checking that its content is what its name says.

    Raises:
        JobError: no such file here, or another content.
    """
    if not _NAME.match(str(name)) or folder == Path():
        raise JobError("this party takes no weights from files; send them")
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise JobError("the weights file is not on this host; send the weights instead")
    if _digest(path) != name:
        raise JobError("the weights file was changed after it was written; load the model again")
    return MappedWeights(path, names)
