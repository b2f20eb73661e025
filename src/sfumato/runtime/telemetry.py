"""Logs and traces of a party: numbers and fixed words, nothing else.

Everything that leaves a party for a log store or a trace collector passes `facts`: a value is a finite number, a
truth value, a word of `WORDS`, an exception's class, or the first eight digits of a run id; its name is one of
`FIELDS`. Anything else is dropped and counted (``dropped``). So no prompt, tensor, model, path or client's name
gets out, whatever a caller passes.

How the supervisor uses it (names outside these lists are dropped, so add a new one to its list first)::

    from sfumato.runtime import telemetry

    telemetry.configure_logging("json")  # or "text"; once per process, workers too
    telemetry.configure_tracing()  # nothing without opentelemetry and OTEL_EXPORTER_OTLP_ENDPOINT

    with telemetry.span("session", party=0, kind="run", run=run[:8]) as session:
        with telemetry.span("queue", queued=3):
            ...  # until the session is granted
        parent = session.context  # a short str; goes to the worker with the grant
        ...
        session.set(outcome="done", bytes_sent=123, rounds=7)

    _log.info(
        "party %d ended a session", 0, extra={"facts": {"run": run[:8], "outcome": "done", "seconds": 1.5}}
    )

and the worker, a process of its own::

    telemetry.configure_logging("json")
    telemetry.configure_tracing()
    with telemetry.span("worker", parent=parent, party=0, run=run[:8]):
        with telemetry.span("meet"):
            ...
        with telemetry.span("load", bytes=2**30):
            ...
        with telemetry.span("call", rounds=7) as call:
            ...
            call.set(bytes_sent=123)
        with telemetry.span("reveal"):
            ...
    telemetry.flush()  # before os._exit

A process that forks workers calls ``telemetry.preload()`` first: each saves a third of a second of imports.

An exception that passes through a span is recorded as the name of its class, never with its text. JSON logs hold a
message's template (a constant of the code), never what was put into it; text logs are for the operator's own host
and do hold the names of clients and models, and public sentences.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato import errors
from sfumato.errors import JobError

__all__ = [
    "COMMANDS",
    "FIELDS",
    "KINDS",
    "OUTCOMES",
    "REASONS",
    "SPANS",
    "STAGES",
    "WORDS",
    "Span",
    "configure_logging",
    "configure_tracing",
    "facts",
    "flush",
    "preload",
    "span",
]

KINDS = frozenset({"run", "share"})
"""What a session is for."""

OUTCOMES = frozenset({"cancelled", "crashed", "done", "expired", "failed", "lost"})
"""How a session ended: ``cancelled`` by its client, ``lost`` with a link, ``expired`` at a deadline, ``crashed`` with
its process, ``failed`` with any other named error."""

REASONS = frozenset(
    {
        "busy",  # the queue is full
        "certificate",  # TLS failed, or the certificate is not of this cluster
        "deadline",  # it waited too long, or was too slow to say what it wants
        "limit",  # this client already has as many sessions as it may
        "malformed",  # not our protocol
        "revoked",  # the certificate is on the operator's list
        "role",  # a client asked for an owner's right, or the other way round
        "run",  # a connection for a run that was not granted
        "stopping",  # the party is about to end
        "version",  # another release
    }
)
"""Why somebody was turned away."""

SPANS = frozenset(
    {"call", "describe", "load", "meet", "queue", "receive", "reveal", "session", "store", "worker"}
)
"""Names of spans."""

COMMANDS = frozenset(
    {"affine", "call", "certify", "close", "describe", "drop", "load", "put", "putindex", "reveal", "stats"}
)
"""What a client asks for in a session."""

STAGES = frozenset({"arrive", "command", "compare", "meet", "receive", "reply", "store"})
"""Where a session is: waiting for its client (``arrive``), connecting to the other parties (``meet``), waiting for a
command (``receive``), comparing it with what they were sent, doing it (``command``), answering; or taking a model."""

WORDS = (
    KINDS | OUTCOMES | REASONS | SPANS | COMMANDS | STAGES
    | {"client", "owner", "party", "ok", "full", "other", "unknown"}
)  # fmt: skip
"""Every string that may leave as a value."""

FIELDS = frozenset((
    "attempt", "bytes", "bytes_received", "bytes_sent", "calls", "certificate", "certificate_days",
    "client_bytes", "command", "dropped", "error", "exit_code", "forkserver", "free_bytes", "handles", "kind",
    "listening", "models", "origin", "outcome", "party", "peer", "pid", "port", "position", "queued", "ready",
    "reason", "role", "rounds", "run", "running", "seconds", "signal", "stage", "step", "storage", "store",
    "store_bytes", "tensors", "threads", "wait_s", "waiting", "workers",
))  # fmt: skip
"""Every name that a value may leave under."""

_RUN = re.compile(r"[0-9a-f]{8}\Z")
_LARGEST = 2**63
_EXCEPTIONS = frozenset(
    name
    for module in (builtins, errors)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def facts(values: Mapping[str, Any]) -> dict[str, int | float | bool | str]:
    """What of ``values`` may leave the party, and under ``dropped`` how many may not."""
    kept: dict[str, int | float | bool | str] = {}
    for name, value in values.items():
        clean = _clean(name, value) if name in FIELDS else None
        if clean is not None:
            kept[name] = clean
    if len(kept) < len(values):
        kept["dropped"] = len(values) - len(kept)
    return kept


def _clean(name: str, value: object) -> int | float | bool | str | None:
    if name == "error":
        kind = value if isinstance(value, type) else type(value)
        return _class_word(kind) if issubclass(kind, BaseException) else None
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -_LARGEST <= value < _LARGEST else None
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if type(value) is str:
        return value if value in WORDS or (name == "run" and _RUN.match(value)) else None
    return None


def _class_word(kind: type[BaseException]) -> str:
    """The class's name, or that of the first base class that everybody knows: a library's may be made of data."""
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in _EXCEPTIONS), "Exception")


# ---- logs -----------------------------------------------------------------------------------------------------------


class _Facts(logging.Filter):
    """Replaces a record's ``facts`` by what of them may leave."""

    def filter(self, record: logging.LogRecord) -> bool:
        given = record.__dict__.get("facts")
        clean = facts(given) if isinstance(given, Mapping) else {}
        if record.exc_info and record.exc_info[0] is not None:
            clean["error"] = _class_word(record.exc_info[0])
        record.__dict__["facts"] = clean
        return True


class _Text(logging.Formatter):
    """A line for people; a traceback shows places and classes, no exception's text."""

    def formatException(self, ei: Any) -> str:
        frames = traceback.extract_tb(ei[2])
        places = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames))
        return f"{ei[0].__name__} at {places}"


class _Json(logging.Formatter):
    """One object a line: ts, level, logger, event, fields."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name == "sfumato" or record.name.startswith("sfumato.")
        return json.dumps(
            {
                "ts": _timestamp(record.created),
                "level": record.levelname.lower() if record.levelno in _LEVELS else "other",
                "logger": record.name if ours else record.name.split(".")[0],
                # A foreign library's message may be made of anything.
                "event": record.msg if ours and isinstance(record.msg, str) else "other",
                "fields": record.__dict__.get("facts", {}),
            }
        )


_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)


def _timestamp(seconds: float) -> str:
    """UTC, ISO 8601, milliseconds."""
    whole = int(seconds)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int((seconds - whole) * 1000):03d}Z"


def configure_logging(format: str = "text") -> None:
    """Send this process's log to standard error as ``text`` (for people) or ``json`` (one object a line, numbers and
    fixed words only). ``SFUMATO_LOG`` sets the level, INFO unless given. Replaces what was configured before.

    Raises ``JobError`` for another format or level.
    """
    if format not in ("text", "json"):
        raise JobError("a log is written as text or as json; choose one of the two")
    level = os.environ.get("SFUMATO_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise JobError("SFUMATO_LOG must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text(_TEXT))
    handler.addFilter(_Facts())
    logging.basicConfig(level=level, handlers=[handler], force=True)


# ---- traces ---------------------------------------------------------------------------------------------------------

#: (pid, provider, tracer) of `configure_tracing`; a forked process does not export through its parent's threads.
_tracing: tuple[int, Any, Any] | None = None


def preload() -> None:
    """Import what `configure_tracing` would, and start nothing: processes that are forked afterwards need not."""
    if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        with contextlib.suppress(ImportError):
            _exporting()


def _exporting() -> tuple[Any, ...]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return OTLPSpanExporter, Resource, TracerProvider, BatchSpanProcessor


def configure_tracing(provider: Any = None) -> bool:
    """Send spans to the OTLP collector that ``OTEL_EXPORTER_OTLP_ENDPOINT`` names, or to ``provider`` (an
    opentelemetry-sdk ``TracerProvider``); whether there is one. Without either, or without opentelemetry, spans do
    nothing."""
    global _tracing
    _tracing = None
    if provider is None:
        if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
            return False
        try:
            exporter, resource, tracer_provider, processor = _exporting()
        except ImportError:
            logging.getLogger(__name__).warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT is set but opentelemetry is missing; install sfumato[otel]"
            )
            return False
        # No detectors: they would send this process's command line and paths.
        # A process that ends does not wait for a collector that is gone: `flush` waits, and not for long.
        provider = tracer_provider(
            resource=resource({"service.name": "sfumato-party"}), shutdown_on_exit=False
        )
        provider.add_span_processor(processor(exporter()))
    _tracing = (os.getpid(), provider, provider.get_tracer("sfumato"))
    return True


def flush(timeout_s: float = 1.0) -> None:
    """Hand over the spans that have ended, or give up after ``timeout_s``; a process calls it before it ends."""
    if _tracing is None or _tracing[0] != os.getpid():
        return
    # In a thread: the exporter's own deadline is longer, whatever it is told.
    thread = threading.Thread(target=_tracing[1].force_flush, name="sfumato-flush", daemon=True)
    thread.start()
    thread.join(timeout_s)


class Span:
    """One span, or a stand-in that does nothing."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def set(self, **attributes: object) -> None:
        """Add ``attributes``: numbers and fixed words; the rest is dropped."""
        if self._inner is not None:
            self._inner.set_attributes(facts(attributes))

    @property
    def context(self) -> str | None:
        """What another process gives as ``parent`` to go on under this span (W3C traceparent)."""
        if self._inner is None:
            return None
        here = self._inner.get_span_context()
        return f"00-{here.trace_id:032x}-{here.span_id:016x}-{int(here.trace_flags):02x}"


@contextlib.contextmanager
def span(name: str, *, parent: str | None = None, **attributes: object) -> Iterator[Span]:
    """A span around a block, below the one around it or below ``parent``; its duration and ``attributes`` are all it
    holds. A name outside `SPANS` becomes ``other``. It never raises and never hides an exception."""
    if _tracing is None or _tracing[0] != os.getpid():
        yield Span()
        return
    tracer = _tracing[2]
    with tracer.start_as_current_span(
        name if name in SPANS else "other",
        context=_remote(parent),
        attributes=facts(attributes),
        record_exception=False,  # it would send the exception's text and the traceback
        set_status_on_exception=False,
    ) as inner:
        try:
            yield Span(inner)
        except BaseException as error:
            from opentelemetry.trace import Status, StatusCode

            inner.set_attributes({"error": _class_word(type(error))})
            if isinstance(error, Exception):
                inner.set_status(Status(StatusCode.ERROR))
            raise


_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})\Z")


def _remote(parent: str | None) -> Any:
    """The context below ``parent``; the current one when there is none or it is not a traceparent."""
    found = _TRACEPARENT.match(parent) if isinstance(parent, str) else None
    if found is None:
        return None
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return set_span_in_context(
        NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags)))
    )
