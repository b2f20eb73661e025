"""Three parties on this machine, with fresh certificates, for as long as a `with` block lasts."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sfumato.errors import LinkError
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Cluster, Limits, with_ports
from sfumato.runtime.forkserver import start_forkserver
from sfumato.runtime.passing import Pipe

if TYPE_CHECKING:
    from sfumato.runtime.client import RemoteSession

__all__ = ["LocalCluster"]

_GRACE_S = 2.0
_MACHINE = "sfumato.runtime.machine:make_machine"
_PREFIX, _LOCK = "sfumato-", ".lock"


class LocalCluster:
    """Starts three parties on free ports of the loopback and stops them whatever happens.

    The constructor returns as soon as the processes run; `ready` (called by `session`) waits until they
    listen. They load torch meanwhile. ``threads``: torch threads of each party. ``machine``:
    ``module:callable`` instead of the real one. ``terms``: extra text per party that all must share (for
    tests of refusal). ``settings``: text of each party's ``party.toml``. Any number of sessions may follow one
    another, and as many at once as the settings say; between them the parties stay as they are.

    Raises ``LinkError`` with the last line of its log when a party does not start.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        hosts: Sequence[str] = ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        limits: Limits | None = None,
        machine: str | None = None,
        python_path: Sequence[str | Path] = (),
        terms: Sequence[Mapping[str, str]] = ({}, {}, {}),
        clients: Sequence[str] = ("client",),
        settings: str = "",
        start_s: float = 60.0,
    ) -> None:
        self._start_s = start_s
        self._ready = False
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._forkserver: subprocess.Popen[bytes] | None = None
        self._held: int | None = None
        _remove_left_behind(Path(tempfile.gettempdir()))
        self.folder, self._held = _new_folder(Path(tempfile.gettempdir()))
        atexit.register(self.close)
        try:
            self.cluster = init_cluster(
                self.folder / "cluster",
                hosts=hosts,
                ports=(0, 0, 0),
                clients=clients,
                limits=limits or Limits(connect_s=30.0),
            )
            for index in range(3):
                (self.party_folder(index) / "party.toml").write_text(settings, encoding="utf-8")
            self._start(
                threads or max(1, (os.cpu_count() or 1) // 3), machine or _MACHINE, python_path, terms
            )
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        threads: int,
        machine: str,
        python_path: Sequence[str | Path],
        terms: Sequence[Mapping[str, str]],
    ) -> None:
        """The process that the three share for starting sessions, then the three."""
        source = str(Path(__file__).resolve().parents[2])
        paths = [*(str(p) for p in python_path), source, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        pairs = [Pipe.pair() for _ in range(3)]
        with open(self.folder / "forkserver.log", "wb") as log:
            self._forkserver = start_forkserver(
                machine, [theirs for _, theirs in pairs], env=environment, stderr=log
            )
        for index, (pipe, _) in enumerate(pairs):
            command = [sys.executable, "-m", "sfumato.runtime.server", "--child"]
            command += ["--folder", str(self.party_folder(index)), "--index", str(index)]
            command += ["--threads", str(threads), "--weights", str(self.folder), "--machine", machine]
            command += ["--forkserver", str(pipe.fileno())]
            for name, text in terms[index].items():
                command += ["--term", f"{name}={text}"]
            if threading.current_thread() is threading.main_thread():
                command.append(
                    "--die-with-parent"
                )  # bound to the starting thread, so only where that lives on
            with open(self._log(index), "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=environment,
                        pass_fds=[pipe.fileno()],
                    )
                )
            pipe.close()

    def party_folder(self, index: int) -> Path:
        """The folder with the keys of party ``index``."""
        return self.folder / "cluster" / f"party{index}"

    @property
    def client_folder(self) -> Path:
        """The folder with the client's keys."""
        return self.keys("client")

    def keys(self, name: str) -> Path:
        """The folder with the keys of a client or owner."""
        return self.folder / "cluster" / name

    @property
    def process_ids(self) -> list[int]:
        """Of the three supervisors, in order; each has a forkserver, and a worker for each session."""
        return [process.pid for process in self._processes]

    @property
    def alive(self) -> bool:
        """Whether the three still run."""
        return all(process.poll() is None for process in self._processes)

    def _log(self, index: int) -> Path:
        return self.folder / f"party{index}.log"

    def log_text(self, index: int) -> str:
        """What party ``index`` has logged so far."""
        with contextlib.suppress(OSError):
            return self._log(index).read_text(errors="replace")
        return ""

    def ready(self) -> Cluster:
        """Wait until all three listen; the cluster with their ports."""
        with self._lock:
            if not self._ready:
                try:
                    deadline = time.monotonic() + self._start_s
                    ports = [self._port(index, deadline) for index in range(3)]
                    line = json.dumps(ports).encode() + b"\n"
                    for index, process in enumerate(self._processes):
                        assert process.stdin is not None
                        try:
                            process.stdin.write(line)
                            process.stdin.flush()
                        except OSError:
                            raise self._not_started(index) from None
                    self.cluster = with_ports(self.cluster, ports)
                    self._ready = True
                except BaseException:
                    self.close()
                    raise
            return self.cluster

    def _port(self, index: int, deadline: float) -> int:
        process = self._processes[index]
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN | select.POLLHUP)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise LinkError(f"party {index} did not start within {self._start_s:g} s")
        line = process.stdout.readline()
        try:
            return int(json.loads(line)["port"])
        except (ValueError, KeyError, TypeError):
            raise self._not_started(index) from None

    def _not_started(self, index: int) -> LinkError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[index].wait(_GRACE_S)
        lines = [line for line in self.log_text(index).splitlines() if line.strip()]
        return LinkError(f"party {index} did not start ({lines[-1] if lines else 'no message in its log'})")

    def session(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        client: str = "client",
        reply_s: float | None = None,
        wait_s: float = 600.0,
        on_wait: Callable[[int, int], None] | None = None,
    ) -> RemoteSession:
        """A `RemoteSession` with the three parties, as their client."""
        from sfumato.runtime.client import RemoteSession

        cluster = self.ready()
        try:
            return RemoteSession(
                cluster, self.keys(client), options, reply_s=reply_s, wait_s=wait_s, on_wait=on_wait
            )
        except LinkError:
            for index, process in enumerate(self._processes):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.3)
                    raise self._not_started(index) from None
            raise

    def close(self) -> None:
        """End the three processes and remove the folder; may be called twice, never raises."""
        atexit.unregister(self.close)
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.terminate()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        deadline = time.monotonic() + _GRACE_S
        # The forkserver ends when the three have.
        for process in [*self._processes, *([self._forkserver] if self._forkserver else [])]:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _new_folder(place: Path) -> tuple[Path, int]:
    """(a folder of this process alone, the descriptor that holds its lock). It gets its name only once it is locked."""
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))  # mode 0700
    held = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        folder = place / f"{_PREFIX}{secrets.token_hex(8)}"
        draft.rename(folder)
    except BaseException:
        os.close(held)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder, held


def _remove_left_behind(place: Path) -> None:
    """Remove folders of this user whose process was killed: nobody holds their lock any more. Never raises."""
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            held = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)  # one without is none of ours
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)
