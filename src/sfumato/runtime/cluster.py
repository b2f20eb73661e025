"""Who computes: the cluster file, that is three parties and the limits of their links."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sfumato.errors import JobError
from sfumato.link.tls import LinkLimits
from sfumato.runtime.canonical import parse_toml
from sfumato.runtime.names import is_fingerprint, is_name

__all__ = ["Cluster", "Limits", "Member", "link_limits", "with_ports"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One party: where it listens and which certificate it shows."""

    name: str
    host: str
    port: int
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds every process of the cluster keeps."""

    max_frame_bytes: int = 1 << 30
    max_message_bytes: int = 16 << 30
    connect_s: float = 10.0
    stall_s: float = 120.0
    idle_s: float = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Three parties in order, and the limits."""

    parties: tuple[Member, Member, Member]
    limits: Limits = field(default_factory=Limits)

    @staticmethod
    def load(path: Path | str) -> Cluster:
        """Read and check a cluster file (or the ``cluster.toml`` of a folder).

        Raises ``JobError`` listing every problem, one sentence each.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "cluster.toml"
        try:
            return Cluster.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise JobError(f"cannot read the cluster file {path} ({error.strerror})") from None
        except UnicodeDecodeError:
            raise JobError(f"the cluster file {path} is not UTF-8 text") from None
        except JobError as error:
            raise JobError(f"the cluster file {path} cannot be used: {error}") from None

    @staticmethod
    def parse(text: str) -> Cluster:
        """The cluster described by TOML ``text``; ``JobError`` listing every problem."""
        data = parse_toml(text)
        problems = [f"Unknown key '{key}'." for key in data if key not in ("format", "party", "limits")]
        if data.get("format") != 1:
            problems.append("Set format = 1.")
        members = _members(data.get("party"), problems)
        limits = _limits(data.get("limits", {}), problems)
        if problems:
            raise JobError(" ".join(problems))
        return Cluster(parties=(members[0], members[1], members[2]), limits=limits)

    def to_toml(self) -> str:
        """The text that `parse` reads back as an equal cluster."""
        lines = [
            "# The three parties of one sfumato cluster, in order: the first is party 0.",
            "format = 1",
            "",
        ]
        for member in self.parties:
            lines += [
                "[[party]]",
                f'name = "{member.name}"',
                f'host = "{member.host}"',
                f"port = {member.port}",
            ]
            if member.fingerprint:
                lines.append(f'fingerprint = "{member.fingerprint}"')
            lines.append("")
        lines.append("[limits]")
        lines += [f"{f.name} = {getattr(self.limits, f.name)}" for f in fields(Limits)]
        return "\n".join(lines) + "\n"


def _members(entries: Any, problems: list[str]) -> list[Member]:
    if not isinstance(entries, list) or len(entries) != 3 or not all(isinstance(e, dict) for e in entries):
        problems.append("Give exactly three [[party]] tables.")
        return []
    members = []
    for index, entry in enumerate(entries):
        where = f"party {index}"
        before = len(problems)
        problems += [
            f"Unknown key '{key}' in {where}."
            for key in entry
            if key not in ("name", "host", "port", "fingerprint")
        ]
        name, host, port = entry.get("name"), entry.get("host"), entry.get("port")
        fingerprint = entry.get("fingerprint")
        if not is_name(name):
            problems.append(f"The name of {where} must be 1 to 63 letters, digits, '.', '_' or '-'.")
        if not isinstance(host, str) or not _is_host(host):
            problems.append(f"The host of {where} must be an IP address or a host name.")
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            problems.append(f"The port of {where} must be a whole number from 0 to 65535.")
        if fingerprint is not None and not is_fingerprint(fingerprint):
            problems.append(f"The fingerprint of {where} must be 'sha256:' and 64 hex digits.")
        if len(problems) == before:
            members.append(
                Member(name=str(name), host=str(host), port=int(port or 0), fingerprint=fingerprint)
            )
    if len(members) == 3:
        if len({m.name for m in members}) < 3:
            problems.append("The three parties must have different names.")
        if len({(m.host, m.port) for m in members if m.port}) < sum(1 for m in members if m.port):
            problems.append("The three parties must have different addresses.")
        prints = [m.fingerprint for m in members if m.fingerprint]
        if len(set(prints)) < len(prints):
            problems.append("The three parties must have different certificates.")
    return members


def _limits(table: Any, problems: list[str]) -> Limits:
    if not isinstance(table, dict):
        problems.append("[limits] must be a table.")
        return Limits()
    bounds = {
        "max_frame_bytes": (1 << 16, 2**32 - 1),
        "max_message_bytes": (1 << 16, 1 << 44),
        "connect_s": (0.1, 3600.0),
        "stall_s": (0.1, 86400.0),
        "idle_s": (0.1, 7 * 86400.0),
    }
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in bounds:
            problems.append(f"Unknown key '{key}' in [limits].")
            continue
        low, high = bounds[key]
        whole = key.endswith("_bytes")
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not low <= value <= high:
            problems.append(f"{key} must be a {'whole ' if whole else ''}number from {low} to {high}.")
        else:
            values[key] = value if whole else float(value)
    return Limits(**values)


def _is_host(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        labels = host.rstrip(".").split(".")
        return len(host) <= 253 and all(
            re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)", part) for part in labels
        )


def link_limits(cluster: Cluster) -> LinkLimits:
    """The link's bounds from the cluster file."""
    limits = cluster.limits
    return LinkLimits(max_frame_bytes=limits.max_frame_bytes, stall_s=limits.stall_s)


def with_ports(cluster: Cluster, ports: Sequence[int]) -> Cluster:
    """The same cluster on other ports."""
    first, second, third = (
        replace(member, port=int(port)) for member, port in zip(cluster.parties, ports, strict=True)
    )
    return replace(cluster, parties=(first, second, third))
