"""Fields of any width: they come back, they take the bytes they should, and hostile sizes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import LinkError
from sfumato.ring.pack import pack, packed_bytes, unpack

DTYPES = {torch.int64: 64, torch.int32: 32, torch.uint8: 8}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)), count=st.integers(0, 40))
def test_round_trip(data: st.DataObject, dtype: torch.dtype, count: int) -> None:
    """The low bits survive with zeros above; a full word keeps its sign."""
    size = DTYPES[dtype]
    bits = data.draw(st.integers(1, size))
    low, high = (0, 255) if dtype == torch.uint8 else (-(1 << (size - 1)), (1 << (size - 1)) - 1)
    words = torch.tensor(
        data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), dtype=dtype
    )
    packed = pack(words, bits)
    assert len(packed) == packed_bytes(count, bits)
    expected = words if bits == size else words & ((1 << bits) - 1)
    assert torch.equal(unpack(packed, bits, (count,), dtype), expected)


@pytest.mark.parametrize(
    ("count", "bits", "size"),
    [(0, 18, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (4, 18, 9), (3, 64, 24), (5, 3, 3)],
)
def test_sizes(count: int, bits: int, size: int) -> None:
    assert packed_bytes(count, bits) == size


def test_no_more_than_seven_bits_a_plane_are_padding() -> None:
    for bits in range(1, 65):
        for count in (1, 7, 8, 100):
            assert 0 <= packed_bytes(count, bits) * 8 - count * bits <= 7 * 3


def test_any_shape_and_layout() -> None:
    words = torch.arange(24).reshape(2, 3, 4)
    for view in (
        words,
        words.permute(2, 0, 1),
        words[:, 1:2].expand(2, 5, 4),
        words[..., ::2],
        words[0, 0, 0],
    ):
        for bits in (5, 64):
            assert torch.equal(unpack(pack(view, bits), bits, tuple(view.shape), torch.int64), view)
    assert torch.equal(unpack(pack(words > 5, 1), 1, (2, 3, 4), torch.uint8), (words > 5).to(torch.uint8))


def test_the_result_is_ours() -> None:
    """Unpacked words are a copy: a later change of the buffer does not reach them."""
    buffer = bytearray(16)
    words = unpack(memoryview(buffer), 64, (2,), torch.int64)
    buffer[0] = 9
    words += 1
    assert words.tolist() == [1, 1]
    assert buffer[0] == 9


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 60), bits=st.integers(1, 64), count=st.integers(0, 20))
def test_a_wrong_size_is_refused(size: int, bits: int, count: int) -> None:
    data = bytes(size)
    if size == packed_bytes(count, bits):
        assert unpack(data, bits, (count,), torch.int64).shape == (count,)
        return
    with pytest.raises(LinkError, match=f"{size} bytes where {packed_bytes(count, bits)}"):
        unpack(data, bits, (count,), torch.int64)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(min_size=9, max_size=9))
def test_any_bytes_of_the_right_size_are_words(data: bytes) -> None:
    """Padding and field bits are free to a hostile sender: the words stay inside their width."""
    words = unpack(data, 18, (4,), torch.int64)
    assert bool(((words >= 0) & (words < 1 << 18)).all())
