"""Three party processes on this machine, with fresh certificates, for as long as a `with` block lasts."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sfumato.errors import LinkError
from sfumato.runtime.cluster import Cluster, Limits, init_cluster

if TYPE_CHECKING:
    from sfumato.runtime.client import RemoteSession

__all__ = ["LocalCluster"]

_GRACE_S = 2.0


class LocalCluster:
    """Starts three parties on free ports of the loopback and stops them whatever happens.

    The constructor returns as soon as the processes run; `ready` (called by `session`) waits until they
    listen. They load torch meanwhile. ``threads``: torch threads of each party. ``machine``:
    ``module:callable`` instead of the real one. ``terms``: extra text per party that all must share (for
    tests of refusal).

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
        start_s: float = 60.0,
    ) -> None:
        self._start_s = start_s
        self._ready = False
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="sfumato-"))  # mode 0700
        atexit.register(self.close)
        try:
            self.cluster = init_cluster(
                self.folder / "cluster", hosts=hosts, ports=(0, 0, 0), limits=limits or Limits(connect_s=30.0)
            )
            threads = threads or max(1, (os.cpu_count() or 1) // 3)
            for index in range(3):
                self._processes.append(self._start(index, threads, machine, python_path, terms[index]))
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        index: int,
        threads: int,
        machine: str | None,
        python_path: Sequence[str | Path],
        terms: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sfumato.runtime.server", "--folder", str(self.party_folder(index))]
        command += [
            "--index",
            str(index),
            "--threads",
            str(threads),
            "--weights",
            str(self.folder),
            "--child",
        ]
        if machine:
            command += ["--machine", machine]
        for name, text in terms.items():
            command += ["--term", f"{name}={text}"]
        if threading.current_thread() is threading.main_thread():
            command.append("--die-with-parent")  # bound to the starting thread, so only where that lives on
        source = str(Path(__file__).resolve().parents[2])
        paths = [*(str(p) for p in python_path), source, os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        }
        with open(self._log(index), "wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )

    def party_folder(self, index: int) -> Path:
        """The folder with the keys of party ``index``."""
        return self.folder / "cluster" / f"party{index}"

    @property
    def client_folder(self) -> Path:
        """The folder with the client's keys."""
        return self.folder / "cluster" / "client"

    @property
    def process_ids(self) -> list[int]:
        """Of the three parties, in order."""
        return [process.pid for process in self._processes]

    def _log(self, index: int) -> Path:
        return self.folder / f"party{index}.log"

    def log_text(self, index: int) -> str:
        """What party ``index`` has logged so far."""
        with contextlib.suppress(OSError):
            return self._log(index).read_text(errors="replace")
        return ""

    def ready(self) -> Cluster:
        """Wait until all three listen; the cluster with their ports."""
        from sfumato.runtime.server import with_ports

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
        self, options: Mapping[str, Any] | None = None, *, reply_s: float | None = None
    ) -> RemoteSession:
        """A `RemoteSession` with the three parties, as their client."""
        from sfumato.runtime.client import RemoteSession

        cluster = self.ready()
        try:
            return RemoteSession(cluster, self.client_folder, options, reply_s=reply_s)
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
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
