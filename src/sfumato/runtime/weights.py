"""Public weights of one host: a safetensors file that the processes map into memory and share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import JobError

__all__ = ["MappedWeights", "opened", "stored"]

_NAME = re.compile(r"[0-9a-f]{32}\Z")


class MappedWeights(Mapping[str, Tensor]):
    """Tensors read from the file when asked for; the pages belong to the file, not to the process."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = tuple(names)
        missing = set(names) - set(self._file.keys())
        if missing:
            raise JobError(f"the weights file lacks {sorted(missing)[0]}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
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


def stored(folder: Path, weights: Mapping[str, Tensor]) -> str:
    """Write weights into the folder under their content's digest; returns the name for :func:`opened`."""
    scratch = folder / "weights.part"
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, scratch)
    name = _digest(scratch)
    scratch.replace(folder / f"{name}.safetensors")
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
