"""A real session under full observation: its logs, metrics and spans hold neither its values nor who ran it."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_ports
from torch import nn

import sfumato as sf
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Limits

pytestmark = pytest.mark.processes

CLIENT = "zebra-and-gnu"
JSON_PARTY = 1
#: Distinct, within range, and nothing that a log would hold by chance.
VALUES = torch.tensor(
    [[3.1734619, -2.7391052, 1.9264837, -0.8173645], [0.4829157, -3.6251893, 2.2918374, 1.1938462]]
)
PATIENCE_S = 30.0


class Collector:
    """An OTLP collector on loopback that keeps what it is sent."""

    def __init__(self) -> None:
        bodies = self.bodies = list[bytes]()

        class Take(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Take)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Observed:
    """Three parties as their operators start them, with metrics at each and a JSON log at one."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        ports = free_ports(6)
        self._folder, self._ports = folder, ports[3:]
        init_cluster(folder / "ours", ports=ports[:3], clients=(CLIENT,), limits=Limits(connect_s=PATIENCE_S))
        self.processes = [self._start(index, environment) for index in range(3)]

    def _start(self, index: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        party = self._folder / "ours" / f"party{index}"
        (party / "party.toml").write_text(f"[operations]\nport = {self._ports[index]}\n")
        command = [
            sys.executable,
            "-m",
            "sfumato.runtime.server",
            "--folder",
            str(party),
            "--index",
            str(index),
        ]
        command += ["--threads", "1", "--log-format", "json" if index == JSON_PARTY else "text"]
        with open(self._folder / f"{index}.log", "wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=log, env={**os.environ, **environment}
            )

    @property
    def keys(self) -> Path:
        return self._folder / "ours" / CLIENT

    def log(self, index: int) -> str:
        return (self._folder / f"{index}.log").read_text(errors="replace")

    def metrics(self, index: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[index]}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def ended(self, index: int) -> float:
        """Sessions that have ended at a party."""
        return total(self.metrics(index), "sfumato_sessions_ended_total")

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """What left in one session that went well and one with an error, by where it went."""
    module = nn.Sequential(nn.Linear(4, 4), nn.SiLU()).eval()
    plan = sf.make_plan(sf.capture(module, (VALUES,)))
    collector = Collector()
    cluster = Observed(
        tmp_path_factory.mktemp("parties"),
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.address,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "SFUMATO_LOG": "DEBUG",
            "PYTHONPATH": str(Path(sf.__file__).resolve().parents[1]),
        },
    )
    try:
        for fails in (False, True):
            with sf.deploy(plan, cluster=cluster.keys / "cluster.toml") as deployment:
                if fails:
                    handle = deployment(VALUES, reveal=False)
                    deployment.drop(handle)
                    with pytest.raises(sf.JobError, match="no value"):
                        deployment(handle)
                else:
                    opened = deployment(VALUES)
                    assert float((opened - module(VALUES).detach()).abs().max()) < 1e-2
        deadline = time.monotonic() + PATIENCE_S
        while b"".join(collector.bodies).count(b"reveal") < 3 or min(map(cluster.ended, range(3))) < 2:
            assert time.monotonic() < deadline, "a session did not end, or its spans did not come"
            time.sleep(0.05)
        yield {
            "spans": b"".join(collector.bodies),
            "metrics": "".join(cluster.metrics(i) for i in range(3)).encode(),
            "json": cluster.log(JSON_PARTY).encode(),
            "text": "".join(cluster.log(i) for i in range(3) if i != JSON_PARTY).encode(),
        }
    finally:
        cluster.close()
        collector.close()


def total(exposition: str, name: str) -> float:
    """Of all series of a metric."""
    lines = [line for line in exposition.splitlines() if re.match(rf"{name}[ {{]", line)]
    assert lines, name
    return sum(float(line.split()[-1]) for line in lines)


def traces_of(values: torch.Tensor) -> Iterator[bytes]:
    """The ways in which a value could stand in bytes or text."""
    yield b"tensor("
    for value in values.flatten().tolist():
        yield struct.pack("<d", value)
        yield struct.pack("<f", value)
        yield f"{abs(value):.5f}".encode()
        yield f"{abs(value):.7f}"[:-2].encode()
        for frac in (18, 20):
            word = round(value * 2**frac)
            yield struct.pack("<q", word)
            yield str(abs(word)).encode()


@pytest.mark.parametrize("where", ["spans", "metrics", "json", "text"])
def test_no_value_leaves(observed: dict[str, bytes], where: str) -> None:
    left = observed[where]
    assert len(left) > 200
    assert [trace for trace in traces_of(VALUES) if trace in left] == []


@pytest.mark.parametrize("where", ["spans", "metrics", "json"])
def test_neither_who_nor_what_leaves_the_host(observed: dict[str, bytes], where: str) -> None:
    for name in (CLIENT, "zebra", "127.0.0.1", os.path.expanduser("~/"), "sfumato-"):
        if not (where == "spans" and name == "sfumato-"):  # the service is called sfumato-party
            assert name.encode() not in observed[where]


def test_all_of_it_was_there_to_look_at(observed: dict[str, bytes]) -> None:
    assert CLIENT.encode() in observed["text"]  # the operator's own log says who
    shown = [f"x = {VALUES[0, 0]}", repr(VALUES), f"[12, {round(float(VALUES[0, 0]) * 2**18)}, 7]"]
    assert all(any(trace in text.encode() for trace in traces_of(VALUES)) for text in shown)
    for name in (b"session", b"queue", b"worker", b"meet", b"load", b"call", b"reveal"):
        assert name in observed["spans"]
    lines = [json.loads(line) for line in observed["json"].splitlines()]
    ended = [line["fields"] for line in lines if line["fields"].get("outcome")]
    assert {fields["outcome"] for fields in ended} >= {"done"}
    assert all("dropped" not in line["fields"] for line in lines)
    assert observed["metrics"].count(b'sfumato_sessions_ended_total{kind="run",outcome="done"}') == 3
    assert b'sfumato_refused_total{reason="other"} 0.0' in observed["metrics"]


def test_what_the_sessions_cost_is_counted(observed: dict[str, bytes]) -> None:
    shown = observed["metrics"].decode()
    for name in (
        "sent_bytes_total",
        "rounds_total",
        "calls_total",
        "store_free_bytes",
        "session_seconds_sum",
    ):
        assert total(shown, f"sfumato_{name}") > 0, name
    assert total(shown, "sfumato_ready") == 3
