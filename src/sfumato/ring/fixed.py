"""Fixed point: reals to ring words and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ring import native
from sfumato.types import Ring

__all__ = ["decode", "encode", "encode_scalar"]

#: Elements encoded at a time: their float64 form stays in cache.
_CHUNK = 1 << 15


def encode(x: Tensor, ring: Ring, frac: int) -> Tensor:
    """Round ``x * 2^frac`` to the nearest word (ties to even), any shape.

    The product with a power of two is exact in float64 and the rounding is IEEE, so every machine gets the
    same words.

    Raises:
        RangeError: a value is not finite or does not fit below 2^(bits - 2), the range that truncation
            allows.
    """
    if x.device.type == "meta":
        return torch.empty(x.shape, dtype=ring.dtype, device="meta")
    x = x.detach()
    if x.dim() > 1 and not x.is_contiguous() and x.mT.is_contiguous():
        return encode(x.mT, ring, frac).mT
    done = native.encode(x, ring.dtype, 2.0**frac, 2.0 ** (ring.bits - 2))
    return _encode(x, ring, frac) if done is None else done


def _encode(x: Tensor, ring: Ring, frac: int) -> Tensor:
    """The words in torch, or the error."""
    words = torch.empty(x.shape, dtype=ring.dtype, device=x.device)
    source, target = x.reshape(-1), words.reshape(-1)
    limit = 2.0 ** (ring.bits - 2)
    for start in range(0, source.numel(), _CHUNK):
        scaled = source[start : start + _CHUNK].to(torch.float64, copy=True).mul_(2.0**frac).round_()
        low, high = torch.aminmax(scaled)
        if not (float(low) > -limit and float(high) < limit):  # neither holds for NaN
            raise RangeError(
                f"a value does not fit {ring} with {frac} fraction bits (finite, "
                f"|x| < 2^{ring.bits - 2 - frac}); "
                "use fewer fraction bits or rescale the model"
            )
        target[start : start + _CHUNK] = scaled
    return words


def encode_scalar(c: float, frac: int) -> int:
    """Round ``c * 2^frac`` to the nearest integer."""
    return int(np.rint(np.float64(c) * 2.0**frac))


def decode(words: Tensor, frac: int) -> Tensor:
    """Signed words to float64, any shape: ``words / 2^frac``."""
    return words.to(torch.float64) / 2.0**frac
