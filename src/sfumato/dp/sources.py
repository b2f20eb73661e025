"""What a model has seen, so that a public start that knows the private images is refused before training.

A record's fingerprint is a prefix of SHA-256 of the image in a canonical form, in which padding, and grey copied to
three channels, make no difference. *Not* caught: copies that were resized, compressed again, cropped, mirrored,
inverted or changed in any pixel. So a match proves that an image was seen; no match proves nothing about
near-duplicates, about the images that a sample leaves out, nor about a model whose sources are only declared.

Fingerprints of public images may be published. Those of private images may not: whoever has a candidate image could
look it up. A ledger holds a commitment to them instead, under a key that stays with the data holder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.errors import JobError
from sfumato.zoo.train.data import SETS, load_split

__all__ = [
    "DECLARED",
    "Seen",
    "Sources",
    "commitment",
    "embedded_sources",
    "fingerprint",
    "private_key",
    "read_sources",
    "refuse_overlap",
]

FORMAT = 1
#: In place of a digest, for a source that was named and not hashed.
DECLARED = "declared, not checked"
#: A sample keeps the fingerprints that are multiples of it: the same ones in every data set, so samples compare.
_SAMPLED = 64
#: Pixels that an image must keep after trimming; fewer are common to unrelated drawings.
_LEAST_PIXELS = 16
#: How the name of a source begins that a fine-tuning writes down.
PRIVATE_RUN = "private images of run"
_CHUNK = 4096
_JSON, _TENSORS = "sources.json", "sources.safetensors"
_KEY_BYTES = 32

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def fingerprint(images: Tensor) -> Tensor:
    """Fingerprints of images, uint8 ``(N, C, H, W)``: int64 ``(M,)``, distinct and ascending, M at most N.

    Canonical form: one channel if all are equal; outer rows and columns of one colour are trimmed until none is left
    (the order does not matter); then the shape and the bytes. Images that trim to fewer than 16 pixels (flat ones,
    plain stripes, a dot) carry no identity and are left out.

    Raises:
        JobError: not uint8, or not four axes.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise JobError(
            f"fingerprints are of uint8 images (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
        )
    found: list[int] = []
    for start in range(0, len(images), _CHUNK):
        piece = images[start : start + _CHUNK].cpu().numpy()
        grey = (piece == piece[:, :1]).all((1, 2, 3))
        for kept in (piece[grey, :1], piece[~grey]):
            found += (
                _hash(image) for image in _trimmed(kept) if image.shape[1] * image.shape[2] >= _LEAST_PIXELS
            )
    return torch.from_numpy(np.unique(np.array(found, np.int64)))


def _hash(image: Bytes) -> int:
    text = "x".join(map(str, image.shape)).encode() + b":" + image.tobytes()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def _trimmed(images: Bytes) -> Iterable[Bytes]:
    """Each image without its outer lines of one colour: one line of one side at a time, of all images that still have
    such a line."""
    count, _, height, width = images.shape
    # First and one past the last row, and column, of each image.
    window = np.tile(np.array([0, height, 0, width]), (count, 1))
    turned = images.transpose(0, 1, 3, 2)
    live = np.arange(count if height and width else 0)
    while len(live):
        moved = np.zeros(len(live), np.bool_)
        for side in range(4):  # top, bottom, left, right
            across, along, lines_of = (0, 2, images) if side < 2 else (2, 0, turned)
            low, high, first, last = window[live][:, [across, across + 1, along, along + 1]].T
            at = high - 1 if side % 2 else low
            lines = lines_of[live, :, at.clip(0, lines_of.shape[2] - 1)]
            place = np.arange(lines.shape[2])
            outside = (place < first[:, None]) | (place >= last[:, None])
            start = first.clip(max=lines.shape[2] - 1)[:, None, None]
            colour = np.take_along_axis(lines, start, 2)
            plain = ((lines == colour) | outside[:, None]).all((1, 2)) & (low < high) & (first < last)
            window[live[plain], across + side % 2] += -1 if side % 2 else 1
            moved |= plain
        live = live[moved]
    for image, (top, bottom, left, right) in zip(images, window, strict=True):
        yield image[:, top:bottom, left:right]


@dataclass(frozen=True)
class Seen:
    """One data set that a model has seen.

    Args:
        name, note: of the data set; licence and origin.
        digest: SHA-256 over all its fingerprints, hex, or `DECLARED`.
        count: of distinct fingerprints; 0 if declared.
        sampled: whether only the fingerprints that are multiples of 64 are kept.
        fingerprints: int64, distinct and ascending; all, a sample, or none if declared.
    """

    name: str
    note: str
    digest: str
    count: int
    sampled: bool
    fingerprints: Tensor

    @staticmethod
    def of(name: str, note: str, images: Tensor, sampled: bool = False) -> Seen:
        """From its images, uint8 (N, C, H, W)."""
        full = fingerprint(images)
        return Seen(
            name, note, _digest(full), len(full), sampled, full[full % _SAMPLED == 0] if sampled else full
        )

    @staticmethod
    def declared(name: str, note: str = "") -> Seen:
        """A source that its user names and nothing checks."""
        return Seen(name, note, DECLARED, 0, False, torch.empty(0, dtype=torch.int64))

    def check(self) -> None:
        """
        Raises:
            JobError: fingerprints that are not what the other entries say.
        """
        values = self.fingerprints
        if values.dtype != torch.int64 or values.ndim != 1 or bool((values[1:] <= values[:-1]).any()):
            raise JobError(f"the fingerprints of {self.name} must be int64, ascending and distinct")
        if self.digest == DECLARED:
            fits = not self.sampled and len(values) == self.count == 0
        elif self.sampled:
            fits = len(values) <= self.count and not bool((values % _SAMPLED).any())
        else:
            fits = len(values) == self.count and self.digest == _digest(values)
        if not fits:
            raise JobError(f"the fingerprints of {self.name} do not fit its digest and count")


@dataclass(frozen=True)
class Sources:
    """All that a model has seen, saved in its folder."""

    seen: tuple[Seen, ...]

    def __post_init__(self) -> None:
        names = [source.name for source in self.seen]
        if len(set(names)) != len(names) or not all(names):
            raise JobError(
                f"what a model has seen needs names that differ, not {', '.join(names)}; rename a file (--images) or "
                "what was declared (--seen)"
            )

    def digests(self) -> dict[str, str]:
        """Name and digest of each, as a ledger keeps them."""
        return {source.name: source.digest for source in self.seen}

    def overlap(self, private: Tensor) -> dict[str, int]:
        """How many of the private ``fingerprint``s each source holds; sources with none are left out. Of a sampled
        source it counts the sample, about one in 64."""
        counts = {source.name: int(torch.isin(private, source.fingerprints).sum()) for source in self.seen}
        return {name: count for name, count in counts.items() if count}

    def write(self, folder: Path) -> None:
        """Write ``sources.json`` and ``sources.safetensors``."""
        entries = [
            {"name": s.name, "note": s.note, "digest": s.digest, "count": s.count, "sampled": s.sampled}
            for s in self.seen
        ]
        text = json.dumps({"format": FORMAT, "sources": entries}, indent=2, ensure_ascii=False)
        save_file({source.name: source.fingerprints for source in self.seen}, folder / _TENSORS)
        (folder / _JSON).write_text(text + "\n", "utf-8")

    @staticmethod
    def read(folder: Path) -> Sources:
        """
        Raises:
            JobError: a missing file, or one that is not strictly of this format.
        """
        try:
            entries = json.loads((folder / _JSON).read_text("utf-8"))
            tensors = load_file(folder / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise JobError(f"the sources of {folder} cannot be read ({error}); write them anew") from error
        try:
            return _from_json(entries, tensors)
        except JobError as error:
            raise JobError(f"the sources of {folder} are damaged: {error}") from error


def read_sources(folder: Path, declared: Sequence[str] = ()) -> Sources:
    """What the model in ``folder`` has seen: its own record, and what the caller declares by name.

    Raises:
        JobError: neither a record nor a declaration; a damaged record.
    """
    if any(name.startswith(PRIVATE_RUN) for name in declared):
        raise JobError(
            f"a source called '{PRIVATE_RUN} ...' was private; start from a model that has not seen it"
        )
    named = tuple(Seen.declared(name) for name in declared)
    if (folder / _JSON).exists() or (folder / _TENSORS).exists():
        return Sources(Sources.read(folder).seen + named)
    if not named:
        raise JobError(
            f"{folder} does not say what its model has seen ({_JSON}); name its training data, for example "
            "'LAION-400M', and the ledger will say that it was declared and not checked"
        )
    return Sources(named)


def refuse_overlap(sources: Sources, private: Tensor) -> None:
    """Hold a public start to the private ``fingerprint``s.

    Raises:
        JobError: the start has seen some of the private images.
    """
    if found := sources.overlap(private):
        sampled = {source.name for source in sources.seen if source.sampled}
        words = ", ".join(
            f"{'at least ' if name in sampled else ''}{count} of the {len(private)} private images (source {name})"
            for name, count in found.items()
        )
        raise JobError(f"the public start has seen {words}; take a start that has not seen them")


def commitment(private: Tensor, key: bytes) -> str:
    """HMAC-SHA256 of the private ``fingerprint``s, 64 hex digits: the same for the same images under the same key, and
    without the key no test of whether an image is among them.

    Raises:
        JobError: a key of another length than 32 bytes.
    """
    if len(key) != _KEY_BYTES:
        raise JobError(
            f"the key of a commitment has {_KEY_BYTES} bytes, not {len(key)}; use the one of private_key"
        )
    return hmac.new(key, b"sfumato-dp-private:" + _bytes(private), hashlib.sha256).hexdigest()


def private_key(path: Path) -> bytes:
    """The data holder's key, made at the first call. It stays beside the data or the checkpoint, readable for its owner
    only, and is never published. One key for one data set, or its runs cannot be added up.

    Raises:
        JobError: a file of another length, or that others may read.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with open(descriptor, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    if path.stat().st_mode & 0o077:
        raise JobError(f"{path} is open to other users; make it private (chmod 600)")
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise JobError(f"{path} holds {len(key)} bytes, not a key of {_KEY_BYTES}; restore it or delete it")
    return key


def embedded_sources(data: Path) -> Sources:
    """What sfumato's embedded pipeline has seen, from the folders of its training data (`zoo.train.data`)."""
    split = load_split(data, train=True)
    notes = ("CC BY-SA 3.0, Y. LeCun, C. Cortes and C. Burges", "MIT, Zalando SE")
    return Sources(
        tuple(
            Seen.of(name, f"training images, {note}", split.images[split.labels // 10 == number])
            for number, (name, note) in enumerate(zip(SETS, notes, strict=True))
        )
    )


def _bytes(fingerprints: Tensor) -> bytes:
    return fingerprints.cpu().numpy().astype("<i8").tobytes()


def _digest(fingerprints: Tensor) -> str:
    return hashlib.sha256(_bytes(fingerprints)).hexdigest()


def _from_json(entries: Any, tensors: dict[str, Tensor]) -> Sources:
    if not isinstance(entries, dict) or set(entries) != {"format", "sources"} or entries["format"] != FORMAT:
        raise JobError(f"a JSON object with 'format' {FORMAT} and 'sources' is wanted")
    kinds = {"name": str, "note": str, "digest": str, "count": int, "sampled": bool}
    seen = []
    for entry in entries["sources"] if isinstance(entries["sources"], list) else [None]:
        if not isinstance(entry, dict) or set(entry) != set(kinds):
            raise JobError(f"a source has exactly {', '.join(kinds)}")
        if any(type(entry[name]) is not kind for name, kind in kinds.items()):
            raise JobError(f"a source has an entry of the wrong type: {entry}")
        if entry["name"] not in tensors:
            raise JobError(f"there are no fingerprints of {entry['name']}")
        seen.append(Seen(**entry, fingerprints=tensors[entry["name"]]))
        seen[-1].check()
    if extra := set(tensors) - {source.name for source in seen}:
        raise JobError(f"fingerprints of unknown sources: {', '.join(sorted(extra))}")
    return Sources(tuple(seen))
