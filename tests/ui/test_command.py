"""``sfumato ui``: without the extra it says what to install; with it, it serves until it is told to stop."""

from __future__ import annotations

import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from typer.testing import CliRunner

from sfumato.shell.cli import app


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ui", "--no-open"])
    assert result.exit_code == 2
    assert "install sfumato[ui]" in result.output


@pytest.mark.browser
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cluster", "/no/such"], "no cluster file /no/such"),
        (["--model", "cluster:ours"], "Give the cluster file"),
        (["--profile", "best"], "no profile 'best'; use one of precise"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_sentence(options: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["ui", "--no-open", "--port", "0", *options])
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


@pytest.mark.browser
@pytest.mark.processes
def test_it_serves_until_it_is_interrupted() -> None:
    command = [sys.executable, "-m", "sfumato.shell.cli", "ui", "--no-open", "--port", "0"]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            url, deadline = None, time.monotonic() + 120
            assert process.stdout is not None
            told = b""
            while url is None and time.monotonic() < deadline:
                if select.select([process.stdout], [], [], 1.0)[0]:
                    told += os.read(process.stdout.fileno(), 4096)
                url = re.search(rb"http://127\.0\.0\.1:\d+/", told)
                assert process.poll() is None
            assert url is not None, told
            with urllib.request.urlopen(url.group().decode(), timeout=60) as answer:
                assert b"sfumato" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.browser
def test_a_taken_port_is_one_sentence() -> None:
    from sfumato.errors import JobError
    from sfumato.ui.server import listen

    with listen(0) as taken, pytest.raises(JobError, match="choose another with --port"):
        listen(taken.getsockname()[1])
