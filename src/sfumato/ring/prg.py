"""Keyed streams: AES-128-CTR under a key derived for each (pair key, path, counter).

Every stream has its own AES key (BLAKE2b of the label under the pair key), so the counter block may start at
zero: no two streams share a key, and no stream is longer than 2^64 blocks. Source: design decision 002; FIPS
197, SP 800-38A.
"""

from __future__ import annotations

import hashlib

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from sfumato.types import Ring

__all__ = ["ALGORITHM", "stream_words"]

#: Algorithm id, compared in the handshake. Changing the derivation or the label format changes this string.
ALGORITHM = "aes128ctr-blake2b-v1"
_ZEROS = bytes(1 << 20)
_IV = bytes(16)


def stream_words(key: bytes, label: str, ring: Ring, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Uniform words of the ring, ``shape``, from the stream ``label`` under ``key`` (32 bytes).

    The same key and label give the same words on every machine (little-endian); the caller never uses a label
    twice.
    """
    if device == "meta":
        return torch.empty(shape, dtype=ring.dtype, device="meta")
    words = torch.empty(shape, dtype=ring.dtype)
    size = words.numel() * words.element_size()
    if size == 0:
        return words
    derived = hashlib.blake2b(label.encode(), key=key, digest_size=16, person=b"sfumato-prg1").digest()
    encryptor = Cipher(algorithms.AES(derived), modes.CTR(_IV)).encryptor()
    target = words.reshape(-1).numpy().data.cast("B")
    for start in range(0, size, len(_ZEROS)):
        piece = min(len(_ZEROS), size - start)
        encryptor.update_into(memoryview(_ZEROS)[:piece], target[start : start + piece])
    return words
