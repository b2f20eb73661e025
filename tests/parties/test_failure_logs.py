"""What a log store learns of a session that failed: which, where in it and of what kind, and no value or name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_machine import MACHINE
from processes import HERE, LIMITS, call, free_ports, put, wait_for

import sfumato as sf
from sfumato.errors import SfumatoError
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.commands import Reveal

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]

CLIENT = "zebra-and-gnu"
FAILED = "party %d ends session %s: %s"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three parties as operators start them, each with a JSON log."""
    where = tmp_path_factory.mktemp("parties")
    init_cluster(where / "ours", ports=free_ports(3), clients=(CLIENT,), limits=LIMITS)
    source = Path(sf.__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{source}"}
    processes = []
    for index in range(3):
        command = [
            sys.executable,
            "-m",
            "sfumato.runtime.server",
            "--folder",
            where / "ours" / f"party{index}",
        ]
        command += ["--index", str(index), "--machine", MACHINE, "--log-format", "json", "--threads", "1"]
        with open(where / f"{index}.log", "wb") as log:
            processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=environment))
    try:
        wait_for(lambda: all("listens" in log_of(where, i) for i in range(3)), 60.0)
        yield where
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


def log_of(folder: Path, index: int) -> str:
    return (folder / f"{index}.log").read_text(errors="replace")


def lines(folder: Path, index: int, run: str, event: str) -> list[dict[str, Any]]:
    """Fields of the lines about a run."""
    found = [json.loads(line) for line in log_of(folder, index).splitlines()]
    return [
        line["fields"] for line in found if line["event"] == event and line["fields"].get("run") == run[:8]
    ]


def _ended(folder: Path, act: Callable[[RemoteSession], object]) -> str:
    """The run of a session in which ``act`` fails, once each party has logged its end."""
    ours = folder / "ours" / CLIENT
    session = RemoteSession(Cluster.load(ours), ours)
    with session, pytest.raises(SfumatoError):
        act(session)
    wait_for(lambda: all(lines(folder, i, session.run, FAILED) for i in range(3)), 30.0)
    return session.run


def test_an_error_of_a_machine_is_placed_and_named(folder: Path) -> None:
    def act(session: RemoteSession) -> None:
        put(session)
        session.send(call("value-error/1"))

    run = _ended(folder, act)
    (fields,) = lines(folder, 1, run, FAILED)
    assert 0 < fields.pop("seconds") < 60
    assert fields == {"party": 1, "run": run[:8], "kind": "run", "stage": "command", "command": "call", "step": 1,
                      "error": "ValueError", "origin": 1}  # fmt: skip
    for party in (0, 2):
        (fields,) = lines(folder, party, run, FAILED)
        assert (fields["party"], fields["origin"], fields["error"]) == (party, 1, "SfumatoError")
    assert all("marmalade" not in log_of(folder, i) for i in range(3)), "the text of the error holds a value"


def test_an_error_of_our_own_keeps_its_class_at_all_parties(folder: Path) -> None:
    def act(session: RemoteSession) -> None:
        put(session)
        session.send(call("range-error/2"))

    run = _ended(folder, act)
    for party in range(3):
        (fields,) = lines(folder, party, run, FAILED)
        assert (fields["error"], fields["origin"]) == ("RangeError", 2)
        assert (fields["command"], fields["step"]) == ("call", 1)
    assert all("mid.attn" not in log_of(folder, i) for i in range(3))


def test_names_from_outside_stay_inside(folder: Path) -> None:
    run = _ended(folder, lambda session: session.send(Reveal("letter-to-nobody")))
    (fields,) = lines(folder, 0, run, FAILED)
    assert (fields["stage"], fields["command"], fields["step"]) == ("command", "reveal", 0)
    assert fields["error"] == "KeyError"
    run = _ended(folder, lambda session: session.send(Reveal("no handle of ours")))
    (fields,) = lines(folder, 0, run, FAILED)
    assert (fields["stage"], fields["error"], "command" in fields) == ("receive", "JobError", False)

    text = "".join(log_of(folder, i) for i in range(3))
    for word in (CLIENT, "zebra", "letter", "of ours", "127.0.0.1", "marmalade", "mid.attn", str(folder)):
        assert word not in text
    assert all("dropped" not in json.loads(line)["fields"] for line in text.splitlines())


def test_a_lost_process_is_told_by_its_supervisor(folder: Path) -> None:
    ours = folder / "ours" / CLIENT
    session = RemoteSession(Cluster.load(ours), ours)
    with session:
        put(session)
        with pytest.raises(SfumatoError):
            session.send(call("kill/1"))
    event = "party %d lost the process of a session (killed, or out of memory)"
    wait_for(lambda: bool(lines(folder, 1, session.run, event)), 30.0)
    (fields,) = lines(folder, 1, session.run, event)
    assert 0 < fields.pop("seconds") < 60
    assert fields == {"party": 1, "run": session.run[:8], "kind": "run", "outcome": "crashed"}
