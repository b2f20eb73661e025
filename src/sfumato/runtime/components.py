"""How a client or an owner hands a value to the three parties: two of three components each, seeds instead of words
where possible."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.errors import JobError
from sfumato.protocol.rep3 import Rep3
from sfumato.ring import dpf
from sfumato.ring.prg import stream_words
from sfumato.types import Index, Ring, Secret

__all__ = ["SEED_BYTES", "component", "held_by", "index_keys", "split", "split_index"]

SEED_BYTES = 32
#: By party: whether each of its two components comes as a seed.
_SEEDED = ((True, True), (True, False), (False, True))


def split(words: Tensor, ring: Ring) -> list[list[Tensor]]:
    """Attachments per party: components 0 and 1 are streams under fresh seeds, component 2 is the rest."""
    seeds = [torch.frombuffer(bytearray(os.urandom(SEED_BYTES)), dtype=torch.uint8) for _ in range(2)]
    shape, device = tuple(words.shape), words.device.type
    masks = [stream_words(seed.numpy().tobytes(), "put", ring, shape, device) for seed in seeds]
    rest = Rep3.split(words, ring, masks)[2]
    return [[seeds[0], seeds[1]], [seeds[1], rest], [rest, seeds[0]]]


def component(type: Secret, name: str, tensor: Tensor) -> Tensor:
    """The words of a component that came as words or as a seed.

    Raises:
        JobError: it is neither.
    """
    if tensor.dtype == torch.uint8 and tensor.numel() == SEED_BYTES:
        return stream_words(tensor.numpy().tobytes(), "put", type.ring, type.shape)
    if tensor.dtype != type.ring.dtype or tuple(tensor.shape) != type.shape:
        raise JobError(f"the share of {name} is {tensor.dtype}{list(tensor.shape)}, not {type}")
    return tensor


def held_by(party: int, type: Secret) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """How the two components that :func:`split` makes for a party look: dtype and shape."""
    words, seed = (type.ring.dtype, type.shape), (torch.uint8, (SEED_BYTES,))
    found: Sequence[tuple[torch.dtype, tuple[int, ...]]] = [
        seed if seeded else words for seeded in _SEEDED[party]
    ]
    return list(found)


def split_index(numbers: Tensor, type: Index) -> list[list[Tensor]]:
    """Attachments per party for row numbers: its keys of its two components' pairs, (2, numbers, key bytes) uint8.

    Raises:
        RangeError: a number is no row of the table.
    """
    if numbers.device.type == "meta":
        size = (2, type.numel, dpf.key_bytes(type.rows, type.ring))
        return [[torch.empty(size, dtype=torch.uint8, device="meta")] for _ in range(3)]
    pairs = [dpf.make_keys(numbers.reshape(-1), type.rows, type.ring) for _ in range(3)]
    return [[torch.stack([pairs[i][0], pairs[(i + 1) % 3][1]])] for i in range(3)]


def index_keys(type: Index, name: str, form: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A party's two keys for each number, as :func:`split_index` makes them.

    Raises:
        JobError: keys of another form, number or length.
    """
    if form != dpf.ALGORITHM:
        raise JobError(
            f"the keys of {name} are of another form than {dpf.ALGORITHM}; use clients of this release"
        )
    wanted = (2, type.numel, dpf.key_bytes(type.rows, type.ring))
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted:
        raise JobError(
            f"the keys of {name} are {tensor.dtype}{list(tensor.shape)}, and {type} need {torch.uint8}{list(wanted)}"
        )
    return tensor[0], tensor[1]
