"""Pair keys and the streams drawn from them: the only randomness that protocols use."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sfumato.errors import ProtocolError
from sfumato.ring.prg import stream_words
from sfumato.types import Ring

__all__ = ["PairStreams"]


class PairStreams:
    """Streams of one party, keyed by the 32-byte key it has with each peer. A label is drawn once, ever."""

    def __init__(self, keys: Mapping[int, bytes], device: str = "cpu") -> None:
        self._keys = dict(keys)
        self._used: set[tuple[int, str]] = set()
        self._device = device

    def words(self, peer: int, label: str, ring: Ring, shape: tuple[int, ...]) -> Tensor:
        """Uniform ring words that this party and ``peer`` alone know.

        Raises:
            ProtocolError: the label was drawn before; a stream used twice would mask two values alike.
        """
        if (peer, label) in self._used:
            raise ProtocolError(f"the stream {label!r} was drawn twice; every draw needs its own path")
        self._used.add((peer, label))
        return stream_words(self._keys[peer], label, ring, shape, self._device)
