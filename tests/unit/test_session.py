"""Paths fork once, streams are drawn once, waits that cannot end are named, rounds follow the messages."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import LinkError, ProtocolError
from sfumato.session.drive import simulate
from sfumato.session.session import Receive, Send, Session
from sfumato.types import Z64

WORD = torch.tensor([7])


def receive(frm: int, name: str, bits: int = 64) -> Receive:
    return Receive(frm, name, (1,), torch.int64, bits)


async def around(s: Session, name: str) -> torch.Tensor:
    """Everybody sends to the next party."""
    (got,) = await s.exchange(
        [Send((s.party + 1) % 3, name, WORD + s.party, 64)], [receive((s.party + 2) % 3, name)]
    )
    return got


def test_a_name_forks_once() -> None:
    async def main(s: Session) -> None:
        s.fork("a").fork("a")
        s.fork("b")
        s.fork("a")

    with pytest.raises(ProtocolError, match="/a was forked twice"):
        simulate(main)


def test_a_stream_is_drawn_once_whatever_the_road_to_it() -> None:
    async def main(s: Session) -> None:
        if s.party < 2:
            s.fork("a").fork("b").prg("m", (0, 1), Z64, (1,))
            s.fork("a/b").prg("m", (0, 1), Z64, (1,))

    with pytest.raises(ProtocolError, match="drawn twice"):
        simulate(main)


def test_roles_turn() -> None:
    async def main(s: Session) -> list[tuple[int, int]]:
        out = []
        for turn in range(3):
            t = s.fork(f"t{turn}", turn=turn)
            assert t.at(t.role) == s.party
            assert t.fork("child").turn == turn
            out.append((t.role, t.at(0)))
        return out

    results, _ = simulate(main)
    assert results == [[(0, 0), (2, 1), (1, 2)], [(1, 0), (0, 1), (2, 2)], [(2, 0), (1, 1), (0, 2)]]


def test_a_deadlock_names_the_paths() -> None:
    async def main(s: Session) -> None:
        await s.fork("up").fork("here").exchange([], [receive((s.party + 1) % 3, "never")])

    with pytest.raises(ProtocolError, match=r"wait for each other.*/up/here:never from party"):
        simulate(main)


def test_a_message_that_never_comes_is_named_when_others_are_done() -> None:
    async def main(s: Session) -> None:
        if s.party == 1:
            await s.fork("alone").exchange([], [receive(0, "gift")])

    with pytest.raises(ProtocolError, match="/alone:gift from party 0"):
        simulate(main)


def test_two_messages_of_one_name_are_refused() -> None:
    async def main(s: Session) -> None:
        if s.party == 0:
            await s.exchange([Send(1, "m", WORD, 64), Send(1, "m", WORD, 64)])

    with pytest.raises(ProtocolError, match="one name"):
        simulate(main)


def test_another_width_is_refused() -> None:
    async def main(s: Session) -> None:
        if s.party == 0:
            await s.exchange([Send(1, "m", WORD, 32)])
        if s.party == 1:
            await s.exchange([], [receive(0, "m")])

    with pytest.raises(LinkError, match=":m"):
        simulate(main)


def test_another_size_is_refused() -> None:
    async def main(s: Session) -> None:
        if s.party == 0:
            await s.exchange([Send(1, "m", torch.cat([WORD, WORD]), 64)])
        if s.party == 1:
            await s.exchange([], [receive(0, "m")])

    with pytest.raises(LinkError, match="16 bytes where 8"):
        simulate(main)


def test_rounds_are_the_longest_chain() -> None:
    """A relay 0 -> 1 -> 2 is two rounds for the last, none for the first."""

    async def main(s: Session) -> int:
        if s.party:
            await s.exchange([], [receive(s.party - 1, f"m{s.party}")])
        if s.party < 2:
            await s.exchange([Send(s.party + 1, f"m{s.party + 1}", WORD, 64)])
        return s.clock

    results, ledgers = simulate(main)
    assert results == [0, 1, 2]
    assert [ledger.rounds for ledger in ledgers] == [0, 1, 2]


def test_gather_overlaps_and_keeps_order() -> None:
    async def main(s: Session) -> tuple[list[int], int]:
        async def branch(t: Session, depth: int) -> int:
            for i in range(depth):
                await around(t, f"m{i}")
            return depth

        first = await s.gather(*(lambda t, d=d: branch(t, d) for d in (3, 0, 2)))
        return first, s.clock

    results, ledgers = simulate(main)
    assert results == [([3, 0, 2], 3)] * 3
    assert [ledger.bytes_sent for ledger in ledgers] == [40] * 3
    assert [ledger.messages for ledger in ledgers] == [5] * 3
    assert [ledger.sends for ledger in ledgers] == [3] * 3  # the rounds in which something leaves


def test_rows_follow_the_path_that_asked_for_one() -> None:
    async def main(s: Session) -> None:
        layer = s.fork("layer", row=True)
        await around(layer, "a")
        await around(layer.fork("inner"), "b")
        await around(s.fork("free"), "c")

    _, ledgers = simulate(main)
    for ledger in ledgers:
        assert {path: row.bytes_sent for path, row in ledger.rows.items()} == {"/layer": 16, "": 8}
        assert ledger.bytes_sent == 24


def test_messages_are_named_by_structure_not_by_order() -> None:
    async def main(s: Session) -> list[int]:
        if s.party == 0:
            for name in "cab":
                await s.fork(name).exchange([Send(1, "m", torch.tensor([ord(name)]), 64)])
        if s.party == 1:
            return [int((await s.fork(name).exchange([], [receive(0, "m")]))[0]) for name in "abc"]
        return []

    assert simulate(main)[0][1] == [ord(c) for c in "abc"]


def test_a_failure_in_a_branch_reaches_the_caller() -> None:
    async def main(s: Session) -> None:
        async def bad(t: Session) -> None:
            await around(t, "m")
            raise ValueError("inside")

        await s.gather(bad, lambda t: around(t, "m"))

    with pytest.raises(ValueError, match="inside"):
        simulate(main)


def test_a_coroutine_that_is_not_ours_is_refused() -> None:
    class Foreign:
        def __await__(self):  # type: ignore[no-untyped-def]
            yield "sleep"

    async def main(s: Session) -> None:
        await Foreign()

    with pytest.raises(ProtocolError, match="not an exchange"):
        simulate(main)


def test_meta_runs_move_no_bytes_and_count_all() -> None:
    async def main(s: Session) -> torch.Tensor:
        words = torch.empty(5, dtype=torch.int64, device=s.device)
        (got,) = await s.exchange(
            [Send((s.party + 1) % 3, "m", words, 18)],
            [Receive((s.party + 2) % 3, "m", (5,), torch.int64, 18)],
        )
        return got

    results, ledgers = simulate(main, device="meta")
    assert all(r.device.type == "meta" and r.shape == (5,) for r in results)
    assert [ledger.bytes_sent for ledger in ledgers] == [12] * 3
