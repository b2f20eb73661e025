"""Three real parties on three loopback addresses, with a machine that only exchanges words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from processes import (
    HERE,
    assert_gone,
    call,
    family,
    is_running,
    leaders,
    put,
    start,
    status,
    wait_for,
    works,
)

from sfumato.errors import JobError, LinkError, ProtocolError, RangeError, SfumatoError
from sfumato.runtime.authority import init_cluster
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.commands import Reveal, to_message
from sfumato.runtime.local import LocalCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Shared by the tests that leave all three parties alive."""
    with start() as made:
        made.ready()
        yield made


@pytest.fixture
def fresh() -> Iterator[LocalCluster]:
    with start() as made:
        yield made
        others = [pid for leader in leaders(made) for pid in family(leader)]
    assert_gone(leaders(made))
    for pid in others:
        wait_for(lambda pid=pid: not is_running(pid))  # type: ignore[misc]
    assert not made.folder.exists()


def test_happy_path_and_pair_keys(cluster: LocalCluster) -> None:
    works(cluster)
    keys = []
    for _ in range(2):
        with cluster.session({"tiles": 4}) as session:
            put(session)
            replies = [header for header, _ in session.send(call(rounds=20))]
            pairs = [{int(k): v for k, v in reply["keys"].items()} for reply in replies]
            assert all(pairs[i][j] == pairs[j][i] for i in range(3) for j in range(3) if i != j)
            assert replies[0]["options"]["tiles"] == 4
            assert all(sent > 8000 for sent in session.bytes_sent)
            keys += [key for pair in pairs for key in pair.values()]
    assert len(set(keys)) == 6  # three pairs, fresh in every session
    assert all(len(key) == 64 for key in keys)


def test_large_values_travel_in_chunks(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        words = put(session, count=6_000_000)
        replies = session.send(Reveal("x"))
        assert all(torch.equal(reply[1][0], w) for reply, w in zip(replies, words, strict=True))


def test_internal_error_shows_no_value_and_the_next_session_starts_empty(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        put(session)
        with pytest.raises(SfumatoError, match=r"internal error in party 1 \(ValueError\)") as caught:
            session.send(call("value-error/1"))
        assert "marmalade" not in str(caught.value)
        with pytest.raises(JobError, match="this session is over"):
            session.send(Reveal("x"))
    assert all("marmalade" not in cluster.log_text(i) for i in range(3))
    assert "ValueError at fake_machine.py" in cluster.log_text(1)
    with cluster.session() as session, pytest.raises(SfumatoError, match=r"internal error .*KeyError"):
        session.send(Reveal("x"))
    works(cluster)


def test_a_partys_own_error_is_the_one_reported(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        put(session)
        with pytest.raises(RangeError, match=r"^party 2: layer mid.attn left its range$"):
            session.send(call("range-error/2"))
    works(cluster)


def test_different_commands_are_refused(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        put(session)
        for stream, rounds in zip(session._streams, (1, 1, 2), strict=True):
            stream.send(*to_message(call(rounds=rounds)))
        with pytest.raises(ProtocolError, match=r"parties . and . received different commands"):
            session._collect(10.0, "the replies")
    works(cluster)


def test_bad_commands_are_one_sentence(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        for stream in session._streams:
            stream.send({"command": "Steal", "common": 0})
        with pytest.raises(JobError, match="there is no command 'Steal'"):
            session._collect(10.0, "the replies")
    works(cluster)


@pytest.mark.parametrize("what", ["data", "control"])
def test_client_that_vanishes_ends_its_session(cluster: LocalCluster, what: str) -> None:
    session = cluster.session()
    put(session)
    (session._link if what == "data" else session._places).close()
    for party in range(3):
        wait_for(lambda party=party: status(cluster, party)["running"] == 0)  # type: ignore[misc]
    works(cluster)
    session.close()


def test_parties_that_differ_are_refused() -> None:
    with start(terms=({"tables": "a"}, {"tables": "a"}, {"tables": "b"})) as cluster:
        with pytest.raises(ProtocolError, match=r"parties . and 2 differ in term tables \(a and b\)"):
            cluster.session()
        for party in range(3):
            wait_for(lambda party=party: "differ in term tables" in cluster.log_text(party))  # type: ignore[misc]


def test_wrong_client_certificates(cluster: LocalCluster, tmp_path: Path) -> None:
    init_cluster(tmp_path / "other")
    ready = cluster.ready()
    with pytest.raises(LinkError, match="certificate"):
        RemoteSession(ready, tmp_path / "other" / "client")
    with pytest.raises(LinkError, match=r"takes no call from sfumato://party/0|refused"):
        RemoteSession(ready, cluster.party_folder(0))
    swapped = Cluster(parties=(ready.parties[1], ready.parties[0], ready.parties[2]), limits=ready.limits)
    with pytest.raises(LinkError, match="expected sfumato://party/"):
        RemoteSession(swapped, cluster.client_folder)
    works(cluster)


def test_killed_party_ends_the_run_on_all_sides(fresh: LocalCluster) -> None:
    with fresh.session() as session:
        put(session)
        begun = time.monotonic()
        with pytest.raises(LinkError, match="party 1 closed the connection"):
            session.send(call("kill/1"))
        assert time.monotonic() - begun < 5
    for party in (0, 2):
        wait_for(lambda party=party: "ends session" in fresh.log_text(party))  # type: ignore[misc]
    wait_for(lambda: "lost the process of a session" in fresh.log_text(1))
    works(fresh)


def test_stalled_party_ends_the_run_in_bounded_time(fresh: LocalCluster) -> None:
    with fresh.session() as session:
        put(session)
        begun = time.monotonic()
        with pytest.raises(LinkError, match=r"party \d.*sent nothing for .*step/0"):
            session.send(call("stop/2"))
        assert time.monotonic() - begun < 10
    wait_for(lambda: status(fresh, 2)["running"] == 0)
    assert "lost the process" not in fresh.log_text(2)  # its client had left, and it was ended for that


def test_a_party_that_does_not_start_shows_its_last_words() -> None:
    cluster = start(machine="no_such_module:make")
    with pytest.raises(
        LinkError, match=r"party \d did not start \(.*there is no machine factory no_such_module"
    ):
        cluster.session()
    cluster.close()
    assert_gone(cluster.process_ids)


def test_parties_end_with_their_parent() -> None:
    source = (
        "import sys\nfrom sfumato.runtime.local import LocalCluster\n"
        f"c = LocalCluster(machine='fake_machine:make', python_path=[{str(HERE)!r}], threads=1)\n"
        "c.ready(); s = c.session()\n"
        "print(c.folder, c._forkserver.pid, *c.process_ids, flush=True)\nsys.stdin.read()\n"
    )
    paths = os.pathsep.join(p for p in sys.path if p)
    parent = subprocess.Popen(
        [sys.executable, "-c", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    folder, *pids = parent.stdout.readline().decode().split()
    workers = family(int(pids[0]))[1:]
    assert len(workers) == 3
    parent.send_signal(signal.SIGKILL)
    parent.wait(5)
    parent.stdin.close()
    parent.stdout.close()
    for pid in [*pids, *workers]:
        wait_for(lambda pid=pid: not is_running(int(pid)))  # type: ignore[misc]
    with start():  # the next one tidies up
        assert not Path(folder).exists()
