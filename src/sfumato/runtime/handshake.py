"""Before any share moves: each pair of parties compares the terms of the run and makes a fresh key.

Pair key: HKDF-SHA256 of 32 random bytes from each side, salted with the hash of both hellos, bound to run id
and pair. Leaks nothing: both hellos travel inside mutually authenticated TLS.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sfumato.errors import LinkError, ProtocolError
from sfumato.link.base import Frame, Link, public_text, tag_of
from sfumato.link.preamble import PROTOCOL_VERSION
from sfumato.runtime.canonical import canonical, parse_json

__all__ = ["PROTOCOL_VERSION", "agree", "compare_digests", "package_version", "run_terms"]

_LABEL = "sfumato/pair-key/v1"


def package_version() -> str:
    """The installed release, or ``0+source`` when run from a source tree."""
    try:
        return metadata.version("sfumato")
    except metadata.PackageNotFoundError:
        return "0+source"


def run_terms(run: str, client: str, options: Mapping[str, Any], extra: Mapping[str, str]) -> dict[str, str]:
    """What all parties must have in common, as flat text; each difference is reported by its key."""
    from torch import __version__ as torch_version

    from sfumato.ops.tiles import DEFAULT_TILES  # these import torch
    from sfumato.ring.prg import ALGORITHM
    from sfumato.ring.trig import table_digest

    terms = {
        "protocol version": str(PROTOCOL_VERSION),
        "package version": package_version(),
        "random streams": ALGORITHM,
        "torch": torch_version,
        "integer sines": str(table_digest()),
        "tiles": str(DEFAULT_TILES),
        "run": run,
        "client": client,
    }
    terms |= {f"option {name}": canonical(value).decode() for name, value in options.items()}
    terms |= {f"term {name}": value for name, value in extra.items()}
    return terms


def agree(
    link: Link, peers: list[int], run: str, terms: Mapping[str, str], timeout_s: float
) -> dict[int, bytes]:
    """Compare ``terms`` with every peer and return one 32-byte key per peer, the same on both sides of a
    pair.

    Raises ``ProtocolError`` naming every term that differs, ``LinkError`` when a peer is lost or silent.
    """
    tag, me = tag_of("control/handshake"), link.party
    nonces = {peer: os.urandom(32) for peer in peers}
    ours = {peer: canonical({"terms": dict(terms), "nonce": nonces[peer].hex()}) for peer in peers}
    for peer in peers:
        link.send(peer, Frame(tag, 0, 0, ours[peer]))
    link.flush()
    theirs = _collect(link, peers, tag, "the handshake", timeout_s)
    keys = {}
    differences: list[str] = []
    for peer in peers:
        fields = parse_json(theirs[peer].payload)
        found, nonce = fields.get("terms"), fields.get("nonce")
        if not isinstance(found, dict) or not isinstance(nonce, str):
            raise LinkError(f"party {peer} sent a handshake without terms and nonce")
        try:
            random = bytes.fromhex(nonce)
        except ValueError:
            random = b""
        if len(random) != 32:
            raise LinkError(f"party {peer} sent a handshake with a bad nonce")
        differences += _differences(me, terms, peer, found)
        pair = [(me, nonces[peer], ours[peer]), (peer, random, bytes(theirs[peer].payload))]
        (low, low_random, low_hello), (high, high_random, high_hello) = sorted(pair)
        transcript = hashlib.sha256(len(low_hello).to_bytes(8, "little") + low_hello + high_hello).digest()
        info = canonical([_LABEL, run, low, high])
        keys[peer] = HKDF(hashes.SHA256(), 32, transcript, info).derive(low_random + high_random)
    if differences:
        raise ProtocolError("; ".join(differences))
    return keys


def compare_digests(link: Link, peers: list[int], number: int, digest: bytes, timeout_s: float) -> None:
    """Check that every peer received the same command as this party.

    Raises ``ProtocolError`` when the client sent them different ones, ``LinkError`` when a peer is lost or
    silent.
    """
    tag = tag_of("control/digest", number)
    for peer in peers:
        link.send(peer, Frame(tag, 0, 0, digest))
    link.flush()
    frames = _collect(link, peers, tag, f"command {number}", timeout_s)
    for peer in peers:
        if not hmac.compare_digest(bytes(frames[peer].payload), digest):
            low, high = sorted((link.party, peer))
            raise ProtocolError(f"parties {low} and {high} received different commands (command {number})")


def _collect(link: Link, peers: list[int], tag: bytes, what: str, timeout_s: float) -> dict[int, Frame]:
    deadline = time.monotonic() + timeout_s
    frames: dict[int, Frame] = {}
    while True:
        for peer in peers:
            if peer not in frames and (frame := link.take(peer, tag)) is not None:
                frames[peer] = frame
        missing = [(peer, tag, what) for peer in peers if peer not in frames]
        if not missing:
            return frames
        link.wait(missing, max(0.001, deadline - time.monotonic()))


def _differences(me: int, ours: Mapping[str, str], peer: int, theirs: Mapping[str, Any]) -> list[str]:
    low, high = sorted((me, peer))
    lines = []
    for key in sorted(set(ours) | set(theirs)):
        values = {me: ours.get(key, "nothing"), peer: theirs.get(key, "nothing")}
        if values[me] != values[peer]:
            shown = [public_text(str(values[i]))[:60] for i in (low, high)]
            lines.append(
                f"parties {low} and {high} differ in {public_text(key)[:60]} ({shown[0]} and {shown[1]})"
            )
    return lines
