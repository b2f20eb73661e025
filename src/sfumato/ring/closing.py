"""The two sides of a truncation's closing step on ring words: the wrap judged, and the quotient less its wraps.

Words hold k bits, sign-extended, in int32 or int64; results have their own dtype, the ring's that the value goes to.
What a, b, p and the dealt words are: docs/security/rep3.md, "close".
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.ring import native

__all__ = ["judge", "rounded_down", "rounded_up", "shorten"]


def judge(words: Tensor, k: int, bits: int) -> Tensor:
    """a + 2p of role 0: a = [u0 outside [-L/4, L/4)], p = [u0 >= L/4]; u0 less one when it will be rounded up."""
    done = native.judge(words, k, bits)
    return _judge(words, k, bits) if done is None else done


def _judge(words: Tensor, k: int, bits: int) -> Tensor:
    # ceil(u / 2^f) = floor((u - 1) / 2^f) + 1, with the 1 taken off before the wrap is judged. The least word of a
    # width that is no dtype's goes below its range by that; it counts as outside like its neighbours.
    top = (words - 1 if bits else words) >> (k - 2)
    p = (top == 1).to(torch.uint8)
    return (p | (top < -1).to(torch.uint8)) | p << 1


def _signs(both: Tensor, dtype: torch.dtype) -> Tensor:
    """(1 - 2a')(1 - 2b') = 1 - 2(a' xor b')."""
    return (1 - (both << 1).to(torch.int8)).to(dtype)


def rounded_up(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    judged: Tensor,
    both: Tensor,
    other: Tensor,
    dealt: Tensor,
) -> Tensor:
    """Role 0's quotient less w0 = p - (ab)_0 wraps. ``both``: a' xor b', ``other``: b', bits as bytes."""
    done = native.rounded_up(words, k, bits, dtype, judged, both, other, dealt)
    return _rounded_up(words, k, bits, dtype, judged, both, other, dealt) if done is None else done


def _rounded_up(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    judged: Tensor,
    both: Tensor,
    other: Tensor,
    dealt: Tensor,
) -> Tensor:
    wrap = ((judged >> 1).to(torch.int8) - (judged & other & 1).to(torch.int8)).to(dtype)
    wrap -= _signs(both, dtype).mul_(dealt)
    quotient = ((words - 1) >> bits if bits else words).to(dtype, copy=True)
    quotient -= wrap << (k - bits)
    return quotient.add_(1) if bits else quotient


def rounded_down(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    own: Tensor,
    other: Tensor,
    rb: Tensor,
    dealt: Tensor,
) -> Tensor:
    """Role 1's quotient plus (ab)_1 wraps. ``own``: b', ``other``: a', bits as bytes."""
    done = native.rounded_down(words, k, bits, dtype, own, other, rb, dealt)
    return _rounded_down(words, k, bits, dtype, own, other, rb, dealt) if done is None else done


def _rounded_down(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    own: Tensor,
    other: Tensor,
    rb: Tensor,
    dealt: Tensor,
) -> Tensor:
    product = (other & rb).to(torch.int8) * (1 - (own << 1).to(torch.int8))
    wrap = _signs(own ^ other, dtype).mul_(dealt).add_(product)
    return (words >> bits).to(dtype) + (wrap << (k - bits))


def shorten(words: Tensor, add: int, drop: int) -> Tensor:
    """(words + add) >> drop of int64 words, of which the low 32 bits are kept; any shape, int32."""
    if words.dim() > 1 and not words.is_contiguous() and words.mT.is_contiguous():
        return shorten(words.mT, add, drop).mT  # in the order of memory
    done = native.shorten(words, add, drop)
    return ((words + add if add else words) >> drop).to(torch.int32) if done is None else done
