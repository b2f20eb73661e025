"""A party: a supervisor that listens, knows who may ask what, and gives every session a worker process.

It never touches a share and imports no torch. Who connects says a preamble first (see `sfumato.link.preamble`): control
connections are answered here, connections of a run go to that run's worker, which does their TLS itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import JobError, LinkError, SfumatoError
from sfumato.link.base import public_text
from sfumato.link.identity import listen
from sfumato.link.preamble import PREAMBLE_BYTES, Preamble
from sfumato.runtime import telemetry
from sfumato.runtime.authority import certificate_days
from sfumato.runtime.cluster import Cluster, with_ports
from sfumato.runtime.forkserver import Forkserver
from sfumato.runtime.greetings import Greetings, Lobby, host_of, makes_room
from sfumato.runtime.jobs import JobQueue
from sfumato.runtime.metrics import Metrics, OperationsServer
from sfumato.runtime.passing import Pipe
from sfumato.runtime.requests import Requests
from sfumato.runtime.settings import PartySettings
from sfumato.runtime.store import ModelStore
from sfumato.runtime.supervision import Workplace

__all__ = ["PartySupervisor", "main"]

_log = logging.getLogger("sfumato.runtime.server")  # also when run as __main__
_MACHINE = "sfumato.runtime.machine:make_machine"
_MOST_CALLERS = 128  # that have not said their preamble
_MOST_EARLY = 32  # connections for runs that are not granted yet
_MOST_REQUESTS = 128  # control connections that have not said who they are
_STOP_S = 1.0
_PAUSE_S = 0.5  # without descriptors, threads or memory: how long nothing is tried
_LOOK_S = 6 * 3600.0
_SOON_DAYS = 30


@dataclass(eq=False)
class _Caller:
    """A connection that has not said its whole preamble."""

    sock: socket.socket
    host: str
    deadline: float
    said: bytes = b""


class PartySupervisor:
    """Party ``index`` of ``cluster``, until `stop`.

    ``terms``: extra text all parties must agree on. ``weights_folder``: of public weights that a client on this host
    may name. ``threads``: of each worker.
    """

    def __init__(
        self,
        cluster: Cluster,
        index: int,
        folder: Path | str,
        forkserver: Forkserver,
        settings: PartySettings,
        *,
        listener: socket.socket | None = None,
        terms: Mapping[str, str] | None = None,
        weights_folder: Path | None = None,
        threads: int | None = None,
        log: str = "text",
    ) -> None:
        if index not in (0, 1, 2):
            raise JobError(f"there is no party {index}; use 0, 1 or 2")
        self.cluster, self.index, self.folder = cluster, index, Path(folder)
        self.settings = settings
        self._forkserver = forkserver
        self._queue = JobQueue(settings.at_once, settings.queued, settings.per_client)
        self.metrics = Metrics(index)
        self.metrics.watch_store(settings.storage_folder)
        self._place = Workplace(
            cluster=cluster,
            index=index,
            folder=self.folder,
            settings=settings,
            forkserver=forkserver,
            queue=self._queue,
            metrics=self.metrics,
            terms=dict(terms or {}),
            weights_folder="" if weights_folder is None else str(weights_folder),
            threads=threads,
            log=log,
            came=lambda session: self._lobby.let_in(session.run),
        )
        self._requests = Requests(self._place, self.health)
        member = cluster.parties[index]
        self._listener = listener or listen(member.host, member.port)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._operations: OperationsServer | None = None
        if settings.operations_port:
            self._operations = OperationsServer(
                settings.operations_host, settings.operations_port, self.metrics, self.health
            )
        self._stopped = threading.Event()
        self._wake_receive, self._wake_send = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._callers: dict[socket.socket, _Caller] = {}
        self._lobby = Lobby(
            _MOST_EARLY, cluster.limits.connect_s, self._place.hand_over, lambda: self.metrics.refused("run")
        )
        self._greetings = Greetings(_MOST_REQUESTS, lambda: self.metrics.refused("busy"))
        self._next_look = 0.0
        self._accepts_at: float | None = None  # when the listener is heard again, while it is not
        self._short = False  # it was said that no caller could be accepted

    def serve_forever(self) -> None:
        """Take callers until `stop`, then end every session."""
        for sock in (self._listener, self._wake_receive):
            self._selector.register(sock, selectors.EVENT_READ)
        if self._operations is not None:
            self._operations.start()
        _log.info(
            "party %d listens on %s port %d",
            self.index,
            *self.address,
            extra={"facts": {"party": self.index, "port": self.address[1]}},
        )
        try:
            while not self._stopped.is_set():
                try:
                    self._turn()
                except Exception as error:  # a moment's trouble: the sessions go on
                    self._note(error)
                    self._stopped.wait(_PAUSE_S)
        finally:
            self._end()

    def _turn(self) -> None:
        """What callers say, and what is due."""
        for key, _ in self._selector.select(self._until_next()):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._callers:
                caller = self._callers[key.fileobj]
                try:
                    self._hear(caller)
                except Exception as error:  # this caller's: others are heard
                    self._note(error)
                    if self._callers.pop(caller.sock, None) is not None:
                        self._selector.unregister(caller.sock)
                    caller.sock.close()
        self._sweep()

    def _note(self, error: Exception) -> None:
        facts = {"party": self.index, "error": error}
        _log.error(
            "party %d failed at a caller (%s)", self.index, type(error).__name__, extra={"facts": facts}
        )

    def stop(self) -> None:
        """Take no more callers and end `serve_forever`; any thread or signal handler may say so."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._wake_send.send(b"x")

    def health(self) -> dict[str, Any]:
        """Whether this party takes sessions, and what of it is as it should be."""
        try:
            days = certificate_days(self.folder)
        except JobError:
            days = -1.0
        parts = {
            "listening": self._listener.fileno() >= 0 and not self._stopped.is_set(),
            "forkserver": self._forkserver.ready,
            "storage": _takes_files(self.settings.storage_folder),
            "certificate": days > 0,
        }
        return {
            "ready": all(parts.values()),
            **parts,
            "certificate_days": round(days, 2),
            "running": self._queue.running,
            "queued": self._queue.waiting,
        }

    # callers before anybody knows who they are

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            # No descriptor or memory left: the caller stays in the kernel's queue, and asking again would only spin.
            if not self._short:
                _log.warning(
                    "party %d could not accept a caller (%s)",
                    self.index,
                    error.strerror,
                    extra={"facts": {"party": self.index, "error": error}},
                )
            self._short = True
            self._selector.unregister(self._listener)
            self._accepts_at = time.monotonic() + _PAUSE_S
            return
        self._short = False
        sock.setblocking(False)
        if len(self._callers) >= _MOST_CALLERS:
            self._drop(makes_room(self._callers.values(), lambda caller: caller.host), "busy")
        self._callers[sock] = _Caller(sock, host_of(sock), time.monotonic() + self.cluster.limits.connect_s)
        self._selector.register(sock, selectors.EVENT_READ)

    def _hear(self, caller: _Caller) -> None:
        try:
            part = caller.sock.recv(PREAMBLE_BYTES - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        caller.said += part
        if part and len(caller.said) < PREAMBLE_BYTES:
            return
        try:
            preamble = Preamble.parse(caller.said)
        except LinkError:
            self._drop(caller, "malformed")
            return
        self._selector.unregister(caller.sock)
        del self._callers[caller.sock]
        if preamble.run is None or preamble.version != self._requests.version:
            self._answer(caller.sock, preamble)
        else:
            self._lobby.take(preamble.run, caller.sock)

    def _answer(self, sock: socket.socket, preamble: Preamble) -> None:
        known: Callable[[], None] | None = None
        try:
            known = self._greetings.enter(sock)
            threading.Thread(
                target=self._requests.serve,
                args=(sock, preamble, known),
                name="sfumato-request",
                daemon=True,
            ).start()
        except (OSError, RuntimeError, MemoryError):  # no descriptor, thread or memory left
            self.metrics.refused("busy")
            sock.close()
            if known is not None:
                known()

    def _until_next(self) -> float:
        deadlines = [caller.deadline for caller in self._callers.values()] + self._lobby.deadlines()
        if self._accepts_at is not None:
            deadlines.append(self._accepts_at)
        return max(0.0, min([*deadlines, self._next_look]) - time.monotonic())

    def _sweep(self) -> None:
        now = time.monotonic()
        for caller in [c for c in self._callers.values() if c.deadline <= now]:
            self._drop(caller, "deadline")
        self._lobby.sweep(now)
        if self._accepts_at is not None and self._accepts_at <= now:
            self._accepts_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        if now >= self._next_look:
            self._next_look = now + _LOOK_S
            self._look()

    def _drop(self, caller: _Caller, why: str) -> None:
        self._selector.unregister(caller.sock)
        del self._callers[caller.sock]
        self._close(caller, why)

    def _close(self, caller: _Caller, why: str) -> None:
        self.metrics.refused(why)
        caller.sock.close()

    def _look(self) -> None:
        """What an operator should know in time, and what crashes left in the store."""
        with contextlib.suppress(RuntimeError):  # no thread left: the next time
            threading.Thread(target=self._tidy, name="sfumato-store", daemon=True).start()
        self.metrics.certificate(self.folder / "certificate.pem")
        days = self.health()["certificate_days"]
        if days < _SOON_DAYS:
            state = f"ends in {days:.0f} days" if days > 0 else "is not valid now"
            _log.warning(
                "the certificate of party %d %s; renew it (sfumato cluster renew)",
                self.index,
                state,
                extra={"facts": {"party": self.index, "certificate_days": days}},
            )

    def _tidy(self) -> None:
        """In a thread of its own: deleting a large model takes long, and a writer may hold the lock."""
        settings = self.settings
        try:
            ModelStore(settings.storage_folder, settings.storage_key, self.index).sweep()
        except (SfumatoError, OSError) as error:
            _log.warning(
                "party %d could not tidy its store: %s",
                self.index,
                public_text(str(error)),
                extra={"facts": {"party": self.index, "error": error}},
            )

    def _end(self) -> None:
        self._queue.close()
        self._listener.close()
        for caller in self._callers.values():
            caller.sock.close()
        self._lobby.close()
        self._place.end(_STOP_S)
        self._forkserver.stop()
        if self._operations is not None:
            self._operations.stop()
        for end in (self._selector, self._wake_receive, self._wake_send):
            end.close()


def _takes_files(folder: Path) -> bool:
    """Whether files can be written to a folder, or where it will be made."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return os.access(folder, os.W_OK) and os.statvfs(folder).f_bavail > 0
    except OSError:
        return False


def _leave_with_parent(supervisor: PartySupervisor) -> None:
    """End this process when standard input ends, which it does when the parent is gone, however it went."""

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        supervisor.stop()
        time.sleep(3 * _STOP_S)
        os._exit(1)

    threading.Thread(target=watch, name="sfumato-parent", daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m sfumato.runtime.server``: one party; with ``--child`` under the control of a local
    cluster."""
    parser = argparse.ArgumentParser(prog="sfumato.runtime.server", description="Run one party.")
    parser.add_argument("--folder", required=True, type=Path, help="the party's folder made by cluster init")
    parser.add_argument("--index", required=True, type=int, choices=(0, 1, 2))
    parser.add_argument("--machine", default=_MACHINE, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument(
        "--term", action="append", default=[], metavar="NAME=TEXT", help="a term all parties must share"
    )
    parser.add_argument(
        "--weights", type=Path, help="folder of public weights that a client on this host may name"
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--forkserver", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--die-with-parent", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if options.die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        telemetry.configure_logging(options.log_format)
        telemetry.configure_tracing()
        cluster, settings = Cluster.load(options.folder), PartySettings.load(options.folder)
        listener = listen(cluster.parties[options.index].host, cluster.parties[options.index].port)

        def failed(problem: str) -> None:
            print(f"sfumato party {options.index}: {public_text(problem)}", file=sys.stderr, flush=True)
            os._exit(1)

        given = None if options.forkserver is None else Pipe(socket.socket(fileno=options.forkserver))
        forkserver = Forkserver(options.machine, failed, given)  # loads while the rest goes on
        if options.child:
            print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
            ports = json.loads(sys.stdin.buffer.readline() or b"null")
            if not isinstance(ports, list) or len(ports) != 3:
                return 0  # the parent left before the cluster was up
            cluster = with_ports(cluster, ports)
        supervisor = PartySupervisor(
            cluster,
            options.index,
            options.folder,
            forkserver,
            settings,
            listener=listener,
            terms=dict(term.partition("=")[::2] for term in options.term),
            weights_folder=options.weights,
            threads=options.threads,
            log=options.log_format,
        )
        signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
        if options.child:
            _leave_with_parent(supervisor)
        supervisor.serve_forever()
    except SfumatoError as error:
        print(f"sfumato party {options.index}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        pass
    telemetry.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
