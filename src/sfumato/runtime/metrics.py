"""Numbers of a party for Prometheus, and the small HTTP server that shows them beside its health.

Labels are words of fixed lists (`telemetry.KINDS`, ``OUTCOMES``, ``REASONS``); another word counts as ``other``. No
metric holds the name of a client, model or file. Without prometheus-client (extra ``[ops]``) a `Metrics` does nothing
and ``/metrics`` says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sfumato.link.identity import listen
from sfumato.runtime.handshake import package_version
from sfumato.runtime.telemetry import KINDS, OUTCOMES, REASONS, facts

__all__ = ["Metrics", "OperationsServer"]

_log = logging.getLogger(__name__)
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0)
_OTHER = "other"


class Metrics:
    """Counters and gauges of party ``party``, in a registry of their own. Any thread may call any method."""

    def __init__(self, party: int) -> None:
        self.available = True
        self._store_folder: Path | None = None
        try:
            import prometheus_client as prometheus
        except ImportError:
            self.available = False
            return
        prometheus.disable_created_metrics()
        self._registry = registry = prometheus.CollectorRegistry()
        self._expose = prometheus.generate_latest
        prometheus.ProcessCollector(registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return prometheus.Gauge(f"sfumato_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return prometheus.Counter(f"sfumato_{name}", text, labels, registry=registry)

        self._running = gauge("sessions_running", "Sessions that run now.", ("kind",))
        self._queued = gauge("sessions_queued", "Sessions that wait for their turn.")
        self._ended = counter("sessions_ended", "Sessions that ended.", ("kind", "outcome"))
        self._refused = counter("refused", "Requests and connections turned away.", ("reason",))
        self._seconds = prometheus.Histogram(
            "sfumato_session_seconds",
            "From grant to end of a session.",
            ("kind",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._spent = {
            "bytes_sent": counter("sent_bytes", "Payload sent to the other parties."),
            "rounds": counter("rounds", "Rounds of messages between the parties."),
            "calls": counter("calls", "Programs executed."),
        }
        self._ready = gauge("ready", "1 when the party takes sessions.")
        self._expires = gauge(
            "certificate_expiry_timestamp_seconds", "When this party's certificate ends, Unix time."
        )
        self._store = gauge("store_bytes", "Size of the model store on disk.")
        self._free = gauge("store_free_bytes", "Free space on the disk of the model store.")
        self._models = gauge("models", "Models in the store.")
        for unseen in (self._expires, self._store, self._free, self._models):
            unseen.set(math.nan)  # not 0, which would be an alarm: nobody has looked
        build = gauge("build_info", "1, labelled with the release.", ("version", "party"))
        build.labels(package_version(), str(int(party))).set(1)
        for kind in [
            *KINDS,
            _OTHER,
        ]:  # every series from the start: a rate needs the zero before the first event
            self._running.labels(kind)
            self._seconds.labels(kind)
            for outcome in [*OUTCOMES, _OTHER]:
                self._ended.labels(kind, outcome)
        for reason in [*REASONS, _OTHER]:
            self._refused.labels(reason)

    def session_started(self, kind: str) -> None:
        """A session was granted."""
        if self.available:
            self._running.labels(_word(kind, KINDS)).inc()

    def session_ended(
        self, kind: str, outcome: str, seconds: float, spent: Mapping[str, float] | None = None
    ) -> None:
        """The session is over, ``seconds`` after its grant. ``spent``: bytes_sent, rounds, calls; other names are
        ignored."""
        if not self.available:
            return
        kind = _word(kind, KINDS)
        self._running.labels(kind).dec()
        self._ended.labels(kind, _word(outcome, OUTCOMES)).inc()
        self._seconds.labels(kind).observe(max(0.0, seconds))
        for name, counter in self._spent.items():
            counter.inc(max(0.0, float((spent or {}).get(name, 0.0))))

    def queued(self, n: int) -> None:
        """``n`` sessions wait now."""
        if self.available:
            self._queued.set(n)

    def refused(self, why: str) -> None:
        """A request or connection was turned away; ``why`` is a word of `telemetry.REASONS`."""
        if self.available:
            self._refused.labels(_word(why, REASONS)).inc()

    def ready(self, is_ready: bool) -> None:
        """Whether the party takes sessions."""
        if self.available:
            self._ready.set(int(is_ready))

    def certificate(self, path: Path | str) -> None:
        """Read when the certificate in ``path`` (PEM) ends. One that cannot be read shows as 0, long expired."""
        if not self.available:
            return
        from cryptography import x509

        ends = 0.0
        with contextlib.suppress(OSError, ValueError):
            ends = x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
        self._expires.set(ends)

    def watch_store(self, folder: Path | str) -> None:
        """Show what the model store in ``folder`` takes and has left, as of each `exposition`."""
        self._store_folder = Path(folder)

    def exposition(self) -> bytes:
        """Everything in Prometheus's text format; empty without prometheus-client."""
        if not self.available:
            return b""
        if self._store_folder is not None:
            self._look_at(self._store_folder)
        return self._expose(self._registry)

    def _look_at(self, folder: Path) -> None:
        size = models = free = 0
        with contextlib.suppress(OSError):  # files come and go; a folder that cannot be read has no room
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(there).free
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.is_dir() and not path.name.startswith("."):
                    models += 1
                    size += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        self._store.set(size)
        self._free.set(free)
        self._models.set(models)


def _word(word: object, known: frozenset[str]) -> str:
    return word if isinstance(word, str) and word in known else _OTHER


# ---- /healthz, /readyz, /metrics ------------------------------------------------------------------------------------

_LARGEST_REQUEST = 8192
_CONNECTIONS = 16
_REQUEST_LINE = re.compile(rb"([A-Z]{1,10}) (/[!-~]{0,1023}) HTTP/1\.[01]\r?\n")
_REASON_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
_TEXT = "text/plain; charset=utf-8"
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class OperationsServer:
    """Serves ``/healthz`` (200 while the process is alive), ``/readyz`` (200, or 503 when ``health()["ready"]`` is not
    true; JSON of the numbers and fixed words in it) and ``/metrics``, to anybody who reaches ``host`` and ``port``:
    keep it on loopback or a network of the operator's own. Port 0 picks a free one.

    Bounds: 8 KiB and ``deadline_s`` for a request, 16 connections (a new one ends the oldest), one request each.
    ``health`` must not block. Raises ``LinkError`` when it cannot listen.
    """

    def __init__(
        self,
        host: str,
        port: int,
        metrics: Metrics,
        health: Callable[[], Mapping[str, Any]],
        *,
        deadline_s: float = 5.0,
    ) -> None:
        self._metrics, self._health = metrics, health
        self._server = _Server(listen(host, port), self._answer, deadline_s)
        self.address: tuple[str, int] = self._server.socket.getsockname()[:2]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="sfumato-operations", daemon=True
        )

    def start(self) -> None:
        """Answer from now on, in threads of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests; may be called twice, and without `start`."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        """(status, content type, body)."""
        if path == "/healthz":
            return 200, _TEXT, b"alive\n"
        if path == "/readyz":
            state = self._state()
            return (200 if state["ready"] else 503), "application/json", json.dumps(state).encode() + b"\n"
        if path == "/metrics":
            if not self._metrics.available:
                return 501, _TEXT, b"install sfumato[ops] (prometheus-client) to have metrics here\n"
            self._metrics.ready(bool(self._state()["ready"]))
            return 200, _PROMETHEUS, self._metrics.exposition()
        return 404, _TEXT, b"there are /healthz, /readyz and /metrics\n"

    def _state(self) -> dict[str, int | float | bool | str]:
        try:
            given = self._health()
        except Exception as error:
            _log.error("the health check failed: %s", type(error).__name__, extra={"facts": {"error": error}})
            return {"ready": False}
        return {**facts(given), "ready": given.get("ready") is True}


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, listener: socket.socket, answer: Callable[[str], tuple[int, str, bytes]], deadline_s: float
    ) -> None:
        super().__init__(listener.getsockname()[:2], _Request, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.answer, self.deadline_s = answer, deadline_s
        self._lock = threading.Lock()
        self._open: dict[socket.socket, bool] = {}  # oldest first; whether it was told to end

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            crowded = len(self._open) >= 2 * _CONNECTIONS  # even those told to end have not
            if not crowded:
                waiting = [sock for sock, told in self._open.items() if not told]
                if len(waiting) >= _CONNECTIONS:  # a client that says nothing must not keep the others out
                    self._open[waiting[0]] = True
                    with contextlib.suppress(OSError):
                        waiting[0].shutdown(socket.SHUT_RDWR)
                self._open[request] = False
        if crowded:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away is not worth a line; the standard library would print a traceback."""


class _Request(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        deadline = time.monotonic() + self.server.deadline_s
        try:
            status, kind, body, head = self._outcome(deadline)
        except TimeoutError:
            status, kind, body, head = 408, _TEXT, b"", False
        except Exception as error:
            _log.error(
                "an operations request failed: %s", type(error).__name__, extra={"facts": {"error": error}}
            )
            status, kind, body, head = 500, _TEXT, b"", False
        if status == 0:
            return
        lines = [
            f"HTTP/1.1 {status} {_REASON_PHRASES[status]}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            *(["Allow: GET, HEAD"] if status == 405 else []),
            "Connection: close",
        ]
        answer = "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head else body)
        self.request.settimeout(self.server.deadline_s)
        with contextlib.suppress(OSError):
            self.request.sendall(answer)
            self.request.shutdown(socket.SHUT_WR)
            self._drain()

    def _outcome(self, deadline: float) -> tuple[int, str, bytes, bool]:
        """(status, content type, body, whether the body is left out); status 0 when the caller left."""
        asked = bytearray()
        while b"\r\n\r\n" not in asked and b"\n\n" not in asked:
            if len(asked) > _LARGEST_REQUEST:
                return 431, _TEXT, b"the request is too long\n", False
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self.request.settimeout(left_s)
            try:
                part = self.request.recv(4096)
            except ConnectionError:
                part = b""
            if not part:
                return 0, "", b"", False
            asked += part
            if b"\n" in asked and not _REQUEST_LINE.match(asked):
                return 400, _TEXT, b"this is not an HTTP request\n", False
        found = _REQUEST_LINE.match(asked)
        assert found is not None
        method, target = found[1].decode("ascii"), found[2].decode("ascii")
        if method not in ("GET", "HEAD"):
            return 405, _TEXT, b"use GET or HEAD\n", False
        return (*self.server.answer(target.partition("?")[0]), method == "HEAD")

    def _drain(self) -> None:
        """Let the caller read the answer before a reset for what it still sends can overtake it."""
        self.request.settimeout(0.5)
        for _ in range(16):
            if not self.request.recv(4096):
                return
