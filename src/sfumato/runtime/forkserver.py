"""A process that has loaded torch and the machine, and forks: a session's worker starts in milliseconds.

It holds nothing secret and starts no thread. It ends when the supervisor ends, however that went, for then its pipe
ends; so do the workers, each by its own pipe. Three parties of one machine may share one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.errors import JobError, SfumatoError
from sfumato.runtime.passing import Pipe

__all__ = ["Forkserver", "Job", "main", "named", "start_forkserver"]

_log = logging.getLogger("sfumato.runtime.forkserver")  # also when run as __main__
_LOOK_S, _LAST_WORDS_S = 0.25, 1.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is told about its session.

    ``cluster``: text of the cluster file. ``folder``: the party's. ``client``: the identity that asked. ``operator``:
    options that no client sets. ``arrive_s``: how long the client may take to connect. ``longest_s``: how long the
    session may run, ``memory_mb``: the MiB its process may take; 0 for no bound. ``trace``: the parent span.
    """

    party: int
    cluster: str
    folder: str
    run: str
    kind: str
    client: str
    options: Mapping[str, Any]
    operator: Mapping[str, Any]
    terms: Mapping[str, str]
    revoked: Sequence[str]
    threads: int | None
    arrive_s: float
    longest_s: float
    memory_mb: int
    log: str
    trace: str | None


def start_forkserver(machine: str, pipes: Sequence[Pipe], **options: Any) -> subprocess.Popen[bytes]:
    """Start the process with its ends of the pipes, which this process lets go."""
    descriptors = [pipe.fileno() for pipe in pipes]
    command = [sys.executable, "-m", "sfumato.runtime.forkserver", machine, *map(str, descriptors)]
    # One thread: a fork takes only the thread that forks, and a worker sets its own number.
    environment = {**options.pop("env", os.environ), **dict.fromkeys(_THREADS, "1")}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=descriptors,
        env=environment,
        **options,
    )
    for pipe in pipes:
        pipe.close()
    return process


class Forkserver:
    """The supervisor's side: keeps one such process alive, and has it fork.

    ``machine``: ``module:callable`` that it loads. ``failed`` is called with one sentence when that cannot be loaded at
    all. ``pipe``: to a process that others have started, which serves until it ends.
    """

    def __init__(self, machine: str, failed: Callable[[str], None], pipe: Pipe | None = None) -> None:
        self._machine, self._failed = machine, failed
        self._lock = threading.Lock()
        self._pipe: Pipe | None = None
        self._stopped = False
        self.process_id = 0
        self.ready = False
        with self._lock:
            self._start(pipe)

    def fork(self) -> Pipe:
        """The pipe of a new worker, which logs where this process does. Its first message is ``{"pid": ...}``; it ends
        at once when there can be none."""
        ours, theirs = Pipe.pair()
        with self._lock:
            for _ in range(2):
                if self._pipe is None and not self._stopped:
                    self._start()
                if self._pipe is not None and self._pipe.send({}, [theirs.fileno(), 2]):
                    break
                self._pipe = None
        theirs.close()
        return ours

    def stop(self) -> None:
        """Let it end; the workers go on."""
        with self._lock:
            self._stopped = True
            if self._pipe is not None:
                self._pipe.half_close()

    def _start(self, pipe: Pipe | None = None) -> None:
        process = None
        if pipe is None:
            pipe, theirs = Pipe.pair()
            process = start_forkserver(self._machine, [theirs])
        self._pipe = pipe
        threading.Thread(
            target=self._watch, args=(process, pipe), name="sfumato-forkserver", daemon=True
        ).start()

    def _watch(self, process: subprocess.Popen[bytes] | None, pipe: Pipe) -> None:
        was_ready = False
        while (message := pipe.receive()) is not None:
            fields, _ = message
            if "problem" in fields:
                self._failed(str(fields["problem"]))
            elif "pid" in fields:
                was_ready = self.ready = True
                self.process_id = int(fields["pid"])
        if process is not None:
            process.kill()
            process.wait()
        with self._lock:
            if self._pipe not in (pipe, None):
                return  # another has taken its place
            self._pipe, self.ready = None, False
            if self._stopped:
                return
            _log.warning("the process that starts sessions ended")
            if was_ready:  # one that never came up would not the next time: the next session tries
                self._start()


# ---- inside the process ---------------------------------------------------------------------------------------------


def named(machine: str) -> Callable[..., Any]:
    """The machine factory called ``module:callable``.

    Raises:
        JobError: there is none.
    """
    module, _, attribute = machine.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute or "make_machine")
    except (ImportError, AttributeError):
        raise JobError(f"there is no machine factory {machine}") from None
    return factory


def _preload(machine: str) -> Callable[..., Any]:
    """Load what every session needs."""
    factory = named(machine)
    for module in ("worker", "commands", "handshake", "machine", "sharing"):
        importlib.import_module(f"sfumato.runtime.{module}")
    from sfumato.ring import native
    from sfumato.ring.trig import table_digest
    from sfumato.runtime import telemetry

    native.available()
    table_digest()
    telemetry.preload()
    return factory


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sfumato.runtime.forkserver MACHINE DESCRIPTOR...``: started by `start_forkserver` only."""
    parser = argparse.ArgumentParser(prog="sfumato.runtime.forkserver")
    parser.add_argument("machine")
    parser.add_argument("descriptors", type=int, nargs="+")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, 0)
    )  # a worker's memory is shares: no crash may write it down
    pipes = [Pipe(socket.socket(fileno=descriptor)) for descriptor in options.descriptors]
    for descriptor in options.descriptors:
        os.set_inheritable(descriptor, False)
    try:
        make_machine = _preload(options.machine)
    except SfumatoError as error:
        for pipe in pipes:
            pipe.send({"problem": str(error)})
        return 1
    gc.collect()
    gc.freeze()  # collections in a worker leave these pages shared
    for pipe in pipes:
        pipe.send({"pid": os.getpid()})
    _Nursery(pipes, make_machine).run()
    return 0


class _Nursery:
    """Forks for its supervisors, and outlives none of them with a worker: also one that is stopped ends."""

    def __init__(self, pipes: list[Pipe], make_machine: Callable[..., Any]) -> None:
        self._pipes, self._make_machine = pipes, make_machine
        self._workers: dict[int, Pipe] = {}  # those that were not waited for: their ids are no others'
        self._doomed: dict[int, float] = {}

    def run(self) -> None:
        while self._pipes or self._workers:
            poll = select.poll()
            for pipe in self._pipes:
                poll.register(pipe, select.POLLIN)
            poll.poll(_LOOK_S * 1000 if self._workers else None)
            for pipe in list(self._pipes):
                self._hear(pipe)
            self._look()

    def _hear(self, pipe: Pipe) -> None:
        try:
            message = pipe.receive(0.0)
        except TimeoutError:
            return
        if message is None:
            self._pipes.remove(pipe)
            pipe.close()
            deadline = time.monotonic() + _LAST_WORDS_S
            self._doomed |= {pid: deadline for pid, owner in self._workers.items() if owner is pipe}
            return
        descriptors = message[1]
        with contextlib.suppress(OSError):  # no process: the supervisor reads the end of the worker's pipe
            pid = os.fork()
            if pid == 0:
                _become_worker(self._pipes, descriptors, self._make_machine)
            self._workers[pid] = pipe
        for descriptor in descriptors:
            os.close(descriptor)

    def _look(self) -> None:
        now = time.monotonic()
        for pid in list(self._workers):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._workers[pid]
                self._doomed.pop(pid, None)
            elif self._doomed.get(pid, now + 1) <= now:
                os.kill(pid, signal.SIGKILL)


def _become_worker(pipes: list[Pipe], descriptors: list[int], make_machine: Callable[..., Any]) -> None:
    code = 1
    try:
        for pipe in pipes:
            pipe.close()
        os.dup2(descriptors[1], 2)
        os.close(descriptors[1])
        from sfumato.runtime.worker import serve

        serve(Pipe(socket.socket(fileno=descriptors[0])), make_machine)
        code = 0
    except BaseException as error:
        _log.error("a worker failed: %s", type(error).__name__)
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
