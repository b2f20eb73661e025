"""What a handler is: how one ATen call runs on secrets, what calibration measures of it, which method the
plan chooses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfumato.graph.program import Node
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Ring

__all__ = ["Choose", "Context", "Handler", "Measure", "Options", "Run", "Stats", "Supports"]

Stats = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user chose for a whole plan. ``margin`` widens calibrated ranges: 1.25 adds a quarter on each
    side."""

    secret: str = "inputs"
    profile: str = "precise"
    frac: int = 18
    ring: str = "Z64"
    margin: float = 1.25


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler may know while it runs: the protocol, the plan's options, and its own choice."""

    protocol: Protocol
    options: Options
    choices: Mapping[str, Mapping[str, Any]]

    @property
    def ring(self) -> Ring:
        return Ring.named(self.options.ring)

    @property
    def frac(self) -> int:
        return self.options.frac

    def choice(self, node: Node) -> Mapping[str, Any]:
        """The plan's choice for this node; empty when there was nothing to choose."""
        return self.choices.get(node.name, {})


#: ``run(context, session, node, args, kwargs)``; secrets come as Shared, public tensors as Tensor, the rest
#: as captured.
Run = Callable[[Context, Session, Node, tuple[Any, ...], Mapping[str, Any]], Awaitable[Any]]
#: ``measure(args, kwargs, out)`` of one float call; keys that start with ``lo_`` merge by min, with ``hi_``
#: by max.
Measure = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], dict[str, float]]
#: ``choose(node, stats, options)``; a JSON-able dict, stored in the plan and hashed with it.
Choose = Callable[[Node, Stats, Options], dict[str, Any]]
#: ``supports(node, secret)``: one flag per entry of ``node.args`` (a nested argument is secret if any part
#: is), kwargs after;
#: a sentence on what does not work, or None.
Supports = Callable[[Node, tuple[bool, ...]], str | None]


@dataclass(frozen=True)
class Handler:
    """How one ATen target runs under a protocol. ``local`` handlers never send a message."""

    run: Run
    measure: Measure | None = None
    choose: Choose | None = None
    supports: Supports | None = None
    local: bool = False
