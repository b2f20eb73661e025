"""The floor: what a run could not take less of on this machine, from three measured rates.

max(GEMM work / GEMM rate, bytes / link rate, rounds x round time). The rates come from a short self-test in three
party processes of their own, over the same TLS links that a run uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.bench.machine import cores
from sfumato.errors import JobError
from sfumato.link.base import Frame, Link, tag_of
from sfumato.ring import kernels
from sfumato.runtime.commands import Call, Command
from sfumato.runtime.local import LocalCluster

__all__ = ["Floor", "Rates", "Work", "make_machine", "measure_rates"]

_SIZE, _REPEAT = 768, 5
_ROUNDS, _BLOCKS, _BLOCK_BYTES = 400, 12, 4 << 20
_STALL_S = 60.0
_WORDS = 4  # the wire's code of int64


@dataclass(frozen=True, slots=True)
class Rates:
    """Of this machine: 64-bit multiply-adds a second on one core; payload bytes a second that each party sends while
    all three send to both peers; seconds of one round of the three."""

    gemm_macs_s: float
    link_bytes_s: float
    round_s: float

    def to_json(self) -> dict[str, float]:
        """Numbers by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of a module's products: of two secrets, and of a secret with public weights."""

    secret_macs: int
    public_macs: int

    @staticmethod
    def of(module: nn.Module, inputs: tuple[Tensor, ...], *, secret_weights: bool) -> Work:
        """Counted in one evaluation in the clear."""
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            module(*inputs)
        linear = other = 0
        for operation, flops in counter.get_flop_counts().get("Global", {}).items():
            if secret_weights or "bmm" in str(operation):
                other += flops // 2
            else:
                linear += flops // 2
        return Work(other, linear)

    def seconds(self, rate: float) -> float:
        """On the cores of this machine. A product of secrets is five local ones, at most two at a party; with public
        weights it is two, one each at two parties."""
        c = cores()
        return (max(2.0, 5 / c) * self.secret_macs + max(1.0, 2 / c) * self.public_macs) / rate


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds of the three bounds."""

    gemm_s: float
    link_s: float
    rounds_s: float

    @staticmethod
    def of(work: Work, bytes_sent: int, rounds: int, rates: Rates) -> Floor:
        """``bytes_sent``: payload of the largest party."""
        return Floor(work.seconds(rates.gemm_macs_s), bytes_sent / rates.link_bytes_s, rounds * rates.round_s)

    @property
    def seconds(self) -> float:
        """The largest bound."""
        return max(self.gemm_s, self.link_s, self.rounds_s)

    @property
    def binding(self) -> str:
        """What it comes from."""
        return max((self.gemm_s, "GEMM"), (self.link_s, "link"), (self.rounds_s, "rounds"))[1]

    def to_json(self) -> dict[str, Any]:
        """Seconds by name."""
        return {**asdict(self), "floor_s": self.seconds, "floor_from": self.binding}


def measure_rates() -> Rates:
    """The self-test, in about three seconds."""
    with LocalCluster(machine=f"{__name__}:make_machine") as cluster, cluster.session() as session:

        def ask(name: str) -> list[float]:
            replies = session.send(Call(name, name, {}, {}, ()))
            return [float(fields["value"]) for fields, _ in replies]

        return Rates(max(ask("gemm")), min(ask("link")), max(ask("rounds")))


class _Tester:
    """A party that measures instead of computing."""

    def __init__(self, party: int, link: Link) -> None:
        self._party, self._link = party, link
        self._peers = [(party + 1) % 3, (party + 2) % 3]

    def handle(self, command: Command, attachments: list[Tensor]) -> tuple[dict[str, Any], list[Tensor]]:
        tests: dict[str, Callable[[], float]] = {
            "gemm": self._gemm,
            "link": self._throughput,
            "rounds": self._rounds,
        }
        if not isinstance(command, Call) or command.name not in tests:
            raise JobError("a self-test knows gemm, link and rounds")
        return {"value": tests[command.name]()}, []

    def close(self) -> None:
        """Nothing is kept."""

    def _gemm(self) -> float:
        if self._party:  # one core works, the others are quiet
            return 0.0
        a = torch.arange(_SIZE * _SIZE, dtype=torch.int64).reshape(_SIZE, _SIZE) * 0x9E3779B97F4A7C1
        b = a.T.contiguous()
        best = min(_timed(lambda: kernels.matmul(a, b)) for _ in range(_REPEAT))
        return float(_SIZE**3 / best)

    def _exchange(self, path: str, payload: bytes) -> None:
        tag = tag_of(path)
        for peer in self._peers:
            self._link.send(peer, Frame(tag, _WORDS, 0, payload))
        self._link.flush()
        missing = list(self._peers)
        while missing:
            missing = [peer for peer in missing if self._link.take(peer, tag) is None]
            if missing:
                self._link.wait([(peer, tag, path) for peer in missing], _STALL_S)

    def _throughput(self) -> float:
        block = bytes(_BLOCK_BYTES)
        self._exchange("warm", block)
        return 2.0 * _BLOCK_BYTES / self._each("block", _BLOCKS, block)

    def _rounds(self) -> float:
        return self._each("round", _ROUNDS, bytes(8))

    def _each(self, name: str, count: int, payload: bytes) -> float:
        """Seconds of one of ``count`` exchanges."""

        def all_of_them() -> None:
            for i in range(count):
                self._exchange(f"{name}{i}", payload)

        return _timed(all_of_them) / count


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_machine(party: int, link: Link, pair_keys: dict[int, bytes], options: dict[str, Any]) -> _Tester:
    """What a party process of the self-test runs."""
    return _Tester(party, link)
