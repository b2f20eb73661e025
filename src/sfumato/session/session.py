"""One party's view of one joint run: where it is (path), what it draws (streams), how it talks."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.errors import LinkError, ProtocolError
from sfumato.link.base import Frame, Link
from sfumato.link.frames import PACKED
from sfumato.ring.pack import pack, packed_bytes, unpack
from sfumato.session.ledger import Clock, Ledger
from sfumato.session.randomness import PairStreams
from sfumato.types import Ring

__all__ = ["Branch", "Clock", "Gather", "Receive", "Send", "Session", "Wanted"]


class Send(NamedTuple):
    """A message to ``to``: the low ``bits`` bits of each word of ``words``. Its name is unique within the
    path.
    """

    to: int
    name: str
    words: Tensor
    bits: int


class Receive(NamedTuple):
    """A message expected from ``frm``: ``shape`` words of ``dtype`` with ``bits`` bits on the wire."""

    frm: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int


class Wanted(NamedTuple):
    """What a suspended task waits for; the driver answers with the frames in order."""

    frames: tuple[tuple[int, bytes, str], ...]


class Gather(NamedTuple):
    """Branches that a suspended task waits for; the driver answers with their results in order."""

    coroutines: tuple[Coroutine[Any, Any, Any], ...]


Branch = Callable[["Session"], Coroutine[Any, Any, Any]]


@types.coroutine
def _suspend(request: Wanted | Gather) -> Generator[Wanted | Gather, Any, Any]:
    return (yield request)


def _later(own: Clock, other: Clock, step: int = 0) -> Clock:
    """The later of two clocks, the other one moved on by ``step``."""
    if isinstance(own, tuple) and isinstance(other, tuple):
        return tuple(max(a, b + step) for a, b in zip(own, other, strict=True))
    assert isinstance(own, int)
    assert isinstance(other, int)
    return max(own, other + step)


@dataclass(slots=True)
class _Clock:
    """Depth of the message chain that the running branch has seen."""

    now: Clock = 0


class Session:
    """One party in one operation of one run.

    ``path`` names tags, streams and ledger rows. ``turn`` rotates the roles of a primitive: the party with
    index ``(role + turn) % 3`` plays ``role``.
    """

    __slots__ = (
        "_children",
        "_clock",
        "_link",
        "_row",
        "device",
        "ledger",
        "party",
        "path",
        "streams",
        "turn",
    )

    def __init__(
        self,
        party: int,
        link: Link,
        streams: PairStreams,
        ledger: Ledger,
        *,
        path: str = "",
        device: str = "cpu",
    ) -> None:
        self.party = party
        self.path = path
        self.turn = 0
        self.device = device
        self.ledger = ledger
        self.streams = streams
        self._link = link
        self._clock = _Clock()
        self._row = path
        self._children: set[str] = set()

    # ---- where we are --------------------------------------------------------------------------------------

    def fork(self, name: str, *, turn: int | None = None, row: bool = False) -> Session:
        """A child operation with its own tags and streams; ``row`` gives it its own ledger row.

        Raises:
            ProtocolError: the name was forked before under this path.
        """
        if name in self._children:
            raise ProtocolError(f"the path {self.path}/{name} was forked twice; its streams would repeat")
        self._children.add(name)
        child = Session.__new__(Session)
        child.party, child.device, child.ledger, child.streams = (
            self.party,
            self.device,
            self.ledger,
            self.streams,
        )
        child._link, child._clock, child._children = self._link, self._clock, set()
        child.path = f"{self.path}/{name}"
        child.turn = self.turn if turn is None else turn % 3
        child._row = child.path if row else self._row
        return child

    @property
    def role(self) -> int:
        """The role this party plays in the primitive at hand."""
        return (self.party - self.turn) % 3

    def at(self, role: int) -> int:
        """The party that plays ``role``."""
        return (role + self.turn) % 3

    @property
    def clock(self) -> Clock:
        """Rounds so far, as this branch has seen them."""
        return self._clock.now

    @clock.setter
    def clock(self, now: Clock) -> None:
        self._clock.now = now

    # ---- what we do ----------------------------------------------------------------------------------------

    async def gather(self, *branches: Branch) -> list[Any]:
        """Run branches so that their rounds overlap; results in order. Branch i gets the path ``#i``."""
        start = self._clock.now
        sessions, coroutines = [], []
        for i, branch in enumerate(branches):
            child = self.fork(f"#{i}")
            child._clock = _Clock(start)
            sessions.append(child)
            coroutines.append(branch(child))
        results: list[Any] = await _suspend(Gather(tuple(coroutines)))
        for child in sessions:
            self._clock.now = _later(self._clock.now, child._clock.now)
        return results

    async def exchange(self, sends: Sequence[Send] = (), receives: Sequence[Receive] = ()) -> list[Tensor]:
        """Send, then wait for the receives; the only I/O of a protocol.

        Raises:
            LinkError: a peer is gone, late, or sent another type or size than the program says.
        """
        meta = self.device == "meta"
        for message in sends:
            size = packed_bytes(message.words.numel(), message.bits)
            payload = b"" if meta else pack(message.words, message.bits)
            tag = self._tag(message.name)
            self._link.send(message.to, Frame(tag, PACKED + message.bits, self._clock.now, payload))
            self.ledger.sent(self._row, size, message.to, self._clock.now)
        if not receives:
            return []
        wanted = tuple((r.frm, self._tag(r.name), f"{self.path}:{r.name}") for r in receives)
        frames: list[Frame] = await _suspend(Wanted(wanted))
        out = []
        for expected, frame in zip(receives, frames, strict=True):
            self._clock.now = _later(self._clock.now, frame.clock, 1)
            if frame.dtype != PACKED + expected.bits:
                raise LinkError(
                    f"party {expected.frm} sent fields of another width at {self.path}:{expected.name} "
                    f"where {expected.bits} bits were expected"
                )
            if meta:
                out.append(torch.empty(expected.shape, dtype=expected.dtype, device="meta"))
            else:
                out.append(unpack(frame.payload, expected.bits, expected.shape, expected.dtype))
        return out

    def local(self, shape: tuple[int, ...], dtype: torch.dtype, work: Callable[[], Tensor]) -> Tensor:
        """The result of a local computation; in a run on shapes, its type alone (torch takes 60 us per elementwise
        operation on the meta device, and no cost depends on it)."""
        return torch.empty(shape, dtype=dtype, device="meta") if self.device == "meta" else work()

    def prg(self, name: str, roles: tuple[int, int], ring: Ring, shape: tuple[int, ...]) -> Tensor:
        """Uniform words known to the parties in these two roles alone; this party must be one of them."""
        if self.role not in roles:
            raise ProtocolError(f"role {self.role} has no key for the stream {name!r} of roles {roles}")
        peer = self.at(roles[0] if roles[1] == self.role else roles[1])
        return self.streams.words(peer, f"{self.path}|{name}", ring, shape)

    def _tag(self, name: str) -> bytes:
        return hashlib.blake2b(f"{self.path}:{name}".encode(), digest_size=8).digest()
