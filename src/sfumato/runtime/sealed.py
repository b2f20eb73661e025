"""Sealed files at a party: encrypted in chunks under keys of their own, and written so that a crash leaves none half.

A file is a row of AES-256-GCM chunks. Its key follows by HKDF from the storage key, the model's random salt and what
the file is, so a nonce is a chunk's number; every chunk is authenticated with its place among how many. Reordering,
shortening, lengthening or swapping files of weights, models or parties is noticed. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfumato.errors import JobError
from sfumato.runtime.canonical import canonical

__all__ = ["Buffer", "Keys", "is_held", "on_disk", "private", "sync", "written"]

_LABEL = "sfumato/model/v1"
_CHUNK_BYTES = 1 << 20
_TAG_BYTES = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)

Buffer = bytes | bytearray | memoryview


class Keys:
    """Keys of one model at one party: derived from the storage key, a random salt, and what they are for."""

    def __init__(self, key: bytes, head: Mapping[str, Any]) -> None:
        self._key, self._salt = key, bytes.fromhex(head["salt"])
        self._model = [head["name"], head["owner"], head["share"], head["party"]]
        if len(self._salt) != 32:
            raise ValueError

    def _derived(self, what: str, number: int = 0) -> bytes:
        info = canonical([_LABEL, what, number, self._model])
        return HKDF(hashes.SHA256(), 32, self._salt, info).derive(self._key)

    def seal(self, file: BinaryIO, item: int, parts: Sequence[Buffer]) -> int:
        """Encrypt a weight's components, one after the other; how many bytes they are."""
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        size = sum(view.nbytes for view in views)
        cipher = AESGCM(self._derived("weight", item))
        for chunk, data in enumerate(_chunks(views)):
            file.write(cipher.encrypt(chunk.to_bytes(12, "big"), data, self._place(item, chunk, size)))
        return size

    def unseal(self, file: BinaryIO, item: int, size: int) -> bytearray | None:
        """The components again; None when any bit is not what was written for this weight, model and party."""
        cipher, found = AESGCM(self._derived("weight", item)), bytearray(size)
        for chunk in range(_chunk_count(size)):
            start = chunk * _CHUNK_BYTES
            end = min(size, start + _CHUNK_BYTES)
            try:
                data = file.read(end - start + _TAG_BYTES)
                piece = cipher.decrypt(chunk.to_bytes(12, "big"), data, self._place(item, chunk, size))
            except (InvalidTag, ValueError):
                return None
            found[start:end] = piece
        return None if file.read(1) else found

    def _place(self, item: int, chunk: int, size: int) -> bytes:
        """What a chunk is authenticated with, so that no other is taken for it."""
        return canonical([_LABEL, *self._model, item, chunk, _chunk_count(size), size])

    def tag(self, text: bytes) -> bytes:
        """Of a manifest's text: hex HMAC-SHA256."""
        return hmac.new(self._derived("manifest"), text, hashlib.sha256).hexdigest().encode()


# ---- files --------------------------------------------------------------------------------------------------------


def _chunk_count(size: int) -> int:
    return max(1, -(-size // _CHUNK_BYTES))


def _chunks(views: Sequence[memoryview]) -> Iterator[Buffer]:
    """Pieces of _CHUNK_BYTES of all views together; without a copy inside a view."""
    if sum(view.nbytes for view in views) == 0:
        yield b""
    held = bytearray()
    for view in views:
        at = 0
        while at < view.nbytes:
            step = min(_CHUNK_BYTES - len(held), view.nbytes - at)
            if not held and step == _CHUNK_BYTES:
                yield view[at : at + step]
            else:
                held += view[at : at + step]
                if len(held) == _CHUNK_BYTES:
                    yield bytes(held)
                    held.clear()
            at += step
    if held:
        yield bytes(held)


def private(path: str, flags: int) -> int:
    """An opener of files that only this user reads."""
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block ends."""
    with open(path, "xb", opener=private) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_held(lock: Path) -> bool:
    """Whether a living process writes this draft."""
    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def on_disk(party: int, name: str, what: str) -> Iterator[None]:
    """Errors of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        model = f" the model {name!r}" if name else " its store"
        if error.errno in _FULL:
            raise JobError(
                f"party {party} has no room on its disk for{model}; its operator must free some"
            ) from None
        raise JobError(
            f"party {party} could not {what}{model} ({error.strerror}); its operator must look at its store"
        ) from None
