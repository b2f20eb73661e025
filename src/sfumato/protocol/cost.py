"""What each move of ``rep3`` sends, as data: documentation that a test holds to the wire.

Nothing plans with these formulas; an estimate is a run on shapes. ``tests/conformance/test_protocol.py``
compares every one of them, per party and to the byte, with the counted messages. Roles are those of
``Session.role``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sfumato.protocol.base import plane_bytes
from sfumato.ring.pack import packed_bytes

__all__ = ["MOVES", "Cost", "Message", "bits", "rounds"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message from role ``frm``: ``fields`` fields of ``bits`` bits an element, or bit planes."""

    frm: int
    to: int
    bits: int
    fields: int = 1
    plane: bool = False

    def bytes(self, count: int) -> int:
        """Payload bytes for ``count`` elements, padding included."""
        return (
            self.fields * plane_bytes(count) if self.plane else packed_bytes(count * self.fields, self.bits)
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """Messages and rounds of one move. ``+`` is one after the other."""

    messages: tuple[Message, ...]
    rounds: int

    @property
    def bits(self) -> int:
        """Bits per element over all parties, padding aside."""
        return sum(m.bits * m.fields for m in self.messages)

    def bytes_by_role(self, count: int) -> tuple[int, int, int]:
        """Payload bytes that each role sends for ``count`` elements."""
        sent = [0, 0, 0]
        for m in self.messages:
            sent[m.frm] += m.bytes(count)
        return sent[0], sent[1], sent[2]

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.messages + other.messages, self.rounds + other.rounds)


def _free(**_: int) -> Cost:
    return Cost((), 0)


def _share(*, k: int, **_: int) -> Cost:
    """From role 0, the owner."""
    return Cost((Message(0, 1, k),), 1)


def _reveal(*, k: int, to: int = 7, **_: int) -> Cost:
    """``to``: bit i set for party i."""
    receivers = [i for i in range(3) if to >> i & 1]
    return Cost(tuple(Message((i + 2) % 3, i, k) for i in receivers), 1 if receivers else 0)


def _bilinear(*, k: int, **_: int) -> Cost:
    return Cost(tuple(Message(i, (i + 2) % 3, k) for i in range(3)), 1)


def _reshare(k: int) -> tuple[Message, ...]:
    return (Message(0, 1, k), Message(1, 0, k))


def _truncate(*, k: int, f: int, out: int = 0, **_: int) -> Cost:
    """``f``: bits dropped; ``out``: bits of the result's ring."""
    out = out or k
    if f == 0 and out == k:
        return Cost(_reshare(k), 1)
    wrap = (Message(0, 1, 1), Message(1, 0, 1), Message(2, 1, out - k + f))
    return Cost(wrap + _reshare(out), 2)


def _bilinear_truncate(*, k: int, f: int, **_: int) -> Cost:
    return Cost((Message(2, 1, k),), 1) + _truncate(k=k, f=f)


def _unfused_bilinear_truncate(*, k: int, f: int, **_: int) -> Cost:
    return _bilinear(k=k) + _truncate(k=k, f=f)


def _and(planes: int) -> Cost:
    return Cost(tuple(Message(i, (i + 2) % 3, 1, planes, True) for i in range(3)), 1)


def _operands(m: int) -> Cost:
    """Shared planes of both operands, then the and of all but the top plane."""
    return Cost((Message(0, 1, 1, m, True), Message(1, 2, 1, m - 1, True), Message(2, 1, 1, m - 1, True)), 2)


def _sign_bits(*, m: int, **_: int) -> Cost:
    cost, groups = _operands(m), m - 1
    while groups > 1:
        pairs = groups // 2
        cost += _and(2 * pairs - 1)
        groups -= pairs
    return cost


def _to_bits(*, m: int, **_: int) -> Cost:
    cost, span = _operands(m), 1
    while span < m - 1:
        cost += _and(2 * sum((i // span) % 2 for i in range(m - 1)))
        span *= 2
    return cost


def _bits_to_words(*, k: int, **_: int) -> Cost:
    opened = (Message(0, 1, 1, 1, True), Message(1, 0, 1, 1, True), Message(2, 1, k))
    return Cost(opened + _reshare(k), 2)


def _less_than_zero(*, k: int, m: int, **_: int) -> Cost:
    return _sign_bits(m=m) + _bits_to_words(k=k)


def _evaluate(*, f: int, period: int, harmonics: int, squared: int, out: int, **_: int) -> Cost:
    """``f``: fraction bits of x; ``out``: of the result; ``period``: log2 of the period; ``squared``: 1 if
    there is x^2.
    """
    opened = Message(0, 1, 64 if squared else period + f)
    dealt = Message(2, 1, 64, 2 * harmonics + squared)
    return Cost((opened, dealt), 1) + _truncate(k=64, f=2 * f + 16 - out)


#: Cost of every move and override by name. Keywords: ``k`` ring bits, ``f`` bits dropped, ``m`` window bits.
MOVES: Mapping[str, Callable[..., Cost]] = MappingProxyType(
    {
        "share": _share,
        "reveal": _reveal,
        "linear": _free,
        "add_public": _free,
        "inject": _free,
        "bilinear": _bilinear,
        "truncate": _truncate,
        "linear_truncate": _truncate,
        "bilinear_truncate": _bilinear_truncate,
        "bilinear_truncate, not fused": _unfused_bilinear_truncate,
        "cast down": _free,
        "cast up": lambda **_: _truncate(k=32, f=0, out=64),
        "sign_bits": _sign_bits,
        "bits_to_words": _bits_to_words,
        "less_than_zero": _less_than_zero,
        "to_bits": _to_bits,
        "select": _bilinear,
        "evaluate": _evaluate,
    }
)


def bits(move: str, **sizes: int) -> int:
    """Bits per element over all parties, e.g. ``bits("bilinear_truncate", k=64, f=18) == 212``."""
    return MOVES[move](**sizes).bits


def rounds(move: str, **sizes: int) -> int:
    """Rounds of one call, e.g. ``rounds("bilinear_truncate", k=64, f=18) == 3``."""
    return MOVES[move](**sizes).rounds
