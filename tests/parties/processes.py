"""What tests of the parties share: local clusters with a small machine, and who is there and who is gone."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_machine import MACHINE
from torch import Tensor

from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Limits
from sfumato.runtime.commands import Call, Put, Reveal
from sfumato.runtime.control import ask
from sfumato.runtime.local import LocalCluster

HERE = Path(__file__).parent
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
LIMITS = Limits(connect_s=15.0, stall_s=2.0, idle_s=15.0)


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports below those that the kernel hands out, so that nobody who asks it for any port can take one meanwhile."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports: list[int] = []
    for port in random.sample(range(lowest // 2, lowest), lowest // 2):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((host, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"no {count} ports are free on {host}")


def start(**options: object) -> LocalCluster:
    """Three parties on three addresses, with a machine that only exchanges words."""
    settings = {"machine": MACHINE, "python_path": [HERE], "hosts": HOSTS, "limits": LIMITS, "threads": 1}
    return LocalCluster(**(settings | options))  # type: ignore[arg-type]


def put(session: RemoteSession, handle: str = "x", count: int = 1000) -> list[Tensor]:
    words = [torch.randint(-(2**62), 2**62, (count,)) for _ in range(3)]
    session.send(Put(handle, "Z64", 18, (count,)), [[w] for w in words])
    return words


def call(kind: str = "sum", rounds: int = 2) -> Call:
    return Call(kind, "step/0", {"x": "x"}, {"rounds": torch.tensor(rounds)}, ("y",))


def check(session: RemoteSession) -> None:
    """One job with its right result."""
    x = put(session)
    session.send(call(rounds=1))
    for party, (header, (y,)) in enumerate(session.send(Reveal("y"))):
        assert header == {"party": party}
        assert torch.equal(y, x[party] + x[(party + 2) % 3])


def works(cluster: LocalCluster, client: str = "client") -> None:
    with cluster.session(client=client) as session:
        check(session)


def status(cluster: LocalCluster, party: int) -> dict[str, Any]:
    """What a party says of itself."""
    return ask(cluster.ready(), cluster.client_folder, party, {"ask": "status"})


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Living processes that ``pid`` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


def family(pid: int) -> list[int]:
    """``pid``, its children, theirs, and so on."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def leaders(cluster: LocalCluster) -> list[int]:
    """The processes that a local cluster has started itself."""
    assert cluster._forkserver is not None
    return [*cluster.process_ids, cluster._forkserver.pid]


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll a fact about another process, bounded."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
