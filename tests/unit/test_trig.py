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
