"""Keyed streams: AES-128-CTR under a key derived for each (pair key, path, counter).

Every stream has its own AES key (BLAKE2b of the label under the pair key), so the counter block may start at
zero: no two streams share a key, and no stream is longer than 2^64 blocks. Source: design decision 002; FIPS
197, SP 800-38A.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from sfumato.types import Ring

__all__ = ["ALGORITHM", "stream_words"]

#: Algorithm id, compared in the handshake. Changing the derivation or the label format changes this string.
ALGORITHM = "aes128ctr-blake2b-v1"
_ZEROS = memoryview(bytes(1 << 20))
_MODE = modes.CTR(bytes(16))
#: Bytes of a stream that is made in one piece.
_SMALL = 1 << 14


def stream_words(key: bytes, label: str, ring: Ring, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Uniform words of the ring, ``shape``, from the stream ``label`` under ``key`` (32 bytes).

    The same key and label give the same words on every machine (little-endian); the caller never uses a label
    twice.
    """
    if device == "meta":
        return torch.empty(shape, dtype=ring.dtype, device="meta")
    count = math.prod(shape)
    size = count * ring.dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=ring.dtype)
    derived = hashlib.blake2b(label.encode(), key=key, digest_size=16, person=b"sfumato-prg1").digest()
    encryptor = Cipher(algorithms.AES(derived), _MODE).encryptor()
    if size <= _SMALL:  # numpy's way to a buffer is 2 us shorter
        small = np.empty(count, f"i{ring.dtype.itemsize}" if ring.dtype.is_signed else np.uint8)
        encryptor.update_into(_ZEROS[:size], small.data.cast("B"))
        return torch.from_numpy(small).view(shape)
    words = torch.empty(shape, dtype=ring.dtype)
    target = words.reshape(-1).numpy().data.cast("B")
    for start in range(0, size, len(_ZEROS)):
        piece = min(len(_ZEROS), size - start)
        encryptor.update_into(_ZEROS[:piece], target[start : start + piece])
    return words
