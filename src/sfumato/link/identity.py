"""Who is at the other end: TLS 1.3 contexts, identities in certificates, dialling and answering with one hello each.

An identity is the one URI name in a certificate: ``sfumato://party/0``, ``sfumato://client/NAME`` or
``sfumato://owner/NAME``. Both ends check it after the TLS handshake, and whoever refuses says why, so that both ends
report the same cause.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import LinkError
from sfumato.link.base import PeerAbort, public_text
from sfumato.link.frames import HEADER_BYTES, Kind, abort_payload, pack_header, parse_abort, parse_header
from sfumato.link.preamble import preamble

__all__ = [
    "Credentials",
    "answer",
    "client_identity",
    "connect",
    "dial",
    "explained",
    "fingerprint_of",
    "identity_of",
    "listen",
    "owner_identity",
    "party_identity",
    "read_fields",
    "refuse",
    "send_fields",
    "welcome",
]

_NO_TAG = bytes(8)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Paths of one operator's certificate, private key, and the cluster's authority."""

    certificate: Path
    key: Path
    authority: Path

    @staticmethod
    def in_folder(folder: Path | str) -> Credentials:
        """The three files as ``sfumato cluster init`` lays them out."""
        folder = Path(folder)
        return Credentials(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")

    def context(self, *, server: bool) -> ssl.SSLContext:
        """A TLS 1.3 context that demands a certificate of this authority from the other end."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the identity is the URI name, checked right after the handshake
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if server:
            context.num_tickets = 0  # no resumption: every session proves its key anew
        for path in (self.certificate, self.key, self.authority):
            if not path.is_file():
                raise LinkError(
                    f"there is no file {path.name} in {path.parent}; use a folder made by cluster init"
                )
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (ssl.SSLError, OSError) as error:
            raise LinkError(
                f"the certificate files in {self.certificate.parent} do not load ({_tls_reason(error)})"
            ) from None
        return context


def party_identity(index: int) -> str:
    """The identity in the certificate of party ``index``."""
    return f"sfumato://party/{index}"


def client_identity(name: str) -> str:
    """The identity in the certificate of the client called ``name``."""
    return f"sfumato://client/{name}"


def owner_identity(name: str) -> str:
    """The identity in the certificate of the model owner called ``name``."""
    return f"sfumato://owner/{name}"


def identity_of(sock: ssl.SSLSocket) -> str:
    """The identity in the peer's verified certificate; ``LinkError`` when it has none or several."""
    certificate: Mapping[str, Any] = sock.getpeercert() or {}
    names = [str(value) for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    mine = [name for name in names if name.startswith("sfumato://")]
    if len(mine) != 1:
        raise LinkError(f"the peer's certificate carries {len(mine)} sfumato identities, not one")
    return mine[0]


def fingerprint_of(sock: ssl.SSLSocket) -> str:
    """``sha256:`` and the hex digest of the peer's certificate."""
    return "sha256:" + hashlib.sha256(sock.getpeercert(binary_form=True) or b"").hexdigest()


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one."""
    try:
        return socket.create_server((host, port), backlog=256)
    except OSError as error:
        raise LinkError(f"cannot listen on {host} port {port} ({error.strerror or error})") from None


def connect(
    address: tuple[str, int],
    context: ssl.SSLContext,
    *,
    name: str,
    identity: str,
    timeout_s: float,
    fingerprint: str | None = None,
    run: str | None = None,
) -> ssl.SSLSocket:
    """Connect to ``address`` for ``run`` (None: a control connection) and check that it is ``identity``.

    A refused connection is tried again until ``timeout_s``: the peer may be starting. Raises ``LinkError`` naming the
    peer. The other side may still refuse our certificate: that shows at the first `read_fields`.
    """
    where = f"{name} ({address[0]}:{address[1]})"
    deadline = time.monotonic() + timeout_s
    raw = _connect(address, where, deadline, timeout_s)
    try:
        _tune(raw)
        raw.settimeout(max(0.01, deadline - time.monotonic()))
        raw.sendall(preamble(run))
        sock = context.wrap_socket(raw, do_handshake_on_connect=False)
    except BaseException as error:
        raw.close()
        if isinstance(error, OSError):
            raise explained(error, where, timeout_s) from None
        raise
    try:
        sock.do_handshake()
        _check_peer(sock, identity, fingerprint)
        return sock
    except BaseException as error:
        sock.close()
        if isinstance(error, (LinkError, OSError)):
            raise explained(error, where, timeout_s) from None
        raise


def send_fields(sock: ssl.SSLSocket, fields: Mapping[str, Any], timeout_s: float) -> None:
    """One JSON object to the other end of a hello or a control connection. Raises ``OSError``."""
    _send(sock, Kind.HELLO, json.dumps(fields).encode(), time.monotonic() + timeout_s)


def read_fields(
    sock: ssl.SSLSocket, where: str, timeout_s: float, give_up: Callable[[], bool] | None = None
) -> dict[str, Any]:
    """The next JSON object from the other end, which messages call ``where``.

    Raises ``LinkError``, and `PeerAbort` when the other end says why it does not go on. ``give_up`` is asked ten times
    a second whether to stop waiting.
    """
    try:
        return _read_fields(sock, where, time.monotonic() + timeout_s, give_up)
    except TimeoutError:
        raise LinkError(f"{where} said nothing for {timeout_s:g} s") from None
    except (ConnectionError, ssl.SSLEOFError):
        raise LinkError(f"{where} closed the connection") from None
    except (LinkError, OSError) as error:
        raise explained(error, where, timeout_s) from None


def _read_fields(
    sock: ssl.SSLSocket, where: str, deadline: float, give_up: Callable[[], bool] | None = None
) -> dict[str, Any]:
    kind, payload = _read(sock, deadline, give_up)
    if kind == Kind.ABORT:
        reason, error_kind, origin = parse_abort(payload)
        raise PeerAbort(f"{where} refused: {reason}", reason=reason, kind=error_kind, origin=origin)
    if kind != Kind.HELLO:
        raise LinkError("answered the hello with something else")
    return _parse_hello(payload)


def dial(
    address: tuple[str, int],
    context: ssl.SSLContext,
    *,
    name: str,
    identity: str,
    hello: Mapping[str, Any],
    timeout_s: float,
    fingerprint: str | None = None,
    run: str | None = None,
    give_up: Callable[[], bool] | None = None,
) -> tuple[ssl.SSLSocket, dict[str, Any]]:
    """`connect`, then send ``hello``; (socket, its welcome).

    Errors: ``LinkError`` naming the peer; `PeerAbort` when the peer answered with a refusal.
    """
    where = f"{name} ({address[0]}:{address[1]})"
    deadline = time.monotonic() + timeout_s
    sock = connect(
        address, context, name=name, identity=identity, timeout_s=timeout_s, fingerprint=fingerprint, run=run
    )
    try:
        _send(sock, Kind.HELLO, json.dumps(hello).encode(), deadline)
        return sock, _read_fields(sock, where, deadline, give_up)
    except BaseException as error:
        sock.close()
        if isinstance(error, (LinkError, OSError)):
            raise explained(error, where, timeout_s) from None
        raise


def answer(
    raw: socket.socket, context: ssl.SSLContext, timeout_s: float
) -> tuple[ssl.SSLSocket, str, dict[str, Any]]:
    """Take an accepted connection through TLS and its hello; (socket, identity, hello).

    The caller then answers with `welcome` or `refuse`. Errors: ``LinkError``; the connection is closed.
    """
    deadline = time.monotonic() + timeout_s
    where = "a caller"
    try:
        where = f"the caller at {raw.getpeername()[0]}"
        _tune(raw)
        raw.settimeout(timeout_s)
        sock = context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
    except BaseException as error:
        raw.close()
        if isinstance(error, OSError):
            raise explained(error, where, timeout_s) from None
        raise
    try:
        sock.do_handshake()
        identity = identity_of(sock)
        kind, payload = _read(sock, deadline)
        if kind == Kind.ABORT:
            reason, error_kind, origin = parse_abort(payload)
            raise PeerAbort(
                f"{where} ({identity}) refused: {reason}", reason=reason, kind=error_kind, origin=origin
            )
        if kind != Kind.HELLO:
            raise LinkError("did not begin with a hello")
        return sock, identity, _parse_hello(payload)
    except BaseException as error:
        if isinstance(error, LinkError) and not isinstance(error, PeerAbort):
            refuse(sock, f"{error}")
        else:
            if isinstance(error, ssl.SSLError):
                _end_writing(sock, time.monotonic() + 1.0)  # the alert says why
            sock.close()
        if isinstance(error, (LinkError, OSError)):
            raise explained(error, where, timeout_s) from None
        raise


def welcome(sock: ssl.SSLSocket, fields: dict[str, Any], timeout_s: float) -> None:
    """Accept the caller's hello."""
    try:
        send_fields(sock, fields, timeout_s)
    except OSError as error:
        sock.close()
        raise LinkError(_explain(error, "the caller", timeout_s)) from None


def refuse(
    sock: ssl.SSLSocket, reason: str, kind: str = "LinkError", origin: int = -1, timeout_s: float = 1.0
) -> None:
    """Tell the caller why it is not served, then close. Never raises, never blocks longer than
    ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    try:
        _send(sock, Kind.ABORT, abort_payload(reason, kind, origin), deadline)
        _end_writing(sock, deadline)
    except (OSError, ValueError):
        pass
    sock.close()


def _end_writing(sock: socket.socket, deadline: float) -> None:
    """Let the other end read what was said before a reset can overtake it: what it sends is read to its end."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        while (left_s := deadline - time.monotonic()) > 0:
            sock.settimeout(left_s)
            if not socket.socket.recv(sock, 4096):
                return


def _tune(raw: socket.socket) -> None:
    """No delay for small frames, and a vanished host is noticed within half a minute also when nobody
    sends."""
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _check_peer(sock: ssl.SSLSocket, identity: str, fingerprint: str | None) -> None:
    problem = None
    found = identity_of(sock)
    if found != identity:
        problem = f"shows a certificate for {public_text(found)}, expected {identity}"
    elif fingerprint is not None and fingerprint != fingerprint_of(sock):
        problem = "shows a certificate whose fingerprint is not the one in the cluster file"
    if problem:
        refuse(sock, f"the answering side {problem}")
        raise LinkError(problem)


def _connect(address: tuple[str, int], where: str, deadline: float, timeout_s: float) -> socket.socket:
    pause_s = 0.02
    while True:
        left_s = deadline - time.monotonic()
        try:
            return socket.create_connection(address, timeout=max(0.01, left_s))
        except ConnectionRefusedError:
            if left_s <= pause_s:
                raise LinkError(
                    f"{where} refuses connections (tried for {timeout_s:g} s); is it running?"
                ) from None
            time.sleep(pause_s)
            pause_s = min(0.5, 2 * pause_s)
        except TimeoutError:
            raise LinkError(f"{where} did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise LinkError(f"cannot reach {where} ({error.strerror or type(error).__name__})") from None


def _send(sock: ssl.SSLSocket, kind: int, payload: bytes, deadline: float) -> None:
    sock.settimeout(max(0.01, deadline - time.monotonic()))
    sock.sendall(pack_header(kind, 0, _NO_TAG, 0, len(payload)) + payload)


def _read(
    sock: ssl.SSLSocket, deadline: float, give_up: Callable[[], bool] | None = None
) -> tuple[int, bytes]:
    header = parse_header(_read_exactly(sock, HEADER_BYTES, deadline, give_up), 65536)
    return header.kind, _read_exactly(sock, header.length, deadline, give_up)


def _read_exactly(
    sock: ssl.SSLSocket, count: int, deadline: float, give_up: Callable[[], bool] | None
) -> bytes:
    data = bytearray()
    while len(data) < count:
        left_s = deadline - time.monotonic()
        sock.settimeout(max(0.01, left_s if give_up is None else min(0.1, left_s)))
        try:
            part = sock.recv(count - len(data))
        except TimeoutError:
            if give_up is None or left_s <= 0.1:
                raise
            if give_up():
                raise LinkError("was left, as the session ended meanwhile") from None
            continue
        if not part:
            raise ConnectionResetError
        data += part
    return bytes(data)


def _parse_hello(payload: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise LinkError("sent a hello that is not a JSON object")
    return fields


def _tls_reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return public_text(error.verify_message)
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return words.rpartition(" alert ")[2]  # without the version that the alert's name begins with
    return public_text(str(getattr(error, "strerror", None) or type(error).__name__))


def explained(error: BaseException, where: str, timeout_s: float) -> LinkError:
    """The error to raise for what happened to a connection with ``where``; an abort speaks for itself."""
    return error if isinstance(error, PeerAbort) else LinkError(_explain(error, where, timeout_s))


def _explain(error: BaseException, where: str, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"{where} did not complete the handshake within {timeout_s:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"{where} shows a certificate the cluster's authority does not vouch for ({_tls_reason(error)})"
        )
    if isinstance(error, ssl.SSLError) and error.reason and "ALERT" in error.reason:
        return f"{where} refused our certificate ({_tls_reason(error)})"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)):
        return f"{where} closed the connection during the handshake"
    if isinstance(error, ssl.SSLError):
        return f"{where} does not complete a TLS 1.3 handshake ({_tls_reason(error)})"
    return f"{where} {error}" if isinstance(error, LinkError) else f"{where} failed ({_tls_reason(error)})"
