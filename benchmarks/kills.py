"""kill -9 of any process at random moments: what everybody else says, what is left behind, whether the next job works.

    python benchmarks/kills.py --rounds 100

Three parties as their operators start them (``sfumato party``), and a client process with one job of several calls. In
each round one process is killed at a moment drawn over the length of a job: a party's supervisor, the process that
sessions are forked from, a session's worker, or the client. Held to, in every round:

* every other process that took part says one named error, or has finished well, within ten seconds;
* no process of a killed party goes on, and no worker outlives its session;
* nothing of the session is on disk: the parties' folders hold what they held before;
* after the killed party is started again, the next job gives the right result.

Pages: results/kills.json and results/kills.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import common
import psutil
from tqdm import tqdm

from sfumato.errors import SfumatoError
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.cluster import Limits

RECORD, PAGE = common.RESULTS / "kills.json", common.RESULTS / "kills.md"
_DEADLINE_S = 10.0
_ROLES = ("supervisor", "forkserver", "worker", "client")

#: What the client process runs: one job of several calls, and its one line.
JOB = """
import sys, time
import torch
import sfumato as sf
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).eval()
for p in net.parameters():
    p.data.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
x = torch.linspace(-1, 1, 32).reshape(4, 8)
plan = sf.make_plan(sf.capture(net, (x,)), secret="inputs+weights", calibration=[((x,), {})])
print("ready", flush=True)
sys.stdin.readline()
try:
    with sf.deploy(plan, sys.argv[1]) as deployment:
        for _ in range(4):
            found = deployment(x)
            assert (found - net(x)).abs().max() < 1e-3, "a wrong result"
    print("ok", flush=True)
except sf.SfumatoError as error:
    print(f"{type(error).__name__}: {error}", flush=True)
"""


class Parties:
    """Three ``sfumato party`` processes of one cluster."""

    def __init__(self, folder: Path, clients: Sequence[str] = ("client",)) -> None:
        self.folder, self.client = folder, clients[0]
        limits = Limits(connect_s=5.0, stall_s=5.0, idle_s=30.0)
        init_cluster(folder / "ours", ports=_free_ports(3), clients=clients, limits=limits)
        self.processes: list[subprocess.Popen[bytes]] = [self.start(i) for i in range(3)]
        self.wait_ready()
        self.before = self.files()

    def start(self, index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sfumato.shell.cli", "party", "--threads", "1"]
        with (self.folder / f"party{index}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "--folder", str(self.folder / "ours" / f"party{index}")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not all(row.get("ready") for row in self.status()):
            if time.monotonic() > deadline:
                raise SystemExit(f"the parties did not get ready: {self.status()}")
            time.sleep(0.1)

    def status(self) -> list[dict[str, Any]]:
        """Each party's own answer; an empty one where it does not answer."""
        from sfumato.runtime.cluster import Cluster
        from sfumato.runtime.control import ask

        client = self.folder / "ours" / self.client
        found = []
        for index in range(3):
            try:
                found.append(ask(Cluster.load(client), client, index, {"ask": "status"}, timeout_s=5.0))
            except SfumatoError:
                found.append({})
        return found

    def files(self) -> set[str]:
        """What lies in the parties' folders."""
        folders = (self.folder / "ours" / f"party{i}" for i in range(3))
        return {str(p.relative_to(self.folder)) for folder in folders for p in folder.rglob("*")}

    def family(self, index: int) -> list[psutil.Process]:
        """A party's supervisor, then everything that descends from it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.processes[index].pid)
            return [supervisor, *supervisor.children(recursive=True)]
        return []

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Client:
    """A client process that waits to be told to begin."""

    def __init__(self, parties: Parties) -> None:
        keys = parties.folder / "ours" / "client" / "cluster.toml"
        self.process = subprocess.Popen(
            [sys.executable, "-c", JOB, str(keys)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float) -> str:
        """Its one line, or what went wrong with it."""
        try:
            out, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return "hung"
        return out.strip() or f"died with {self.process.returncode}"


def victim(parties: Parties, client: Client, role: str, source: random.Random) -> tuple[int, int]:
    """(process id, party or -1) of what is to be killed; a worker that is not there is waited for a moment."""
    if role == "client":
        return client.process.pid, -1
    index = source.randrange(3)
    deadline = time.monotonic() + 1.0
    while True:
        family = parties.family(index)
        depth = _ROLES.index(role)
        if len(family) > depth:
            return family[depth].pid, index
        if time.monotonic() > deadline:
            return family[0].pid, index
        time.sleep(0.005)


def one_round(parties: Parties, role: str, length_s: float, source: random.Random) -> dict[str, Any]:
    """Kill one process at one moment; what happened."""
    client = Client(parties)
    client.go()
    after_s = source.uniform(0.0, length_s)
    time.sleep(after_s)
    pid, index = victim(parties, client, role, source)
    family = parties.family(index) if index >= 0 and pid == parties.processes[index].pid else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    said = client.answer(_DEADLINE_S + 3 * length_s)  # who is not told of the kill finishes its job
    client_s = time.monotonic() - killed
    problems = []
    if role == "client":
        if not (said.startswith("died") or said == "ok"):
            problems.append(f"a killed client said {said!r}")
    elif said == "hung" or (said != "ok" and not said.split(":")[0].endswith("Error")):
        problems.append(f"the client said {said!r}")
    gone_s = _gone(family, killed)
    if gone_s is None:
        problems.append("a process of the killed party goes on")
    if family:
        parties.processes[index].wait()
        parties.processes[index] = parties.start(index)
        parties.wait_ready()
    idle_s = _idle(parties, killed)
    if idle_s is None:
        problems.append("a session goes on at a party")
    if left := parties.files() - parties.before:
        problems.append(f"left on disk: {sorted(left)[0]}")
    following = Client(parties)
    following.go()
    if (again := following.answer(60.0)) != "ok":
        problems.append(f"the next job said {again!r}")
    return {
        "role": role, "party": index, "after_s": round(after_s, 3), "said": said, "client_s": round(client_s, 2),
        "gone_s": gone_s, "idle_s": idle_s, "problems": problems,
    }  # fmt: skip


def _whole_job(parties: Parties) -> float:
    """Seconds of a job that nobody disturbs."""
    client = Client(parties)
    begun = time.monotonic()
    client.go()
    assert client.answer(60.0) == "ok"
    return time.monotonic() - begun


def _gone(family: Iterable[psutil.Process], since: float) -> float | None:
    """Seconds until none of these processes ran; None if some still do at the deadline."""
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family):
        if time.monotonic() - since > _DEADLINE_S:
            return None
        time.sleep(0.02)
    return round(time.monotonic() - since, 2)


def _idle(parties: Parties, since: float) -> float | None:
    """Seconds until no party has a session; None if one still has at the deadline."""
    while any(row.get("running", 1) for row in parties.status()):
        if time.monotonic() - since > 2 * _DEADLINE_S:
            return None
        time.sleep(0.05)
    return round(time.monotonic() - since, 2)


def page(record: dict[str, Any]) -> str:
    """The page of a record."""
    rows = []
    for role in _ROLES:
        mine = [r for r in record["rounds"] if r["role"] == role]
        if not mine:
            continue
        kinds = Counter(r["said"].split(":")[0] for r in mine)
        rows.append([
            role, str(len(mine)), ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
            f"{max(r['client_s'] for r in mine):.1f}", f"{max(r['idle_s'] or 99 for r in mine):.1f}",
            str(sum(bool(r["problems"]) for r in mine)),
        ])  # fmt: skip
    head = [
        "killed", "rounds", "what the client said", "latest answer, s", "latest end of sessions, s", "with a problem",
    ]  # fmt: skip
    body = [
        "# kill -9 at random moments", "", common.machine_line(record["machine"]), "",
        *(__doc__ or "").split("Pages:")[0].split("\n\n", 2)[2].splitlines(), common.markdown_table(head, rows), "",
    ]  # fmt: skip
    return "\n".join(body)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    source = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        parties = Parties(Path(folder))
        try:
            lengths = [_whole_job(parties) for _ in range(2)]
            length_s = lengths[-1]
            record: dict[str, Any] = {"machine": common.machine(), "job_s": round(length_s, 2), "rounds": []}
            for i in tqdm(range(options.rounds)):
                record["rounds"].append(one_round(parties, _ROLES[i % 4], length_s, source))
                common.write_json(RECORD, record)
                if record["rounds"][-1]["problems"]:
                    tqdm.write(json.dumps(record["rounds"][-1]))
        finally:
            parties.close()
    PAGE.write_text(page(record), encoding="utf-8")
    print(page(record))
    if any(r["problems"] for r in record["rounds"]):
        raise SystemExit("some rounds had problems")


if __name__ == "__main__":
    main()
