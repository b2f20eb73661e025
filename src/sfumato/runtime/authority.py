"""The private authority behind a cluster: keys and certificates for operators, owners and clients.

Folders of a cluster: ``party0`` .. ``party2``, one for each client and owner, and ``authority``, which whoever made the
cluster keeps offline. A folder holds what its holder needs and nothing of the others.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sfumato.errors import JobError
from sfumato.link.identity import client_identity, owner_identity, party_identity
from sfumato.runtime.cluster import Cluster, Limits, Member
from sfumato.runtime.names import is_name
from sfumato.runtime.sealed import sync

__all__ = ["Authority", "add_member", "certificate_days", "init_cluster", "party_index", "renew_cluster"]

_VALID_DAYS = 365
_AUTHORITY_DAYS = 3650
_AUTHORITY = "authority"
_RESERVED = re.compile(r"(party[0-2]|authority)\Z", re.IGNORECASE)

Files = Mapping[str, tuple[bytes, int]]  # name -> (content, mode)


def init_cluster(
    folder: Path | str,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ports: Sequence[int] = (8440, 8441, 8442),
    names: Sequence[str] = ("party0", "party1", "party2"),
    clients: Sequence[str] = ("client",),
    owners: Sequence[str] = ("owner",),
    limits: Limits | None = None,
) -> Cluster:
    """Make a private authority, certificates for three parties, the clients and the owners, and one folder for each.

    Every folder holds ``cluster.toml``, ``authority.pem``, ``certificate.pem`` and ``key.pem`` (mode 0600), that of a
    party ``storage.key``, too. ``authority`` holds the authority's own certificate and key. Certificates are valid for
    one year, the authority's for ten.

    Raises ``JobError`` when the folder already holds something, or a host, port or name is not valid; nothing
    is written then.
    """
    folder = Path(folder)
    if len(hosts) != 3 or len(ports) != 3 or len(names) != 3:
        raise JobError("a cluster has three parties; give three hosts, three ports and three names")
    _check_names((*clients, *owners))
    if not clients:
        raise JobError("give at least one client")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(f"{folder} already exists and is not empty; choose a new folder, nothing was changed")
    members = [Member(name=n, host=h, port=p) for n, h, p in zip(names, hosts, ports, strict=True)]
    draft = Cluster(parties=(members[0], members[1], members[2]), limits=limits or Limits())
    Cluster.parse(draft.to_toml())
    authority = Authority.new()
    identities = {name: client_identity(name) for name in clients}
    identities |= {name: owner_identity(name) for name in owners}
    cluster, shelves = _issue_all(authority, draft, identities)
    for index in range(3):
        shelves[f"party{index}"] = {
            **shelves[f"party{index}"],
            "storage.key": (secrets.token_bytes(32), 0o600),
        }
    shelves[_AUTHORITY] = authority.files()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft_folder = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))  # mode 0700
    try:
        for shelf, files in shelves.items():
            _fill(draft_folder / shelf, files)
        _write(draft_folder / "cluster.toml", cluster.to_toml().encode(), 0o644)
        os.replace(draft_folder, folder)  # all or nothing
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(draft_folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise JobError(f"cannot write {folder} ({error.strerror})") from None
        raise
    return cluster


def renew_cluster(folder: Path | str) -> Cluster:
    """New keys and certificates, valid for a year, for the three parties and for every client and owner whose folder is
    in ``folder``, under the same authority. Storage keys and settings stay as they are.

    Every holder takes its new folder, and the three parties start again: they pin each other's certificates.

    Raises ``JobError`` when ``folder`` is not a cluster with its authority, or the authority itself ends too soon.
    """
    folder = Path(folder)
    authority, cluster = Authority.load(folder / _AUTHORITY), Cluster.load(folder)
    identities = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _RESERVED.match(path.name) and (path / "certificate.pem").is_file():
            identities[path.name] = _identity(path)
    renewed, shelves = _issue_all(authority, cluster, identities)
    try:
        for shelf, files in shelves.items():
            _fill(folder / shelf, files)
        _write(folder / "cluster.toml", renewed.to_toml().encode(), 0o644)
    except OSError as error:
        raise JobError(f"cannot write {folder} ({error.strerror}); renew it again") from None
    return renewed


def add_member(folder: Path | str, *, client: str | None = None, owner: str | None = None) -> Path:
    """A folder for one more client or owner, under the cluster's authority; the parties need not be told.

    Raises ``JobError`` when ``folder`` is not a cluster with its authority, or the name is taken or not valid.
    """
    folder, name = Path(folder), client or owner
    if name is None or (client and owner):
        raise JobError("give either the name of a client or that of an owner")
    _check_names([name])
    authority, cluster = Authority.load(folder / _AUTHORITY), Cluster.load(folder)
    target = folder / name
    if target.exists():
        raise JobError(f"{target} already exists; choose another name, nothing was changed")
    identity = owner_identity(name) if owner else client_identity(name)
    try:
        _fill(
            target, {**authority.member(identity, name), "cluster.toml": (cluster.to_toml().encode(), 0o644)}
        )
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)  # half a folder would hold the name
        if isinstance(error, OSError):
            raise JobError(f"cannot write {target} ({error.strerror})") from None
        raise
    return target


def certificate_days(folder: Path | str) -> float:
    """Days until the certificate in a folder ends; negative when it has ended, or has not begun.

    Raises ``JobError`` when it cannot be read.
    """
    certificate, now = _certificate(Path(folder)), datetime.datetime.now(datetime.UTC)
    if now < certificate.not_valid_before_utc:
        return -1.0
    return (certificate.not_valid_after_utc - now).total_seconds() / 86400


def party_index(folder: Path | str) -> int:
    """Which party a folder belongs to, by its certificate.

    Raises ``JobError`` when it belongs to none, or the certificate is not the one in the folder's cluster file.
    """
    folder = Path(folder)
    cluster, certificate = Cluster.load(folder), _certificate(folder)
    identity = _identity(folder)
    for index, member in enumerate(cluster.parties):
        if identity == party_identity(index):
            if member.fingerprint not in (None, _fingerprint(certificate)):
                raise JobError(
                    f"the certificate in {folder} is not the one in its cluster file; take a whole folder"
                )
            return index
    raise JobError(f"the certificate in {folder} is that of no party; give a party's folder")


class Authority:
    """Signs the certificates of one cluster."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self.certificate = key, certificate

    @staticmethod
    def new() -> Authority:
        """With a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sfumato cluster authority")])
        start, end = _span(_AUTHORITY_DAYS)
        certificate = (
            _begin(name, name, key.public_key(), start, end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return Authority(key, certificate)

    @staticmethod
    def load(folder: Path) -> Authority:
        """From the folder that `files` were written to; ``JobError`` when they are not there."""
        try:
            key = serialization.load_pem_private_key((folder / "authority.key").read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
        except (OSError, ValueError, TypeError):
            raise JobError(
                f"there is no authority in {folder}; bring back the folder that cluster init made"
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise JobError(f"the key and the certificate in {folder} do not belong together")
        return Authority(key, certificate)

    def files(self) -> Files:
        """Its certificate and its key, for the folder ``authority``."""
        return {
            "authority.pem": (_pem(self.certificate), 0o644),
            "authority.key": (_key_pem(self._key), 0o600),
        }

    def member(self, identity: str, name: str, host: str | None = None) -> Files:
        """Files for a holder: a new key, its certificate, and the authority's. A party has a ``host``."""
        certificate, key = self.issue(identity, name, host)
        return {
            "authority.pem": (_pem(self.certificate), 0o644),
            "certificate.pem": (_pem(certificate), 0o644),
            "key.pem": (_key_pem(key), 0o600),
        }

    def issue(
        self,
        identity: str,
        name: str,
        host: str | None = None,
        *,
        valid: tuple[datetime.datetime, datetime.datetime] | None = None,
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """A certificate for ``identity`` and its new key; with a ``host`` it may serve.

        Raises ``JobError`` when it would outlive the authority.
        """
        start, end = valid or _span(_VALID_DAYS)
        if end > self.certificate.not_valid_after_utc:
            raise JobError("the authority of this cluster ends within a year; make a new cluster")
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity)]
        if host is not None:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                names.append(x509.DNSName(host))
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if host else [])]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = (
            _begin(subject, self.certificate.subject, key.public_key(), start, end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate, key


def _issue_all(
    authority: Authority, cluster: Cluster, identities: Mapping[str, str]
) -> tuple[Cluster, dict[str, Files]]:
    """(the cluster with the new fingerprints, files of each folder)."""
    shelves: dict[str, Files] = {}
    members = []
    for index, member in enumerate(cluster.parties):
        files = authority.member(party_identity(index), member.name, member.host)
        certificate = x509.load_pem_x509_certificate(files["certificate.pem"][0])
        members.append(replace(member, fingerprint=_fingerprint(certificate)))
        shelves[f"party{index}"] = files
    shelves |= {name: authority.member(identity, name) for name, identity in identities.items()}
    issued = replace(cluster, parties=(members[0], members[1], members[2]))
    text = (issued.to_toml().encode(), 0o644)
    return issued, {name: {**files, "cluster.toml": text} for name, files in shelves.items()}


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not is_name(name) or _RESERVED.match(name):
            raise JobError(
                "a client's or owner's name must be 1 to 63 letters, digits, '.', '_' or '-', and not that of a "
                "party's or the authority's folder"
            )
    if len({name.lower() for name in names}) < len(names):
        raise JobError("give each client and each owner once, and a name of its own")


def _certificate(folder: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
    except (OSError, ValueError):
        raise JobError(
            f"cannot read {folder / 'certificate.pem'}; give a folder made by cluster init"
        ) from None


def _fingerprint(certificate: x509.Certificate) -> str:
    return f"sha256:{certificate.fingerprint(hashes.SHA256()).hex()}"


def _identity(folder: Path) -> str:
    try:
        names = _certificate(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        found = []
    if len(found) != 1:
        raise JobError(f"the certificate in {folder} carries no sfumato identity")
    return str(found[0])


def _fill(folder: Path, files: Files) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, (content, mode) in files.items():
        _write(folder / name, content, mode)


def _write(path: Path, data: bytes, mode: int) -> None:
    """A file that is there whole or, after a crash, as it was."""
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _span(days: int) -> tuple[datetime.datetime, datetime.datetime]:
    now = datetime.datetime.now(datetime.UTC)
    return now - datetime.timedelta(minutes=5), now + datetime.timedelta(days=days)


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
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
