"""What a handler is: how one ATen call runs on secrets, what calibration measures of it, which method the
plan chooses."""

from __future__ import annotations

import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sfumato.graph.program import Node
from sfumato.graph.tails import Sketch
from sfumato.ops.look import Look, Sampler
from sfumato.protocol.base import Protocol
from sfumato.session.session import Session
from sfumato.types import Ring, Shared

__all__ = ["Choose", "Context", "Handler", "Measure", "Options", "Run", "Stats", "Supports", "Watcher"]


@dataclass(frozen=True, slots=True)
class Stats:
    """What calibration saw of one call: numbers by key, and sketches of the quantities that have a range."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    sketches: Mapping[str, Sketch] = field(default_factory=dict)

    def __getitem__(self, key: str) -> float:
        return self.numbers[key]

    def __contains__(self, key: str) -> bool:
        return key in self.numbers

    def get(self, key: str, default: float) -> float:
        return self.numbers.get(key, default)


@dataclass(frozen=True, slots=True)
class Options:
    """What a user chose for a whole plan.

    ``margin``: the most that a calibrated range is widened without enough data, 1.25 by a quarter of its size on each
    side. ``risk``: probability with which one call of the plan leaves a widened range, by the tail model; 0 without a
    model, then every range has the whole margin. ``mixed``: calls have rings of their own, and read here theirs.
    """

    secret: str = "inputs"
    profile: str = "precise"
    frac: int = 18
    ring: str = "Z64"
    margin: float = 1.25
    risk: float = 0.0
    mixed: bool = False


class Watcher(typing.Protocol):
    """Who looks inside calls: the certificate, which samples there."""

    def look_inside(self, node: Node, part: str, value: Shared) -> None:
        """Something inside a call that is at hand; local."""

    def sampler(self, node: Node, part: str, path: str, count: int) -> Sampler | None:
        """The same of ``count`` elements that never will be; see :class:`sfumato.ops.look.Look`."""


@dataclass(frozen=True, slots=True)
class Watching:
    """A watcher of one call, as operations see it."""

    watcher: Watcher
    node: Node

    def __call__(self, part: str, value: Shared) -> None:
        self.watcher.look_inside(self.node, part, value)

    def sampler(self, part: str, path: str, count: int) -> Sampler | None:
        return self.watcher.sampler(self.node, part, path, count)


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler may know while it runs: the protocol, the plan's options, its own choice, and who looks."""

    protocol: Protocol
    options: Options
    choices: Mapping[str, Mapping[str, Any]]
    watcher: Watcher | None = None

    def at(self, options: Options) -> Context:
        """The same with the options of one call."""
        return self if options is self.options else replace(self, options=options)

    @property
    def ring(self) -> Ring:
        return Ring.named(self.options.ring)

    @property
    def frac(self) -> int:
        return self.options.frac

    def choice(self, node: Node) -> Mapping[str, Any]:
        """The plan's choice for this node; empty when there was nothing to choose."""
        return self.choices.get(node.name, {})

    def watching(self, node: Node) -> Look | None:
        """What an operation of this call gives its inner values to, by name; None when nobody looks."""
        return None if self.watcher is None else Watching(self.watcher, node)


#: ``run(context, session, node, args, kwargs)``; secrets come as Shared, public tensors as Tensor, the rest
#: as captured.
Run = Callable[[Context, Session, Node, tuple[Any, ...], Mapping[str, Any]], Awaitable[Any]]
#: ``measure(args, kwargs, out)`` of one float call: tensors by quantity, of which extremes and a sketch are kept, and
#: numbers; keys that start with ``lo_`` merge by min, with ``hi_`` by max.
Measure = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], Mapping[str, float | Tensor]]
#: ``choose(node, stats, options)``; a JSON-able dict, stored in the plan and hashed with it. What it says of itself:
#: ``method``, ``error`` (of a result, absolute or relative as documented there), ``bits`` (per element, in all),
#: ``headroom`` (bits left in the ring at the range's end), ``range`` (of the first argument, or of ``argument``) and
#: ``inside`` (bounds of inner values that the certificate samples: {part: (lo, hi, fraction bits)}).
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
