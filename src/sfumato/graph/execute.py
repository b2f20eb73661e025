"""Run a plan's secret calls under a protocol: one coroutine per party, the same order at all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.certificate import Certificate
from sfumato.graph.handlers import HANDLERS, Context
from sfumato.graph.plan import Plan
from sfumato.graph.program import Node, map_refs
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared

__all__ = ["execute", "turns", "waves"]

#: How many calls ahead in program order a call may start; bounds the values that are alive at once.
LOOKAHEAD = 24


def waves(plan: Plan, lookahead: int = LOOKAHEAD) -> list[list[int]]:
    """Indices of the secret calls in groups whose rounds overlap; local calls go alone and as early as they
    can.

    A group is the first interactive call left, in program order, with every other one in the next
    ``lookahead`` calls that does not wait for any of them. Depends on the plan alone.
    """
    nodes = plan.secret_nodes
    ready = set(plan.frontier)
    left = list(range(len(nodes)))
    groups: list[list[int]] = []

    def start(chosen: Sequence[int]) -> None:
        groups.append(list(chosen))
        ready.update(nodes[i].name for i in chosen)
        for i in chosen:
            left.remove(i)

    while left:
        open_calls = [i for i in left[:lookahead] if all(name in ready for name in nodes[i].refs())]
        at_once = [i for i in open_calls if HANDLERS[nodes[i].target].local]
        if at_once:
            for i in at_once:
                start([i])
        else:
            start(open_calls)
    return groups


def turns(plan: Plan) -> list[int]:
    """The role rotation of each secret call: calls of one kind take turns by size, so that all send alike."""
    loads: dict[str, list[int]] = {}
    chosen = []
    for node in plan.secret_nodes:
        load = loads.setdefault(node.target, [0, 0, 0])
        turn = load.index(min(load))
        load[turn] += math.prod(node.shape)
        chosen.append(turn)
    return chosen


async def execute(
    protocol: Protocol,
    session: Session,
    plan: Plan,
    secrets: Mapping[str, Shared],
    publics: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | Mapping[str, Shared],
    *,
    certificate: Certificate | None = None,
) -> list[Shared]:
    """The plan's secret results, in the order of ``plan.secret_outputs``; ``certificate`` sees every result.

    ``secrets``: the client's shares by name (``plan.client_inputs``). ``publics``: ``plan.public_inputs``.
    ``weights``: ``plan.constants`` and ``plan.secret_weights``. Values are freed after their last use.

    Raises:
        JobError: a value of the frontier is missing.
    """
    values: dict[str, Any] = {}  # weights are read at each use, so that a file can hold them
    for name in plan.frontier:
        if name in secrets or name in publics:
            values[name] = secrets[name] if name in secrets else publics[name]
        elif name not in weights:
            raise JobError(f"the value {name} was not given to this run of {plan.program.title}")

    def value(name: str) -> Any:
        return values[name] if name in values else weights[name]

    context = Context(protocol, plan.options, plan.choices)
    nodes, groups, turn = plan.secret_nodes, waves(plan), turns(plan)
    last = {name: g for g, group in enumerate(groups) for i in group for name in nodes[i].refs()}
    kept = set(plan.secret_outputs)
    for g, group in enumerate(groups):
        branches = [partial(_run, context, nodes[i], turn[i], value) for i in group]
        if len(branches) == 1:
            outs = [await branches[0](session)]
        else:
            outs = await session.fork(f"~{g}").gather(*branches)
        for i, out in zip(group, outs, strict=True):
            values[nodes[i].name] = out
            if certificate is not None:
                certificate.look(session, nodes[i], out)
        for name in {n for i in group for n in nodes[i].refs()}:
            if last[name] == g and name not in kept:
                values.pop(name, None)
    return [value(name) for name in plan.secret_outputs]


async def _run(context: Context, node: Node, turn: int, value: Callable[[str], Any], session: Session) -> Any:
    args = map_refs(node.args, value)
    kwargs = {k: map_refs(v, value) for k, v in node.kwargs.items()}
    child = session.fork(node.name, turn=turn, row=True)
    return await HANDLERS[node.target].run(context, child, node, args, kwargs)
