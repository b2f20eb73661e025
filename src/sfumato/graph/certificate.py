"""A cheap check, under the protocol, that a run stayed in the ranges its plan was calibrated for.

A few random elements per interactive call are compared with what the plan allows: the argument of a function
planned for a range with that range, the result of any other call with a wide bound. The client alone learns how
many of each call's samples were outside. Sampling misses rare outliers: with n samples a call, a share q of
violations goes unseen with probability (1 - q)^n.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.graph.plan import Plan
from sfumato.graph.program import Node
from sfumato.protocol.base import Protocol, Window
from sfumato.ring.prg import stream_words
from sfumato.session.session import Session
from sfumato.types import Z64, Ring, Shared

__all__ = ["SAMPLES", "Certificate", "watched", "window"]

#: Elements looked at per call.
SAMPLES = 8
_WINDOW_BITS = 40
_PUBLIC = hashlib.blake2b(b"sfumato certificate positions", digest_size=32).digest()


def watched(plan: Plan) -> list[str]:
    """Names of the calls that a certificate of this plan looks at, in its order."""
    return [node.name for node in plan.secret_nodes if node.name in plan.watches]


def window(plan: Plan, ring: Ring) -> Window:
    """The bits that tell a value's side of its bound: ten bits of room above the largest bound."""
    largest = max(max(abs(w.lo), abs(w.hi)) for w in plan.watches.values())
    bits = min(_WINDOW_BITS, ring.bits - 1)
    top = math.frexp(largest)[1] + plan.options.frac + 10
    return Window(min(max(0, top - bits + 1), ring.bits - bits), bits)


class Certificate:
    """Collects samples while a plan runs and compares them at the end."""

    def __init__(self, protocol: Protocol, plan: Plan) -> None:
        self._protocol = protocol
        self._plan = plan
        self._samples: dict[str, Shared] = {}

    def look(self, session: Session, node: Node, value: Callable[[str], Any]) -> None:
        """Keep a few elements of a call's argument or result. Local; the positions are public and differ by call."""
        watch = self._plan.watches.get(node.name)
        if watch is None:
            return
        shared = value(watch.name)
        label = f"{session.path}/{node.name}|certificate"
        numbers = stream_words(_PUBLIC, label, Z64, (SAMPLES,)) & ((1 << 62) - 1)
        positions = numbers % shared.type.numel

        def pick(part: Tensor) -> Tensor:
            return part.reshape(-1)[positions.to(part.device)]

        self._samples[node.name] = self._protocol.linear(pick, shared)

    async def violations(self, session: Session) -> Shared:
        """Samples outside their bounds per watched call; shape (calls,), whole numbers, still secret.

        Cost: one comparison of 40 bits and one conversion for 2 * SAMPLES elements a call, all in one batch.
        """
        p = self._protocol
        names = watched(self._plan)
        picked = [self._aligned(name) for name in names]
        values = p.linear(lambda *parts: torch.stack(parts), *picked)  # (calls, SAMPLES)
        watches = [self._plan.watches[name] for name in names]
        ends = torch.tensor([[watch.lo, watch.hi] for watch in watches], dtype=torch.float64)
        bounds = p.encode(values, torch.stack([-ends[:, :1], ends[:, 1:]]))  # (2, calls, 1)
        room = p.linear(lambda part: torch.stack([part, -part]), values)
        outside = await p.less_than_zero(
            session, p.add_public(session, room, bounds), window(self._plan, values.ring)
        )
        return p.linear(lambda part: part.sum((0, 2)), outside)

    def _aligned(self, name: str) -> Shared:
        value = self._samples[name]
        return (
            self._protocol.lift(value, self._plan.options.frac)
            if value.frac < self._plan.options.frac
            else value
        )

    @staticmethod
    def failed(plan: Plan, counts: Sequence[float]) -> list[str]:
        """One line per call that left its range."""
        where = {n.name: n.module_path or "the root" for n in plan.secret_nodes}
        return [
            f"{name} at {where[name]} ({int(count)} of {SAMPLES} samples)"
            for name, count in zip(watched(plan), counts, strict=True)
            if count > 0
        ]
