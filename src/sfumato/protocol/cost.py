"""What each move of ``rep3`` sends, as data: documentation that a test holds to the wire.

Nothing plans with these formulas; an estimate is a run on shapes. ``tests/conformance/test_protocol.py``
compares every one of them, per party and to the byte, with the counted messages. Roles are those of
``Session.role``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from sfumato.protocol.base import plane_bytes
from sfumato.ring.carry import carry_plan
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


def _look_up(*, k: int, **_: int) -> Cost:
    """Per element of the result. What the client uploads for it is no message between parties."""
    return _bilinear(k=k)


def _reshare(k: int) -> tuple[Message, ...]:
    return (Message(0, 1, k), Message(1, 0, k))


def _truncate(*, k: int, f: int, out: int = 0, **_: int) -> Cost:
    """``k``: bits of the words, a ring's or fewer; ``f``: bits dropped; ``out``: bits of the result's ring."""
    out = out or k
    width = out - k + f
    if width <= 0:  # no wrap reaches the result
        return Cost(_reshare(out), 1)
    wrap = (Message(0, 1, 1), Message(1, 0, 1), Message(2, 1, width))
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


def _tree_sign_bits(*, m: int, **_: int) -> Cost:
    cost, groups = _operands(m), m - 1
    while groups > 1:
        pairs = groups // 2
        cost += _and(2 * pairs - 1)
        groups -= pairs
    return cost


def _exchanged(planes: int) -> Cost:
    """Roles 0 and 1 tell each other planes under masks."""
    return Cost((Message(0, 1, 1, planes, True), Message(1, 0, 1, planes, True)), 1)


def _sign(m: int, count: int = 1) -> Cost:
    """``count`` signs an element, to xor shares at roles 0 and 1."""
    plan = carry_plan(m)
    cost = Cost((Message(1, 0, 1, count * m, True), Message(2, 1, 1, count * plan.dealt, True)), 1)
    for planes in plan.opened:
        cost += _exchanged(count * planes)
    return cost


def _sign_bits(*, m: int, **_: int) -> Cost:
    return _sign(m) + _exchanged(1)


def _to_bits(*, m: int, **_: int) -> Cost:
    cost, span = _operands(m), 1
    while span < m - 1:
        cost += _and(2 * sum((i // span) % 2 for i in range(m - 1)))
        span *= 2
    return cost


def _bits_to_words(*, k: int, **_: int) -> Cost:
    return _exchanged(1) + Cost((Message(2, 1, k), *_reshare(k)), 1)


def _less_than_zero(*, k: int, m: int, **_: int) -> Cost:
    return _sign(m) + _bits_to_words(k=k)


def _tree_less_than_zero(*, k: int, m: int, **_: int) -> Cost:
    return _tree_sign_bits(m=m) + _bits_to_words(k=k)


def _select_negative(*, k: int, m: int, ys: int = 1, **_: int) -> Cost:
    """``ys``: how many values one sign chooses from."""
    return _sign(m) + _chosen(k, 1, ys)


def _chosen(k: int, bits: int, ys: int) -> Cost:
    """``bits`` bits an element opened, each times ``ys`` values, summed."""
    words = (Message(2, 1, k, bits * (1 + ys)), Message(0, 1, k, ys), Message(1, 0, k, ys))
    return _exchanged(bits) + Cost(words, 1)


def _select_largest(*, k: int, m: int, r: int, ys: int = 1, **_: int) -> Cost:
    """Of ``r`` = 3 or 4 candidates; per element of the result."""
    pairs = r * (r - 1) // 2
    dealt = Cost((Message(2, 1, 1, {3: 2, 4: 13}[r], True),), 0)
    return _sign(m, pairs) + _exchanged(pairs) + dealt + _chosen(k, r - 1, ys)


def _tree_select_negative(*, k: int, m: int, **_: int) -> Cost:
    return _tree_less_than_zero(k=k, m=m) + _bilinear(k=k)


def _opened(opened: int, word: int, entries: int, two_way: int) -> Cost:
    """A masked value of ``opened`` bits, one way or two, and ``entries`` dealt words."""
    back = (Message(0, 1, opened),) if two_way else ()
    return Cost((Message(1, 0, opened), *back, Message(2, 1, word, entries)), 1)


def _evaluate(
    *, opened: int, harmonics: int, word: int, scale: int, out: int, k: int, two_way: int = 0, count: int = 1,
    **_: int,
) -> Cost:  # fmt: skip
    """``opened``: bits of a phase, period_log2 + f; ``scale``: fraction bits of the sum, in words of ``word`` bits;
    ``out``: of the result; ``k``: the result's ring; ``count``: how many series share the opening.
    """
    closing = _truncate(k=word, f=max(0, scale - out), out=k)
    return _opened(opened, word, 2 * harmonics, two_way) + Cost(closing.messages * count, closing.rounds)


def _exponential(
    *, opened: int, blocks: int, word: int, scale: int, out: int, k: int, two_way: int = 0, **_: int
) -> Cost:
    """``blocks``: bits that tell the wrap; the rest as for ``evaluate``."""
    return _opened(opened, word, 1 << blocks, two_way) + _truncate(k=word, f=max(0, scale - out), out=k)


def _of_product(move: Callable[..., Cost], *, source: int = 0, **sizes: int) -> Cost:
    """A function of a product that is not closed, whose words have ``source`` bits (0: of a public linear map)."""
    made = Cost((Message(2, 1, source),), 1) if source else Cost((), 0)
    return made + move(**{**sizes, "two_way": 1})


#: Cost of every move and override by name. Keywords: ``k`` ring bits, ``f`` bits dropped, ``m`` window bits.
MOVES: Mapping[str, Callable[..., Cost]] = MappingProxyType(
    {
        "share": _share,
        "reveal": _reveal,
        "linear": _free,
        "add_public": _free,
        "inject": _free,
        "bilinear": _bilinear,
        "look_up": _look_up,
        "truncate": _truncate,
        "linear_truncate": _truncate,
        "bilinear_truncate": _bilinear_truncate,
        "bilinear_truncate, not fused": _unfused_bilinear_truncate,
        "cast down": _free,
        "cast up": lambda **_: _truncate(k=32, f=0, out=64),
        "sign_bits": _sign_bits,
        "sign_bits, not fused": _tree_sign_bits,
        "bits_to_words": _bits_to_words,
        "less_than_zero": _less_than_zero,
        "less_than_zero, not fused": _tree_less_than_zero,
        "select_negative": _select_negative,
        "select_negative, not fused": _tree_select_negative,
        "select_largest": _select_largest,
        "to_bits": _to_bits,
        "select": _bilinear,
        "evaluate": _evaluate,
        "exponential": _exponential,
        "evaluate, not closed": partial(_of_product, _evaluate),
        "exponential, not closed": partial(_of_product, _exponential),
    }
)


def bits(move: str, **sizes: int) -> int:
    """Bits per element over all parties, e.g. ``bits("bilinear_truncate", k=64, f=18) == 212``."""
    return MOVES[move](**sizes).bits


def rounds(move: str, **sizes: int) -> int:
    """Rounds of one call, e.g. ``rounds("bilinear_truncate", k=64, f=18) == 3``."""
    return MOVES[move](**sizes).rounds
