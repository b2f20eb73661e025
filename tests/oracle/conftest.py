"""Run one numeric operation on shares in simulation, and say what came out and what it cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.ring.fixed import decode, encode
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Z64, Secret, Shared

FRAC = 18


class Outcome(NamedTuple):
    """The revealed value, rounds on the critical path, and bits of all parties in all."""

    value: Tensor
    rounds: int
    bits: int


Op = Callable[..., Awaitable[Shared]]
Run = Callable[..., Outcome]


@pytest.fixture(params=["rep3", "rep3-moves", "plain"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return {"rep3": Rep3(), "rep3-moves": Rep3(fused=False), "plain": Plain()}[request.param]


@pytest.fixture(scope="session")
def run() -> Run:
    """``run(protocol, op, *values)``: ``op(p, s, *secrets)`` on values shared with 18 fraction bits."""

    def once(p: Protocol, op: Op, *values: Tensor) -> Outcome:
        async def main(s: Session) -> tuple[Tensor | None, int, int]:
            secrets = []
            for i, value in enumerate(values):
                kind = Secret(Z64, FRAC, tuple(value.shape))
                secrets.append(await p.share(s.fork(f"in{i}"), encode(value, Z64, FRAC), 0, kind))
            rounds, sent = s.clock, s.ledger.bytes_sent
            out = await op(p, s.fork("op"), *secrets)
            rounds, sent = s.clock - rounds, s.ledger.bytes_sent - sent
            words = await p.reveal(s.fork("out"), out, tuple(range(p.parties)))
            return (None if words is None else decode(words, out.frac)), rounds, sent

        results, _ = simulate(main, parties=p.parties)
        value = results[0][0]
        return Outcome(value, max(r[1] for r in results), 8 * sum(r[2] for r in results))

    return once


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Normal values in float64, the same in every run of a test."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
