"""Point functions shared between two: keys that a client makes, and the words that each holder expands them to.

A pair of keys stands for one position among ``rows``. Either key expands to that many ring words and says nothing of
the position by itself; the words of both add up to 1 there and to 0 elsewhere. A binary tree of seeds with one
correction per level; a leaf of 128 bits holds two words of Z64 or four of Z32, so the tree ends early.

Source: [BGI16], figure 1 and section 3.2.3. The generator is AES-128 under three fixed keys (left, right, leaf), each
block xored with its argument, in the ideal-cipher model. Design: docs/design/012-look-up.md; format: docs/wire.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ring import native
from sfumato.types import Ring

__all__ = ["ALGORITHM", "expand", "key_bytes", "make_keys"]

#: Form of the keys and of what they expand to; travels with them. Changing either changes this string.
ALGORITHM = "dpf-aes128-v1"
_SEED, _LEVEL = 16, 17
#: Fixed cipher keys: left and right child, leaf.
_FIXED = [
    hashlib.blake2b(name, digest_size=16, person=b"sfumato-dpf1").digest() for name in (b"left", b"right", b"leaf")
]  # fmt: skip
_FIXED_BYTES = torch.frombuffer(bytearray(b"".join(_FIXED)), dtype=torch.uint8)
_LEFT, _RIGHT, _LEAF = range(3)
#: Leaves that are made at once in numpy: their seeds stay in the second cache.
_LEAVES_AT_ONCE = 1 << 15

Blocks = NDArray[np.uint64]  # (..., 2): 128 bits


def _tree(rows: int, ring: Ring) -> tuple[int, int, int]:
    """Words per leaf, leaves, levels above them."""
    words = 128 // ring.bits
    leaves = -(-rows // words)
    return words, leaves, (leaves - 1).bit_length()


def key_bytes(rows: int, ring: Ring) -> int:
    """Bytes of one key: a seed, 17 bytes a level, and a leaf's correction."""
    return 2 * _SEED + _LEVEL * _tree(rows, ring)[2]


# ---- the generator -------------------------------------------------------------------------------------------------


def _hashed(blocks: Blocks, which: int) -> Blocks:
    """AES of every block under a fixed key, xored with the block."""
    raw = np.ascontiguousarray(blocks)
    out = np.empty(raw.nbytes + _SEED, np.uint8)  # OpenSSL wants room for one block more
    cipher = Cipher(algorithms.AES(_FIXED[which]), modes.ECB()).encryptor()
    cipher.update_into(raw.reshape(-1).view(np.uint8).data, out.data)
    made = out[: raw.nbytes].view(np.uint64).reshape(raw.shape)
    made ^= raw
    return made


def _children(seeds: Blocks) -> tuple[Blocks, NDArray[np.uint64]]:
    """Seeds (..., 2 children, 2) and their control bits (..., 2 children): the lowest bit of each block, taken out."""
    both = np.stack([_hashed(seeds, _LEFT), _hashed(seeds, _RIGHT)], -2)
    controls = both[..., 0] & np.uint64(1)
    both[..., 0] ^= controls
    return both, controls


# ---- at the client -------------------------------------------------------------------------------------------------


def make_keys(
    positions: Tensor, rows: int, ring: Ring, *, draw: Callable[[int], bytes] = os.urandom
) -> tuple[Tensor, Tensor]:
    """A pair of keys for each of the positions (n,) int64: two (n, :func:`key_bytes`) uint8 tensors.

    ``draw`` gives uniform bytes, fresh for each call; tests fix it.

    Raises:
        RangeError: a position is not a row.
    """
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < rows:
        raise RangeError(f"a position to look up lies outside the {rows} rows of its table")
    words, _, levels = _tree(rows, ring)
    count = positions.numel()
    at = positions.reshape(-1).numpy().astype(np.int64)
    leaf, inside = at // words, at % words
    seeds = np.frombuffer(draw(2 * count * _SEED), np.uint64).reshape(2, count, 2).copy()
    keys = np.zeros((2, count, key_bytes(rows, ring)), np.uint8)
    keys[:, :, :_SEED] = seeds.view(np.uint8).reshape(2, count, _SEED)
    controls = np.repeat(np.array([[0], [1]], np.uint64), count, 1)  # (2 holders, count)
    each = np.arange(count)
    for level in range(levels):
        turn = (leaf >> (levels - 1 - level)) & 1  # 1: the path goes right
        children, bits = _children(seeds)  # (2, count, 2, 2), (2, count, 2)
        correction = children[0, each, 1 - turn] ^ children[1, each, 1 - turn]  # off the path both agree
        sides = bits[0] ^ bits[1]  # (count, 2): left, right
        sides[:, 0] ^= (1 - turn).astype(np.uint64)
        sides[:, 1] ^= turn.astype(np.uint64)
        start = _SEED + _LEVEL * level
        keys[:, :, start : start + _SEED] = correction.view(np.uint8).reshape(count, _SEED)
        keys[:, :, start + _SEED] = (sides[:, 0] | sides[:, 1] << np.uint64(1)).astype(np.uint8)
        kept, told = children[:, each, turn], bits[:, each, turn]
        seeds = kept ^ correction * controls[..., None]
        controls = told ^ controls * sides[each, turn]
    keys[:, :, -_SEED:] = _last_correction(seeds, controls, inside, ring)
    first, second = (torch.from_numpy(half) for half in keys)
    return first, second


def _last_correction(
    seeds: Blocks, controls: NDArray[np.uint64], inside: NDArray[np.int64], ring: Ring
) -> NDArray[np.uint8]:
    """What one holder adds to its leaf on the path, so that the two differ by a one in the right word."""
    dtype = np.dtype(f"u{ring.bits // 8}")
    count = len(inside)
    first, second = _hashed(seeds, _LEAF).view(dtype).reshape(2, count, -1)
    wanted = second - first
    wanted[np.arange(count), inside] += dtype.type(1)
    negative = controls[1].astype(bool)  # the second holder adds it, and its words count negatively
    wanted[negative] = np.zeros((), dtype) - wanted[negative]
    return wanted.view(np.uint8).reshape(count, _SEED)


# ---- at a party ----------------------------------------------------------------------------------------------------


def expand(keys: Tensor, rows: int, ring: Ring, *, first: bool) -> Tensor:
    """All words of each key (n, :func:`key_bytes`) uint8: (n, rows) of the ring. ``first``: whose keys they are.

    Any bytes of the right length expand to some words, in the same time.
    """
    _, leaves, levels = _tree(rows, ring)
    keys, out = keys.contiguous(), torch.empty((keys.shape[0], rows), dtype=ring.dtype)
    if not native.expand(keys, levels, leaves, _FIXED_BYTES, first, out):
        _expand(keys, levels, leaves, first, out)
    return out


def _expand(keys: Tensor, levels: int, leaves: int, first: bool, out: Tensor) -> None:
    """The same in numpy, a few keys at a time."""
    target, raw, rows = out.numpy(), keys.numpy(), out.shape[1]
    step = max(1, _LEAVES_AT_ONCE // leaves)
    for start in range(0, len(raw), step):
        some = raw[start : start + step]
        seeds, controls = _leaves(some, levels, leaves, first)
        words = _hashed(seeds, _LEAF).view(target.dtype).reshape(len(some), leaves, -1)
        fix = np.ascontiguousarray(some[:, -_SEED:]).view(target.dtype)[:, None]
        words += fix * controls[..., None].astype(target.dtype)
        flat = words.reshape(len(some), -1)[:, :rows]
        target[start : start + step] = flat if first else -flat


def _leaves(
    keys: NDArray[np.uint8], levels: int, leaves: int, first: bool
) -> tuple[Blocks, NDArray[np.uint64]]:
    """Seeds (n, leaves, 2) and control bits (n, leaves) at the end of the tree."""
    count = len(keys)
    seeds: Blocks = np.ascontiguousarray(keys[:, :_SEED]).view(np.uint64)[:, None]
    controls = np.full((count, 1), 0 if first else 1, np.uint64)
    for level in range(levels):
        start = _SEED + _LEVEL * level
        correction = np.ascontiguousarray(keys[:, start : start + _SEED]).view(np.uint64)
        sides = keys[:, start + _SEED, None] >> np.array([0, 1], np.uint8) & np.uint8(1)
        children, bits = _children(seeds)  # (n, m, 2, 2), (n, m, 2)
        children ^= correction[:, None, None] * controls[:, :, None, None]
        bits ^= sides[:, None].astype(np.uint64) * controls[:, :, None]
        kept = -(-leaves >> (levels - 1 - level))
        seeds = children.reshape(count, -1, 2)[:, :kept]
        controls = bits.reshape(count, -1)[:, :kept]
    return seeds, controls
