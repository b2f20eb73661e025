"""Three parties as operators start them, each with a process of its own to fork from, and with somebody on the network
between party 1 and those who call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from odd_party import MACHINE
from processes import HERE, check, family, free_ports, is_running, wait_for
from proxy import Proxy

import sfumato
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Limits, with_ports
from sfumato.runtime.control import ask

__all__ = ["Trio"]


class Trio:
    """``folder/c`` holds the cluster. ``to_client`` and ``to_peer``: the proxies that the client and party 0 find party
    1 behind. Workers have one, two and three threads."""

    def __init__(self, folder: Path, limits: Limits, clients: Sequence[str]) -> None:
        self.folder, self.limits = folder, limits
        ports = free_ports(3)
        self.direct = init_cluster(folder / "c", ports=ports, clients=clients, limits=limits)
        self.to_client, self.to_peer = (Proxy(("127.0.0.1", ports[1])) for _ in range(2))
        self.cluster = with_ports(self.direct, (ports[0], self.to_client.port, ports[2]))
        seen = with_ports(self.direct, (ports[0], self.to_peer.port, ports[2]))
        (self.party_folder(0) / "cluster.toml").write_text(seen.to_toml(), encoding="utf-8")
        self.processes: list[subprocess.Popen[bytes]] = []
        for party in range(3):
            (folder / f"odd{party}").write_text("")
            self.processes.append(self._start(party))
        for party in range(3):
            wait_for(lambda party=party: self._is_ready(party), 60.0)  # type: ignore[misc]

    def _start(self, party: int) -> subprocess.Popen[bytes]:
        source = str(Path(sfumato.__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(HERE), source))}
        environment["ODD_PARTY"] = str(self.folder / f"odd{party}")
        command = [sys.executable, "-m", "sfumato.runtime.server", "--folder", str(self.party_folder(party))]
        command += ["--index", str(party), "--threads", str(1 + party), "--machine", MACHINE]
        if threading.current_thread() is threading.main_thread():
            command.append("--die-with-parent")
        with open(self._log(party), "ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, env=environment)

    def _is_ready(self, party: int) -> bool:
        assert self.processes[party].poll() is None, self._log(party).read_text(encoding="utf-8")[-500:]
        return self.status(party).get("ready") is True

    def party_folder(self, party: int) -> Path:
        return self.folder / "c" / f"party{party}"

    def keys(self, name: str = "client") -> Path:
        return self.folder / "c" / name

    def _log(self, party: int) -> Path:
        return self.folder / f"party{party}.log"

    def status(self, party: int) -> dict[str, Any]:
        """What a party says of itself; nothing when it says nothing."""
        try:
            return ask(self.direct, self.keys(), party, {"ask": "status"})
        except sfumato.SfumatoError:
            return {}

    def session(self, name: str = "client", **options: Any) -> RemoteSession:
        """Of a client, with the fake machine unless the options say otherwise."""
        return RemoteSession(self.cluster, self.keys(name), {"words": True, **options})

    def works(self) -> None:
        with self.session() as session:
            check(session)

    def rests(self) -> None:
        """No party has a session, will have one, or has a process for one."""
        for party, process in enumerate(self.processes):
            wait_for(
                lambda party=party: [self.status(party).get(k) for k in ("running", "queued")] == [0, 0]  # type: ignore[misc]
            )
            wait_for(lambda process=process: len(family(process.pid)) == 2)  # type: ignore[misc]

    def said(self, party: int) -> list[str]:
        """Why a party ended sessions or turned callers away so far, the earliest first."""
        text = self._log(party).read_text(errors="replace")
        assert "Traceback" not in text
        return re.findall(rf"party {party} (?:ends session \w+|turned a caller away): (.*)", text)

    def files(self) -> set[str]:
        """What lies in the parties' folders; a store's lock file may stay."""
        folders = (self.party_folder(party) for party in range(3))
        found = {str(path.relative_to(self.folder)) for folder in folders for path in folder.rglob("*")}
        return {path for path in found if not path.endswith(("/store", "/.lock"))}

    def close(self) -> None:
        pids = {pid for process in self.processes for pid in family(process.pid)}
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(10)
        for proxy in (self.to_client, self.to_peer):
            proxy.close()
        for pid in pids:
            wait_for(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
