"""Nothing but numbers and fixed words leaves through logs and spans."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sfumato.errors import JobError, LinkError
from sfumato.runtime import telemetry
from sfumato.runtime.commands import Command

PACKAGE = Path(telemetry.__file__).resolve().parents[1]
PROMPT = "a letter to nobody"


@pytest.fixture
def logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[], str]]:
    """What was logged since the last look; the root logger is put back afterwards."""
    root = logging.getLogger()
    level = root.level
    monkeypatch.delenv("SFUMATO_LOG", raising=False)
    yield lambda: capsys.readouterr().err
    root.handlers[:] = []
    root.setLevel(level)


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    assert telemetry.configure_tracing(provider)
    yield exporter
    telemetry.configure_tracing()
    provider.shutdown()


# ---- facts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bytes", 2**40),
        ("seconds", 0.25),
        ("ready", True),
        ("kind", "run"),
        ("reason", "busy"),
        ("outcome", "crashed"),
        ("run", "0123abcd"),
    ],
)
def test_numbers_and_fixed_words_pass(name: str, value: object) -> None:
    assert telemetry.facts({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", PROMPT),
        ("kind", "Run"),
        ("run", "0123abcd0123abcd"),
        ("run", "0123abcd\n"),
        ("kind", "0123abcd"),
        ("bytes", int.from_bytes(PROMPT.encode())),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("bytes", PROMPT.encode()),
        ("bytes", [1, 2]),
        ("bytes", {"a": 1}),
        ("bytes", None),
        ("error", PROMPT),
        ("error", 7),
        (PROMPT, 1),
        ("client", 1),
    ],
)
def test_anything_else_is_dropped_and_counted(name: str, value: object) -> None:
    assert telemetry.facts({name: value, "party": 2}) == {"party": 2, "dropped": 1}


def test_every_command_has_a_word() -> None:
    assert {kind.__name__.lower() for kind in get_args(Command)} == telemetry.COMMANDS


def test_an_error_is_the_name_of_a_known_class() -> None:
    told = type(PROMPT.title().replace(" ", ""), (LinkError,), {})
    assert telemetry.facts({"error": LinkError(PROMPT)}) == {"error": "LinkError"}
    assert telemetry.facts({"error": told(PROMPT)}) == {"error": "LinkError"}
    assert telemetry.facts({"error": BrokenPipeError}) == {"error": "BrokenPipeError"}


# ---- logs -----------------------------------------------------------------------------------------------------------


def test_a_json_line_has_the_template_and_the_facts_only(logged: Callable[[], str]) -> None:
    telemetry.configure_logging("json")
    log = logging.getLogger("sfumato.runtime.server")
    log.warning(
        "party %d ended %s", 1, PROMPT, extra={"facts": {"seconds": 1.5, "kind": "run", "step": PROMPT}}
    )
    line = json.loads(logged())
    assert set(line) == {"ts", "level", "logger", "event", "fields"}
    assert line["level"] == "warning"
    assert line["logger"] == "sfumato.runtime.server"
    assert line["event"] == "party %d ended %s"
    assert line["fields"] == {"seconds": 1.5, "kind": "run", "dropped": 1}
    assert line["ts"].endswith("Z")


def test_a_json_line_of_an_exception_or_a_foreign_library_holds_no_text(logged: Callable[[], str]) -> None:
    telemetry.configure_logging("json")
    try:
        raise ValueError(PROMPT)
    except ValueError:
        logging.getLogger("sfumato.link").exception("a frame broke")
    logging.getLogger(f"urllib3.{PROMPT}").error(PROMPT, extra={"facts": 3})
    logging.getLogger("sfumato").error(ValueError(PROMPT))
    text = logged()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["fields"] for line in lines] == [{"error": "ValueError"}, {}, {}]
    assert [line["event"] for line in lines] == ["a frame broke", "other", "other"]
    assert [line["logger"] for line in lines] == ["sfumato.link", "urllib3", "sfumato"]
    assert PROMPT not in text


def test_a_text_line_is_for_people_and_hides_an_exceptions_text(logged: Callable[[], str]) -> None:
    telemetry.configure_logging("text")
    log = logging.getLogger("sfumato.runtime.server")
    log.info("party %d listens on %s port %d", 0, "127.0.0.1", 8440)
    log.debug("unseen")
    try:
        raise ValueError(PROMPT)
    except ValueError:
        log.exception("it broke")
    text = logged()
    assert "INFO sfumato.runtime.server: party 0 listens on 127.0.0.1 port 8440" in text
    assert "ValueError at test_telemetry.py:" in text
    assert "unseen" not in text
    assert PROMPT not in text


def test_the_level_comes_from_the_environment(
    logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_LOG", "error")
    telemetry.configure_logging("text")
    logging.getLogger("sfumato").warning("unseen")
    assert logged() == ""
    monkeypatch.setenv("SFUMATO_LOG", "loud")
    with pytest.raises(JobError, match="SFUMATO_LOG must be"):
        telemetry.configure_logging("text")
    with pytest.raises(JobError, match="text or as json"):
        telemetry.configure_logging("xml")


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    methods = {"debug", "info", "warning", "error", "exception", "critical"}
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in methods
                and ast.unparse(node.func.value) in ("_log", "log", "logger", "logging")
            ):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_message_of_ours_is_a_constant() -> None:
    """A JSON line shows the template, so no template may be made of data."""
    calls = list(log_calls())
    assert len(calls) > 5
    made = [
        where
        for where, call in calls
        if not call.args
        or not isinstance(call.args[0], ast.Constant)
        or not isinstance(call.args[0].value, str)
    ]
    assert made == []


def test_every_fact_that_is_logged_has_a_known_name() -> None:
    unknown = []
    for where, call in log_calls():
        for keyword in call.keywords:
            if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
                for inner in keyword.value.values:
                    keys = inner.keys if isinstance(inner, ast.Dict) else []
                    unknown += [
                        f"{where}: {key.value}"
                        for key in keys
                        if isinstance(key, ast.Constant) and key.value not in telemetry.FIELDS
                    ]
    assert unknown == []


# ---- spans ----------------------------------------------------------------------------------------------------------


def test_a_runs_spans_hold_sizes_and_durations_only(spans: InMemorySpanExporter) -> None:
    with telemetry.span("session", party=1, kind="run", run="0123abcd", step=PROMPT) as session:
        with telemetry.span("queue", queued=3):
            pass
        parent = session.context
        session.set(outcome="done", bytes_sent=123, command=PROMPT)
    with telemetry.span("worker", parent=parent), telemetry.span("call", rounds=7):
        pass
    with telemetry.span(PROMPT, parent=PROMPT):
        pass
    done = {span.name: span for span in spans.get_finished_spans()}
    assert set(done) == {"session", "queue", "worker", "call", "other"}
    assert done["session"].attributes == {
        "party": 1,
        "kind": "run",
        "run": "0123abcd",
        "dropped": 1,
        "outcome": "done",
        "bytes_sent": 123,
    }
    assert done["queue"].attributes == {"queued": 3}
    root = done["session"].context
    assert root is not None
    for name, above in (("queue", "session"), ("worker", "session"), ("call", "worker")):
        found, parent_of = done[name], done[above].context
        assert found.parent is not None
        assert parent_of is not None
        assert found.parent.span_id == parent_of.span_id
        assert found.context is not None
        assert found.context.trace_id == root.trace_id
    assert done["other"].parent is None
    assert all(span.end_time is not None and span.start_time is not None for span in done.values())
    assert PROMPT not in "".join(span.to_json() for span in done.values())


def test_an_exception_passes_and_leaves_its_class(spans: InMemorySpanExporter) -> None:
    with pytest.raises(LinkError, match=PROMPT), telemetry.span("call"):
        raise LinkError(PROMPT)
    (span,) = spans.get_finished_spans()
    assert span.attributes == {"error": "LinkError"}
    assert not span.status.is_ok
    assert span.status.description is None
    assert span.events == ()
    assert PROMPT not in span.to_json()


def test_without_a_collector_spans_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert not telemetry.configure_tracing()
    with telemetry.span("session", party=0) as session:
        session.set(outcome="done")
        assert session.context is None
    telemetry.flush()


def test_a_forked_process_does_not_use_its_parents_exporter(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with telemetry.span("worker") as inside:
        assert inside.context is None
    assert spans.get_finished_spans() == ()


def run_with(
    code: str, *arguments: str, timeout_s: float = 60.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        check=False,
    )


def test_without_opentelemetry_a_party_runs_and_says_so() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from sfumato.runtime import telemetry\n"
        "telemetry.configure_logging('text')\n"
        "print(telemetry.configure_tracing())\n"
        "with telemetry.span('session') as s: print(s.context)\n"
        "print('torch' in sys.modules)\n"
    )
    done = run_with(code, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert done.stdout.split() == ["False", "None", "False"]
    assert "install sfumato[otel]" in done.stderr


def test_a_collector_that_is_gone_holds_nobody_up() -> None:
    """One that refuses, and one that takes the request and never answers."""
    code = (
        "import os, socket, sys\n"
        "silent = socket.create_server(('127.0.0.1', 0))\n"
        "port = silent.getsockname()[1] if sys.argv[1] == 'silent' else 9\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = f'http://127.0.0.1:{port}'\n"
        "from sfumato.runtime import telemetry\n"
        "telemetry.preload()\n"
        "assert telemetry.configure_tracing()\n"
        "with telemetry.span('session'): pass\n"
        "telemetry.flush(0.3)\n"
        "print('flushed', flush=True)\n"
    )
    for kind in ("refused", "silent"):
        done = run_with(code, kind, timeout_s=8.0)  # the exporter alone would try for ten seconds
        assert done.stdout.split() == ["flushed"], done.stderr


def test_spans_reach_a_collector_and_tell_nothing_about_the_host() -> None:
    """A real exporter, and a collector of our own on loopback."""
    code = (
        "import http.server, threading, sys\n"
        "bodies = []\n"
        "class Collector(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        bodies.append(self.rfile.read(int(self.headers['Content-Length'])))\n"
        "        self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Collector)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "import os\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = f'http://127.0.0.1:{server.server_port}'\n"
        "from sfumato.runtime import telemetry\n"
        "assert telemetry.configure_tracing()\n"
        "with telemetry.span('session', party=2, step='SECRET'): pass\n"
        "telemetry.flush()\n"
        "import gzip\n"
        "body = b''.join(gzip.decompress(b) if b[:2] == b'\\x1f\\x8b' else b for b in bodies)\n"
        "for part in (b'session', b'sfumato-party', b'SECRET', sys.executable.encode(), b'process.'):\n"
        "    print(part in body)\n"
    )
    done = run_with(code, OTEL_RESOURCE_ATTRIBUTES="")
    assert done.stdout.split() == ["True", "True", "False", "False", "False"], done.stderr
