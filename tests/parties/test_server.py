"""Three real party processes on three loopback addresses, with a machine that only exchanges words."""

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
from torch import Tensor

from sfumato.errors import JobError, LinkError, ProtocolError, RangeError, SfumatoError
from sfumato.runtime.client import RemoteSession
from sfumato.runtime.cluster import Cluster, Limits, init_cluster
from sfumato.runtime.commands import Call, Put, Reveal, to_message
from sfumato.runtime.local import LocalCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]
HERE = Path(__file__).parent
HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
LIMITS = Limits(connect_s=15.0, stall_s=2.0, idle_s=15.0)


def start(**options: object) -> LocalCluster:
    settings = {
        "machine": "fake_machine:make",
        "python_path": [HERE],
        "hosts": HOSTS,
        "limits": LIMITS,
        "threads": 1,
    }
    return LocalCluster(**(settings | options))  # type: ignore[arg-type]


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
    assert_gone(made.process_ids)
    assert not made.folder.exists()


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def put(session: RemoteSession, handle: str = "x", count: int = 1000) -> list[Tensor]:
    words = [torch.randint(-(2**62), 2**62, (count,)) for _ in range(3)]
    session.send(Put(handle, "Z64", 18, (count,)), [[w] for w in words])
    return words


def call(kind: str = "sum", rounds: int = 2) -> Call:
    return Call(kind, "step/0", {"x": "x"}, {"rounds": torch.tensor(rounds)}, ("y",))


def works(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        x = put(session)
        session.send(call(rounds=1))
        for party, (header, (y,)) in enumerate(session.send(Reveal("y"))):
            assert header == {"party": party}
            assert torch.equal(y, x[party] + x[(party + 2) % 3])


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
        assert "12345" not in str(caught.value)
        with pytest.raises(JobError, match="this session is over"):
            session.send(Reveal("x"))
    assert all("12345" not in cluster.log_text(i) for i in range(3))
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


def test_second_client_is_told_that_the_party_is_busy(cluster: LocalCluster) -> None:
    with cluster.session() as session:
        put(session)
        with pytest.raises(JobError, match="is busy with another session"):
            cluster.session()
        session.send(call())  # the first goes on
    works(cluster)


def test_client_that_vanishes_ends_its_session(cluster: LocalCluster) -> None:
    session = cluster.session()
    put(session)
    session._link.close()
    works(cluster)


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


def test_stalled_party_ends_the_run_in_bounded_time(fresh: LocalCluster) -> None:
    with fresh.session() as session:
        put(session)
        begun = time.monotonic()
        with pytest.raises(LinkError, match=r"party \d.*sent nothing for .*step/0"):
            session.send(call("stop/2"))
        assert time.monotonic() - begun < 10


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
        "c.ready(); print(c.folder, *c.process_ids, flush=True)\nsys.stdin.read()\n"
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
    parent.send_signal(signal.SIGKILL)
    parent.wait(5)
    parent.stdin.close()
    parent.stdout.close()
    for pid in pids:
        wait_for(lambda pid=pid: not is_running(int(pid)))  # type: ignore[misc]
    subprocess.run(["rm", "-rf", folder], check=True)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    """Poll a fact about another process, bounded."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
