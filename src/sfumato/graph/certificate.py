"""A cheap check, under the protocol, that a run stayed in the ranges its plan was calibrated for.

A few random elements per interactive call are compared with what the plan allows: the argument of a function
planned for a range with that range, so are a norm's mean squares and an attention's scores and row sums inside it, the
result of any other call with a wide bound. While a plan runs, samples are only kept; they are compared when something
that descends from the run is to be opened, those of many runs in one batch. The client alone learns how many of each
call's samples were outside. Sampling misses rare outliers: with n samples a call, a share q of violations goes unseen
with probability (1 - q)^n. With ``every`` all elements of everything that was planned for a range are compared instead,
at about the price of the functions themselves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.graph.plan import Plan
from sfumato.graph.program import Node
from sfumato.graph.watches import Watch
from sfumato.ops.look import Sampler
from sfumato.protocol.base import Protocol, Window
from sfumato.ring.prg import stream_words
from sfumato.session.session import Session
from sfumato.types import Z64, Ring, Shared

__all__ = ["SAMPLES", "Samples", "Taken", "failed", "sample_count", "violations", "watched", "window"]

#: Elements looked at per watch.
SAMPLES = 8
#: Bits of a comparison, and how many of them lie below the top bit of a bound; the rest are room for values beyond it.
#: Where every element is compared bits cost: a value is held to its bounds up to 2^-24 of the larger one.
_WINDOW, _WINDOW_OF_EVERY = (48, 30), (40, 24)
#: Units of a sample's last bit that it may lie outside: rounding.
_ROUNDING = 4
_POSITIVE = (1 << 62) - 1
_PUBLIC = hashlib.blake2b(b"sfumato certificate positions", digest_size=32).digest()


def watched(plan: Plan) -> list[str]:
    """What a certificate of this plan looks at, in its order: names of calls, and ``call.part`` inside calls. What
    lives in the narrower ring of a mixed plan comes last."""
    order = {node.name: i for i, node in enumerate(plan.secret_nodes)}
    return sorted(plan.watches, key=lambda key: (_is_narrow(plan, key), order[key.partition(".")[0]], key))


def _is_narrow(plan: Plan, key: str) -> bool:
    """Whether this watch looks at words of a ring smaller than the plan's."""
    watch = plan.watches[key]
    return (plan.format_of(watch.name).ring if watch.name else watch.ring) != plan.options.ring


def _frac(plan: Plan, watch: Watch) -> int:
    """Fraction bits of what a watch looks at."""
    return plan.format_of(watch.name).frac if watch.frac < 0 else watch.frac


def sample_count(plan: Plan) -> int:
    """Elements that one run of the plan leaves to be compared, where not every one is."""
    return SAMPLES * len(plan.watches)


class Taken(NamedTuple):
    """What one run left: all samples in a row, those of the plan's ring and those of a narrower one, and how many
    belong to each watch."""

    values: tuple[Shared, ...]
    sizes: tuple[int, ...]


def _tops(plan: Plan) -> dict[str, int]:
    """By watch: the bits of a word at its bound, in the fraction bits of the value that it looks at."""
    return {key: math.frexp(max(abs(w.lo), abs(w.hi)))[1] + _frac(plan, w) for key, w in plan.watches.items()}


def window(plan: Plan, ring: Ring, *, every: bool = False) -> Window:
    """The bits that tell a value's side of its bound. Samples are shifted up until all bounds have the same top bit."""
    bits, below = _WINDOW_OF_EVERY if every else _WINDOW
    shift = min(max(0, max(_tops(plan).values()) - below), ring.bits - 2)
    return Window(shift, min(bits, ring.bits - 1 - shift))


class Samples:
    """Collects elements per watch while a plan runs once under ``path``: a few of them, or with ``every`` all of those
    that were planned for a range."""

    def __init__(self, protocol: Protocol, plan: Plan, path: str, *, every: bool = False) -> None:
        self._protocol = protocol
        self._plan = plan
        names = watched(plan)
        self._every = {name for name in names if every and plan.watches[name].ranged}
        words = stream_words(_PUBLIC, f"{path}|certificate", Z64, (len(names), SAMPLES))
        self._random = dict(zip(names, words.numpy() & _POSITIVE, strict=True))
        self._path = path
        self._found: dict[str, Shared] = {}
        self._blocks: dict[tuple[str, str], int] = {}
        # By part and path: priorities and samples.
        self._pieces: dict[str, dict[str, tuple[Tensor, Shared]]] = {}

    def look(self, node: Node, value: Callable[[str], Any]) -> None:
        """Keep elements of a call's argument or result. Local; the positions are public and differ by call."""
        watch = self._plan.watches.get(node.name)
        if watch is not None:
            shared: Shared = value(watch.name)
            self._found[node.name] = self._picked(node.name, shared, _frac(self._plan, watch))

    def look_inside(self, node: Node, part: str, value: Shared) -> None:
        """Keep elements of a value inside a call; where it comes in blocks, each sample is from any of them."""
        block = self._blocks[node.name, part] = self._blocks.get((node.name, part), 0) + 1
        sampler = self.sampler(node, part, f"{self._path}|{block}", value.type.numel)
        if sampler is not None:
            pick, seen = sampler
            seen(self._protocol.linear(pick, value))

    def sampler(self, node: Node, part: str, path: str, count: int) -> Sampler | None:
        """(pick, seen) for a piece of a value inside a call, also one that is never at hand as shares; ``path`` tells
        pieces apart. Of several pieces each sample is from any, by public priorities, in whatever order they come."""
        key = f"{node.name}.{part}"
        watch = self._plan.watches.get(key)
        if watch is None:
            return None
        words = stream_words(_PUBLIC, f"{path}|{key}", Z64, (2, SAMPLES)) & _POSITIVE

        def seen(picked: Shared) -> None:
            self._pieces.setdefault(key, {})[path] = words[0], self._lifted(picked, watch.frac)

        return _picking(None if key in self._every else words[1] % count), seen

    def _picked(self, key: str, shared: Shared, frac: int) -> Shared:
        flat = None if key in self._every else torch.from_numpy(self._random[key] % shared.type.numel)
        return self._lifted(self._protocol.linear(_picking(flat), shared), frac)

    def _lifted(self, picked: Shared, frac: int) -> Shared:
        return self._protocol.lift(picked, frac) if picked.frac < frac else picked

    def _of_pieces(self, key: str) -> Shared:
        """The samples of a value that came in pieces."""
        pieces = [self._pieces[key][path] for path in sorted(self._pieces[key])]
        values = [picked for _, picked in pieces]
        if key in self._every:
            return self._protocol.linear(lambda *parts: torch.cat(parts), *values)
        first = torch.stack([priority for priority, _ in pieces]).argmax(0, keepdim=True)

        def chosen(*parts: Tensor) -> Tensor:
            stacked = torch.stack(parts)
            return (
                stacked[0]
                if stacked.device.type == "meta"
                else stacked.gather(0, first.to(stacked.device))[0]
            )

        return self._protocol.linear(chosen, *values)

    def taken(self) -> Taken:
        """All samples of the run, still secret."""
        frac, groups = self._plan.options.frac, ([], [])  # type: tuple[int, tuple[list[Shared], list[Shared]]]
        self._found |= {key: self._of_pieces(key) for key in self._pieces}
        for name in watched(self._plan):
            groups[_is_narrow(self._plan, name)].append(self._found[name].viewed(frac))
        rows = (self._protocol.linear(lambda *parts: torch.cat(parts), *group) for group in groups if group)
        return Taken(tuple(rows), tuple(x.type.numel for group in groups for x in group))


def _picking(flat: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Elements at these positions, or all of them, in a row."""

    def pick(part: Tensor) -> Tensor:
        if flat is None:
            return part.reshape(-1)
        if part.device.type == "meta":
            return part.new_empty((SAMPLES,))
        # By position: a transposed or expanded component is not copied for eight of its elements.
        return torch.take(part, flat if part.device.type == "cpu" else flat.to(part.device))

    return pick


async def violations(p: Protocol, session: Session, runs: Sequence[tuple[Plan, Sequence[Taken]]]) -> Shared:
    """Samples outside their bounds by watched call, summed over the runs of each plan; whole numbers, still secret:
    those of the first plan's calls, then of the next one's.

    Cost: one comparison of 48 bits (40 for every element) and one conversion for twice the elements, all at once.
    """
    counts = await session.gather(*(partial(_counts, p, plan, taken) for plan, taken in runs))
    return p.linear(lambda *parts: torch.cat(parts), *counts)


async def _counts(p: Protocol, plan: Plan, taken: Sequence[Taken], session: Session) -> Shared:
    sizes = torch.tensor([size for run in taken for size in run.sizes])
    values = await _shifted(p, session.fork("rows"), plan, taken, sizes)
    side = window(plan, values.ring, every=values.type.numel > len(taken) * sample_count(plan))
    bounds = _bounds(plan, side).repeat(1, len(taken)).repeat_interleave(sizes, 1)  # (2, elements)
    room = p.linear(lambda part: torch.stack([part, -part]), values)
    outside = await p.less_than_zero(
        session, p.add_public(session, room, p.encode(values, bounds)), side, ring=Z64
    )
    watch = torch.arange(len(plan.watches)).repeat(len(taken)).repeat_interleave(sizes)

    def counted(part: Tensor) -> Tensor:
        if part.device.type == "meta":
            return part.new_empty((len(plan.watches),))
        return part.new_zeros(len(plan.watches)).index_add_(0, watch.to(part.device), part.sum(0))

    return p.linear(counted, outside)


async def _shifted(p: Protocol, s: Session, plan: Plan, taken: Sequence[Taken], sizes: Tensor) -> Shared:
    """All samples in the plan's ring, run by run, shifted up as :func:`window` says. Those of a narrower ring are cast:
    2 rounds and 162 bits each."""
    tops = _tops(plan)
    highest = max(tops.values())
    shifts = torch.tensor([min(62, highest - tops[name]) for name in watched(plan)])
    rows = [list(run.values) for run in taken]
    narrow = [row[-1] for row in rows if len(row) > 1 or _is_narrow(plan, watched(plan)[0])]
    if narrow:
        wide = await p.cast(
            s, p.linear(lambda *parts: torch.cat(parts), *narrow), Ring.named(plan.options.ring)
        )
        for i, row in enumerate(rows):
            row[-1] = _piece(p, wide, i, row[-1].type.numel)
    words = shifts.repeat(len(taken)).repeat_interleave(sizes)
    return p.linear(
        lambda *parts: torch.cat(parts) << words.to(device=parts[0].device, dtype=parts[0].dtype),
        *(x for row in rows for x in row),
    )


def _piece(p: Protocol, x: Shared, i: int, size: int) -> Shared:
    return p.linear(lambda part: part[i * size : (i + 1) * size], x)


def _bounds(plan: Plan, side: Window) -> Tensor:
    """(-lo, hi) of every watch, in the units of the shifted samples and with room for rounding and for what the window
    does not tell from a negative number: (2, watches)."""
    tops, frac, names = _tops(plan), plan.options.frac, watched(plan)
    highest = max(tops.values())
    ends = []
    for name in names:
        watch = plan.watches[name]
        own = _frac(plan, watch)
        scale = math.ldexp(1.0, own - frac + highest - tops[name])
        more = math.ldexp(_ROUNDING, -own) * scale + math.ldexp(1.0, side.shift - frac)
        ends.append([more - watch.lo * scale, watch.hi * scale + more])
    return torch.tensor(ends, dtype=torch.float64).T


def failed(plan: Plan, counts: Sequence[float], runs: int, *, every: bool = False) -> list[str]:
    """One line per watch that left its range in any of ``runs`` runs."""
    where = {n.name: n.module_path or "the root" for n in plan.secret_nodes}
    lines = []
    for name, count in zip(watched(plan), counts, strict=True):
        looked = "elements" if every and plan.watches[name].ranged else f"of {SAMPLES * runs} samples"
        if count > 0:
            lines.append(f"{name} at {where[name.partition('.')[0]]} ({int(count)} {looked})")
    return lines
