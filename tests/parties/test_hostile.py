"""The hostile world against three real parties: each attack ends in one named error on every side and in bounded time,
with no process and no file left, and the next job works. docs/security/hostile.md is the list."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import shared_parties as shared
from certificates import reissue
from processes import call, check, children, put, wait_for
from proxy import MEDDLERS
from trio import Trio

from sfumato.errors import JobError, LinkError, ProtocolError, SfumatoError
from sfumato.link.base import Frame, tag_of
from sfumato.link.frames import DTYPE_CODES, Kind, pack_header
from sfumato.link.identity import Credentials, client_identity, listen, party_identity
from sfumato.link.preamble import preamble
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Limits
from sfumato.runtime.commands import Load, Put, Reveal, WeightsSpec, to_message
from sfumato.runtime.control import ControlConnection, ask
from sfumato.runtime.greetings import Greetings
from sfumato.runtime.remote import Remote
from sfumato.runtime.sharing import share_model
from sfumato.runtime.wire import canonical, pack_message

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]
LIMITS = Limits(connect_s=4.0, stall_s=2.0, idle_s=4.0, max_frame_bytes=1 << 22, max_message_bytes=1 << 24)
DEADLINE_S = 10.0
RUN = "0123456789abcdef" * 2
MODEL = shared.a_model(clients=["client"])
BYTES, WORDS = DTYPE_CODES["uint8"], DTYPE_CODES["int64"]
A = tag_of("a")


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    made = Trio(tmp_path_factory.mktemp("trio"), LIMITS, ("client", "mallory"))
    try:
        made.works()
        yield made
    finally:
        made.close()


@pytest.fixture
def house(parties: Trio) -> Iterator[Trio]:
    """What every attack is followed by: no session, no process and no file is left, and the next job works."""
    files = parties.files()
    yield parties
    for proxy in (parties.to_client, parties.to_peer):
        proxy.disarm()
    for party in range(3):
        (parties.folder / f"odd{party}").write_text("")
    parties.rests()
    assert parties.files() == files
    parties.works()


@contextlib.contextmanager
def ends(house: Trio, match: str, kind: type[SfumatoError] = LinkError, parties: str = ".") -> Iterator[None]:
    """The block ends in one error, which the client sees, and every party ends one session with a sentence of
    its own that ``parties`` matches; all of it in time."""
    before, begun = [len(house.said(party)) for party in range(3)], time.monotonic()
    with pytest.raises(kind, match=match):
        yield
    for party in range(3):
        wait_for(lambda party=party: len(house.said(party)) > before[party], DEADLINE_S)  # type: ignore[misc]
        (sentence,) = house.said(party)[before[party] :]
        assert "internal" not in sentence
        assert re.search(parties, sentence), sentence
    assert time.monotonic() - begun < DEADLINE_S


# ---- a client that holds keys -----------------------------------------------------------------------------------


def raw(session: RemoteSession, party: int, data: bytes) -> None:
    """Bytes on the bare TLS connection of a session that has nothing else to send."""
    session._link._channels[party].sock.sendall(data)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "client sent bytes that are not a sfumato frame"),
        (pack_header(Kind.DATA, BYTES, A, 0, (1 << 22) + 1), "client sent a frame of 4194305 bytes, over the bound"),
        (pack_header(Kind.DATA, 200, A, 0, 8), "client sent a frame with the unknown dtype code 200"),
        (pack_header(Kind.DATA, WORDS, A, 0, 7), "client sent a frame of 7 bytes, no whole number of 8-byte items"),
        (pack_header(Kind.HELLO, BYTES, A, 0, 2) + b"{}", "client sent a second hello"),
    ],
)  # fmt: skip
def test_frames_that_are_none(house: Trio, data: bytes, match: str) -> None:
    with house.session() as session, ends(house, f"party 1: {match}", parties=match):
        raw(session, 1, data)
        session._collect(DEADLINE_S, "the replies")


@pytest.mark.parametrize("then", ["silence", "the end"])
def test_half_a_frame(house: Trio, then: str) -> None:
    words = "sent nothing for 4 s" if then == "silence" else "closed the connection inside a frame"
    with house.session() as session, ends(house, f"client {words}|party 1", parties="client|party 1"):
        raw(session, 1, pack_header(Kind.DATA, WORDS, (0).to_bytes(8, "little"), 0, 800) + bytes(100))
        if then == "the end":
            socket.socket.shutdown(session._link._channels[1].sock, socket.SHUT_WR)
        session._collect(DEADLINE_S, "the replies")


def frames_of(session: RemoteSession, party: int, parts: list[tuple[int, Any]], number: int = 0) -> None:
    for code, payload in parts:
        session._link.send(party, Frame(number.to_bytes(8, "little"), code, 0, payload))
    session._link.flush()


def test_messages_whose_frames_are_out_of_order(house: Trio) -> None:
    parts = pack_message(*to_message(Put("x", "Z64", 18, (1000,)), [torch.zeros(1000, dtype=torch.int64)]))
    match = "client sent a bad message: a message begins with a bad header length"
    with house.session() as session, ends(house, f"party [012]: {match}", parties=match):
        for party in range(3):
            frames_of(session, party, parts[::-1])
        session._collect(DEADLINE_S, "the replies")


def test_a_message_over_the_bound(house: Trio) -> None:
    huge = canonical({"header": {}, "tensors": [{"dtype": "int64", "shape": [1 << 40]}]})
    match = "client sent a bad message: a message carries more than the bound of 16777216 bytes"
    with house.session() as session, ends(house, match, parties=match):
        for party in range(3):
            frames_of(session, party, [(0, len(huge).to_bytes(8, "little")), (0, huge)])
        session._collect(DEADLINE_S, "the replies")


def test_old_frames_are_never_read_again(house: Trio) -> None:
    """A message's name is its number: what comes under an old one is nobody's, and the job goes on as if it were not
    there."""
    with house.session() as session:
        words = put(session)
        for party in range(3):
            old = pack_message(
                *to_message(Put("x", "Z64", 18, (1000,)), [torch.zeros(1000, dtype=torch.int64)])
            )
            frames_of(session, party, old)
        for party, (_, (x,)) in enumerate(session.send(Reveal("x"))):
            assert torch.equal(x, words[party])


def test_a_replayed_run_is_no_run(house: Trio) -> None:
    """Whoever asks for a run that is there already is told so, and disturbs nobody."""
    with house.session() as session:
        context = Credentials.in_folder(house.keys("mallory")).context(server=False)
        control = ControlConnection(house.direct, context, 2, 5.0)
        asked = {"ask": "session", "run": session.run, "kind": "run", "options": {}, "wait_s": 1.0}
        control.send(asked, 5.0)
        with pytest.raises(LinkError, match="this run is here already; begin another"):
            control.read(5.0)
        control.close()
        check(session)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"wait_s": 10**400}, "the seconds that it can wait"),
        ({"wait_s": float("nan")}, "the seconds that it can wait"),
        ({"kind": ["run"]}, "a session is of the kind run or share"),
        ({"run": "0" * 33}, "with a run id and options"),
        ({"options": {"x": float("inf")}}, "without NaN or Infinity"),
        ({"options": {"x": json.loads("[" * 400 + "]" * 400)}}, "nested 8 deep at most"),
    ],
)
def test_requests_that_are_none(house: Trio, changes: dict[str, Any], match: str) -> None:
    request = {"ask": "session", "run": RUN, "kind": "run", "options": {}, "wait_s": 1.0}
    with pytest.raises(JobError, match=match):
        ask(house.direct, house.keys(), 1, {**request, **changes})


def remote(house: Trio, name: str = "client") -> Remote:
    """A session with the real machine."""
    path = house.folder / "here.toml"
    path.write_text(house.cluster.to_toml(), encoding="utf-8")
    return Remote(path, house.keys(name), {})


def test_another_clients_result(house: Trio) -> None:
    with remote(house) as mine, remote(house, "mallory") as theirs:
        mine.put("y", torch.ones(4))
        with pytest.raises(JobError, match="there is no value 'y'"):
            theirs._send(Reveal("y"), [[], [], []])
        assert torch.equal(mine.reveal("y"), torch.ones(4))


# ---- somebody on the network ------------------------------------------------------------------------------------

#: What the client raises; which end of a broken link is the first to say so is chance.
BROKEN = {
    "flip": "broke the TLS stream|closed the connection",
    "replay": "broke the TLS stream|closed the connection",
    "swap": "broke the TLS stream|closed the connection",
    "drop": "broke the TLS stream|closed the connection",
    "cut": "closed the connection",
    "swallow": "sent nothing for|takes no data",
    "trickle": "sent nothing for|takes no data",
}


@pytest.mark.parametrize("what", ["cut", "flip", "swallow", "trickle"])
def test_records_between_the_client_and_a_party(house: Trio, what: str) -> None:
    with house.session() as session:
        put(session)
        house.to_client.arm("to", MEDDLERS[what])
        with ends(house, BROKEN[what], parties="party|client"):
            put(session, count=20_000)


@pytest.mark.parametrize("what", sorted(MEDDLERS))
def test_records_between_two_parties(house: Trio, what: str) -> None:
    with house.session() as session:
        put(session, count=20_000)
        house.to_peer.arm("to", MEDDLERS[what])
        with ends(house, BROKEN[what], parties="party|client"):
            session.send(call(rounds=50))


def test_a_link_that_carries_one_way_only(house: Trio) -> None:
    """What a party says is lost, and it takes in what others say."""
    with house.session() as session:
        put(session)
        house.to_client.arm("from", MEDDLERS["swallow"])
        with ends(house, "sent nothing for 4 s", parties="party 1|client"):
            session.send(call(rounds=1))
    house.to_client.disarm()
    house.works()
    with house.session() as session:
        put(session)
        house.to_peer.arm("from", MEDDLERS["swallow"])
        with ends(house, "party 1 sent nothing for", parties="party 1"):
            session.send(call(rounds=5))


def test_a_party_behind_a_wall_is_bounded(house: Trio) -> None:
    """Its port answers, and nothing more comes."""
    house.to_client.arm("", MEDDLERS["swallow"])
    begun = time.monotonic()
    with pytest.raises(
        LinkError, match=r"party 1 \(127.0.0.1:\d+\) did not complete the handshake within 4 s"
    ):
        house.session()
    assert time.monotonic() - begun < DEADLINE_S


# ---- callers without a name -------------------------------------------------------------------------------------


def silent(house: Trio, party: int, count: int, first: bytes, source: str) -> list[socket.socket]:
    member, made = house.direct.parties[party], []
    for _ in range(count):
        sock = socket.create_connection((member.host, member.port), 5.0, source_address=(source, 0))
        sock.sendall(first)
        made.append(sock)
    return made


def test_a_crowd_that_says_nothing_keeps_nobody_out(house: Trio) -> None:
    """In the middle of a preamble, after one, and waiting for a run that nobody has asked for."""
    firsts = (b"sfumato", preamble(), preamble(RUN))
    crowd = [sock for first in firsts for sock in silent(house, 1, 150, first, "127.0.0.2")]
    try:
        house.works()
        for sock in crowd:
            sock.settimeout(DEADLINE_S)  # connect_s is 4
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    finally:
        for sock in crowd:
            sock.close()


def test_a_crowd_from_one_host_pushes_out_its_own() -> None:
    dropped: list[int] = []
    greetings = Greetings(3, lambda: dropped.append(1))
    with listen("127.0.0.1", 0) as listener, contextlib.ExitStack() as stack:
        ends, over = [], []
        for host in ("127.0.0.3", "127.0.0.2", "127.0.0.2", "127.0.0.2", "127.0.0.4"):
            caller = socket.create_connection(listener.getsockname(), source_address=(host, 0))
            raw = stack.enter_context(listener.accept()[0])
            ends.append(stack.enter_context(caller))
            over.append(greetings.enter(raw))
        for done in over:
            done()
        closed = []
        for end in ends:
            end.setblocking(False)
            try:
                closed.append(end.recv(1) == b"")
            except BlockingIOError:
                closed.append(False)
    assert closed == [False, True, True, False, False]
    assert len(dropped) == 2


# ---- certificates -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(folder: Path) -> Iterator[Path]:
    """A folder whose certificate a test changes; as it was afterwards."""
    kept = {name: (folder / name).read_bytes() for name in ("certificate.pem", "key.pem")}
    try:
        yield folder
    finally:
        for name, data in kept.items():
            (folder / name).write_bytes(data)


def test_a_client_whose_certificate_has_expired(house: Trio) -> None:
    with changed(house.keys("mallory")) as folder:
        reissue(folder, house.folder / "c" / "authority", client_identity("mallory"), "127.0.0.1", -9, -1)
        before = len(house.said(0))
        with pytest.raises(LinkError, match=r"refused our certificate \(certificate expired"):
            house.session("mallory")
        wait_for(lambda: "certificate has expired" in "".join(house.said(0)[before:]))


@pytest.mark.parametrize("what", ["expired", "another party's"])
def test_a_party_whose_certificate_is_not_its_own(house: Trio, what: str) -> None:
    """Workers read it when they begin; the supervisor shows the one that it began with."""
    with changed(house.party_folder(1)) as folder:
        if what == "expired":
            reissue(folder, house.folder / "c" / "authority", party_identity(1), "127.0.0.1", -9, -1)
            match = "certificate has expired"
        else:
            for name in ("certificate.pem", "key.pem"):
                shutil.copy(house.party_folder(2) / name, folder / name)
            match = "shows a certificate for sfumato://party/2, expected sfumato://party/1"
        before = len(house.said(1))
        with pytest.raises(LinkError, match=re.escape(match)):
            house.session()
        # Among its lines, not the last of them: how a session ended is said when its worker has gone, too.
        wait_for(lambda: any("party 1" in line or "client" in line for line in house.said(1)[before:]))


def test_two_parties_that_took_each_others_place(house: Trio) -> None:
    """Party 0 is led to party 2 where it looks for party 1."""
    target = house.to_peer.target
    house.to_peer.target = ("127.0.0.1", house.direct.parties[2].port)
    try:
        match = "shows a certificate for sfumato://party/2, expected sfumato://party/1"
        with pytest.raises(LinkError, match=match):
            house.session()
        wait_for(lambda: match in house.said(0)[-1])
    finally:
        house.to_peer.target = target


# ---- parties that differ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "value", "match"),
    [
        ("sfumato.runtime.handshake", "PROTOCOL_VERSION", 1, r"differ in protocol version \(2 and 1\)|\(1 and 2\)"),
        ("sfumato.ops.tiles", "DEFAULT_TILES", "Tiles(elements=64)", "differ in tiles"),
        ("sfumato.ring.prg", "ALGORITHM", "another", "differ in random streams"),
        ("torch", "__version__", "1.0", "differ in torch"),
    ],
)  # fmt: skip
def test_a_party_of_another_build(house: Trio, module: str, name: str, value: Any, match: str) -> None:
    (house.folder / "odd1").write_text(json.dumps([[module, name, value]]))
    with ends(house, f"parties . and . {match}", ProtocolError, parties=match):
        house.session()


def test_a_client_that_tells_parties_different_options(house: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ControlConnection.send

    def send(self: ControlConnection, request: dict[str, Any], timeout_s: float) -> None:
        real(self, {**request, "options": {"words": True, "tiles": self.party // 2}}, timeout_s)

    monkeypatch.setattr(ControlConnection, "send", send)
    match = r"parties [01] and 2 differ in option tiles \(0 and 1\)"
    with ends(house, match, ProtocolError, parties=match):
        house.session()
    monkeypatch.undo()


def test_a_client_that_gives_parties_different_plans(house: Trio) -> None:
    plans = [shared.planned(shared.chain(seed)).for_parties() for seed in (1, 2)]
    match = "parties . and . received different commands"
    with house.session(words=False) as session, ends(house, match, ProtocolError, parties=match):
        for party, stream in enumerate(session._streams):
            stream.send(*to_message(Load("net", plans[party == 1], WeightsSpec("public", ()))))
        session._collect(DEADLINE_S, "the replies")


# ---- disks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(house: Trio) -> Iterator[str]:
    """Party 1's store on a disk that has no room left."""
    store = house.party_folder(1) / "store"
    store.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(store)], capture_output=True
    ).returncode:
        pytest.skip("not on this platform: mounting a small disk takes a right that this user has not")
    try:
        (store / ".ballast").write_bytes(bytes(240 << 10))
        yield "party 1 has no room on its disk for the model 'house'"
        os.unlink(store / ".ballast")
        shared_and_removed(house)
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)


@contextlib.contextmanager
def small_files(house: Trio) -> Iterator[str]:
    """Party 1's sessions may not write long files."""
    (own,) = children(house.processes[1].pid)  # its sessions are forked from this one
    _, hard = resource.prlimit(own, resource.RLIMIT_FSIZE)
    resource.prlimit(own, resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield "party 1 could not write the model 'house' (File too large)"
    finally:
        resource.prlimit(own, resource.RLIMIT_FSIZE, (hard, hard))
    shared_and_removed(house)


def shared_and_removed(house: Trio) -> None:
    share_model(house.cluster, house.keys("owner"), MODEL)
    for party in range(3):
        ask(house.direct, house.keys("owner"), party, {"ask": "remove", "model": "house"})


@pytest.mark.parametrize("disk", [full_disk, small_files])
def test_a_disk_that_takes_no_more(house: Trio, disk: Callable[[Trio], Any]) -> None:
    with disk(house) as sentence:
        with pytest.raises(JobError, match=re.escape(sentence)):
            share_model(house.cluster, house.keys("owner"), MODEL)
        house.rests()
        for party in range(3):
            store = house.party_folder(party) / "store"
            assert not store.exists() or {path.name for path in store.iterdir()} <= {".lock", ".ballast"}


# ---- threads ----------------------------------------------------------------------------------------------------


def test_parties_with_different_numbers_of_threads_agree(house: Trio) -> None:
    """One, two and three: integer words are the same, however many threads compute them."""
    plan, x = shared.planned(shared.chain(1)), shared.batch()
    (argument,) = plan.client_inputs
    with remote(house) as session:
        session.load("net", plan)
        session.put("x", x)
        session.call("net", "once", {argument: "x"}, {}, ["y"])
        assert float((session.reveal("y") - shared.chain(1)(x).detach()).abs().max()) < 1e-3
