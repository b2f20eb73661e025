"""Three parties of this process on links with the latency and bandwidth of a network, one thread each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfumato.errors import JobError
from sfumato.link.memory import memory_links
from sfumato.runtime.backend import Backend
from sfumato.runtime.commands import Call, Certify, Command, Load
from sfumato.runtime.machine import PartyMachine
from sfumato.session.drive import simulation_keys
from sfumato.session.randomness import PairStreams

__all__ = ["NETWORKS", "Emulated", "Network"]

_STALL_S = 600.0


@dataclass(frozen=True, slots=True)
class Network:
    """``latency_s`` one way; ``bandwidth_bytes_s`` of each ordered pair of parties (None: no limit)."""

    name: str
    latency_s: float
    bandwidth_bytes_s: float | None

    def least_s(self, sent: Sequence[int], rounds: int) -> float:
        """What a run cannot take less of on this network: its rounds, or half of the largest party's bytes on each of
        its two links."""
        wire = 0.0 if self.bandwidth_bytes_s is None else max(sent) / 2 / self.bandwidth_bytes_s
        return max(rounds * self.latency_s, wire)


#: The networks of [Ditto] 2.7: 5 Gbit/s and 0.4 ms there and back, 400 Mbit/s and 40 ms.
NETWORKS: Mapping[str, Network] = {
    n.name: n for n in (Network("none", 0.0, None), Network("lan", 2e-4, 625e6), Network("wan", 2e-2, 50e6))
}


class Emulated(Backend):
    """Real schedulers and messages, no encryption of links, randomness from one seed: for measurements alone.

    The parties share this machine's cores and one interpreter, so that computing takes longer than on three hosts;
    ``call_s`` is the time that calls and certificates took.
    """

    protocol = "rep3"

    def __init__(self, network: Network, options: Mapping[str, Any] | None = None) -> None:
        given = {"protocol": "rep3", "stall_s": _STALL_S, **(options or {})}
        super().__init__(certificate=given.get("certificate", True))
        if given["protocol"] != "rep3":
            raise JobError(f"a network is emulated for rep3, not for {given['protocol']}")
        links = memory_links(3, latency_s=network.latency_s, bandwidth_bytes_s=network.bandwidth_bytes_s)
        seed = os.urandom(32)
        self._machines = [
            PartyMachine(i, links[i], PairStreams(simulation_keys(seed, i, 3), "cpu"), given)
            for i in range(3)
        ]
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="party")
        self.call_s = 0.0

    @property
    def _parties(self) -> int:
        return 3

    def _send(
        self, command: Command, attachments: Sequence[Sequence[Tensor]]
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        if isinstance(command, Load):
            command = replace(command, plan=json.loads(json.dumps(command.plan)))
        start = time.perf_counter()
        answers = [
            self._pool.submit(machine.handle, command, list(own))
            for machine, own in zip(self._machines, attachments, strict=True)
        ]
        results = [answer.result() for answer in answers]
        if isinstance(command, Call | Certify):
            self.call_s += time.perf_counter() - start
        return results

    def close(self) -> None:
        for machine in self._machines:
            machine.close()
        self._pool.shutdown()
