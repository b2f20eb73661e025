"""All parties in one thread: simulation, plain words, and shapes alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.graph.certificate import Taken
from sfumato.runtime.backend import Backend, tensor_bytes
from sfumato.runtime.commands import Call, Command, Load
from sfumato.runtime.machine import PartyMachine
from sfumato.runtime.report import Took
from sfumato.session.drive import LockstepLink, Scheduler, lockstep, simulation_keys
from sfumato.session.ledger import Row
from sfumato.session.randomness import PairStreams
from sfumato.types import Shared

__all__ = ["Lockstep"]

#: The clock of a party that a message chain does not start from.
_NEVER = -(1 << 40)


class _Repeat(NamedTuple):
    """What one call of a plan costs: path lengths from party j's start to party i's end, ledger rows, the lengths at
    which something leaves for a peer, result types."""

    lengths: list[tuple[int, ...]]
    rows: list[dict[str, Row]]
    departures: list[set[tuple[int, tuple[int, ...]]]]
    values: list[tuple[list[Shared], Taken | None]]

    @staticmethod
    def of(machines: Sequence[PartyMachine], command: Call) -> _Repeat:
        """Read it off machines that have just run the call from unit clocks."""
        prefix = f"/{command.path}"
        rows = [
            {
                p[len(prefix) :]: row
                for p, row in machine.ledger.rows.items()
                if p == prefix or p.startswith(f"{prefix}/")
            }
            for machine in machines
        ]
        departures = [set(machine.ledger.relative) for machine in machines]
        for machine in machines:
            machine.ledger.relative.clear()
        lengths = [machine.clock for machine in machines]
        return _Repeat(
            [clock if isinstance(clock, tuple) else (clock,) for clock in lengths],
            rows,
            departures,
            [machine.known(command) for machine in machines],
        )

    def book(self, machines: Sequence[PartyMachine], command: Call) -> None:
        """The same call under another path: rows and result types."""
        for machine, rows, values in zip(machines, self.rows, self.values, strict=True):
            for suffix, row in rows.items():
                machine.ledger.rows[f"/{command.path}{suffix}"] = replace(row)
            machine.remember(command, values)

    def advance(self, machines: Sequence[PartyMachine], starts: Sequence[int]) -> None:
        """Move the parties' clocks on from where they start, and count what leaves on the way by true rounds."""

        def after(lengths: tuple[int, ...]) -> int:
            return max(length + start for length, start in zip(lengths, starts, strict=True))

        for machine, lengths, departures in zip(machines, self.lengths, self.departures, strict=True):
            machine.ledger.begin()
            for to, departure in departures:
                machine.ledger.depart(to, after(departure))
            machine.clock = after(lengths)


class Lockstep(Backend):
    """All parties in this process, in one thread: ``simulate``, ``plain`` and ``meta``."""

    def __init__(self, kind: str, options: Mapping[str, Any], *, seed: bytes | None = None) -> None:
        super().__init__(certificate=options.get("certificate", True))
        self.protocol = "plain" if kind == "plain" else str(options.get("protocol", "rep3"))
        self.device = "meta" if kind == "meta" else "cpu"
        count = 1 if self.protocol == "plain" else 3
        links = LockstepLink.mesh(count)
        seed = seed or os.urandom(32)
        self._machines = [
            PartyMachine(
                i,
                links[i],
                PairStreams(simulation_keys(seed, i, count), self.device),
                {**options, "protocol": self.protocol},
                device=self.device,
            )
            for i in range(count)
        ]
        self._links = links
        self._repeats: dict[str, _Repeat] = {}

    @property
    def _parties(self) -> int:
        return len(self._machines)

    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        if isinstance(command, Load):
            # A plan reaches real parties as JSON text; what does not survive that must fail here, too.
            command = replace(command, plan=json.loads(json.dumps(command.plan)))
        tasks = [
            Scheduler(link, machine.perform(command, list(own)))
            for link, machine, own in zip(self._links, self._machines, attachments, strict=True)
        ]
        # Here and not in the coroutines: those are interleaved, and would leave the mode on.
        with torch.inference_mode():
            return lockstep(tasks)

    def _call(self, command: Call) -> Sequence[Took]:
        """On shapes, a plan's calls all cost the same: the first is run, the others repeat its rows, and its matrix of
        path lengths moves the clocks on."""
        if self.device != "meta":
            return super()._call(command)
        machines = self._machines
        starts = [clock for machine in machines if isinstance(clock := machine.clock, int)]
        repeat = self._repeats.get(command.name)
        if repeat is None:
            for i, machine in enumerate(machines):
                machine.clock = tuple(0 if j == i else _NEVER for j in range(len(starts)))
            super()._call(command)
            repeat = self._repeats[command.name] = _Repeat.of(machines, command)
        else:
            self._client_bytes += self._parties * tensor_bytes(list(command.publics.values()))
            repeat.book(machines, command)
        repeat.advance(machines, starts)
        return ()

    def close(self) -> None:
        for machine in self._machines:
            machine.close()
