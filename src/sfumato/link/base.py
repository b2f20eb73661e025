"""What a driver needs from a channel between parties: frames by tag, flush, bounded waits, abort."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from sfumato.errors import LinkError

__all__ = ["CLIENT", "Frame", "Link", "Payload", "PeerAbort", "peer_name", "public_text", "tag_of"]

Payload = bytes | bytearray | memoryview

CLIENT = 255
"""The peer number of the client on a link between a client and a party."""

_MAX_TEXT = 400


class Frame(NamedTuple):
    """One message: its name, the dtype code of its words, the sender's round count, and the bytes."""

    tag: bytes
    dtype: int
    clock: Any
    payload: Payload

    @property
    def nbytes(self) -> int:
        """Payload length in bytes."""
        return self.payload.nbytes if isinstance(self.payload, memoryview) else len(self.payload)

    def __repr__(self) -> str:
        return f"Frame({self.tag.hex()}, dtype {self.dtype}, clock {self.clock}, {self.nbytes} bytes)"


class PeerAbort(LinkError):
    """A peer ended the run and said why. ``reason`` is its public sentence, ``kind`` its error class,
    ``origin`` who failed."""

    def __init__(self, message: str, *, reason: str, kind: str = "LinkError", origin: int = -1) -> None:
        super().__init__(message)
        self.reason = reason
        self.kind = kind
        self.origin = origin


def peer_name(index: int) -> str:
    """``party 1``, or ``client``: how errors and logs call a peer."""
    return "client" if index == CLIENT else f"party {index}"


def public_text(text: str) -> str:
    """One short printable line: what may be shown of a sentence that came from a peer or from an
    exception."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _MAX_TEXT else line[: _MAX_TEXT - 3] + "..."


def tag_of(path: str, counter: int = 0) -> bytes:
    """The 8-byte name of message ``counter`` of ``path``."""
    return hashlib.blake2b(f"{path}\x00{counter}".encode(), digest_size=8).digest()


class Link(ABC):
    """One party's view of its channels to the others.

    One thread drives a link (``send``, ``flush``, ``take``, ``wait``); ``abort`` and ``close`` may come from
    any thread. A payload that was sent must not be changed until the link is closed: large ones are not
    copied.
    """

    party: int

    @abstractmethod
    def send(self, to: int, frame: Frame) -> None:
        """Queue ``frame`` for party ``to``; never blocks on the peer.

        Raises ``LinkError`` when there is no such peer, the frame is over the bound, or the channel has
        failed.
        """

    @abstractmethod
    def flush(self) -> None:
        """Everything queued leaves, coalesced. Blocks only above the bound on unsent bytes, and then not for
        ever."""

    @abstractmethod
    def take(self, frm: int, tag: bytes) -> Frame | None:
        """The oldest unclaimed frame named ``tag`` from ``frm``, removed, or None. Never blocks."""

    @abstractmethod
    def wait(self, wanted: Sequence[tuple[int, bytes, str]], timeout_s: float) -> None:
        """Return when at least one of ``wanted`` (peer, tag, path) can be taken.

        Raises ``LinkError`` naming the peer and the path after ``timeout_s``, and at once when a peer of this
        link was lost, sent a bad frame, or aborted (``PeerAbort``), also when another peer is the one waited
        for.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Tell every peer why the run ends (one public sentence, no values), then close. Never raises,
        bounded time."""

    @abstractmethod
    def close(self) -> None:
        """Say goodbye and let go. Peers may still take what was sent before. Never raises; may be called
        twice."""

    def settle(self, timeout_s: float) -> None:  # noqa: B027 - channels that send at once have nothing to wait for
        """Wait until what was flushed has left this process, at most ``timeout_s``. Never raises."""

    def wire_bytes(self) -> int:
        """Bytes that left for all peers so far, framing and encryption included; -1 where nobody counts them."""
        return -1

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
