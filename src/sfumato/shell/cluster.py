"""``sfumato cluster``, ``party`` and ``status``: who computes, one of them, and how all three are."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sfumato.errors import SfumatoError
from sfumato.shell.command import clean

__all__ = ["cluster_app", "in_common", "party", "status", "status_table"]

_SOON_DAYS = 30
_STATUS_S = 5.0

cluster_app = typer.Typer(help="Who computes: keys, certificates and the cluster file.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="The cluster's folder, with its authority.")]


@cluster_app.command("init")
@clean
def cluster_init(
    folder: Annotated[Path, typer.Argument(help="A new folder for the cluster.")],
    host: Annotated[list[str] | None, typer.Option(help="Address of a party; three times.")] = None,
    port: Annotated[list[int] | None, typer.Option(help="Port of a party; three times.")] = None,
    client: Annotated[list[str] | None, typer.Option(help="Name of a client; repeat for more.")] = None,
    owner: Annotated[list[str] | None, typer.Option(help="Name of a model owner; repeat for more.")] = None,
) -> None:
    """Make keys and certificates for three parties, their clients and the owners of models.

    Each holder gets one folder of it, over a channel that you trust, and nothing of the others'. Keep 'authority'
    offline: it makes certificates.

    Example: `sfumato cluster init ours --host a.example --host b.example --host c.example`
    """
    from sfumato.runtime.authority import init_cluster

    given: dict[str, Any] = {"hosts": host, "ports": port, "clients": client, "owners": owner}
    made = init_cluster(folder, **{name: value for name, value in given.items() if value})
    for index, member in enumerate(made.parties):
        print(f"{folder}/party{index}: for the operator at {member.host}, port {member.port}")
    for name in client or ["client"]:
        print(f"{folder}/{name}: for a client")
    for name in owner or ["owner"]:
        print(f"{folder}/{name}: for an owner of models")
    print(f"{folder}/authority: yours; keep it offline, 'cluster renew' and 'cluster add' need it")


@cluster_app.command("renew")
@clean
def cluster_renew(folder: Folder) -> None:
    """Make new keys and certificates, valid for a year, for everybody whose folder is here.

    Hand the folders out again and restart the three parties: they know each other's certificates. Models stay.

    Example: `sfumato cluster renew ours`
    """
    from sfumato.runtime.authority import renew_cluster

    renew_cluster(folder)
    for path in sorted(folder.iterdir()):
        if (path / "certificate.pem").is_file():
            print(f"{path}: renewed")


@cluster_app.command("add")
@clean
def cluster_add(
    folder: Folder,
    client: Annotated[str | None, typer.Option(help="Name of a new client.")] = None,
    owner: Annotated[str | None, typer.Option(help="Name of a new owner of models.")] = None,
) -> None:
    """Make a folder for one more client or owner. The parties need not be told.

    Example: `sfumato cluster add ours --client alice`
    """
    from sfumato.runtime.authority import add_member

    made = add_member(folder, client=client, owner=owner)
    print(f"{made}: for {'a client' if client else 'an owner of models'}")


@clean
def party(
    folder: Annotated[Path, typer.Option(help="This party's folder, made by 'cluster init'.")],
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads for computing, of each session.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="text, or json: numbers and fixed words only.")] = "text",
) -> None:
    """Run one party until stopped. Settings are read from party.toml in its folder.

    Example: `sfumato party --folder ours/party0`
    """
    from sfumato.runtime.authority import party_index
    from sfumato.runtime.server import main as serve

    arguments = ["--folder", str(folder), "--index", str(party_index(folder))]
    arguments += ["--threads", str(threads)] if threads else []
    arguments += ["--log-format", log_format] if log_format != "text" else []
    if serve(arguments):
        raise typer.Exit(2)


@clean
def status(
    cluster: Annotated[Path, typer.Option(help="Cluster file of the three parties.")],
    keys: Annotated[
        Path | None, typer.Option(help="Your certificate's folder. [default: that of the file]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """How the three parties are: reachable, how busy, with which release and certificates.

    The exit code is 1 unless all three are ready.

    Example: `sfumato status --cluster ours/client/cluster.toml`
    """
    from sfumato.runtime.cluster import Cluster
    from sfumato.runtime.control import ask

    given = Cluster.load(cluster)
    folder = keys or (cluster if cluster.is_dir() else cluster.parent)

    def one(index: int) -> dict[str, Any]:
        try:
            return {"reachable": True, **ask(given, folder, index, {"ask": "status"}, timeout_s=_STATUS_S)}
        except SfumatoError as error:
            return {"reachable": False, "ready": False, "party": index, "problem": str(error)}

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        console.print(status_table([member.host for member in given.parties], found))
        for line in filter(None, (in_common(found), *_warnings(found))):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    if not all(row["ready"] is True for row in found):
        raise typer.Exit(1)


def status_table(hosts: list[str], found: list[dict[str, Any]]) -> Table:
    """A line for each party; 80 columns hold it, long host names in several lines. What all parties should have in
    common is not here but in :func:`in_common`."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("party")
    table.add_column("host", overflow="fold")
    for name in ("state", "running", "waiting", "up", "certificate"):
        table.add_column(name, no_wrap=True)
    for index, (host, row) in enumerate(zip(hosts, found, strict=True)):
        if not row["reachable"]:
            table.add_row(str(index), host, "not reachable", *[""] * 4)
            continue
        table.add_row(
            str(index),
            host,
            "ready" if row["ready"] is True else "not ready",
            f"{row['running']} of {row['at_once']}",
            str(row["queued"]),
            _ago(float(row["uptime_s"])),
            f"{max(0.0, float(row['certificate_days'])):.0f} days left",
        )
    return table


def in_common(found: list[dict[str, Any]]) -> str:
    """Release, protocol and number of models of the parties that answered: once where they agree, else each one's."""
    told = []
    for field, name in (("package", "release"), ("protocol", "protocol"), ("models", "models")):
        values = {index: str(row[field]) for index, row in enumerate(found) if row["reachable"]}
        if len(set(values.values())) == 1:
            told.append(f"{name} {next(iter(values.values()))}")
        elif values:
            told.append(f"{name} " + ", ".join(f"{value} at party {i}" for i, value in values.items()))
    return "; ".join(told)


def _warnings(found: list[dict[str, Any]]) -> list[str]:
    """One line for what an operator or client should know."""
    lines = []
    for index, row in enumerate(found):
        if not row["reachable"]:
            named = row["problem"].startswith(f"party {index} ")
            lines.append(row["problem"] if named else f"party {index}: {row['problem']}")
            continue
        for part, words in _PARTS.items():
            if row.get(part) is not True:
                lines.append(f"party {index}: {words}")
        if 0 < float(row["certificate_days"]) < _SOON_DAYS:
            lines.append(f"party {index}: its certificate ends soon; renew it (sfumato cluster renew)")
    return lines


_PARTS = {
    "listening": "it is about to stop",
    "forkserver": "it cannot start sessions yet; it is loading, or its log says why not",
    "storage": "its store cannot be written, or its disk is full",
    "certificate": "its certificate is not valid now; renew it (sfumato cluster renew)",
}


def _ago(seconds: float) -> str:
    """In the largest unit, at most six characters in the first years."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
