"""Keyed streams: golden words, no reuse, independence of paths and pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.errors import ProtocolError
from sfumato.ring.prg import ALGORITHM, stream_words
from sfumato.session.drive import simulate, simulation_keys
from sfumato.session.randomness import PairStreams
from sfumato.session.session import Session
from sfumato.types import B8, Z32, Z64

KEY = bytes(range(32))
GOLDEN_Z64 = [680997607222991728, 5045375687354405307, 1019513348771524179, 446598371847714383]
GOLDEN_Z32 = [929749872, 158557111, -1020866117, 1174718068]
GOLDEN_B8 = [112, 219, 106, 55, 183, 99, 115, 9]


def test_golden_words() -> None:
    """A change of derivation, label format or byte order changes ALGORITHM and these words together."""
    assert ALGORITHM == "aes128ctr-blake2b-v1"
    assert stream_words(KEY, "/a/b|mask", Z64, (4,)).tolist() == GOLDEN_Z64
    assert stream_words(KEY, "/a/b|mask", Z32, (4,)).tolist() == GOLDEN_Z32
    assert stream_words(KEY, "/a/b|mask", B8, (2, 4)).reshape(-1).tolist() == GOLDEN_B8


def test_the_same_by_other_means() -> None:
    """AES-128-CTR from zero under BLAKE2b(label) keyed by the pair key, computed block by block."""
    import hashlib

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = hashlib.blake2b(b"/x|m", key=KEY, digest_size=16, person=b"sfumato-prg1").digest()
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(block.update(i.to_bytes(16, "big")) for i in range(8))
    assert stream_words(KEY, "/x|m", Z64, (16,)).numpy().tobytes() == stream


def test_long_streams_do_not_repeat_at_the_chunk() -> None:
    """The stream goes on over the buffer it is made with (1 MiB)."""
    words = stream_words(KEY, "long", Z64, (300_001,)).numpy()
    assert np.unique(words).size == words.size
    assert torch.equal(stream_words(KEY, "long", Z64, (5,)), torch.from_numpy(words[:5].copy()))


def test_shapes() -> None:
    assert stream_words(KEY, "s", Z64, ()).shape == ()
    assert stream_words(KEY, "s", Z32, (0, 3)).shape == (0, 3)
    meta = stream_words(KEY, "s", B8, (2, 3), "meta")
    assert (meta.device.type, meta.dtype, meta.shape) == ("meta", torch.uint8, (2, 3))


def test_words_are_uniform() -> None:
    words = stream_words(KEY, "uniform", Z64, (20_000,)).numpy().view(np.uint64)
    for bit in range(64):
        ones = int((words >> np.uint64(bit) & np.uint64(1)).sum())
        assert abs(ones - 10_000) < 6 * 20_000**0.5 / 2


def test_every_key_and_label_has_its_own_stream() -> None:
    other = bytes(31) + b"\1"
    streams = [
        stream_words(key, label, Z64, (64,))
        for key in (KEY, bytes(32), other)
        for label in ("/a|m", "/a|n", "/b|m", "/a/|m")
    ]
    words = torch.cat(streams).tolist()
    assert len(set(words)) == len(words)


def test_a_label_is_drawn_once() -> None:
    streams = PairStreams({1: KEY, 2: bytes(32)})
    first = streams.words(1, "/a|m", Z64, (3,))
    with pytest.raises(ProtocolError, match="drawn twice"):
        streams.words(1, "/a|m", Z64, (3,))
    with pytest.raises(ProtocolError, match="drawn twice"):
        streams.words(1, "/a|m", Z32, (1,))
    # Another peer is another key, and another stream.
    assert not torch.equal(first, streams.words(2, "/a|m", Z64, (3,)))


def test_a_pair_shares_its_stream_and_nobody_else_has_it() -> None:
    async def main(s: Session) -> dict[tuple[int, int], torch.Tensor]:
        pairs = [(0, 1), (0, 2), (1, 2)]
        return {pair: s.prg("m", pair, Z64, (8,)) for pair in pairs if s.party in pair}

    a, b, c = simulate(main)[0]
    assert torch.equal(a[0, 1], b[0, 1])
    assert torch.equal(a[0, 2], c[0, 2])
    assert torch.equal(b[1, 2], c[1, 2])
    words = torch.cat([a[0, 1], a[0, 2], b[1, 2]]).tolist()
    assert len(set(words)) == 24


def test_simulation_keys_agree_in_pairs_and_differ_between_seeds() -> None:
    keys = [simulation_keys(b"s", i) for i in range(3)]
    assert keys[0][1] == keys[1][0]
    assert len({keys[0][1], keys[0][2], keys[1][2], simulation_keys(b"t", 0)[1]}) == 4
