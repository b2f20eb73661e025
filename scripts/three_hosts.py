"""Run README's section "On three hosts" as it stands: every host of it is a network namespace of this machine.

    sudo python scripts/three_hosts.py [--rate 1gbit] [--keep FOLDER]

Needs Linux, root and iproute2. Hosts have addresses of their own on one bridge, each with its link's rate limited; each
has a folder of its own that holds only what the README hands to it. Commands that run until stopped go to the
background; every other one must end well in its time. What was made (pictures, logs) stays in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 240.0
_STARTS = re.compile(r"sfumato party\b")


@dataclass(frozen=True, slots=True)
class Step:
    """One command, and the host it is typed at."""

    host: str
    command: str

    @property
    def stays(self) -> bool:
        """Whether it runs until stopped."""
        return bool(_STARTS.match(self.command))

    @property
    def folders(self) -> list[str]:
        """Handed-over folders that it names: ``ours/party0``."""
        return sorted(set(re.findall(r"\bours/[\w.-]+", self.command)))


def steps_of(readme: str) -> list[Step]:
    """The commands of the section's block; ``# on HOST`` says where the following ones are typed."""
    section = readme.split("## On three hosts", 1)[1].split("\n## ", 1)[0]
    block = section.split("```", 2)[1]
    host, found = "desk.example", []
    for line in block.replace("\\\n", " ").splitlines():
        if at := re.match(r"# on (\S+?)[:,]?(\s|$)", line):
            host = at.group(1)
        elif line.strip() and not line.startswith("#"):
            found.append(Step(host, line.split("  #")[0].strip()))
    return found


@dataclass
class Network:
    """Namespaces on one bridge, for as long as a ``with`` block lasts."""

    hosts: Sequence[str]
    rate: str
    tag: str = field(default_factory=lambda: f"sf{os.getpid() % 10000}")

    def name(self, host: str) -> str:
        return f"{self.tag}-{host.split('.')[0]}"

    def __enter__(self) -> Network:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        _ip(f"link add {self.tag} type bridge")
        _ip(f"link set {self.tag} up")
        table = ["127.0.0.1 localhost"]
        table += [f"10.77.0.{i + 1} {host}" for i, host in enumerate(self.hosts)]
        for i, host in enumerate(self.hosts):
            name, inside, outside = self.name(host), f"{self.tag}i{i}", f"{self.tag}o{i}"
            _ip(f"netns add {name}")
            _ip(f"link add {outside} type veth peer name {inside}")
            _ip(f"link set {outside} master {self.tag} up")
            _ip(f"link set {inside} netns {name}")
            for command in (
                f"addr add 10.77.0.{i + 1}/24 dev {inside}",
                f"link set {inside} up",
                "link set lo up",
            ):
                _ip(f"-n {name} {command}")
            subprocess.run(
                shlex.split(
                    f"tc -n {name} qdisc add dev {inside} root tbf rate {self.rate} burst 1mbit latency 50ms"
                ),
                check=True,
            )
            own = Path("/etc/netns") / name
            own.mkdir(parents=True)
            (own / "hosts").write_text("\n".join(table) + "\n")

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip(f"netns del {self.name(host)}", quiet=True)
            shutil.rmtree(Path("/etc/netns") / self.name(host), ignore_errors=True)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip(f"link del {self.tag}", quiet=True)

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name(host), *words]


def _ip(arguments: str, *, quiet: bool = False) -> None:
    hidden = subprocess.DEVNULL if quiet else None
    subprocess.run(["ip", *shlex.split(arguments)], check=True, stdout=hidden, stderr=hidden)


@contextlib.contextmanager
def _processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Background commands, stopped together at the end whatever happens."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def play(steps: Sequence[Step], folder: Path, rate: str) -> None:
    """Do every step; raises ``SystemExit`` with the failing command and its last words."""
    hosts = list(dict.fromkeys(step.host for step in steps))
    first = hosts[0]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with Network(hosts, rate) as network, _processes() as running:
        for step in steps:
            here = folder / step.host
            here.mkdir(parents=True, exist_ok=True)
            for handed in step.folders:
                source, target = folder / first / handed, here / handed
                if source.is_dir() and not target.exists():
                    shutil.copytree(source, target)
            print(f"{step.host}$ {step.command}", flush=True)
            words = network.command(step.host, shlex.split(step.command))
            environment = {**os.environ, "PATH": path, "HOME": str(here), "HF_HUB_OFFLINE": "1"}
            environment["OMP_NUM_THREADS"] = "1"  # the hosts share the cores of this machine
            log = here / f"{len(list(here.glob('*.log')))}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    words, cwd=here, env=environment, stdout=output, stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            if step.stays:
                running.append(process)
                continue
            started = time.monotonic()
            try:
                code = process.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise SystemExit(f"{step.host}: no end after {_TIMEOUT_S:g} s: {step.command}") from None
            print(_indented(log), f"   ({time.monotonic() - started:.1f} s)", sep="\n", flush=True)
            if code:
                logs = "\n".join(f"-- {p}\n{_indented(p)}" for p in sorted(folder.glob("*/*.log")))
                raise SystemExit(f"{step.host}: exit code {code}: {step.command}\n{logs}")


def _indented(log: Path, last: int = 40) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(f"   {line}" for line in lines[-last:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--rate", default="1gbit", help="of each host's link, as tc writes it")
    parser.add_argument("--keep", type=Path, help="a folder for what the hosts make; [default: none is kept]")
    options = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        raise SystemExit("network namespaces need root, ip and tc (iproute2)")
    steps = steps_of(options.readme.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="three-hosts-") as temporary:
        play(steps, (options.keep or Path(temporary)).resolve(), options.rate)
    print("every command of the section ended well")


if __name__ == "__main__":
    main()
