"""One party's supervisor in this process: what runs out, and what must not end it."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from processes import LIMITS, wait_for

from sfumato.errors import LinkError
from sfumato.runtime import server
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Cluster, with_ports
from sfumato.runtime.control import ask
from sfumato.runtime.server import PartySupervisor
from sfumato.runtime.settings import PartySettings
from sfumato.runtime.supervision import Supervised
from sfumato.runtime.worker import _Worker

pytestmark = pytest.mark.timeout(60)


class Listener(socket.socket):
    """Accepts nobody while ``broken`` says so."""

    def __init__(self) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.bind(("127.0.0.1", 0))
        self.listen()
        self.tries = 0
        self.broken: Callable[[], bool] = lambda: False

    def accept(self) -> Any:
        self.tries += 1
        if self.broken():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Party:
    """Party 0 of a cluster whose other two do not run; it starts no process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = Listener()
        cluster = init_cluster(folder / "c", limits=LIMITS)
        self.cluster: Cluster = with_ports(cluster, (self.listener.getsockname()[1], 1, 2))
        self.store = folder / "c" / "party0" / "store"

    @contextmanager
    def runs(self) -> Iterator[PartySupervisor]:
        forkserver: Any = SimpleNamespace(ready=True, stop=lambda: None)
        home = self.folder / "c" / "party0"
        made = PartySupervisor(
            self.cluster, 0, home, forkserver, PartySettings.load(home), listener=self.listener
        )
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
            assert thread.is_alive()
        finally:
            made.stop()
            thread.join(10)

    def answers(self) -> bool:
        return ask(self.cluster, self.folder / "c" / "client", 0, {"ask": "status"})["party"] == 0


@pytest.fixture
def party(tmp_path: Path) -> Party:
    return Party(tmp_path)


def test_without_descriptors_a_party_waits_and_says_so_once(
    party: Party, caplog: pytest.LogCaptureFixture
) -> None:
    begun = time.monotonic()
    party.listener.broken = lambda: time.monotonic() < begun + 1.2
    with party.runs():
        assert party.answers()
    assert 2 <= party.listener.tries < 20  # it did not ask again and again meanwhile
    assert caplog.text.count("could not accept a caller") == 1


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_without_threads_a_caller_is_turned_away_and_the_next_is_served(
    party: Party, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, failed = threading.Thread.start, list[str]()

    def start(thread: threading.Thread) -> None:
        if thread.name == "sfumato-request" and not failed:
            failed.append(thread.name)
            raise error
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with party.runs() as supervisor:
        with pytest.raises(LinkError):
            party.answers()
        assert party.answers()
        wait_for(lambda: not supervisor._greetings._held)


def test_a_callers_trouble_is_its_own(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = server.Preamble.parse, list[bytes]()

    def parse(data: bytes) -> Any:
        calls.append(data)
        if len(calls) == 1:
            raise ValueError
        return real(data)

    monkeypatch.setattr(server, "Preamble", SimpleNamespace(parse=parse))
    with party.runs() as supervisor:
        with pytest.raises(LinkError):
            party.answers()
        assert party.answers()
        assert not supervisor._callers


def test_what_a_crash_left_in_the_store_is_repaired_at_the_start(party: Party) -> None:
    (party.store / ".old-house").mkdir(parents=True)
    (party.store / ".draft-0").mkdir()
    with party.runs():
        wait_for(lambda: {path.name for path in party.store.iterdir()} == {"house", ".lock"})


def test_a_session_without_descriptors_leaves_nothing(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    sock: Any = None
    with party.runs() as supervisor:
        monkeypatch.setattr(socket, "socketpair", none)
        with pytest.raises(OSError, match="Too many open files"):
            supervisor._place.serve(Supervised("00" * 16, "run", "sfumato://client/client", {}, 1.0), sock)
        monkeypatch.undo()
        assert supervisor._place._sessions == {}


def test_a_store_whose_folder_cannot_be_looked_at_is_not_ready(tmp_path: Path) -> None:
    assert server._takes_files(tmp_path / "new")
    assert not server._takes_files(tmp_path / ("x" * 300))  # to look for it is an error


def test_a_worker_without_threads_turns_a_caller_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker: Any = object.__new__(_Worker)
    worker.index, worker.job = 0, SimpleNamespace(run="00" * 16, kind="run")
    worker._greetings = threading.BoundedSemaphore(1)
    monkeypatch.setattr(threading.Thread, "start", none)
    for _ in range(2):  # the place of the first was given back
        ours, theirs = socket.socketpair()
        with ours:
            worker._take(theirs.detach())
            assert ours.recv(1) == b""
    assert caplog.text.count("could not greet a caller") == 2
