"""The queue of sessions: turns, limits, and places given back. No process, no clock."""

from __future__ import annotations

import pytest

from sfumato.errors import JobError
from sfumato.runtime.jobs import JobQueue, NoPlace, Ticket
from sfumato.runtime.telemetry import REASONS


def names(tickets: list[Ticket]) -> list[str]:
    return [ticket.client for ticket in tickets if ticket.granted and not ticket.left]


def drained(queue: JobQueue, running: list[Ticket], waiting: list[Ticket]) -> list[str]:
    """The order in which those that wait begin, when one at a time ends."""
    order = []
    while running:
        queue.leave(running.pop(0))
        begun = [ticket for ticket in waiting if ticket.granted and ticket not in running and not ticket.left]
        order += [ticket.client for ticket in begun]
        running += begun
    return order


def test_as_many_run_as_may() -> None:
    queue = JobQueue(2, 10, 10)
    tickets = [queue.enter("a") for _ in range(3)]
    assert [t.granted for t in tickets] == [True, True, False]
    assert (queue.running, queue.waiting) == (2, 1)
    queue.leave(tickets[0])
    assert tickets[2].granted
    assert (queue.running, queue.waiting) == (2, 0)


def test_clients_take_turns_however_many_sessions_each_has() -> None:
    queue = JobQueue(1, 100, 100)
    first = queue.enter("greedy")
    waiting = [queue.enter("greedy") for _ in range(4)]
    waiting += [queue.enter("b"), queue.enter("c"), queue.enter("b")]
    assert drained(queue, [first], waiting) == ["greedy", "b", "c", "greedy", "b", "greedy", "greedy"]


def test_who_runs_nothing_goes_before_who_does() -> None:
    queue = JobQueue(2, 100, 100)
    first, second = queue.enter("greedy"), queue.enter("greedy")
    waiting = [queue.enter("greedy"), queue.enter("greedy"), queue.enter("b"), queue.enter("c")]
    assert [ticket.position for ticket in waiting] == [3, 4, 1, 2]
    queue.leave(first)
    assert names(waiting) == ["b"]
    queue.leave(waiting[2])
    assert names(waiting) == ["c"]
    queue.leave(waiting[3])
    assert names(waiting) == ["greedy"]  # nobody else waits
    queue.leave(second)
    assert queue.running == 2


def test_each_refusal_says_which_it_is() -> None:
    queue = JobQueue(1, 2, 1)
    queue.enter("a")
    queue.enter("a")
    queue.enter("b")
    found = []
    for client in ("a", "c"):
        with pytest.raises(NoPlace) as refused:
            queue.enter(client)
        found.append(refused.value.word)
    queue.close()
    with pytest.raises(NoPlace) as refused:
        queue.enter("c")
    assert [*found, refused.value.word] == ["limit", "busy", "stopping"]
    assert {*found, refused.value.word} <= REASONS


def test_one_client_is_served_in_order() -> None:
    queue = JobQueue(1, 100, 100)
    first = queue.enter("a")
    waiting = [queue.enter("a") for _ in range(5)]
    for ticket in waiting:
        assert not ticket.granted
        queue.leave(first)
        assert ticket.granted
        first = ticket


def test_a_newcomer_does_not_pass_those_who_wait() -> None:
    queue = JobQueue(1, 100, 100)
    running = queue.enter("a")
    waits = queue.enter("b")
    queue.leave(running)
    late = queue.enter("c")
    assert waits.granted
    assert not late.granted


def test_positions_say_who_begins_when_and_changes_are_told() -> None:
    queue = JobQueue(1, 100, 100)
    told: list[str] = []
    first = queue.enter("a")
    waiting = {
        name: queue.enter(name[0], lambda name=name: told.append(name))  # type: ignore[misc]
        for name in ("a1", "a2", "b1")
    }
    assert {name: ticket.position for name, ticket in waiting.items()} == {"a1": 1, "b1": 2, "a2": 3}
    assert told == ["a2"]  # it was second until b came
    told.clear()
    queue.leave(first)
    assert waiting["a1"].granted
    assert {name: ticket.position for name, ticket in waiting.items()} == {"a1": 0, "b1": 1, "a2": 2}
    assert sorted(told) == ["a1", "a2", "b1"]


def test_a_full_queue_says_so() -> None:
    queue = JobQueue(1, 2, 10)
    for _ in range(3):
        queue.enter("a")
    with pytest.raises(JobError, match=r"its queue is full \(2 sessions are waiting\)"):
        queue.enter("b")


def test_one_client_cannot_take_the_whole_queue() -> None:
    queue = JobQueue(1, 10, 2)
    for _ in range(3):
        queue.enter("a")
    with pytest.raises(JobError, match="2 sessions of this client are waiting already"):
        queue.enter("a")
    assert not queue.enter("b").granted


def test_no_waiting_at_all() -> None:
    queue = JobQueue(1, 0, 0)
    assert queue.enter("a").granted
    with pytest.raises(JobError):
        queue.enter("b")


def test_who_leaves_the_queue_frees_its_place() -> None:
    queue = JobQueue(1, 2, 2)
    running = queue.enter("a")
    gone, stays = queue.enter("b"), queue.enter("c")
    queue.leave(gone)
    queue.leave(gone)
    assert stays.position == 1
    assert queue.waiting == 1
    queue.enter("b")  # there is room again
    queue.leave(running)
    assert stays.granted
    assert not gone.granted


def test_leaving_twice_frees_one_place_only() -> None:
    queue = JobQueue(1, 10, 10)
    running = queue.enter("a")
    waiting = [queue.enter("b"), queue.enter("c")]
    queue.leave(running)
    queue.leave(running)
    assert names(waiting) == ["b"]


def test_a_closed_queue_grants_nothing() -> None:
    queue = JobQueue(1, 10, 10)
    running, waits = queue.enter("a"), queue.enter("b")
    queue.close()
    queue.leave(running)
    assert not waits.granted
    with pytest.raises(JobError, match="about to stop"):
        queue.enter("c")
