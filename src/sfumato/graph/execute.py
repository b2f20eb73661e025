"""Run a plan's secret calls under a protocol: one coroutine per party, the same order at all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.certificate import Samples
from sfumato.graph.handlers import HANDLERS, Context
from sfumato.graph.plan import Plan
from sfumato.graph.program import Node, map_refs
from sfumato.graph.published import run_entry
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Shared, SharedIndex

__all__ = ["execute"]


async def execute(
    protocol: Protocol,
    session: Session,
    plan: Plan,
    secrets: Mapping[str, Shared | SharedIndex],
    publics: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | Mapping[str, Shared],
    *,
    samples: Samples | None = None,
) -> list[Shared]:
    """The plan's secret results, in the order of ``plan.secret_outputs``; ``samples`` sees every call.

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

    context = Context(protocol, plan.options, plan.choices, samples)
    nodes, order = plan.secret_nodes, plan.order
    for g, group in enumerate(order.groups):
        branches = [partial(_run, context.at(plan.options_of(nodes[i].name)), nodes[i], order.turns[i], value)
                    for i in group]  # fmt: skip
        if len(branches) == 1:
            outs = [await branches[0](session)]
        else:
            outs = await session.fork(f"~{g}").gather(*branches)
        for i, out in zip(group, outs, strict=True):
            values[nodes[i].name] = out
            if samples is not None:
                samples.look(nodes[i], value)
        for name in order.freed[g]:
            values.pop(name, None)
    return [value(name) for name in plan.secret_outputs]


async def _run(context: Context, node: Node, turn: int, value: Callable[[str], Any], session: Session) -> Any:
    args = map_refs(node.args, value)
    kwargs = {k: map_refs(v, value) for k, v in node.kwargs.items()}
    child = session.fork(node.name, turn=turn, row=True)
    run = run_entry if "entry" in context.choice(node) else HANDLERS[node.target].run
    return await run(context, child, node, args, kwargs)
