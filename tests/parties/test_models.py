"""Models at real parties: an owner shares over mutual TLS, clients use what it approved, and nothing else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import shared_parties as shared

from sfumato.errors import JobError, SfumatoError
from sfumato.graph.plan import load_side
from sfumato.runtime.cluster import Limits
from sfumato.runtime.commands import Reveal
from sfumato.runtime.control import ask
from sfumato.runtime.local import LocalCluster
from sfumato.runtime.remote import Remote
from sfumato.runtime.sharing import ModelToShare, share_model
from sfumato.runtime.wire import tensor_bytes

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

LIMITS = Limits(connect_s=30.0, stall_s=20.0, idle_s=60.0)
MODEL = shared.a_model(clients=["client"])


class Cluster(LocalCluster):
    """Real parties with stores, an owner, and two clients of which one may use the model."""

    def __init__(self, settings: str = "") -> None:
        super().__init__(clients=("client", "guest"), threads=1, limits=LIMITS, settings=settings)
        self.ready()
        (self.folder / "here.toml").write_text(self.cluster.to_toml(), encoding="utf-8")

    def share(self, model: ModelToShare = MODEL, owner: str = "owner") -> str:
        return share_model(self.cluster, self.keys(owner), model)

    def open(self, client: str = "client") -> Remote:
        return Remote(self.folder / "here.toml", self.keys(client), {})

    def names(self, keys: str) -> list[list[str]]:
        answers = [ask(self.cluster, self.keys(keys), party, {"ask": "models"}) for party in range(3)]
        return [[model["name"] for model in answer["models"]] for answer in answers]

    def store(self, party: int) -> Path:
        return self.party_folder(party) / "store"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


@pytest.fixture
def house(cluster: Cluster) -> Iterator[Cluster]:
    """With the model shared; without any afterwards."""
    cluster.share()
    yield cluster
    for party in range(3):
        if cluster.names("owner")[party]:
            ask(cluster.cluster, cluster.keys("owner"), party, {"ask": "remove", "model": "house"})


def used(session: Remote) -> float:
    """The largest error of the two parts, one after the other."""
    description = session.describe("house")
    x = shared.batch(5)
    session.put("x", x)
    for part, given, result in (("first", "x", "hidden"), ("last", "hidden", "y")):
        digest = shared.part_of(MODEL, part)
        session.load_shared(part, description, digest)
        (argument,) = description.plans[digest].client_inputs
        session.call(part, part, {argument: given}, {}, [result])
    expected = shared.chain(2)(shared.chain(1)(x)).detach()
    return float((session.reveal("y") - expected).abs().max())


def test_a_client_runs_a_shared_model_and_opens_what_its_owner_lets(house: Cluster) -> None:
    with house.open() as session:
        assert used(session) < 1e-3
        with pytest.raises(JobError, match="the owner of house does not let 'hidden' be opened"):
            session._send(Reveal("hidden"), [[], [], []])
    errors: list[float] = []

    def one() -> None:
        with house.open() as session:
            errors.append(used(session))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(errors) == 2
    assert max(errors) < 1e-3


def test_rights(house: Cluster) -> None:
    assert house.names("owner") == house.names("client") == [["house"]] * 3
    assert house.names("guest") == [[]] * 3
    with house.open("guest") as session, pytest.raises(JobError, match="there is no model 'house'"):
        session.describe("house")
    with pytest.raises(JobError, match="for the certificate of an owner"):
        house.share(owner="client")
    with pytest.raises(JobError, match="for the certificate of a client"):
        house.open("owner")
    for keys in ("client", "guest"):
        with pytest.raises(JobError, match="removed by its owner"):
            ask(house.cluster, house.keys(keys), 0, {"ask": "remove", "model": "house"})
    with pytest.raises(JobError, match=r"already at party 0; replace it"):
        house.share()


def test_a_removed_model_stays_for_the_session_that_has_it(house: Cluster) -> None:
    with house.open() as session:
        used(session)
        for party in range(3):
            ask(house.cluster, house.keys("owner"), party, {"ask": "remove", "model": "house"})
        (argument,) = MODEL.plans[shared.part_of(MODEL, "last")].client_inputs
        session.call("last", "again", {argument: "x"}, {}, ["z"])
        expected = shared.chain(2)(shared.batch(5)).detach()
        assert float((session.reveal("z") - expected).abs().max()) < 1e-3
    with house.open() as session, pytest.raises(JobError, match="there is no model 'house'"):
        session.describe("house")


def test_no_file_of_a_party_has_a_secret_weight(house: Cluster) -> None:
    contents = [
        path.read_bytes()
        for party in range(3)
        for path in house.store(party).rglob("*")
        if path.is_file() and path.name != ".lock"
    ]
    assert len(contents) > 9
    for plan in MODEL.plans.values():
        for tensor in load_side(plan).secrets.values():
            pattern = bytes(tensor_bytes(tensor.reshape(-1)[:4]))
            assert not any(pattern in data for data in contents)


def test_an_owner_that_stops_half_way_leaves_nothing(cluster: Cluster) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        share_model(cluster.cluster, cluster.keys("owner"), MODEL, progress=stop)
    deadline = time.monotonic() + 20
    while any(
        list(cluster.store(party).glob("[!.]*")) or list(cluster.store(party).glob(".draft-*"))
        for party in range(3)
    ):
        assert time.monotonic() < deadline, "a draft was left behind"
        time.sleep(0.05)
    assert cluster.names("owner") == [[]] * 3
    cluster.share()
    for party in range(3):
        ask(cluster.cluster, cluster.keys("owner"), party, {"ask": "remove", "model": "house"})


def test_a_damaged_file_ends_in_one_sentence_that_names_the_party(house: Cluster) -> None:
    path = house.store(1) / "house" / "weights" / "000000"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with house.open() as session, pytest.raises(JobError, match=r"'house' at party 1 has a damaged file"):
        used(session)
    with pytest.raises(SfumatoError, match="already at party 0"):
        house.share()
    house.share(shared.a_model(clients=["client"], replace=True))
    with house.open() as session:
        assert used(session) < 1e-3


def test_parties_that_take_approved_programs_alone() -> None:
    with Cluster('[accept]\nprograms = "approved"\n') as strict:
        strict.share()
        with strict.open() as session, pytest.raises(JobError, match="not plans of clients"):
            session.load("mine", shared.planned(shared.chain(5)))
        with strict.open() as session:
            assert used(session) < 1e-3
