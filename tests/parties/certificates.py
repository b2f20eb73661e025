"""Certificates that are not as they should be."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from sfumato.runtime.authority import Authority

__all__ = ["reissue"]


def reissue(
    folder: Path, authority: Path, identity: str, host: str, start_days: float, end_days: float
) -> None:
    """Give a folder a new key and a certificate that is valid from and until so many days from now."""
    now = datetime.datetime.now(datetime.UTC)
    span = (now + datetime.timedelta(days=start_days), now + datetime.timedelta(days=end_days))
    certificate, key = Authority.load(authority).issue(identity, folder.name, host, valid=span)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(data)
