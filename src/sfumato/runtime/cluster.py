"""Who computes: the cluster file (three parties and the limits of their links) and the private authority
behind it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sfumato.errors import JobError
from sfumato.link.identity import client_identity, party_identity

__all__ = ["Cluster", "Limits", "Member", "init_cluster"]

_VALID_DAYS = 365
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}\Z")


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
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise JobError(f"it is not valid TOML ({error}).") from None
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
        if not isinstance(name, str) or not _NAME.match(name):
            problems.append(f"The name of {where} must be 1 to 63 letters, digits, '.', '_' or '-'.")
        if not isinstance(host, str) or not _is_host(host):
            problems.append(f"The host of {where} must be an IP address or a host name.")
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            problems.append(f"The port of {where} must be a whole number from 0 to 65535.")
        if fingerprint is not None and not (isinstance(fingerprint, str) and _FINGERPRINT.match(fingerprint)):
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


def init_cluster(
    folder: Path | str,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ports: Sequence[int] = (8440, 8441, 8442),
    names: Sequence[str] = ("party0", "party1", "party2"),
    clients: Sequence[str] = ("client",),
    limits: Limits | None = None,
) -> Cluster:
    """Make a private authority, certificates for three parties and the clients, and one folder for each
    operator.

    ``folder/party0`` .. ``party2`` and ``folder/NAME`` of each client hold ``cluster.toml``,
    ``authority.pem``, ``certificate.pem`` and ``key.pem`` (mode 0600): all that its operator needs, and
    nothing of the others. The authority's own key is used here once and never written. Certificates are valid
    for one year.

    Raises ``JobError`` when the folder already holds something, or a host, port or name is not valid; nothing
    is written then.
    """
    folder = Path(folder)
    if len(hosts) != 3 or len(ports) != 3 or len(names) != 3:
        raise JobError("a cluster has three parties; give three hosts, three ports and three names")
    for client in clients:
        if not _NAME.match(client) or re.fullmatch(r"party[0-2]", client):
            raise JobError(
                "a client's name must be 1 to 63 letters, digits, '.', '_' or '-', and not a party's folder"
            )
    if not clients or len(set(clients)) < len(clients):
        raise JobError("give at least one client, and each client once")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"{folder} already exists and is not empty; choose a new folder, nothing was changed")
    draft = Cluster(
        parties=tuple(Member(name=n, host=h, port=p) for n, h, p in zip(names, hosts, ports, strict=True)),  # type: ignore[arg-type]
        limits=limits or Limits(),
    )
    Cluster.parse(draft.to_toml())
    authority = _Authority()
    issued = [
        authority.issue(party_identity(i), m.name, m.host, serves=True) for i, m in enumerate(draft.parties)
    ]
    members = [
        Member(
            name=m.name,
            host=m.host,
            port=m.port,
            fingerprint=f"sha256:{certificate.fingerprint(hashes.SHA256()).hex()}",
        )
        for m, (certificate, _) in zip(draft.parties, issued, strict=True)
    ]
    cluster = Cluster(parties=(members[0], members[1], members[2]), limits=draft.limits)
    shelves = {f"party{i}": pair for i, pair in enumerate(issued)}
    shelves |= {name: authority.issue(client_identity(name), name, None, serves=False) for name in clients}
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # mode 0700
    try:
        for shelf, (certificate, key) in shelves.items():
            target = draft_folder / shelf
            target.mkdir(mode=0o700)
            _write(target / "cluster.toml", cluster.to_toml().encode(), 0o644)
            _write(
                target / "authority.pem",
                authority.certificate.public_bytes(serialization.Encoding.PEM),
                0o644,
            )
            _write(target / "certificate.pem", certificate.public_bytes(serialization.Encoding.PEM), 0o644)
            pem = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            _write(target / "key.pem", pem, 0o600)
        _write(draft_folder / "cluster.toml", cluster.to_toml().encode(), 0o644)
        os.replace(draft_folder, folder)  # all or nothing
    except OSError as error:
        shutil.rmtree(draft_folder, ignore_errors=True)
        raise JobError(f"cannot write {folder} ({error.strerror})") from None
    return cluster


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


class _Authority:
    """A certificate authority that lives as long as one `init_cluster`."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sfumato cluster authority")])
        self._identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        usage = _usage(signs_certificates=True)
        self.certificate = (
            self._begin(name, name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(self._identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(
        self, identity: str, name: str, host: str | None, *, serves: bool
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """A certificate for ``identity`` and its new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity)]
        if host is not None:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if serves else [])]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._begin(subject, self.certificate.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._identifier),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate, key

    @staticmethod
    def _begin(
        subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
