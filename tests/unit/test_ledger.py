"""Sends: rounds in which something leaves for a peer, the same before a run and after it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sfumato as sf
from sfumato.session.drive import simulate
from sfumato.session.ledger import Ledger
from sfumato.session.session import Receive, Send, Session

WORD = torch.tensor([7])


def test_messages_of_one_round_to_one_peer_are_one_send() -> None:
    ledger = Ledger()
    for path, to, clock in [("a", 1, 0), ("b", 1, 0), ("a", 2, 0), ("a", 1, 70), ("a", 1, 70), ("a", 1, 6)]:
        ledger.sent(path, 10, to, clock)
    assert (ledger.messages, ledger.sends, ledger.bytes_sent) == (6, 4, 60)
    ledger.begin()
    ledger.sent("a", 10, 1, 0)
    assert ledger.sends == 5


def test_a_peer_that_lies_about_its_clock_costs_no_memory() -> None:
    ledger = Ledger()
    ledger.sent("a", 1, 1, 2**32 - 1)
    assert ledger.sends == 1
    assert len(ledger._seen) == 1


def test_branches_share_their_sends() -> None:
    async def main(s: Session) -> None:
        async def around(t: Session) -> None:
            await t.exchange(
                [Send((s.party + 1) % 3, "m", WORD, 64)],
                [Receive((s.party + 2) % 3, "m", (1,), torch.int64, 64)],
            )

        await s.gather(around, around, around)
        await around(s)

    _, ledgers = simulate(main)
    assert [(ledger.messages, ledger.sends) for ledger in ledgers] == [(4, 2)] * 3


class Block(nn.Module):
    """Dealers rotate, branches overlap, and outputs fit the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.sigmoid(self.a(x)) * self.b(x) + x)


@pytest.fixture(scope="module")
def plan() -> sf.Plan:
    torch.manual_seed(0)
    return sf.make_plan(sf.capture(Block().eval(), (torch.randn(5, 6),)), secret="inputs+weights")


def chained(plan: sf.Plan, backend: str) -> sf.CostReport:
    """Calls that follow each other and calls that do not: their rounds overlap differently."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    with sf.deploy(plan, backend=backend) as deployment:
        first = deployment(x, reveal=False)
        second = deployment(first, reveal=False)
        deployment(x)
        deployment(second)
        return deployment.cost


def test_repeated_calls_are_estimated_to_the_send(plan: sf.Plan) -> None:
    real, estimated = chained(plan, "simulate"), chained(plan, "meta")
    assert estimated.same_cost(real)
    assert estimated.sends == real.sends
    assert 0 < min(real.sends) <= max(real.sends) <= 2 * real.rounds + 2 * 8
    assert all(n <= sum(c.messages[i] for c in real.by_path.values()) for i, n in enumerate(real.sends))


def test_the_report_splits_offline_and_online(plan: sf.Plan) -> None:
    cost = sf.estimate(plan)
    assert cost.offline_bytes == cost.offline_sends == (0, 0, 0)
    assert (cost.online_rounds, cost.online_bytes) == (cost.rounds, cost.bytes_sent)
    record = json.loads(cost.to_json())
    for name in ("rounds", "sends", "bytes_sent", "client_bytes", "setup_bytes", "peak_memory", "by_path"):
        assert name in record
    assert record["offline_rounds"] == 0
    assert record["online_sends"] == list(cost.sends)
