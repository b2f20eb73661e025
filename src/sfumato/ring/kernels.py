"""``torch.library`` ops on ring words: matmul and convolution mod 2^k, with fake versions for the meta
device.

Plain torch integer kernels are the reference; the CPU version is native where that was built and does the case. A CUDA
kernel registers itself for its device under the same names and nothing above this file changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ring import native

__all__ = ["conv", "logical_shift_right", "matmul"]

_FEW_ROWS, _LARGE = 256, 1 << 18


@torch.library.custom_op("ring::matmul", mutates_args=(), device_types="cpu")
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _product(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    done = native.matmul(a, b)
    return _multiply(a, b) if done is None else done


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product in torch."""
    if (
        a.dim() == b.dim() == 2
        and 1 < a.shape[0] <= _FEW_ROWS
        and b.numel() >= _LARGE
        and b.mT.is_contiguous()
    ):
        # torch repacks a transposed right operand anew for every few rows; as the left one it is read once.
        return torch.matmul(b.mT, a.mT).mT.contiguous()
    return torch.matmul(a, b)


@_matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@torch.library.custom_op("ring::conv", mutates_args=(), device_types="cpu")
def _conv(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    return _convolution(x, w, stride, padding, dilation, groups)


def _convolution(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    done = native.conv(x, w, stride, padding, dilation, groups)
    return _convolve(x, w, stride, padding, dilation, groups) if done is None else done


@_conv.register_fake
def _(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    return _convolve(x, w, stride, padding, dilation, groups)


def _convolve(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    if x.dtype == torch.int32 and any(d != 1 for d in dilation):
        # torch has no dilated int32 kernel; mod 2^64 reduces to mod 2^32.
        return _convolve(x.long(), w.long(), stride, padding, dilation, groups).int()
    return run(x, w, None, list(stride), list(padding), list(dilation), groups)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` mod 2^k, batched as in torch; int64 or int32, CPU or meta. (..., M, K) @ (..., K, N)."""
    if a.device.type == "meta":  # the fake version without the dispatcher's 200 us
        return torch.matmul(a, b)
    if type(a) is type(b) is Tensor and a.is_cpu and b.is_cpu:  # nor its 12 us
        return _product(a, b)
    return torch.ops.ring.matmul(a, b)


def conv(
    x: Tensor,
    w: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolution mod 2^k with 1 to 3 spatial axes. x (N, C, ...), w (O, C/groups, ...) -> (N, O, ...)."""
    if x.device.type == "meta":
        return _convolve(x, w, stride, padding, dilation, groups)
    if type(x) is type(w) is Tensor and x.is_cpu and w.is_cpu:
        return _convolution(x, w, stride, padding, dilation, groups)
    return torch.ops.ring.conv(x, w, list(stride), list(padding), list(dilation), groups)


def logical_shift_right(words: Tensor, bits: int) -> Tensor:
    """Shift as unsigned words: zeros come in from the left."""
    if bits == 0:
        return words
    size = 64 if words.dtype == torch.int64 else 32
    return (words >> bits) & ((1 << (size - bits)) - 1)
