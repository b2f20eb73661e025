"""Words as packed bit planes and back: plane j holds bit j of every word, eight elements a byte, bit 0 first."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sfumato.ring import native

__all__ = ["from_plane", "to_planes"]


def to_planes(words: Tensor, bits: int, shift: int = 0) -> Tensor:
    """Bits shift..shift+bits-1 of every word as packed planes; words (any shape, n elements, sign-extended)
    -> (bits, ceil(n / 8)) uint8. Padding bits are zero.
    """
    size = -(-words.numel() // 8)
    if words.device.type == "meta":
        return torch.empty((bits, size), dtype=torch.uint8, device="meta")
    done = native.planes(words, bits, shift)
    return _to_planes(words, bits, shift) if done is None else done


def _to_planes(words: Tensor, bits: int, shift: int) -> Tensor:
    """The planes in numpy."""
    size = -(-words.numel() // 8)
    flat = words.reshape(-1).contiguous().numpy()
    out = np.empty((bits, size), np.uint8)
    for start in range(0, bits, 8):
        group = (flat >> (shift + start)).astype(np.uint8)
        for j in range(start, min(start + 8, bits)):
            out[j] = np.packbits(group & np.uint8(1 << (j - start)) != 0, bitorder="little")
    return torch.from_numpy(out)


def from_plane(plane: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One packed plane as 0/1 words of ``shape``."""
    if plane.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    done = native.from_plane(plane, shape, dtype)
    return _from_plane(plane, shape, dtype) if done is None else done


def _from_plane(plane: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The words in numpy."""
    bits = np.unpackbits(plane.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).reshape(shape).to(dtype)
