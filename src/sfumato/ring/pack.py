"""Fields of any width really packed on the wire.

A field of w bits travels as w // 8 byte planes followed by planes of 4, 2 and 1 bits for the rest, each plane
packed densely and padded to a byte. The size depends on count and width alone.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import LinkError
from sfumato.ring import native

__all__ = ["pack", "packed_bytes", "unpack"]


def _planes(bits: int) -> list[tuple[int, int]]:
    """(offset, width) of each plane, widths 64, 32, 16, 8, 4, 2, 1."""
    planes, offset = [], 0
    for width in (64, 32, 16, 8, 4, 2, 1):
        while bits - offset >= width:
            planes.append((offset, width))
            offset += width
    return planes


@lru_cache(maxsize=4096)
def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` fields of ``bits`` bits take."""
    return sum(-(-count * width // 8) for _, width in _planes(bits))


def pack(words: Tensor, bits: int) -> memoryview | bytes:
    """The low ``bits`` bits of each word (int64, int32, uint8 or bool; any shape, row-major) as bytes."""
    flat = words.reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    flat = flat.contiguous()
    if bits == flat.element_size() * 8:
        return flat.numpy().view(np.uint8).data
    done = native.pack(flat, bits, packed_bytes(flat.numel(), bits))
    return _pack(flat, bits) if done is None else done


def _pack(flat: Tensor, bits: int) -> memoryview:
    """Fields narrower than their words, in numpy."""
    array = flat.numpy()
    array = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    out = np.empty(packed_bytes(array.size, bits), np.uint8)
    at = 0
    for offset, width in _planes(bits):
        size = -(-array.size * width // 8)
        shifted = array >> array.dtype.type(offset) if offset else array
        if width >= 8:
            out[at : at + size] = shifted.astype(f"u{width // 8}").view(np.uint8)
        else:
            _pack_small(shifted, width, out[at : at + size])
        at += size
    return out.data


def _pack_small(field: np.ndarray, width: int, out: np.ndarray) -> None:
    small = (field & field.dtype.type((1 << width) - 1)).astype(np.uint8)
    if width == 1:
        out[:] = np.packbits(small, bitorder="little")
        return
    per = 8 // width
    if small.size % per:
        small = np.concatenate([small, np.zeros(-small.size % per, np.uint8)])
    out[:] = 0
    for i in range(per):
        out |= small[i::per] << np.uint8(i * width)


def unpack(
    data: bytes | bytearray | memoryview, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Inverse of :func:`pack`: words with the field in their low bits, zero above (full words keep their
    sign).

    Raises:
        LinkError: the number of bytes is not the one that shape and width ask for.
    """
    wanted = packed_bytes(math.prod(shape), bits)
    if len(data) != wanted:
        raise LinkError(
            f"a message of {len(data)} bytes where {wanted} were expected; the peer runs another program"
        )
    if bits == dtype.itemsize * 8:
        return torch.from_numpy(np.frombuffer(data, _signed(dtype)).copy()).reshape(shape)
    done = native.unpack(data, bits, shape, dtype)
    return _unpack(data, bits, shape, dtype) if done is None else done


def _signed(dtype: torch.dtype) -> str:
    return "u1" if dtype.itemsize == 1 else f"i{dtype.itemsize}"


def _unpack(
    data: bytes | bytearray | memoryview, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Fields narrower than their words, in numpy."""
    count, size, raw = math.prod(shape), dtype.itemsize, np.frombuffer(data, np.uint8)
    out = np.zeros(count, f"u{size}")
    at = 0
    for offset, width in _planes(bits):
        length = -(-count * width // 8)
        chunk = raw[at : at + length]
        at += length
        if width >= 8:
            field = np.ascontiguousarray(chunk).view(f"u{width // 8}").astype(out.dtype)
        elif width == 1:
            field = np.unpackbits(chunk, count=count, bitorder="little").astype(out.dtype)
        else:
            per = 8 // width
            wide = np.empty((length, per), np.uint8)
            for i in range(per):
                wide[:, i] = (chunk >> np.uint8(i * width)) & np.uint8((1 << width) - 1)
            field = wide.reshape(-1)[:count].astype(out.dtype)
        out |= field << out.dtype.type(offset) if offset else field
    return torch.from_numpy(out.view(_signed(dtype))).reshape(shape)
