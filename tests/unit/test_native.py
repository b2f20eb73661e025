"""Native kernels and their twins: the same bits, whatever the shape, the strides and the words."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import RangeError
from sfumato.ring import build, closing, fixed, kernels, native, pack, planes, trig
from sfumato.types import Z32, Z64, Ring

WORDS = [torch.int64, torch.int32]
NO_KERNELS = "no native kernels"

pytestmark = pytest.mark.skipif(not native.available(), reason=f"{NO_KERNELS}: {native.describe()}")


def words(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Uniform words, a third of them the extreme ones."""
    g = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    out = torch.randint(info.min, info.max, shape, dtype=dtype, generator=g)
    extremes = torch.tensor([info.min, info.max, -1 if info.min else 1, 0], dtype=dtype)
    chosen = extremes[torch.randint(0, 4, shape, generator=g)]
    return torch.where(torch.randint(0, 3, shape, generator=g) == 0, chosen, out)


def bits_of(shape: tuple[int, ...], seed: int, below: int = 2) -> Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@contextmanager
def at_most(level: int) -> Iterator[None]:
    """Kernels as on a lesser CPU: 0 the baseline, 1 AVX2, 2 AVX-512."""
    library = native._load()[0]
    assert library is not None
    library.sf_limit(level)
    try:
        yield
    finally:
        library.sf_limit(2)


@pytest.fixture(params=[0, 1, 2])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    with at_most(request.param):
        yield


@pytest.fixture(autouse=True)
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size are ours, not torch's."""
    monkeypatch.setattr(native, "_LEAST_PRODUCT", 0)


def same(got: Tensor | None, twin: Tensor) -> None:
    if got is None:  # this CPU has no native form of it
        pytest.skip(f"{NO_KERNELS} of this kind: {native.describe()}")
    assert got.dtype == twin.dtype
    assert torch.equal(got, twin)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("m", [1, 7, 16, 130])
@pytest.mark.parametrize("n", [1, 9, 48, 100, 410])
@pytest.mark.parametrize("k", [3, 64, 300])
def test_matmul(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """Every tail of rows, columns and depth, with plain and turned operands."""
    a, b = words((m, k), dtype), words((k, n), dtype, 1)
    twin = kernels._multiply(a, b)
    for left, right in itertools.product((a, a.mT.contiguous().mT), (b, b.mT.contiguous().mT)):
        done = native.matmul(left, right)
        if done is not None or dtype == torch.int64:  # few 32-bit rows are torch's
            same(done, twin)


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 20, 17), (3, 17, 19)),
        ((3, 20, 17), (17, 19)),
        ((20, 17), (3, 17, 19)),
        ((2, 1, 20, 17), (5, 17, 19)),
    ],
    ids=str,
)
def test_batches(dtype: torch.dtype, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = words(left, dtype), words(right, dtype, 1)
    same(native.matmul(a, b), torch.matmul(a, b))
    strided = words((*left, 2), dtype)[..., 1]
    same(native.matmul(strided, b), torch.matmul(strided.contiguous(), b))


CONVS = [
    # (images, channels, height, width), (outputs, tall, wide), stride, padding, dilation, groups
    ((1, 8, 9, 9), (8, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((2, 16, 32, 31), (70, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((3, 8, 14, 16), (9, 3, 3), (1, 1), (0, 2), (1, 1), 1),
    ((2, 32, 10, 25), (16, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    ((1, 300, 12, 12), (11, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    ((1, 80, 9, 9), (130, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    ((2, 5, 12, 13), (7, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    ((2, 5, 12, 13), (7, 3, 2), (3, 2), (1, 0), (2, 1), 1),
    ((1, 24, 16, 16), (17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    ((1, 24, 15, 9), (17, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((1, 6, 9, 9), (6, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    ((1, 4, 5, 5), (3, 5, 5), (1, 1), (0, 0), (1, 1), 1),
    ((2, 6, 20), (5, 3), (2,), (1,), (1,), 1),
    ((1, 6, 20), (6, 5), (1,), (2,), (2,), 2),
]


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation", "groups"), CONVS, ids=str)
def test_conv(
    dtype: torch.dtype,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> None:
    x, w = words(size, dtype), words((kernel[0], size[1] // groups, *kernel[1:]), dtype, 1)
    options = (stride, padding, dilation, groups)
    twin = kernels._convolve(x, w, *options)
    same(native.conv(x, w, *options), twin)
    same(native.conv(x.mT.contiguous().mT, w, *options), twin)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([*WORDS, torch.uint8]), seed=st.integers(0, 1 << 20))
def test_fields(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    """Fields of every width, there and back."""
    bits = data.draw(st.integers(1, dtype.itemsize * 8 - 1))
    count = data.draw(st.sampled_from([0, 1, 7, 8, 9, 65, 2047, 2048, 2049, 5001]))
    flat = words((count,), dtype, seed)
    with at_most(data.draw(st.integers(0, 2))):
        packed = native.pack(flat, bits, pack.packed_bytes(count, bits))
        assert packed is not None
        assert bytes(packed) == bytes(pack._pack(flat, bits))
        same(native.unpack(packed, bits, (count,), dtype), pack._unpack(packed, bits, (count,), dtype))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(WORDS), seed=st.integers(0, 1 << 20))
def test_planes(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    top = dtype.itemsize * 8
    shift = data.draw(st.integers(0, top - 1))
    bits = data.draw(st.integers(1, top - shift))
    count = data.draw(st.sampled_from([0, 1, 7, 8, 9, 63, 65, 2049, 4100]))
    flat = words((count,), dtype, seed)
    twin = planes._to_planes(flat, bits, shift)
    with at_most(data.draw(st.integers(0, 2))):
        same(native.planes(flat, bits, shift), twin)
        same(native.from_plane(twin[0], (count,), dtype), planes._from_plane(twin[0], (count,), dtype))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
@pytest.mark.parametrize("real", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("frac", [0, 13, 28])
def test_encode(ring: Ring, real: torch.dtype, frac: int) -> None:
    """Halves, neighbours of halves and of 2^52, the ends of the range; what does not fit is left to the twin."""
    top = 2.0 ** (ring.bits - 2)
    odd = torch.arange(-9, 10, dtype=torch.float64) / 2
    ends = torch.tensor(
        [2.0**51 + 0.5, 2.0**52 - 0.5, 2.0**52 + 1, 2.0**53 + 2, 2.0**61, top * (1 - 2.0**-24)]
    )
    near = torch.cat(
        [torch.nextafter(odd, odd + 1), torch.nextafter(odd, odd - 1), ends.double(), -ends.double()]
    )
    drawn = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2.0**20
    scaled = torch.cat([odd, near, drawn, torch.tensor([0.0, -0.0])]).to(torch.float64)
    x = (scaled[scaled.abs() < top - 1] / 2.0**frac).to(real)
    same(native.encode(x, ring.dtype, 2.0**frac, top), fixed._encode(x, ring, frac))
    for bad in (top, -top, math.inf, -math.inf, math.nan):
        x[7] = bad / 2.0**frac
        assert native.encode(x, ring.dtype, 2.0**frac, top) is None
        with pytest.raises(RangeError):
            fixed.encode(x, ring, frac)


@pytest.mark.parametrize(("source", "dtype"), list(itertools.product(WORDS, WORDS)), ids=str)
@pytest.mark.parametrize(
    ("k", "bits"), [(64, 0), (64, 18), (62, 40), (48, 20), (32, 0), (32, 13), (20, 7), (8, 3)]
)
@pytest.mark.usefixtures("level")
def test_closing(source: torch.dtype, dtype: torch.dtype, k: int, bits: int) -> None:
    """Words at the ends of k bits included; dealt words of the result's width."""
    if k > source.itemsize * 8 or k - bits >= dtype.itemsize * 8:
        return
    spare = source.itemsize * 8 - k
    flat = words((5, 413), source) << spare >> spare
    judged = closing._judge(flat, k, bits)
    same(native.judge(flat, k, bits), judged)
    one, two, three = (bits_of((5, 413), seed) for seed in range(3))
    dealt = words((5, 413), dtype, 2)
    up = (flat, k, bits, dtype, judged, one, two, dealt)
    same(native.rounded_up(*up), closing._rounded_up(*up))
    down = (flat, k, bits, dtype, one, two, three, dealt)
    same(native.rounded_down(*down), closing._rounded_down(*down))


@pytest.mark.parametrize("k", [20, 32, 47, 62])
def test_the_least_word_wraps_like_its_neighbours(k: int) -> None:
    """Less one it leaves its k bits; the wrap is still told: quotients add up for any split of a small value."""
    least, bits = -(1 << (k - 1)), 5
    u0 = torch.tensor([least, least + 1, least + 2, (1 << (k - 1)) - 1])
    u1 = torch.tensor([(1 << (k - 1)) - 4, -least - 1, -least - 2, least + 8])
    zeros, half = torch.zeros(4, dtype=torch.uint8), 1 << (k - 1)
    for run in (closing.judge, closing._judge):
        judged = run(u0, k, bits)
        a, b = judged & 1, (u1 < 0).to(torch.uint8)
        zero = torch.zeros(4, dtype=torch.int64)
        up = closing.rounded_up(u0, k, bits, torch.int64, judged, zeros, zeros, zero)
        down = closing.rounded_down(u1, k, bits, torch.int64, zeros, zeros, zeros, zero)
        total = up + down + ((a & b).to(torch.int64) << (k - bits))
        value = (u0 + u1 + half) % (2 * half) - half
        assert ((total << bits) - value).abs().max() < 1 << bits


@pytest.mark.parametrize("dtype", WORDS, ids=str)
@pytest.mark.parametrize("period_bits", [12, 17, 31, 42, 50])
@pytest.mark.parametrize("count", [1, 2, 9, 33])
@pytest.mark.parametrize("n", [1, 8, 515])
@pytest.mark.usefixtures("level")
def test_harmonics(dtype: torch.dtype, period_bits: int, count: int, n: int) -> None:
    mask = words((n,), torch.int64)
    phase, table = trig._phase(period_bits), trig._table()
    for frac in (12, 30):
        twin = trig._dealt(mask, period_bits, count, frac, dtype)
        same(native.dealt(mask, phase, *table, count, 30 - frac, dtype), twin)
    g = torch.Generator().manual_seed(2)
    cos, sin = (torch.randint(-(1 << 30), 1 << 30, (count,), generator=g).tolist() for _ in range(2))
    dealt = words((2 * count, n), dtype, 3)
    for drop in (30, 45):
        twin = trig._weighted(mask, period_bits, dealt, cos, sin, drop)
        same(native.weighted(mask, phase, *table, dealt, cos, sin, drop), twin)


def test_other_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that was made from other sources is not used; one that is missing is no fault."""
    sources, library = tmp_path / "csrc", tmp_path / build.LIBRARY.name
    shutil.copytree(build._SOURCES, sources)
    shutil.copy(build.LIBRARY, library)
    monkeypatch.setattr(build, "_SOURCES", sources)
    monkeypatch.setattr(build, "LIBRARY", library)
    load = native._load.__wrapped__
    assert load()[0] is not None
    (sources / "words.c").write_text("/* changed */")
    refused, why = load()
    assert refused is None
    assert "other sources" in why
    library.unlink()
    assert "not built" in load()[1]
    monkeypatch.setenv("SFUMATO_NATIVE", "0")
    assert "off" in load()[1]


def test_no_compiler_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LIBRARY", tmp_path / build.LIBRARY.name)
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "no C compiler" in (build.build() or "")
    monkeypatch.setenv("CC", "false")
    assert "failed" in (build.build() or "")
    assert list(tmp_path.iterdir()) == []
