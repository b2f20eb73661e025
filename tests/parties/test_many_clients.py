"""Several clients at one cluster: turns, limits, rights, and processes that die while others go on."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from processes import call, check, children, family, is_running, leaders, put, start, status, wait_for, works

from sfumato.errors import JobError, LinkError, ProtocolError, SfumatoError
from sfumato.link.identity import Credentials, dial, party_identity
from sfumato.runtime.authority import add_member, init_cluster
from sfumato.runtime.cluster import Limits
from sfumato.runtime.control import ControlConnection, ask
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.places import Places, new_run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(90)]
CLIENTS = ("alice", "bob", "carol")
PATIENT = Limits(connect_s=15.0, stall_s=30.0, idle_s=30.0)
SETTINGS = "[sessions]\nat_once = 2\nqueued = 3\nper_client = 2\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Shared: every test leaves it without a session."""
    with start(clients=("client", *CLIENTS), settings=SETTINGS) as made:
        made.ready()
        yield made


@pytest.fixture
def fresh() -> Iterator[LocalCluster]:
    with start(settings="[sessions]\nat_once = 1\n") as made:
        works(made)
        yield made


def idle(cluster: LocalCluster) -> None:
    for party in range(3):
        wait_for(
            lambda party=party: [status(cluster, party)[k] for k in ("running", "queued")] == [0, 0]  # type: ignore[misc]
        )


def in_thread(job: object, *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=job, args=arguments, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_two_at_once_and_each_its_own(cluster: LocalCluster) -> None:
    with cluster.session(client="alice") as first, cluster.session(client="bob") as second:
        assert status(cluster, 0)["running"] == 2
        put(first, "mine")
        with pytest.raises(SfumatoError, match="KeyError"):
            second.send(call())  # there is no handle of another session
        check(first)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(works, cluster, name) for name in ("alice", "bob") for _ in range(3)]:
            future.result(60)
    idle(cluster)


def test_a_third_waits_and_then_runs(cluster: LocalCluster) -> None:
    told: list[tuple[int, int]] = []
    with cluster.session(client="alice") as first:
        with cluster.session(client="bob"):

            def third() -> None:
                with cluster.session(
                    client="carol", on_wait=lambda party, place: told.append((party, place))
                ) as session:
                    check(session)

            thread = in_thread(third)
            wait_for(lambda: (0, 1) in told)
            assert status(cluster, 0)["queued"] == 1
            check(first)  # the others go on
        thread.join(60)
        assert not thread.is_alive()
    idle(cluster)


def test_a_wait_has_its_end(cluster: LocalCluster) -> None:
    with (
        cluster.session(client="alice"),
        cluster.session(client="alice"),
        pytest.raises(JobError, match=r"^party 0 had no turn for this session in time"),
    ):
        cluster.session(client="bob", wait_s=0.3)
    idle(cluster)


def test_a_session_has_its_end_also_in_the_middle_of_a_computation() -> None:
    with start(settings="[sessions]\nat_once = 1\nlongest_s = 1\n", limits=PATIENT) as cluster:
        with cluster.session() as session:
            put(session)
            with pytest.raises(JobError, match="lets a session run for 1 s, and this one has; begin another"):
                session.send(call("stop/2"))  # party 2 says nothing any more, the others wait for it

        def busy() -> None:
            with cluster.session() as session:
                while True:
                    put(session)

        with pytest.raises(JobError, match="lets a session run for 1 s"):
            busy()
        idle(cluster)


def test_a_session_that_takes_too_much_memory_ends_alone() -> None:
    with start(settings="[sessions]\nsession_mb = 700\n") as cluster:
        with cluster.session() as other, cluster.session() as session:
            with pytest.raises(JobError, match=r"party \d has no memory left for this session"):
                put(session, count=60_000_000)
            check(other)
        works(cluster)


def test_full_queues_say_so_and_those_who_leave_make_room(cluster: LocalCluster) -> None:
    def waiting(name: str) -> ControlConnection:
        """A client that asks party 0 for a session, and waits."""
        context = Credentials.in_folder(cluster.keys(name)).context(server=False)
        control = ControlConnection(cluster.ready(), context, 0, 10.0)
        control.send({"ask": "session", "run": new_run(), "kind": "run", "options": {}, "wait_s": 60.0}, 10.0)
        assert "queued" in control.read(10.0)
        return control

    with cluster.session(client="alice"), cluster.session(client="bob"):
        lines = [waiting("alice"), waiting("alice")]
        with pytest.raises(JobError, match="party 0: 2 sessions of this client are waiting already"):
            cluster.session(client="alice")
        lines.append(waiting("bob"))
        with pytest.raises(JobError, match=r"party 0: its queue is full \(3 sessions are waiting\)"):
            cluster.session(client="carol")
        lines.pop().close()  # goes away while it waits
        wait_for(lambda: status(cluster, 0)["queued"] == 2)
        lines.append(waiting("carol"))
        for line in lines:
            line.close()
    idle(cluster)
    works(cluster)


def test_nobody_comes_into_another_clients_session(cluster: LocalCluster) -> None:
    with cluster.session(client="alice") as session:
        put(session)
        member = cluster.ready().parties[1]
        for name, run, words in (
            ("bob", session.run, "takes no call from sfumato://client/bob"),
            ("alice", session.run, "already has a connection from sfumato://client/alice"),
            ("owner", session.run, "takes no call from sfumato://owner/owner"),
        ):
            with pytest.raises(LinkError, match=words):
                dial(
                    (member.host, member.port),
                    Credentials.in_folder(cluster.keys(name)).context(server=False),
                    name="party 1",
                    identity=party_identity(1),
                    hello={"run": run},
                    run=run,
                    timeout_s=10.0,
                )
        check(session)
    idle(cluster)


def test_a_run_that_nobody_granted_is_let_go(cluster: LocalCluster) -> None:
    member, run = cluster.ready().parties[0], new_run()
    started = time.monotonic()
    with pytest.raises(LinkError, match=r"party 0 .*closed the connection"):
        dial(
            (member.host, member.port),
            Credentials.in_folder(cluster.keys("bob")).context(server=False),
            name="party 0",
            identity=party_identity(0),
            hello={"run": run},
            run=run,
            timeout_s=40.0,
        )
    assert time.monotonic() - started < 30  # connect_s is 15


def test_each_role_has_its_own_rights(cluster: LocalCluster) -> None:
    ready = cluster.ready()
    with pytest.raises(
        JobError, match="a session to run is for the certificate of a client, not for sfumato://owner"
    ):
        Places(ready, cluster.keys("owner"), "run", new_run(), {})
    with pytest.raises(JobError, match="a session to share is for the certificate of an owner, not for"):
        Places(ready, cluster.keys("alice"), "share", new_run(), {})
    with pytest.raises(JobError, match="removed by its owner"):
        ask(ready, cluster.keys("alice"), 0, {"ask": "remove", "model": "digits"})
    with pytest.raises(JobError, match="no model 'digits' of this owner"):
        ask(ready, cluster.keys("owner"), 0, {"ask": "remove", "model": "digits"})
    with pytest.raises(JobError, match="there is no request 'everything'"):
        ask(ready, cluster.keys("alice"), 0, {"ask": "everything"})
    for who in (cluster.keys("alice"), cluster.keys("owner"), cluster.party_folder(1)):
        assert ask(ready, who, 0, {"ask": "models"}) == {"models": []}
        assert ask(ready, who, 2, {"ask": "status"})["party"] == 2


def test_a_client_cannot_choose_what_the_operator_chooses(cluster: LocalCluster) -> None:
    wanted = {"weights_folder": "/", "largest_bytes": 1, "host": {"store": "/"}, "tiles": 3}
    with cluster.session(wanted, client="alice") as session:
        put(session)
        given = session.send(call(rounds=1))[0][0]["options"]
    assert given["tiles"] == 3
    assert given["weights_folder"] == str(cluster.folder)
    assert given["largest_bytes"] == cluster.cluster.limits.max_message_bytes
    assert given["host"] == {
        "store": str(cluster.party_folder(0) / "store"),
        "key": str(cluster.party_folder(0) / "storage.key"),
        "client": "sfumato://client/alice",
        "programs": "any",
    }


def test_a_client_added_later_is_served(cluster: LocalCluster) -> None:
    add_member(cluster.folder / "cluster", client="late")
    works(cluster, "late")


def test_another_version_is_told_so(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sfumato.runtime.control.PROTOCOL_VERSION", 3)
        with pytest.raises(
            ProtocolError, match="party 0 runs protocol version 2, the client 3; install one release"
        ):
            cluster.session(client="alice")
    with monkeypatch.context() as patch:
        patch.setattr("sfumato.link.preamble.PROTOCOL_VERSION", 9)
        with pytest.raises(
            ProtocolError, match="party 0 runs protocol version 2, the client 9; install one release"
        ):
            cluster.session(client="alice")
    with monkeypatch.context() as patch:
        patch.setattr("sfumato.runtime.control.package_version", lambda: "9.9")
        with pytest.raises(ProtocolError, match=r"party 0 runs package version .*, the client 9\.9"):
            cluster.session(client="alice")
    works(cluster)


def test_a_dead_worker_ends_one_session_and_frees_its_place(fresh: LocalCluster) -> None:
    """Whichever process of a session is killed, idle or in the middle of a command."""
    for party in range(3):
        with fresh.session() as session:
            put(session)
            workers = children(leaders(fresh)[-1])
            assert len(workers) == 3
            victim = next(pid for pid in workers if party_of(fresh, pid) == party)
            os.kill(victim, signal.SIGKILL)
            begun = time.monotonic()
            with pytest.raises(LinkError, match=rf"party {party}"):
                session.send(call())
            assert time.monotonic() - begun < 10
        works(fresh)  # the place of the one that may run at once


def party_of(cluster: LocalCluster, worker: int) -> int:
    """By the log that it writes to."""
    log = os.readlink(f"/proc/{worker}/fd/2")
    return next(party for party in range(3) if log == str(cluster._log(party)))


def test_a_dead_forkserver_is_started_again(fresh: LocalCluster) -> None:
    with fresh.session() as session:
        put(session)
        os.kill(leaders(fresh)[-1], signal.SIGKILL)
        session.send(call())  # a session that runs goes on
    works(fresh)
    for party, supervisor in enumerate(fresh.process_ids):
        own = children(supervisor)
        assert len(own) == 1
        os.kill(own[0], signal.SIGKILL)
        wait_for(lambda supervisor=supervisor, own=own: children(supervisor) not in ([], own))  # type: ignore[misc]
        wait_for(lambda party=party: status(fresh, party)["ready"] is True, 60.0)  # type: ignore[misc]
    works(fresh)


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_outlives_a_killed_supervisor(fresh: LocalCluster, stopped: bool) -> None:
    session = fresh.session()
    put(session)
    workers = children(leaders(fresh)[-1])
    mine = [pid for pid in workers if party_of(fresh, pid) == 1]
    assert len(mine) == 1
    if stopped:  # it does not even read that its supervisor is gone
        os.kill(mine[0], signal.SIGSTOP)
    begun = time.monotonic()
    os.kill(fresh.process_ids[1], signal.SIGKILL)

    def go_on() -> None:
        while True:  # a command may still come through before the worker reads that it must end
            session.send(call())

    with pytest.raises(LinkError, match="party 1"):
        go_on()
    assert time.monotonic() - begun < 10
    for pid in workers:
        wait_for(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
    session.close()


def test_a_supervisor_alone_leaves_no_process(tmp_path: Path) -> None:
    """As operators run it: its own forkserver, killed without a word."""
    import subprocess

    init_cluster(tmp_path / "c", ports=(0, 0, 0))
    command = [sys.executable, "-m", "sfumato.runtime.server", "--folder", str(tmp_path / "c" / "party0")]
    process = subprocess.Popen(
        [*command, "--index", "0"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    wait_for(lambda: len(family(process.pid)) == 2)
    pids = family(process.pid)
    process.kill()
    process.wait(10)
    for pid in pids:
        wait_for(lambda pid=pid: not is_running(pid), 60.0)  # type: ignore[misc]


def test_the_supervisor_loads_no_torch_and_the_forkserver_starts_no_thread(cluster: LocalCluster) -> None:
    for pid in cluster.process_ids:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    forkserver = leaders(cluster)[-1]
    assert "libtorch" in Path(f"/proc/{forkserver}/maps").read_text()
    assert "Threads:\t1\n" in Path(f"/proc/{forkserver}/status").read_text()


def test_revoked_certificates_are_refused() -> None:
    import hashlib
    import ssl

    with start(clients=("client", "mallory")) as first:
        text = (first.keys("mallory") / "certificate.pem").read_text()
        print_ = hashlib.sha256(ssl.PEM_cert_to_DER_cert(text)).hexdigest()
        for party in range(3):  # read when the party starts, and these have only just begun to
            path = first.party_folder(party) / "party.toml"
            path.write_text(f'[accept]\nrevoked = ["sha256:{print_}"]\n')
        first.ready()
        with pytest.raises(
            LinkError, match="party 0 does not take the certificate of sfumato://client/mallory"
        ):
            first.session(client="mallory")
        with pytest.raises(LinkError, match="does not take the certificate of sfumato://client/mallory"):
            ask(first.ready(), first.keys("mallory"), 2, {"ask": "status"})
        works(first)


def test_settings_that_cannot_be_used_end_the_party_with_their_problem() -> None:
    with (
        start(settings="[sessions]\nat_once = 0\n") as cluster,
        pytest.raises(LinkError, match=r"party \d did not start \(.*at_once must be a whole number"),
    ):
        cluster.session()
