"""Ring kernels: registered as they should be, exact against float64, wrapping mod 2^k, and the same on
shapes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.ring import kernels

DTYPES = [torch.int64, torch.int32]
MATMULS = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)),
    ((4,), (4,)),
    ((0, 4), (4, 5)),
    ((3, 0), (0, 5)),
]
CONVS = [
    (spatial, stride, padding, dilation, groups)
    for spatial in (1, 2)
    for stride, padding, dilation, groups in itertools.product((1, 2), (0, 1), (1, 2), (1, 2))
]


def words(shape: tuple[int, ...], dtype: torch.dtype, bound: int | None = None, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    low, high = (-bound, bound) if bound else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return torch.randint(low, high, shape, dtype=dtype, generator=g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", MATMULS, ids=str)
def test_matmul(dtype: torch.dtype, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = words(shapes[0], dtype, 1000), words(shapes[1], dtype, 1000, 1)
    result = kernels.matmul(a, b)
    assert result.dtype == dtype
    assert torch.equal(result.double(), torch.matmul(a.double(), b.double()))
    fake = kernels.matmul(a.to("meta"), b.to("meta"))
    assert (fake.shape, fake.dtype) == (result.shape, result.dtype)


def test_matmul_wraps() -> None:
    for dtype, bits in ((torch.int64, 64), (torch.int32, 32)):
        a, b = words((3, 6), dtype), words((6, 2), dtype, seed=1)
        exact = [[sum(int(x) * int(y) for x, y in zip(row, col, strict=True)) for col in b.T] for row in a]
        wrapped = [[(v + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1)) for v in row] for row in exact]
        assert kernels.matmul(a, b).tolist() == wrapped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spatial", "stride", "padding", "dilation", "groups"), CONVS)
def test_conv(
    dtype: torch.dtype, spatial: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    x = words((2, 4, *(9, 8)[:spatial]), dtype, 100)
    w = words((6, 4 // groups, *(3, 2)[:spatial]), dtype, 100, 1)
    options = {
        "stride": [stride] * spatial, "padding": [padding] * spatial, "dilation": [dilation] * spatial,
        "groups": groups
    }  # fmt: skip
    result = kernels.conv(x, w, **options)
    exact = {1: F.conv1d, 2: F.conv2d}[spatial](x.double(), w.double(), None, **options)
    assert result.dtype == dtype
    assert torch.equal(result.double(), exact)
    fake = kernels.conv(x.to("meta"), w.to("meta"), **options)
    assert (fake.shape, fake.dtype) == (result.shape, result.dtype)


@pytest.mark.parametrize("dilation", [1, 2])
def test_conv_wraps_alike_in_both_rings(dilation: int) -> None:
    """Full-size words: Z32 is Z64 reduced, and a delta kernel gives its input back."""
    x, w = words((1, 2, 6, 6), torch.int64), words((3, 2, 2, 2), torch.int64, seed=1)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (dilation, dilation), "groups": 1}
    wide = kernels.conv(x, w, **options)
    assert torch.equal(kernels.conv(x.int(), w.int(), **options), wide.int())
    delta = torch.zeros(2, 1, 1, 1, dtype=torch.int64) - 1
    same = kernels.conv(x, delta, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=2)
    assert torch.equal(same, -x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    a, b = words((3, 4), dtype), words((4, 5), dtype)
    torch.library.opcheck(torch.ops.ring.matmul.default, (a, b))
    x, w = words((1, 4, 7, 7), dtype), words((6, 2, 3, 3), dtype)
    torch.library.opcheck(torch.ops.ring.conv.default, (x, w, [2, 1], [1, 0], [1, 2], 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logical_shift(dtype: torch.dtype) -> None:
    size = torch.iinfo(dtype).bits
    values = torch.tensor([-1, 0, 1, torch.iinfo(dtype).min], dtype=dtype)
    for bits in (0, 1, size - 1):
        expected = [(int(v) % (1 << size)) >> bits for v in values]
        got = [int(v) % (1 << size) for v in kernels.logical_shift_right(values, bits)]
        assert got == expected
