"""Integer sines: the same words everywhere, and close to the real ones."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sfumato.ring import trig


def test_golden() -> None:
    """Bit-identical on every machine: one unit of difference between two parties would be a random word
    later.
    """
    words = torch.arange(-(1 << 15), 1 << 15) * 68719476731 + 12345
    digest = hashlib.blake2b(digest_size=8)
    for period_bits, count in ((12, 3), (22, 8), (31, 2), (50, 5)):
        for part in trig.harmonics(words, period_bits, count):
            digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == "c702326d608c3b74"
    assert trig.table_digest() == -1099511627776


@pytest.mark.parametrize("period_bits", [12, 16, 22, 36, 42, 43, 50])
@pytest.mark.parametrize("count", [1, 8, 40])
def test_error(period_bits: int, count: int) -> None:
    """Below 2^-23 up to the fortieth harmonic, over whole periods and far outside."""
    g = torch.Generator().manual_seed(1)
    words = torch.randint(-(1 << 62), 1 << 62, (4000,), generator=g)
    words = torch.cat([words, torch.arange(-600, 600), (1 << period_bits) - torch.arange(600)])
    cos, sin = trig.harmonics(words, period_bits, count)
    phase = (words & ((1 << period_bits) - 1)).double() * (2 * torch.pi / 2**period_bits)
    k = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    for got, exact in ((cos, torch.cos(k * phase)), (sin, torch.sin(k * phase))):
        assert got.shape == (count, words.numel())
        assert float((got.double() / 2.0**trig.SCALE_BITS - exact).abs().max()) < 2.0**-23


def test_exact_points() -> None:
    one = 1 << trig.SCALE_BITS
    cos, sin = trig.harmonics(torch.arange(4) << 20, 22, 1)
    assert cos[0].tolist() == [one, 0, -one, 0]
    assert sin[0].tolist() == [0, one, 0, -one]


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiled kernels where there are any, and the same in torch."""
    if request.param == "torch":
        monkeypatch.setattr(trig.native, "dealt", lambda *_: None)
        monkeypatch.setattr(trig.native, "weighted", lambda *_: None)
    return request.param


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("frac", [4, 11, 17, 30])
def test_dealt_sines_are_rounded_to_nearest(kernels: str, frac: int, dtype: torch.dtype) -> None:
    """Interleaved harmonics, half a unit and 2^-23 off at most; a mask of any length, none included."""
    mask = torch.arange(9001) * 2654435761 & ((1 << 26) - 1)
    found = trig.dealt(mask, 26, 3, frac, dtype)
    assert (found.dtype, found.shape) == (dtype, (6, 9001))
    phase = mask.double() * (2 * torch.pi / 2**26)
    for k in range(3):
        for row, exact in ((2 * k, torch.cos((k + 1) * phase)), (2 * k + 1, torch.sin((k + 1) * phase))):
            off = (found[row].double() - exact * 2.0**frac).abs()
            assert float(off.max()) <= 0.5 + 2.0 ** (frac - 23)
    assert trig.dealt(mask[:0], 26, 3, frac, dtype).shape == (6, 0)
    assert trig.dealt(mask.to("meta"), 26, 3, frac, dtype).device.type == "meta"


@pytest.mark.parametrize(("dtype", "bits"), [(torch.int64, 64), (torch.int32, 32)])
@pytest.mark.parametrize("frac", [4, 18, 30])
def test_weights_are_rounded_and_sums_wrap(kernels: str, frac: int, dtype: torch.dtype, bits: int) -> None:
    """The same words as big integers give, for coefficients at both ends and tables of any words."""
    unit = 1 << trig.COEFFICIENT_BITS
    cos, sin = [8 * unit - 1, -3, 0], [-8 * unit + 1, unit // 3, 0]
    delta = torch.cat([torch.arange(300) * 7919, torch.tensor([0, 1, (1 << 22) - 1])])
    g = torch.Generator().manual_seed(2)
    half = 1 << (bits - 1)
    table = torch.randint(-half, half - 1, (6, len(delta)), generator=g).to(dtype)
    found = trig.weighted(delta, 22, table, cos, sin, frac)
    waves = [part.tolist() for part in trig.harmonics(delta, 22, 3)]
    drop = trig.SCALE_BITS + trig.COEFFICIENT_BITS - frac
    for i in range(len(delta)):
        total = 0
        for k in range(3):
            c, s = waves[0][k][i], waves[1][k][i]
            a = (cos[k] * c + sin[k] * s + (1 << (drop - 1))) >> drop
            b = (sin[k] * c - cos[k] * s + (1 << (drop - 1))) >> drop
            total += a * int(table[2 * k, i]) + b * int(table[2 * k + 1, i])
        assert int(found[i]) == (total + half) % (2 * half) - half
    assert trig.weighted(delta[:0], 22, table[:, :0], cos, sin, frac).shape == (0,)


def test_only_the_phase_counts() -> None:
    """Bits above the period are ignored: an opening of period_bits bits is enough."""
    words = torch.arange(0, 1 << 14, 37)
    for a, b in zip(trig.harmonics(words, 14, 3), trig.harmonics(words - (1 << 40), 14, 3), strict=True):
        assert torch.equal(a, b)


def test_int32_words_and_shapes() -> None:
    words = torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4)
    for a, b in zip(trig.harmonics(words, 13, 2), trig.harmonics(words.long(), 13, 2), strict=True):
        assert torch.equal(a, b)
        assert a.shape == (2, 3, 4)
    for part in trig.harmonics(words.to("meta"), 13, 2):
        assert (part.device.type, part.shape, part.dtype) == ("meta", (2, 3, 4), torch.int64)
