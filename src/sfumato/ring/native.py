"""The native kernels, where they were built: loaded once, refused if they are not of this version's sources.

Every function but two returns None (``expand``: False) when the library is not there or does not do the case; its
caller has a twin in torch or numpy then, with the same bits. ``SFUMATO_NATIVE=0`` turns the library off. Calls release
the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sfumato.ring import build

__all__ = [
    "available",
    "chosen",
    "conv",
    "dealt",
    "describe",
    "encode",
    "expand",
    "from_plane",
    "judge",
    "matmul",
    "pack",
    "planes",
    "powers",
    "rounded_down",
    "rounded_up",
    "shorten",
    "unpack",
    "weighted",
]

_LEVELS = ("baseline", "AVX2", "AVX-512")
#: AVX-512, which products and convolutions are written for.
_WIDE = 2
_WORDS = {torch.int64: 64, torch.int32: 32}
_REALS = {torch.float64: 64, torch.float32: 32}
_FIELDS = {torch.int64: 64, torch.int32: 32, torch.uint8: 8}
#: Multiplications below which torch's overhead is no larger than ours.
_LEAST_PRODUCT = 1 << 17
_FEW = 16


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library or None, and a line for reports."""
    if os.environ.get("SFUMATO_NATIVE") == "0":
        return None, "native kernels: off (SFUMATO_NATIVE=0)"
    if sys.byteorder != "little":
        return None, "native kernels: for little-endian machines only"
    if not build.LIBRARY.exists():
        return None, "native kernels: not built (python -m sfumato.ring.build)"
    try:
        library = ctypes.CDLL(str(build.LIBRARY))
        library.sf_digest.restype = ctypes.c_char_p
        made_from = library.sf_digest().decode()
    except (OSError, AttributeError) as problem:
        return None, f"native kernels: not usable ({problem})"
    if made_from != build.digest():
        return None, "native kernels: of other sources, not used (python -m sfumato.ring.build)"
    _declare(library)
    return library, f"native kernels: {made_from}, {_LEVELS[library.sf_level()]}"


def _declare(library: ctypes.CDLL) -> None:
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "d": ctypes.c_double}
    for name, letters in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:  # products, where they cannot be built
            continue
        function.argtypes = [kinds[letter] for letter in letters]
        function.restype = ctypes.c_int if name.startswith(("sf_gemm", "sf_conv", "sf_dpf")) else None


#: Arguments of each function, a letter each: p a pointer, l a long, i an int, d a double.
_SIGNATURES = {
    "sf_limit": "i",
    **{f"sf_gemm_{bits}": "llllplllplllp" for bits in (64, 32)},
    **{f"sf_conv_{bits}": "pppp" for bits in (64, 32)},
    **{f"sf_pack_{bits}": "plip" for bits in (64, 32, 8)},
    **{f"sf_unpack_{bits}": "plip" for bits in (64, 32, 8)},
    **{f"sf_planes_{bits}": "pliilp" for bits in (64, 32)},
    **{f"sf_from_plane_{bits}": "plp" for bits in (64, 32)},
    **{f"sf_encode_{a}_{b}": "plddpp" for a in (64, 32) for b in (64, 32)},
    **{f"sf_judge_{bits}": "pliip" for bits in (64, 32)},
    **{
        f"sf_rounded_{way}_{a}_{b}": "pliippppp" for way in ("up", "down") for a in (64, 32) for b in (64, 32)
    },
    **{f"sf_dealt_{bits}": "plppplip" for bits in (64, 32)},
    **{f"sf_weighted_{bits}": "plppppl" + "ppip" for bits in (64, 32)},
    "sf_powers": "plipilpp",
    "sf_shorten": "pllip",
    "sf_dpf": "pllllipip",
    **{f"sf_chosen_{bits}": "pliippp" for bits in (64, 32)},
}


def available() -> bool:
    """Whether the library is there and in use."""
    return _load()[0] is not None


def describe() -> str:
    """One line for reports: what was built and for which instructions, or why there is none."""
    return _load()[1]


def _library(*words: Tensor) -> ctypes.CDLL | None:
    """The library, if these tensors lie where it can read them."""
    for word in words:
        if type(word) is not Tensor or not word.is_cpu:
            return None
    return _load()[0]


def _wide(*words: Tensor) -> ctypes.CDLL | None:
    library = _library(*words)
    if library is None or library.sf_level() != _WIDE or not hasattr(library, "sf_gemm_64"):
        return None
    return library


def matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """``a @ b`` of int64 or int32 words, batched as in torch; operands may have any strides."""
    library = _wide(a, b)
    if library is None or a.dtype != b.dtype or a.dtype not in _WORDS or min(a.dim(), b.dim()) < 2:
        return None
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if b.shape[-2] != k or m * n * k < _LEAST_PRODUCT:
        return None
    if (
        a.dtype == torch.int32
        and min(m, n) < _FEW
        and (m == 1 or n == 1 or (a.stride(-1) == b.stride(-2) == 1))
    ):
        return None  # torch's dot products
    if a.dim() == b.dim() == 2:
        batch, sides = 1, (0, *a.stride(), 0, *b.stride())
        out = torch.empty((m, n), dtype=a.dtype)
    else:
        each = a.shape[:-2]
        if each != b.shape[:-2]:
            each = torch.broadcast_shapes(each, b.shape[:-2])
        out = torch.empty((*each, m, n), dtype=a.dtype)
        if b.dim() == 2:  # one product with more rows
            a, b = a.reshape(1, -1, k), b.unsqueeze(0)
        else:
            a, b = a.expand(*each, m, k).reshape(-1, m, k), b.expand(*each, k, n).reshape(-1, k, n)
        batch, m, sides = a.shape[0], a.shape[1], (*a.stride(), *b.stride())
    run = getattr(library, f"sf_gemm_{_WORDS[a.dtype]}")
    done = run(batch, m, n, k, a.data_ptr(), *sides[:3], b.data_ptr(), *sides[3:], out.data_ptr())
    return out if done else None


def conv(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor | None:
    """The convolution of int64 or int32 words with one or two spatial axes."""
    library = _wide(x, w)
    if library is None or x.dtype != w.dtype or x.dtype not in _WORDS or x.dim() not in (3, 4):
        return None
    if w.dim() != x.dim() or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        return None  # torch says what is wrong
    flat = x.dim() == 3
    size, kernel = x.shape[2:], w.shape[2:]
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(len(size))
    ]
    if min(*out, *x.shape, *w.shape) < 1 or math.prod(out) * w.numel() < _LEAST_PRODUCT:
        return None
    result = torch.empty((x.shape[0], w.shape[0], *out), dtype=x.dtype)
    one, none = (1,) * flat, (0,) * flat
    shape = (
        *x.shape[:2], *one, *size, w.shape[0], *one, *kernel,
        *one, *stride, *none, *padding, *one, *dilation, groups, *one, *out
    )  # fmt: skip
    run = getattr(library, f"sf_conv_{_WORDS[x.dtype]}")
    x, w = x.contiguous(), w.contiguous()
    done = run((ctypes.c_long * len(shape))(*shape), x.data_ptr(), w.data_ptr(), result.data_ptr())
    return result if done else None


def pack(words: Tensor, bits: int, size: int) -> memoryview | None:
    """The fields of flat words (int64, int32, uint8; rows together) in ``size`` bytes."""
    library = _library(words)
    if library is None or not 0 < bits <= _FIELDS.get(words.dtype, 0):
        return None
    out = np.empty(size, np.uint8)
    getattr(library, f"sf_pack_{_FIELDS[words.dtype]}")(
        words.data_ptr(), words.numel(), bits, out.ctypes.data
    )
    return out.data


def unpack(
    data: bytes | bytearray | memoryview, bits: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """Words from fields; the caller has checked the number of bytes."""
    library = _library()
    if library is None or not 0 < bits <= _FIELDS.get(dtype, 0):
        return None
    raw, out = np.frombuffer(data, np.uint8), torch.empty(shape, dtype=dtype)
    getattr(library, f"sf_unpack_{_FIELDS[dtype]}")(raw.ctypes.data, out.numel(), bits, out.data_ptr())
    return out


def planes(words: Tensor, bits: int, shift: int) -> Tensor | None:
    """Packed bit planes of int64 or int32 words."""
    library = _library(words)
    if library is None or words.dtype not in _WORDS:
        return None
    words = words.contiguous()
    out = torch.empty((bits, -(-words.numel() // 8)), dtype=torch.uint8)
    run = getattr(library, f"sf_planes_{_WORDS[words.dtype]}")
    run(words.data_ptr(), words.numel(), bits, shift, out.shape[1], out.data_ptr())
    return out


def from_plane(plane: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """One packed plane as 0/1 words, int64 or int32."""
    library = _library(plane)
    out = torch.empty(shape, dtype=dtype)
    if (
        library is None
        or dtype not in _WORDS
        or plane.dtype != torch.uint8
        or plane.numel() * 8 < out.numel()
    ):
        return None
    plane = plane.contiguous()
    getattr(library, f"sf_from_plane_{_WORDS[dtype]}")(plane.data_ptr(), out.numel(), out.data_ptr())
    return out


def encode(x: Tensor, dtype: torch.dtype, factor: float, limit: float) -> Tensor | None:
    """round(x * factor) for a power of two; None, too, where one is not below ``limit`` in size."""
    library = _library(x)
    if library is None or x.dtype not in _REALS or dtype not in _WORDS:
        return None
    x, bad = x.contiguous(), ctypes.c_int()
    out = torch.empty(x.shape, dtype=dtype)
    run = getattr(library, f"sf_encode_{_REALS[x.dtype]}_{_WORDS[dtype]}")
    run(x.data_ptr(), x.numel(), factor, limit, out.data_ptr(), ctypes.addressof(bad))
    return None if bad.value else out


def judge(words: Tensor, k: int, bits: int) -> Tensor | None:
    """As :func:`sfumato.ring.closing.judge`."""
    library = _library(words)
    if library is None or words.dtype not in _WORDS:
        return None
    words = words.contiguous()
    out = torch.empty(words.shape, dtype=torch.uint8)
    run = getattr(library, f"sf_judge_{_WORDS[words.dtype]}")
    run(words.data_ptr(), words.numel(), k, bits, out.data_ptr())
    return out


def rounded_up(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    judged: Tensor,
    both: Tensor,
    other: Tensor,
    dealt: Tensor,
) -> Tensor | None:
    """As :func:`sfumato.ring.closing.rounded_up`."""
    return _rounded("up", words, k, bits, dtype, (judged, both, other), dealt)


def rounded_down(
    words: Tensor,
    k: int,
    bits: int,
    dtype: torch.dtype,
    own: Tensor,
    other: Tensor,
    rb: Tensor,
    dealt: Tensor,
) -> Tensor | None:
    """As :func:`sfumato.ring.closing.rounded_down`."""
    return _rounded("down", words, k, bits, dtype, (own, other, rb), dealt)


def _rounded(
    way: str, words: Tensor, k: int, bits: int, dtype: torch.dtype, taken: tuple[Tensor, ...], dealt: Tensor
) -> Tensor | None:
    library = _library(words, *taken, dealt)
    if library is None or words.dtype not in _WORDS or dtype not in _WORDS or dealt.dtype != dtype:
        return None
    if any(t.dtype != torch.uint8 or t.shape != words.shape for t in taken) or dealt.shape != words.shape:
        return None
    if not 0 <= k - bits < _WORDS[dtype]:
        return None
    words, dealt = words.contiguous(), dealt.contiguous()
    taken = tuple(t.contiguous() for t in taken)
    out = torch.empty(words.shape, dtype=dtype)
    run = getattr(library, f"sf_rounded_{way}_{_WORDS[words.dtype]}_{_WORDS[dtype]}")
    run(
        words.data_ptr(), words.numel(), k, bits, *(t.data_ptr() for t in taken), dealt.data_ptr(), out.data_ptr()
    )  # fmt: skip
    return out


def dealt(
    mask: Tensor,
    phase: Sequence[int],
    cosines: Tensor,
    sines: Tensor,
    count: int,
    drop: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """As :func:`sfumato.ring.trig.dealt`; ``phase``: how a word's phase splits, five numbers."""
    library = _library(mask)
    if library is None or mask.dtype != torch.int64 or dtype not in _WORDS:
        return None
    mask = mask.contiguous()
    out = torch.empty((2 * count, mask.numel()), dtype=dtype)
    getattr(library, f"sf_dealt_{_WORDS[dtype]}")(
        mask.data_ptr(), mask.numel(), (ctypes.c_long * 5)(*phase), cosines.data_ptr(), sines.data_ptr(),
        count, drop, out.data_ptr()
    )  # fmt: skip
    return out


def weighted(
    delta: Tensor, phase: Sequence[int], cosines: Tensor, sines: Tensor, table: Tensor,
    cos: Sequence[int], sin: Sequence[int], drop: int
) -> Tensor | None:  # fmt: skip
    """As :func:`sfumato.ring.trig.weighted`; ``phase`` as in :func:`dealt`."""
    library, count = _library(delta, table), len(cos)
    if library is None or delta.dtype != torch.int64 or table.dtype not in _WORDS:
        return None
    if tuple(table.shape) != (2 * count, delta.numel()):
        return None
    delta, table = delta.contiguous(), table.contiguous()
    out = torch.empty(delta.numel(), dtype=table.dtype)
    weights = ctypes.c_int64 * count
    getattr(library, f"sf_weighted_{_WORDS[table.dtype]}")(
        delta.data_ptr(), delta.numel(), (ctypes.c_long * 5)(*phase), cosines.data_ptr(), sines.data_ptr(),
        table.data_ptr(), count, weights(*cos), weights(*sin), drop, out.data_ptr()
    )  # fmt: skip
    return out


def powers(words: Tensor, digits: Sequence[int], blocks: int, scale: int, tables: Tensor) -> Tensor | None:
    """As :func:`sfumato.ring.powers.rows`, flat; ``digits``: widths; ``tables``: mantissas, then exponents, of each."""
    library = _library(words)
    if library is None or words.dtype != torch.int64:
        return None
    words = words.contiguous()
    out = torch.empty((1 << blocks, words.numel()), dtype=torch.int64)
    library.sf_powers(
        words.data_ptr(), words.numel(), len(digits), (ctypes.c_int * len(digits))(*digits), blocks, scale,
        tables.data_ptr(), out.data_ptr()
    )  # fmt: skip
    return out


def chosen(words: Tensor, block: int, spare: int, factor: Tensor, table: Tensor) -> Tensor | None:
    """As :func:`sfumato.ring.powers.chosen`; ``spare``: bits above the word."""
    library = _library(words, factor, table)
    if library is None or table.dtype not in _WORDS:
        return None
    words, factor, table = words.contiguous(), factor.contiguous(), table.contiguous()
    out = torch.empty(words.numel(), dtype=table.dtype)
    getattr(library, f"sf_chosen_{_WORDS[table.dtype]}")(
        words.data_ptr(), words.numel(), block, spare, factor.data_ptr(), table.data_ptr(), out.data_ptr()
    )
    return out


def shorten(words: Tensor, add: int, drop: int) -> Tensor | None:
    """As :func:`sfumato.ring.closing.shorten`."""
    library = _library(words)
    if library is None or words.dtype != torch.int64:
        return None
    words = words.contiguous()
    out = torch.empty(words.shape, dtype=torch.int32)
    library.sf_shorten(words.data_ptr(), words.numel(), add, drop, out.data_ptr())
    return out


def expand(keys: Tensor, levels: int, leaves: int, fixed: Tensor, first: bool, out: Tensor) -> bool:
    """As :func:`sfumato.ring.dpf.expand`, into ``out`` (n, rows); ``fixed``: the three cipher keys. False: not done."""
    library = _library(keys, fixed, out)
    if library is None or out.dtype not in _WORDS:
        return False
    done = library.sf_dpf(
        keys.data_ptr(), keys.shape[0], levels, leaves, out.shape[1], _WORDS[out.dtype], fixed.data_ptr(), int(first),
        out.data_ptr(),
    )  # fmt: skip
    return bool(done)
