"""A party's numbers, and the HTTP server that shows them: bounded, and silent about everything else."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sfumato.errors import LinkError
from sfumato.runtime import metrics as module
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.metrics import Metrics, OperationsServer
from sfumato.runtime.telemetry import KINDS, OUTCOMES, REASONS

SOURCE = Path(module.__file__).resolve().parents[2]
PROMPT = "a letter to nobody"
TIMEOUT_S = 20.0


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_a_session_is_counted() -> None:
    metrics = Metrics(1)
    metrics.queued(4)
    metrics.session_started("run")
    metrics.session_started("run")
    assert value(metrics, "sfumato_sessions_running", kind="run") == 2
    metrics.session_ended("run", "done", 2.0, {"bytes_sent": 100, "rounds": 7, "calls": 2, PROMPT: 5})
    metrics.session_ended("run", "lost", 0.05, {})
    assert value(metrics, "sfumato_sessions_running", kind="run") == 0
    assert value(metrics, "sfumato_sessions_queued") == 4
    assert value(metrics, "sfumato_sessions_ended_total", kind="run", outcome="done") == 1
    assert value(metrics, "sfumato_sessions_ended_total", kind="run", outcome="lost") == 1
    assert value(metrics, "sfumato_session_seconds_count", kind="run") == 2
    assert value(metrics, "sfumato_session_seconds_bucket", kind="run", le="0.1") == 1
    assert value(metrics, "sfumato_session_seconds_bucket", kind="run", le="3600.0") == 2
    assert value(metrics, "sfumato_sent_bytes_total") == 100
    assert value(metrics, "sfumato_rounds_total") == 7
    assert value(metrics, "sfumato_calls_total") == 2
    assert value(metrics, "sfumato_build_info", party="1") == 1
    assert value(metrics, "process_open_fds") is not None
    assert PROMPT.encode() not in metrics.exposition()


def test_every_series_is_there_before_the_first_event() -> None:
    metrics = Metrics(0)
    for kind in KINDS:
        for outcome in OUTCOMES:
            assert value(metrics, "sfumato_sessions_ended_total", kind=kind, outcome=outcome) == 0
    for reason in REASONS:
        assert value(metrics, "sfumato_refused_total", reason=reason) == 0


def test_an_unknown_word_becomes_other() -> None:
    metrics = Metrics(0)
    words: list[Any] = [PROMPT, "", None, 3, b"busy", ["busy"]]
    for word in words:
        metrics.refused(word)
        metrics.session_started(word)
        metrics.session_ended(word, word, -1.0)
    metrics.refused("busy")
    assert value(metrics, "sfumato_refused_total", reason="other") == len(words)
    assert value(metrics, "sfumato_refused_total", reason="busy") == 1
    assert value(metrics, "sfumato_sessions_ended_total", kind="other", outcome="other") == len(words)
    text = metrics.exposition().decode()
    assert PROMPT not in text
    allowed = KINDS | OUTCOMES | REASONS | {"other"}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, word in sample.labels.items():
                assert label in ("le", "version", "party") or word in allowed


def test_two_parties_of_one_process_do_not_share_numbers() -> None:
    one, other = Metrics(0), Metrics(1)
    one.refused("busy")
    assert value(other, "sfumato_refused_total", reason="busy") == 0


def test_the_store_and_the_certificate(tmp_path: Path) -> None:
    metrics = Metrics(0)
    for name in ("models", "store_bytes", "store_free_bytes", "certificate_expiry_timestamp_seconds"):
        assert math.isnan(value(metrics, f"sfumato_{name}") or 0.0)
    store = tmp_path / "not" / "yet"
    metrics.watch_store(store)
    assert value(metrics, "sfumato_models") == 0
    assert (value(metrics, "sfumato_store_free_bytes") or 0) > 0
    for name, size in (("one", 10), ("two", 20), (".draft-1", 40)):
        (store / name / "weights").mkdir(parents=True)
        (store / name / "weights" / "0").write_bytes(bytes(size))
    assert value(metrics, "sfumato_models") == 2
    assert value(metrics, "sfumato_store_bytes") == 30
    init_cluster(tmp_path / "ours")
    metrics.certificate(tmp_path / "ours" / "party0" / "certificate.pem")
    ends = value(metrics, "sfumato_certificate_expiry_timestamp_seconds")
    assert ends is not None
    assert 360 < (ends - time.time()) / 86400 < 370
    (tmp_path / "broken.pem").write_text("no certificate")
    for name in ("broken.pem", "absent.pem"):
        metrics.certificate(tmp_path / name)
        assert value(metrics, "sfumato_certificate_expiry_timestamp_seconds") == 0


def test_without_prometheus_a_party_still_runs() -> None:
    code = (
        "import sys, urllib.request, urllib.error\n"
        "sys.modules['prometheus_client'] = None\n"
        "from sfumato.runtime.metrics import Metrics, OperationsServer\n"
        "m = Metrics(0)\n"
        "m.session_started('run'); m.session_ended('run', 'done', 1.0, {}); m.queued(1); m.refused('busy')\n"
        "m.ready(True); m.watch_store('.'); m.certificate('x')\n"
        "print(m.exposition())\n"
        "s = OperationsServer('127.0.0.1', 0, m, lambda: {'ready': True}); s.start()\n"
        "base = 'http://127.0.0.1:%d' % s.address[1]\n"
        "print(urllib.request.urlopen(base + '/readyz').status)\n"
        "try: urllib.request.urlopen(base + '/metrics')\n"
        "except urllib.error.HTTPError as e: print(e.code, e.read().decode())\n"
        "print('torch' in sys.modules)\n"
        "s.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        check=False,
    )
    assert done.stdout.splitlines()[:2] == ["b''", "200"], done.stderr
    assert "501 install sfumato[ops]" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


# ---- the server -----------------------------------------------------------------------------------------------------


class Health:
    """What the party says of itself; a test changes it."""

    def __init__(self) -> None:
        self.now: Mapping[str, Any] | Exception = {"ready": True, "running": 1, "queued": 2}

    def __call__(self) -> Mapping[str, Any]:
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def server(health: Health) -> Iterator[OperationsServer]:
    server = OperationsServer("127.0.0.1", 0, Metrics(0), health, deadline_s=TIMEOUT_S)
    server.start()
    yield server
    server.stop()


def connect(server: OperationsServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=TIMEOUT_S)


def exchange(server: OperationsServer, asked: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the answer to ``asked``; status 0 when there was none."""
    with connect(server) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(asked)
        return read(sock)


def read(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            answer += part
    if not answer:
        return 0, {}, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}, body


def get(server: OperationsServer, path: str) -> tuple[int, dict[str, str], bytes]:
    return exchange(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def test_alive_ready_and_metrics(server: OperationsServer, health: Health) -> None:
    assert get(server, "/healthz")[::2] == (200, b"alive\n")
    status, headers, body = get(server, "/readyz")
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"ready": True, "running": 1, "queued": 2}
    status, headers, body = get(server, "/metrics?x=1")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert int(headers["content-length"]) == len(body)
    assert b"sfumato_ready 1.0" in body
    health.now = {"ready": False, "queued": 2}
    status, _, body = get(server, "/readyz")
    assert (status, json.loads(body)) == (503, {"ready": False, "queued": 2})
    assert b"sfumato_ready 0.0" in get(server, "/metrics")[2]
    assert get(server, "/healthz")[0] == 200


@pytest.mark.parametrize("state", [{}, {"ready": 1}, {"ready": "yes"}, ValueError(PROMPT)])
def test_ready_is_only_what_says_so(server: OperationsServer, health: Health, state: Any) -> None:
    health.now = state
    status, _, body = get(server, "/readyz")
    assert status == 503
    assert json.loads(body)["ready"] is False
    assert PROMPT.encode() not in body


def test_health_shows_numbers_and_fixed_words_only(server: OperationsServer, health: Health) -> None:
    health.now = {"ready": True, "store": PROMPT, PROMPT: 1, "reason": "deadline"}
    body = get(server, "/readyz")[2]
    assert json.loads(body) == {"ready": True, "reason": "deadline", "dropped": 2}


def test_head_has_no_body_and_no_banner(server: OperationsServer) -> None:
    status, headers, body = exchange(server, b"HEAD /healthz HTTP/1.0\r\n\r\n")
    assert (status, body) == (200, b"")
    assert headers["content-length"] == "6"
    assert set(headers) == {"content-type", "content-length", "cache-control", "connection"}


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../healthz HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
        (b"get /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\n\r\n", 400),
        (b"GET http://x/healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\n", 400),
        (b"sfumato\x02" + bytes(16) + b"\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 5_000 + b"\r\n", 431),
        (b"y" * 20_000, 431),
        (b"", 0),
    ],
    ids=str,
)
def test_what_is_not_a_plain_request_is_refused(
    server: OperationsServer, asked: bytes, status: int, request: pytest.FixtureRequest
) -> None:
    if asked:
        found, headers, _ = exchange(server, asked)
        assert found == status
        assert ("allow" in headers) == (status == 405)
    else:
        connect(server).close()
    assert get(server, "/healthz")[0] == 200


def test_silent_and_half_sent_requests_do_not_keep_others_out(server: OperationsServer) -> None:
    """More of them than there are places; each new caller is served while none of them has reached its deadline."""
    with contextlib.ExitStack() as slow:
        for number in range(50):
            sock = slow.enter_context(connect(server))
            if number % 2:
                sock.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            if number % 10 == 9:
                assert get(server, "/healthz")[0] == 200
        assert get(server, "/metrics")[0] == 200


def test_a_slow_request_ends_at_the_deadline(health: Health) -> None:
    server = OperationsServer("127.0.0.1", 0, Metrics(0), health, deadline_s=0.2)
    server.start()
    try:
        with connect(server) as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\n")
            assert read(sock)[0] == 408
        with connect(server) as sock:  # a byte now and then does not move the deadline
            until = time.monotonic() + TIMEOUT_S
            with contextlib.suppress(OSError):
                for byte in b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 1000:
                    sock.sendall(bytes([byte]))
                    sock.settimeout(0.02)
                    with contextlib.suppress(TimeoutError):
                        assert sock.recv(4096).startswith(b"HTTP/1.1 408")
                        break
                    assert time.monotonic() < until
    finally:
        server.stop()


def test_it_says_where_it_cannot_listen_and_stops_twice(server: OperationsServer, health: Health) -> None:
    with pytest.raises(LinkError, match="cannot listen on"):
        OperationsServer(*server.address, Metrics(0), health)
    never_started = OperationsServer("127.0.0.1", 0, Metrics(0), health)
    never_started.stop()
    server.stop()
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        connect(server)
