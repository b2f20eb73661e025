"""What a party sees says nothing: every bit it receives is uniform given its view, and independent of the
secret.

One run holds many samples side by side. The receiver's view is the same in all of them: its two components of
every operand, and every word of its two pair streams. Only the stream between the two other parties is fresh
per sample; the component that the receiver lacks follows from the secret. Then every bit position of every
message must be uniform and they must be jointly independent, so no bit may be a function of the view.

The mutations show that the check is not empty: each draw of each move is set to zero in turn, and must be
missed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import protocol_suite as suite
from protocol_suite import CASES, PROTOCOLS, Case

from sfumato.link.base import Frame
from sfumato.ring import dpf
from sfumato.ring.pack import unpack
from sfumato.ring.prg import stream_words
from sfumato.session.drive import LockstepLink, simulate, simulation_keys
from sfumato.session.randomness import PairStreams
from sfumato.session.session import PACKED, Session
from sfumato.types import B8, B64, Z32, Z64, Index, Ring, Shared

N = 4096
SIGMAS = 6.5

#: Draws whose absence no view can show, and why. Everything else must be caught.
NOT_MASKS = {
    "split": "hides nothing: it frees the rounding error from the sharing; "
    "test_truncation_has_no_bias needs it",
}
#: (move, end of the label) -> the case in which the same draw of the same step is caught. Here the step's
#: input is a product of masked messages, and what a missing mask shows is no linear function of what came
#: before.
CAUGHT_ALONE = {
    ("less_than_zero", "/b2a|ra"): "bits_to_words",
    ("less_than_zero", "/b2a|rb"): "bits_to_words",
    ("select_negative", "/select|ra"): "select_negative, narrow",
    ("select_negative", "/select|rb"): "select_negative, narrow",
    ("select_negative", "/select|c0"): "select_negative, narrow",
    ("select_largest", "/winner|ra"): "select_largest of 3, narrow",
    ("select_largest", "/winner|rb"): "select_largest of 3, narrow",
    ("select_largest", "/select|ra"): "select_negative, narrow",
    ("select_largest", "/select|rb"): "select_negative, narrow",
    ("select_largest", "/select|c0"): "select_negative, narrow",
    ("sign_bits", "/case|c0"): "sign_bits, narrow",
    ("sign_bits", "/case|c2"): "sign_bits, narrow",
    ("sign_bits", "/tree3|zero"): "and",
    ("select_negative", "/tree3|zero"): "and",
    **{
        (move, end): found
        for move in ("evaluate", "exponential", "evaluate, not closed", "exponential, not closed")
        for end, found in (
            ("|ra", "truncate"),
            ("|rb", "truncate"),
            ("|c0", "truncate by nothing"),
            ("|c2", "truncate by nothing"),
        )
    },
}

ROWS = tuple(
    replace(c, shapes=lambda shape: [(2, 3), (3, *shape)]) if c.name.startswith("matmul") else c
    for c in CASES
    if c.any_shape or c.name.startswith("matmul")
)
INTERACTIVE = [
    pytest.param(name, case, ring, id=f"{name}-{case}-{ring}")
    for name in ("rep3", "rep3-moves")
    for case in ROWS
    for ring in case.rings
    if name in case.protocols
    and case.move not in ("linear", "add_public", "cast down")
    and (name == "rep3" or case.unfused)
    and not case.name.endswith("broadcast")
]


class View(PairStreams):
    """Streams of one party in a run of many samples: those of ``receiver`` are alike in all, the third is
    fresh.
    """

    def __init__(
        self, party: int, receiver: int, seed: int, mutant: tuple[int, int, str] | None = None
    ) -> None:
        super().__init__(simulation_keys(f"view {seed}".encode(), party))
        self.party, self.receiver, self.mutant = party, receiver, mutant
        self.drawn: list[tuple[int, int, str]] = []

    def words(self, peer: int, label: str, ring: Ring, shape: tuple[int, ...]) -> Tensor:
        words = super().words(peer, label, ring, shape)
        low, high = sorted((self.party, peer))
        self.drawn.append((low, high, label))
        if (low, high, label) == self.mutant:
            return torch.zeros_like(words)
        if self.receiver not in (low, high):
            return words
        if ring == B8:
            words = torch.where(words > 127, 255, 0).to(torch.uint8)
        return words[..., :1].expand(shape).contiguous() if shape else words


class Tap(LockstepLink):
    """A link that keeps what it sent: (receiver, tag, bits, payload) in order."""

    def __init__(self, party: int, boxes: dict[tuple[int, int], dict[bytes, Frame]]) -> None:
        super().__init__(party, boxes)
        self.sent: list[tuple[int, bytes, int, bytes]] = []

    def send(self, to: int, frame: Frame) -> None:
        self.sent.append((to, frame.tag, frame.dtype - PACKED, bytes(frame.payload)))
        super().send(to, frame)


@dataclass
class Transcript:
    """All messages of one run, and which draws it made."""

    sent: list[list[tuple[int, bytes, int, bytes]]]
    draws: set[tuple[int, int, str]]

    def received(self, receiver: int) -> NDArray[np.bool_]:
        """Bits that ``receiver`` got: one row per bit position of a message (and row of its tensor), N
        columns.
        """
        rows = []
        for sender in self.sent:
            for to, _, bits, payload in sender:
                if to == receiver:
                    rows.append(_bit_rows(payload, bits))
        return np.concatenate(rows) if rows else np.zeros((0, N), bool)


def _bit_rows(payload: bytes, bits: int) -> NDArray[np.bool_]:
    raw = np.frombuffer(payload, np.uint8)
    if bits == 8:  # bit planes; no field of the cases below is 8 bits wide
        return np.unpackbits(raw, bitorder="little").reshape(-1, N).astype(bool)
    count = len(payload) * 8 // bits
    words = unpack(payload, bits, (count // N, N), torch.int64).numpy().view(np.uint64)
    positions = np.arange(bits, dtype=np.uint64)[:, None]
    return np.concatenate([(row >> positions & np.uint64(1)).astype(bool) for row in words])


def constant_operands(case: Case, ring: Ring, secret: int) -> list[Tensor]:
    """Operands whose samples are all alike: column 0 of a random draw, repeated."""
    drawn = suite.draw(case, ring, (N,), seed=100 + secret)
    if case.name == "bits_to_words":
        drawn = [torch.where(drawn[0][:1] > 127, 255, 0).to(torch.uint8).expand(N // 8)]
        drawn = [drawn[0] if secret else ~drawn[0]]
    return [w[..., :1].expand(w.shape).contiguous() if w.shape[-1] == N else w.contiguous() for w in drawn]


def transcript(
    name: str,
    case: Case,
    ring: Ring,
    receiver: int,
    *,
    secret: int,
    turn: int = 0,
    seed: int = 0,
    mutant: tuple[int, int, str] | None = None,
) -> Transcript:
    """One run; the receiver's two components are the same constants for every secret."""
    words = constant_operands(case, ring, secret)
    g = np.random.default_rng(17 + receiver)
    split = []
    for i, w in enumerate(words):
        kind = case.source.get(i, ring)
        known = []
        for _ in range(2):
            fixed = suite._words(g, kind.bits, kind, tuple(w.shape))
            if kind == B8:
                fixed = torch.where(fixed > 127, 255, 0).to(torch.uint8)
            known.append(fixed[..., :1].expand(w.shape).contiguous() if w.shape[-1] >= N // 8 else fixed)
        third = suite.Rep3.split(w, kind, known)[2]
        parts = [third, third, third]
        parts[receiver], parts[(receiver + 1) % 3] = known
        split.append(parts)
    boxes: dict[tuple[int, int], dict[bytes, Frame]] = {}
    links = [Tap(i, boxes) for i in range(3)]
    streams: list[View] = []

    def view(party: int) -> View:
        streams.append(View(party, receiver, seed, mutant))
        return streams[-1]

    suite.execute(PROTOCOLS[name], case, ring, words, turn=turn, split=split, streams=view, links=links)
    assert not any(boxes.values()), "a message was sent that nobody takes"
    return Transcript([link.sent for link in links], {draw for s in streams for draw in s.drawn})


def complaints(bits: NDArray[np.bool_]) -> list[str]:
    """The first reason why these rows of N samples are not independent uniform bits; empty when none shows.

    Each row's mean, each pair of rows, each row against each product of neighbours (6.5 standard deviations),
    and linear relations over GF(2) of any number of rows, which every sum of words shows in its lowest bit.
    """
    if not len(bits):
        return []
    signs = 1.0 - 2.0 * bits.astype(np.float32)
    bound = SIGMAS / N**0.5
    means = np.abs(signs.mean(1))
    if (means > bound).any():
        return [f"{int((means > bound).sum())} of {len(bits)} bits are not uniform"]
    pairs = np.abs(signs @ signs.T) / N
    np.fill_diagonal(pairs, 0)
    if (pairs > bound).any():
        return [f"{int((pairs > bound).sum()) // 2} pairs of bits depend on each other"]
    if len(bits) > 2:
        triples = np.abs((signs[:-1] * signs[1:]) @ signs.T) / N
        rows = np.arange(len(bits) - 1)
        triples[rows, rows] = triples[rows, rows + 1] = 0
        if (triples > bound).any():
            return [f"{int((triples > bound).sum())} bits depend on two neighbours"]
    if relations := _relations(bits):
        return [f"{relations} linear relations between bits"]
    return []


def _relations(bits: NDArray[np.bool_]) -> int:
    """Rows minus the rank over GF(2) of the rows and the row of ones, on 1,024 samples or more if rows ask
    for it.
    """
    width = min(N, max(1024, 2 * len(bits)))
    rows = [int.from_bytes(np.packbits(row[:width]).tobytes(), "big") for row in bits]
    rows.append((1 << width) - 1)
    pivots: dict[int, int] = {}
    missing = 0
    for row in rows:
        while row:
            top = row.bit_length()
            if top not in pivots:
                pivots[top] = row
                break
            row ^= pivots[top]
        missing += row == 0
    return missing


@pytest.mark.parametrize(("name", "case", "ring"), INTERACTIVE)
def test_a_view_is_uniform_and_independent_of_the_secret(name: str, case: Case, ring: Ring) -> None:
    """For every receiver, secret and turn: nothing received depends on the secret or on the view."""
    for receiver in range(3):
        told = []
        for secret in (0, 1):
            # turn = 2 * receiver: over the receivers every role, and every turn, is seen.
            run = transcript(name, case, ring, receiver, secret=secret, turn=2 * receiver % 3, seed=secret)
            seen = run.received(receiver)
            assert complaints(seen) == [], f"party {receiver}, secret {secret}"
            told.append(seen.mean(1) if len(seen) else np.zeros(0))
        # Two secrets, one distribution.
        assert told[0].shape == told[1].shape
        assert (np.abs(told[0] - told[1]) < SIGMAS * (0.5 / N) ** 0.5).all()


@cache
def draws_of(name: str, index: int, ring: Ring) -> tuple[tuple[int, int, str], ...]:
    """Every draw that a case makes, by recording it: a new one cannot be forgotten."""
    return tuple(sorted(transcript(name, ROWS[index], ring, 0, secret=0).draws))


@cache
def missed(name: str, index: int, ring: Ring) -> tuple[str, ...]:
    """Labels of the draws that may be zero without the one party that does not know them seeing anything."""
    out, case = [], ROWS[index]
    for low, high, label in draws_of(name, index, ring):
        if label.rpartition("|")[2] in NOT_MASKS:
            continue
        for secret in (0, 1, 2):
            mutant = (low, high, label)
            run = transcript(name, case, ring, 3 - low - high, secret=secret, seed=secret, mutant=mutant)
            if complaints(run.received(3 - low - high)):
                break
        else:
            out.append(label)
    return tuple(out)


@pytest.mark.parametrize(
    ("name", "case", "ring"), [p for p in INTERACTIVE if p.values[2] == p.values[1].rings[-1]]
)
def test_a_missing_mask_is_caught(name: str, case: Case, ring: Ring) -> None:
    """Set each draw to zero in turn: the one party that does not know that stream must see something."""
    assert draws_of(name, ROWS.index(case), ring)
    unexplained = []
    for label in missed(name, ROWS.index(case), ring):
        alone = [
            other for (move, end), other in CAUGHT_ALONE.items() if move == case.move and label.endswith(end)
        ]
        if alone:
            other = next(c for c in ROWS if c.name == alone[0])
            names = [found.rpartition("|")[2] for found in missed("rep3", ROWS.index(other), other.rings[-1])]
            if label.rpartition("|")[2] not in names:
                continue
        unexplained.append(label)
    assert not unexplained


def test_every_draw_is_known_to_these_tests() -> None:
    """The names of all draws in all cases; a new one is a deliberate change of this list and of
    docs/security/rep3.md.
    """
    names = {
        label.rpartition("|")[2]
        for name in ("rep3", "rep3-moves")
        for index, case in enumerate(ROWS)
        for ring in case.rings
        if name in case.protocols
        for _, _, label in draws_of(name, index, ring)
    }
    expected = {
        "share",
        "zero",
        "zero02",
        "ra",
        "rb",
        "ab",
        "c0",
        "c1",
        "c2",
        "planes",
        "r",
        "t",
        "t0",
        "t1",
        "dealt",
        "split",
    }
    assert names == expected


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
def test_a_revealed_message_is_the_value_minus_what_its_receiver_holds(ring: Ring) -> None:
    """The one message that is a function of view and output: a simulator knows it."""
    p = PROTOCOLS["rep3"]
    words = suite._words(np.random.default_rng(1), ring.bits, ring, (33,))
    parts = suite.components(words, ring, 2)
    for receiver in range(3):
        links = [Tap(i, boxes) for boxes in [{}] for i in range(3)]

        async def main(s: Session, receiver: int = receiver) -> Tensor | None:
            return await p.reveal(s, suite.shares(p, s.party, parts, ring, 0), (receiver,))

        simulate(main, links=links)
        (message,) = [m for link in links for m in link.sent]
        assert message[0] == receiver
        seen = unpack(message[3], ring.bits, (33,), ring.dtype)
        assert torch.equal(seen, words - parts[receiver] - parts[(receiver + 1) % 3])


@pytest.mark.parametrize(("name", "case", "ring"), INTERACTIVE)
def test_sizes_names_and_order_do_not_depend_on_secrets(name: str, case: Case, ring: Ring) -> None:
    runs = []
    for secret in (0, 1):
        run = transcript(name, case, ring, 0, secret=secret, turn=1, seed=secret)
        runs.append([[(to, tag, bits, len(data)) for to, tag, bits, data in sent] for sent in run.sent])
    assert runs[0] == runs[1]


def test_fresh_keys_give_fresh_messages() -> None:
    """The same input twice under other keys: no word is repeated; under the same keys: every word is."""
    case = next(c for c in CASES if c.name == "bilinear_truncate")
    words = suite.draw(case, Z64, (64,), 3)
    split = [suite.components(w, Z64, 5) for w in words]

    def messages(key: bytes) -> Sequence[bytes]:
        links = [Tap(i, boxes) for boxes in [{}] for i in range(3)]
        keyed = lambda i: PairStreams(simulation_keys(key, i))  # noqa: E731
        suite.execute(PROTOCOLS["rep3"], case, Z64, words, split=split, streams=keyed, links=links)
        return [data for link in links for _, _, bits, data in link.sent if bits == 64]

    first, second = messages(b"one"), messages(b"two")
    assert messages(b"one") == first
    a, b = (np.concatenate([np.frombuffer(d, np.uint64) for d in m]) for m in (first, second))
    assert not set(a.tolist()) & set(b.tolist())


def test_the_checker_sees_what_it_should() -> None:
    """Its own power: uniform bits pass; a constant, a copy, a product of neighbours, a long parity do not."""
    words = stream_words(bytes(32), "checker", Z64, (N,)).numpy().view(np.uint64)
    bits = (words >> np.arange(40, dtype=np.uint64)[:, None] & np.uint64(1)).astype(bool)
    assert complaints(bits) == []
    assert "uniform" in complaints(np.vstack([bits, np.zeros(N, bool)]))[0]
    assert "pairs" in complaints(np.vstack([bits, bits[3]]))[0]
    assert "neighbours" in complaints(np.vstack([bits, bits[3] ^ bits[4]]))[0]
    assert "linear" in complaints(np.vstack([bits, bits[1] ^ bits[9] ^ bits[20] ^ bits[33]]))[0]
    small = bits & np.roll(bits, 1, 0) | np.roll(bits, 2, 0)
    assert complaints(small)


@pytest.mark.parametrize("ring", [Z64, Z32, B64], ids=str)
def test_summands_for_a_client_say_nothing_but_their_sum(ring: Ring) -> None:
    """The three summands add up to the value; for fixed shares any two of them are uniform."""
    p = PROTOCOLS["rep3"]
    words = suite._words(np.random.default_rng(4), ring.bits, ring, (1,)).expand(N).contiguous()
    fixed = [suite._words(np.random.default_rng(i), ring.bits, ring, (1,)).expand(N) for i in (5, 6)]
    parts = list(suite.Rep3.split(words, ring, fixed))
    for turn in range(3):

        async def main(s: Session, turn: int = turn) -> Tensor:
            return p.summand(s.fork("out", turn=turn), suite.shares(p, s.party, parts, ring, 0))

        summands, ledgers = simulate(main)
        assert torch.equal(suite.Rep3.combine(summands, ring), words)
        assert sum(ledger.sends for ledger in ledgers) == 0
        for i in range(3):
            two = [_bit_rows(summands[j].numpy().tobytes(), ring.bits) for j in (i, (i + 1) % 3)]
            assert complaints(np.concatenate(two)) == []


def key_bits(keys: Tensor, rows: int, ring: Ring) -> NDArray[np.bool_]:
    """Bits of N keys, a row per bit, without those that every key has alike: the lowest bit of a correction of seeds,
    and the six upper ones of a byte of control bits."""
    bits = np.unpackbits(keys.numpy(), axis=1, bitorder="little").T.astype(bool)
    levels = (dpf.key_bytes(rows, ring) - 32) // 17
    starts = [16 + 17 * level for level in range(levels)]
    fixed = [8 * start for start in starts]
    fixed += [8 * (start + 16) + i for start in starts for i in range(2, 8)]
    assert not bits[fixed].any()
    return np.delete(bits, fixed, 0)


@pytest.mark.parametrize("ring", [Z64, Z32], ids=str)
def test_keys_say_nothing_of_the_number(ring: Ring) -> None:
    """Both keys that a party gets are uniform, whatever the number, and of one distribution for any two."""
    rows = 9
    for party in range(3):
        told = []
        for number in (0, 8):
            type = Index(ring, rows, (N,))
            held = suite.held_keys(type, torch.full((N,), number), party, seed=number)
            seen = np.concatenate([key_bits(keys, rows, ring) for keys in held])
            assert complaints(seen) == [], f"party {party}, number {number}"
            told.append(seen.mean(1))
        assert (np.abs(told[0] - told[1]) < SIGMAS * (0.5 / N) ** 0.5).all()


def test_the_two_keys_of_one_pair_would_say_it() -> None:
    """The checker's power: who held both keys of a pair would see; so no party does."""
    first, second = dpf.make_keys(
        torch.zeros(N, dtype=torch.int64), 9, Z64, draw=np.random.default_rng(1).bytes
    )
    both = np.concatenate([key_bits(keys, 9, Z64) for keys in (first, second)])
    assert "depend on each other" in complaints(both)[0]
    one_seed, _ = dpf.make_keys(torch.zeros(N, dtype=torch.int64), 9, Z64, draw=lambda size: bytes(size))
    assert "not uniform" in complaints(key_bits(one_seed, 9, Z64))[0]


def test_a_party_without_the_key_cannot_draw() -> None:
    """The session itself refuses a stream of two other roles."""

    async def main(s: Session) -> Shared | None:
        if s.party == 2:
            s.prg("mask", (0, 1), Z32, (1,))
        return None

    with pytest.raises(Exception, match="no key"):
        simulate(main)
