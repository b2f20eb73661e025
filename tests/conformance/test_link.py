"""One suite for every link: memory and TLS. Hostile bytes and wrong certificates where there are bytes and
certificates."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parties"))

from certificates import reissue

from sfumato.errors import LinkError
from sfumato.link.base import Frame, Link, PeerAbort, tag_of
from sfumato.link.frames import DTYPE_CODES, HEADER_BYTES, Kind, abort_payload, pack_header
from sfumato.link.identity import (
    Credentials,
    answer,
    client_identity,
    dial,
    listen,
    party_identity,
    read_fields,
    welcome,
)
from sfumato.link.memory import memory_links
from sfumato.link.preamble import PREAMBLE_BYTES, PROTOCOL_VERSION, Preamble, preamble
from sfumato.link.tls import LinkLimits, TlsLink
from sfumato.runtime.authority import init_cluster

pytestmark = pytest.mark.timeout(20)
BYTES, WORDS = DTYPE_CODES["uint8"], DTYPE_CODES["int64"]
A, B = tag_of("a"), tag_of("b")
LIMITS = LinkLimits(max_frame_bytes=1 << 26, stall_s=5.0, abort_s=1.0)
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
RUN = "0123456789abcdef" * 2


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two clusters with an authority each."""
    folders = [tmp_path_factory.mktemp("clusters") / name for name in ("ours", "other")]
    for folder in folders:
        init_cluster(folder, hosts=HOSTS)
    return folders


def read_preamble(raw: socket.socket) -> Preamble:
    """What a party's supervisor reads of a caller before TLS."""
    return Preamble.parse(raw.recv(PREAMBLE_BYTES, socket.MSG_WAITALL))


def meet(caller: Path, callee: Path, host: str, identity: str, timeout_s: float = 5.0) -> tuple[Any, Any]:
    """One TLS connection; (dialling socket or its error, answering socket or its error)."""
    listener = listen(host, 0)

    def serve() -> Any:
        raw, _ = listener.accept()
        assert read_preamble(raw) == Preamble(PROTOCOL_VERSION, RUN)
        sock, _, _ = answer(raw, Credentials.in_folder(callee).context(server=True), timeout_s)
        welcome(sock, {}, timeout_s)
        return sock

    def call() -> Any:
        context = Credentials.in_folder(caller).context(server=False)
        return dial(
            listener.getsockname(),
            context,
            name="party 1",
            identity=identity,
            hello={"run": RUN},
            run=RUN,
            timeout_s=timeout_s,
        )[0]

    with listener, ThreadPoolExecutor(2) as pool:
        return tuple(f.exception() or f.result() for f in [pool.submit(call), pool.submit(serve)])  # type: ignore[return-value]


def tls_links(folder: Path, limits: LinkLimits = LIMITS) -> list[TlsLink]:
    sockets: list[dict[int, Any]] = [{}, {}, {}]
    for low, high in ((0, 1), (0, 2), (1, 2)):
        ends = meet(folder / f"party{low}", folder / f"party{high}", HOSTS[high], party_identity(high))
        sockets[low][high], sockets[high][low] = ends
    return [TlsLink(i, sockets[i], limits) for i in range(3)]


@pytest.fixture(params=["memory", "tls"])
def links(request: pytest.FixtureRequest, clusters: list[Path]) -> Iterator[list[Any]]:
    made: list[Any] = (
        memory_links(3, max_frame_bytes=1 << 26) if request.param == "memory" else tls_links(clusters[0])
    )
    yield made
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda link: link.close(), made))


def drop(link: Any) -> None:
    """Vanish as a killed process does."""
    if isinstance(link, TlsLink):
        for channel in link._channels.values():
            socket.socket.shutdown(channel.sock, socket.SHUT_RDWR)
    else:
        link.drop()


def receive(link: Link, frm: int, tag: bytes, path: str = "path", timeout_s: float = 5.0) -> Frame:
    while (frame := link.take(frm, tag)) is None:
        link.wait([(frm, tag, path)], timeout_s)
    return frame


def in_parallel(*jobs: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(15) for future in [pool.submit(job) for job in jobs]]


def test_frame_arrives_as_sent(links: list[Any]) -> None:
    links[0].send(1, Frame(A, WORDS, 7, b"12345678"))
    links[0].flush()
    frame = receive(links[1], 0, A)
    assert (frame.tag, frame.dtype, frame.clock, bytes(frame.payload)) == (A, WORDS, 7, b"12345678")
    assert links[1].take(0, A) is None


def test_order_is_kept_under_one_tag_and_tags_come_in_any_order(links: list[Any]) -> None:
    for number in range(100):
        links[0].send(1, Frame(A, BYTES, number, bytes([number])))
    links[0].send(1, Frame(B, BYTES, 0, b"last"))
    links[0].flush()
    assert bytes(receive(links[1], 0, B).payload) == b"last"
    assert [receive(links[1], 0, A).clock for _ in range(100)] == list(range(100))


def test_wait_returns_for_any_of_several(links: list[Any]) -> None:
    links[2].send(1, Frame(B, BYTES, 0, b"x"))
    links[2].flush()
    links[1].wait([(0, A, "from 0"), (2, B, "from 2")], 5.0)
    assert links[1].take(2, B) is not None


@pytest.mark.parametrize("size", [0, 1, 21, 2047, 2048, 2049, 65515, 65536, 65557, 200_001, 20_000_000])
def test_sizes(links: list[Any], size: int) -> None:
    payload = os.urandom(size)
    links[0].send(1, Frame(A, BYTES, 0, memoryview(payload)))
    links[0].send(1, Frame(B, BYTES, 0, b"after"))
    links[0].flush()
    assert bytes(receive(links[1], 0, B).payload) == b"after"
    assert bytes(receive(links[1], 0, A).payload) == payload


def test_frames_of_all_sizes_in_one_flush(links: list[Any]) -> None:
    payloads = [os.urandom(size) for size in (0, 5, 70_000, 3, 2048, 1_000_000, 1, 64_000, 64_000, 9)]
    for payload in payloads:
        links[0].send(2, Frame(A, BYTES, 0, payload))
    links[0].flush()
    assert [bytes(receive(links[2], 0, A).payload) for _ in payloads] == payloads


def test_settling_waits_until_what_was_flushed_has_left(links: list[Any]) -> None:
    before, payload = links[0].wire_bytes(), bytes(3 << 20)
    links[0].send(1, Frame(A, BYTES, 0, payload))
    links[0].flush()
    frame = in_parallel(lambda: receive(links[1], 0, A), lambda: links[0].settle(5.0))[0]
    assert frame.payload == payload
    if isinstance(links[0], TlsLink):
        assert before >= 0
        assert len(payload) < links[0].wire_bytes() - before < 1.05 * len(payload)
    else:
        assert links[0].wire_bytes() == -1  # nobody counts


def test_big_simultaneous_sends_do_not_deadlock(links: list[Any]) -> None:
    payload = bytes(30_000_000)

    def party(me: int) -> int:
        others = [i for i in range(3) if i != me]
        for other in others:
            links[me].send(other, Frame(A, BYTES, 0, payload))
        links[me].flush()
        return sum(receive(links[me], other, A).nbytes for other in others)

    assert in_parallel(*(lambda i=i: party(i) for i in range(3))) == [60_000_000] * 3


def test_back_pressure_does_not_deadlock(clusters: list[Path]) -> None:
    limits = LinkLimits(
        max_frame_bytes=1 << 26, max_unsent_bytes=1 << 20, max_unclaimed_bytes=1 << 21, stall_s=5.0
    )
    links = tls_links(clusters[0], limits)

    def party(me: int) -> int:
        other = 1 - me
        for number in range(12):
            links[me].send(other, Frame(tag_of("x", number), BYTES, 0, bytes(1 << 19)))
            links[me].flush()
        return sum(receive(links[me], other, tag_of("x", number)).nbytes for number in range(12))

    assert in_parallel(lambda: party(0), lambda: party(1)) == [12 << 19] * 2
    in_parallel(*(link.close for link in links))


def test_frames_without_payload_that_nobody_asks_for_end_the_link(clusters: list[Path]) -> None:
    """Each takes memory here: tags alone are no way to fill a peer's."""
    links = tls_links(clusters[0], LinkLimits(max_unclaimed_bytes=1 << 16, stall_s=5.0, abort_s=1.0))

    def flood() -> None:
        for number in range(500):
            links[0].send(1, Frame(tag_of("x", number), BYTES, 0, b""))
        links[0].flush()

    def waits() -> None:
        with pytest.raises(LinkError, match=r"party 0 sent \d+ bytes that nobody asked for"):
            links[1].wait([(0, A, "a")], 5.0)

    in_parallel(flood, waits)
    in_parallel(*(link.close for link in links))


def test_what_is_taken_is_charged_no_more(clusters: list[Path]) -> None:
    links = tls_links(clusters[0], LinkLimits(max_unclaimed_bytes=1 << 12, stall_s=5.0))
    for number in range(100):
        tag = tag_of("x", number)
        links[0].send(1, Frame(tag, BYTES, 0, b"xyz"))
        links[0].flush()
        assert receive(links[1], 0, tag).nbytes == 3
    assert links[1].received_bytes()[0] == 300
    in_parallel(*(link.close for link in links))


def test_ping_pong_many_rounds(links: list[Any]) -> None:
    def party(me: int) -> None:
        for number in range(300):
            tag = tag_of("ping", number)
            links[me].send(1 - me, Frame(tag, BYTES, number, b"x" * 64))
            links[me].flush()
            assert receive(links[me], 1 - me, tag).clock == number

    in_parallel(lambda: party(0), lambda: party(1))


def test_stall_names_peer_and_path_in_bounded_time(links: list[Any]) -> None:
    start = time.monotonic()
    with pytest.raises(LinkError, match=r"party 2 sent nothing for 0\.2 s .*unet/mid"):
        links[0].wait([(2, A, "unet/mid")], 0.2)
    assert 0.19 < time.monotonic() - start < 2


def test_lost_peer_is_noticed_by_all_even_when_another_is_waited_for(links: list[Any]) -> None:
    start = time.monotonic()

    def waits(me: int, frm: int) -> str:
        with pytest.raises(LinkError) as caught:
            links[me].wait([(frm, A, f"path{me}")], 10.0)
        return str(caught.value)

    texts = in_parallel(lambda: waits(0, 2), lambda: waits(1, 0), lambda: drop(links[2]))
    assert "party 2 closed the connection" in texts[0]
    assert "path0" in texts[0]
    assert "party 2 closed the connection" in texts[1]
    assert "path1" in texts[1]
    assert time.monotonic() - start < 5


def test_what_a_peer_sent_before_leaving_can_still_be_taken(links: list[Any]) -> None:
    links[2].send(0, Frame(A, BYTES, 0, bytes(100_000)))
    links[2].close()
    assert receive(links[0], 2, A).nbytes == 100_000
    with pytest.raises(LinkError, match="party 2 has left"):
        links[0].wait([(2, B, "more")], 5.0)
    links[1].send(0, Frame(B, BYTES, 0, b"x"))  # the others go on
    links[1].flush()
    assert receive(links[0], 1, B).nbytes == 1


def test_abort_reaches_all_with_its_reason(links: list[Any]) -> None:
    def waits(me: int) -> PeerAbort:
        with pytest.raises(
            PeerAbort, match=r"party 1 ended the run: layer\? left its range .*somewhere"
        ) as caught:
            links[me].wait([(2 - me, A, "somewhere")], 10.0)
        return caught.value

    reason = "layer? left its\nrange"
    errors = in_parallel(lambda: waits(0), lambda: waits(2), lambda: links[1].abort(reason))
    assert all(error.reason == "layer? left its range" and error.origin == 1 for error in errors[:2])
    with pytest.raises(LinkError, match="closed"):
        links[1].wait([(0, A, "anything")], 1.0)


def test_abort_overtakes_queued_frames_of_a_peer_that_does_not_read(clusters: list[Path]) -> None:
    links = tls_links(
        clusters[0], LinkLimits(max_frame_bytes=1 << 26, max_unclaimed_bytes=1 << 16, abort_s=1.0)
    )
    for _ in range(4):
        links[0].send(1, Frame(A, BYTES, 0, bytes(1 << 26)))
    links[0].flush()
    start = time.monotonic()
    links[0].abort("enough")
    assert time.monotonic() - start < 4
    with pytest.raises(LinkError, match="party 0"):
        [receive(links[1], 0, A, timeout_s=10.0) for _ in range(5)]
    in_parallel(*(link.close for link in links))


@pytest.mark.parametrize("unread", [0, 1 << 23], ids=["idle", "in the middle of a write"])
def test_last_words_are_heard_also_when_a_write_fails_first(clusters: list[Path], unread: int) -> None:
    folder = clusters[0]
    peer, sock = meet(folder / "party0", folder / "party1", HOSTS[1], party_identity(1))
    link = TlsLink(1, {0: sock}, LIMITS)
    with link._channels[0].reading:  # nothing is read yet
        if unread:  # more than the socket takes: a part of a record stays behind, and its write fails later
            link._channels[0].stage(pack_header(Kind.DATA, BYTES, A, 0, unread), bytes(unread), unread)
            link._channels[0].depart()
            time.sleep(0.2)
        words = abort_payload("no room", "JobError", 0)
        peer.sendall(pack_header(Kind.ABORT, 0, bytes(8), 0, len(words)) + words)
        peer.close()
        for _ in range(10):  # the first is answered by a reset, the others fail
            link._channels[0].stage(pack_header(Kind.DATA, BYTES, A, 0, 1), b"x", 1)
            link._channels[0].depart()
            time.sleep(0.01)
    with pytest.raises(PeerAbort, match="party 0 ended the run: no room"):
        link.wait([(0, A, "more")], 5.0)
    link.close()


def test_sender_is_told_what_it_may_not_send(links: list[Any]) -> None:
    with pytest.raises(LinkError, match="over the bound"):
        links[0].send(1, Frame(A, BYTES, 0, bytes((1 << 26) + 1)))
    with pytest.raises(LinkError, match="no whole number of 8-byte items"):
        links[0].send(1, Frame(A, WORDS, 0, b"123"))
    with pytest.raises(LinkError, match="dtype code 250"):
        links[0].send(1, Frame(A, 250, 0, b""))
    with pytest.raises(LinkError, match="no link from party 0 to party 7"):
        links[0].send(7, Frame(A, BYTES, 0, b""))


def test_memory_link_emulates_a_network() -> None:
    zero, one = memory_links(2, latency_s=0.05, bandwidth_bytes_s=1e6)
    start = time.monotonic()
    zero.send(1, Frame(A, BYTES, 0, bytes(50_000)))
    zero.flush()
    assert one.take(0, A) is None
    receive(one, 0, A)
    assert 0.099 < time.monotonic() - start < 1.0


def hostile(clusters: list[Path], data: bytes, match: str) -> None:
    """Party 0 is not one of ours: it writes ``data`` on the bare TLS connection, then closes."""
    folder = clusters[0]
    bad, good = meet(folder / "party0", folder / "party1", HOSTS[1], party_identity(1))
    link = TlsLink(1, {0: good}, LIMITS)
    bad.sendall(data)
    socket.socket.shutdown(bad, socket.SHUT_WR)
    with pytest.raises(LinkError, match=match) as caught:
        receive(link, 0, A, "the/path", 5.0)
    assert "party 0" in str(caught.value)
    assert "the/path" in str(caught.value)
    link.abort("bad frame")
    bad.close()


HEADER = pack_header(Kind.DATA, WORDS, A, 0, 8)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a sfumato frame"),
        (bytes([*HEADER[:2], 9, *HEADER[3:]]), "wire version 9"),
        (bytes([*HEADER[:3], 77, *HEADER[4:]]), "unknown kind 77"),
        (bytes([*HEADER[:4], 200, *HEADER[5:]]), "unknown dtype code 200"),
        (pack_header(Kind.DATA, BYTES, A, 0, 2**32 - 1), "over the bound"),
        (pack_header(Kind.ABORT, BYTES, A, 0, 1 << 20), "over the bound"),
        (pack_header(Kind.DATA, WORDS, A, 0, 7), "no whole number of 8-byte items"),
        (pack_header(Kind.DATA, WORDS, A, 0, 800) + bytes(100), "closed the connection inside a frame"),
        (HEADER[:10], "closed the connection inside a frame"),
        (pack_header(Kind.HELLO, BYTES, A, 0, 2) + b"{}", "second hello"),
        (pack_header(Kind.ABORT, BYTES, A, 0, 4) + b"\xff[[[", "no readable reason"),
        (b"", "closed the connection"),
    ],
)
def test_hostile_bytes(clusters: list[Path], data: bytes, match: str) -> None:
    hostile(clusters, data, match)


def test_who_sends_a_bad_frame_is_told_so(clusters: list[Path]) -> None:
    folder = clusters[0]
    bad, good = meet(folder / "party0", folder / "party1", HOSTS[1], party_identity(1))
    link = TlsLink(1, {0: good}, LIMITS)
    bad.sendall(bytes(HEADER_BYTES))
    with pytest.raises(LinkError, match="not a sfumato frame"):
        receive(link, 0, A)
    link.abort("bad frame")
    with pytest.raises(PeerAbort, match="bad frame"):
        read_fields(bad, "party 1", 5.0)
    bad.close()


def test_a_frame_that_never_ends_is_bounded(clusters: list[Path]) -> None:
    folder = clusters[0]
    bad, good = meet(folder / "party0", folder / "party1", HOSTS[1], party_identity(1))
    link = TlsLink(1, {0: good}, LIMITS)
    bad.sendall(pack_header(Kind.DATA, BYTES, A, 0, 100) + bytes(10))
    with pytest.raises(LinkError, match=r"party 0 sent nothing for 0\.3 s"):
        receive(link, 0, A, timeout_s=0.3)
    bad.close()
    link.close()


def test_kernel_sends_little_more_than_the_payload(clusters: list[Path]) -> None:
    links = tls_links(clusters[0])
    before = links[0].kernel_bytes()[1]
    if before < 0:
        pytest.skip("no TCP_INFO on this system")
    for number in range(100):
        links[0].send(1, Frame(tag_of("k", number), BYTES, 0, bytes(100_000)))
    links[0].flush()
    for number in range(100):
        receive(links[1], 0, tag_of("k", number))
    sent = links[0].kernel_bytes()[1] - before
    assert links[0].payload_bytes()[1] == 10_000_000
    assert (
        0 <= sent - 10_000_000 - 100 * HEADER_BYTES < 0.003 * 10_000_000
    )  # TLS: 22 bytes a record of 16 KiB
    in_parallel(*(link.close for link in links))


def test_no_thread_is_left_behind(clusters: list[Path]) -> None:
    before = set(threading.enumerate())
    links = tls_links(clusters[0])
    in_parallel(*(link.close for link in links))
    for thread in set(threading.enumerate()) - before:
        thread.join(6.0)
        assert not thread.is_alive()


def both_fail(clusters: list[Path], caller: Path, callee: Path, here: str, there: str) -> None:
    errors = meet(caller, callee, HOSTS[1], party_identity(1))
    for error, text in zip(errors, (here, there), strict=True):
        assert isinstance(error, LinkError), error
        assert text in str(error), str(error)
        assert "\n" not in str(error)


def test_caller_of_another_authority_is_refused(clusters: list[Path]) -> None:
    ours, other = clusters
    both_fail(clusters, other / "party0", ours / "party1", "does not vouch for", "refused our certificate")


def reissued(folder: Path, shelf: str, into: Path, start_days: float, end_days: float) -> Path:
    """A copy of a folder whose certificate is valid from and until so many days from now."""
    shutil.copytree(folder / shelf, into)
    index = int(shelf[-1])
    reissue(into, folder / "authority", party_identity(index), HOSTS[index], start_days, end_days)
    return into


@pytest.mark.parametrize(
    ("days", "why", "alert"),
    [
        ((-9, -1), "certificate has expired", "certificate expired"),
        ((1, 9), "certificate is not yet valid", "bad certificate"),
    ],
)
def test_certificates_out_of_their_time(
    clusters: list[Path], tmp_path: Path, days: tuple[int, int], why: str, alert: str
) -> None:
    ours = clusters[0]
    caller = reissued(ours, "party0", tmp_path / "caller", *days)
    both_fail(
        clusters,
        caller,
        ours / "party1",
        f"refused our certificate ({alert}",
        f"vouch for ({why}",
    )
    callee = reissued(ours, "party1", tmp_path / "callee", *days)
    both_fail(clusters, ours / "party0", callee, f"vouch for ({why}", "refused our certificate")


def test_a_swapped_key_does_not_load(clusters: list[Path], tmp_path: Path) -> None:
    shutil.copytree(clusters[0] / "party0", tmp_path / "mixed")
    shutil.copy(clusters[0] / "party1" / "key.pem", tmp_path / "mixed" / "key.pem")
    with pytest.raises(LinkError, match=r"the certificate files in .* do not load \(key values mismatch\)"):
        Credentials.in_folder(tmp_path / "mixed").context(server=True)


def test_right_authority_wrong_index(clusters: list[Path]) -> None:
    ours = clusters[0]
    text = "shows a certificate for sfumato://party/2, expected sfumato://party/1"
    both_fail(clusters, ours / "party0", ours / "party2", text, text)


def test_a_client_cannot_answer_as_a_party(clusters: list[Path]) -> None:
    ours = clusters[0]
    both_fail(clusters, ours / "party0", ours / "client", "party 1", "refused our certificate")


def test_wrong_fingerprint(clusters: list[Path]) -> None:
    folder = clusters[0]
    listener = listen(HOSTS[1], 0)
    context = Credentials.in_folder(folder / "party0").context(server=False)

    def call() -> None:
        dial(
            listener.getsockname(),
            context,
            name="party 1",
            identity=party_identity(1),
            hello={},
            timeout_s=5.0,
            fingerprint="sha256:" + "0" * 64,
        )

    def serve() -> None:
        raw, _ = listener.accept()
        read_preamble(raw)
        answer(raw, Credentials.in_folder(folder / "party1").context(server=True), 5.0)

    with listener, ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(call), pool.submit(serve)]:
            assert "fingerprint" in str(future.exception())


def test_plain_tcp_and_silence_are_bounded(clusters: list[Path]) -> None:
    context = Credentials.in_folder(clusters[0] / "party1").context(server=True)
    for data, match in ((b"hello, is this the party?\r\n", "TLS 1.3"), (b"", "within 0.5 s")):
        with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as plain:
            raw, _ = listener.accept()
            plain.sendall(data)
            with pytest.raises(LinkError, match=match):
                answer(raw, context, 0.5)


def test_nobody_listens(clusters: list[Path]) -> None:
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
    context = Credentials.in_folder(clusters[0] / "party0").context(server=False)
    with pytest.raises(LinkError, match=r"party 1 \(127.0.0.1:\d+\) refuses connections"):
        dial(address, context, name="party 1", identity=client_identity("x"), hello={}, timeout_s=0.3)


def test_a_preamble_is_read_back_and_anything_else_refused() -> None:
    assert Preamble.parse(preamble()) == Preamble(PROTOCOL_VERSION, None)
    assert Preamble.parse(preamble(RUN)) == Preamble(PROTOCOL_VERSION, RUN)
    assert Preamble.parse(b"sfumato\x07" + bytes(16)) == Preamble(7, None)
    for wrong in (
        b"",
        preamble()[:-1],
        preamble() + b"x",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        bytes(PREAMBLE_BYTES),
    ):
        with pytest.raises(LinkError, match="did not begin with sfumato's preamble"):
            Preamble.parse(wrong)
