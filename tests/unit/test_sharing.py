"""Sharing a model with three parties, and what a client gets of it, over in-process links."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_parties as shared

import sfumato as sf
from sfumato.errors import JobError, LinkError
from sfumato.graph.places import Place
from sfumato.graph.plan import client_side
from sfumato.runtime import sharing
from sfumato.runtime.commands import Describe
from sfumato.runtime.lockstep import Lockstep
from sfumato.runtime.shared_model import client_constants, read_description


def test_a_shared_model_runs_as_its_module(tmp_path: Path) -> None:
    at, model, seen = shared.stores(tmp_path), shared.a_model(), list[tuple[int, int]]()
    share_id = shared.share(at, model, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    with shared.Parties(at) as session:
        description = session.describe("house")
        assert description.share_id == share_id
        assert description.files == dict(model.files)
        assert set(description.plans) == set(model.plans)
        session.load_shared("first", description, shared.part_of(model, "first"))
        session.load_shared("last", description, shared.part_of(model, "last"))
        x = shared.batch(5)
        session.put("x", x)
        session.call("first", "one", _inputs(description, model, "first", "x"), {}, ["hidden"])
        session.call("last", "two", _inputs(description, model, "last", "hidden"), {}, ["y"])
        expected = shared.chain(2)(shared.chain(1)(x)).detach()
        assert float((session.reveal("y") - expected).abs().max()) < 1e-3


def _inputs(description: Any, model: Any, part: str, handle: str) -> dict[str, str]:
    (name,) = description.plans[shared.part_of(model, part)].client_inputs
    return {name: handle}


def test_a_part_with_public_weights_is_mapped_and_its_client_computes_from_the_constants(
    tmp_path: Path,
) -> None:
    at, model = shared.stores(tmp_path), shared.a_model()
    shared.share(at, model)
    with shared.Parties(at) as session:
        description = session.describe("house")
        digest = shared.part_of(model, "known")
        plan = description.plans[digest]
        session.load_shared("known", description, digest)
        if sys.platform == "linux":  # the weights are pages of the file, which sessions of a host share
            maps = Path("/proc/self/maps").read_text()
            assert all(str(store.folder / "house" / "public.safetensors") in maps for store in at)
        x, t = shared.batch(6), torch.tensor(0.25)
        values = client_side(plan, (x, t))
        handles = {}
        for name, tensor in values.secrets.items():
            handles[name] = f"in/{name}"
            session.put(handles[name], tensor, plan.secret_type(name).frac)
        session.call("known", "run", handles, values.publics, ["y"])
        torch.manual_seed(7)
        assert float((session.reveal("y") - shared.Timed().eval()(x, t).detach()).abs().max()) < 1e-3


def test_a_client_gets_the_constants_that_it_needs_and_no_secret_weight() -> None:
    for secret in ("inputs", "inputs+weights"):
        plan = shared.timed(secret)
        needed = client_constants(plan)
        assert all(plan.places[name] is Place.PUBLIC for name in needed)
        assert bool(needed) is (secret == "inputs")  # the embedding of time, where its weights are public
        bare = sf.Plan.from_json(plan.for_parties(), needed)
        x, t = shared.batch(6), torch.tensor(0.25)
        ours, theirs = client_side(plan, (x, t)), client_side(bare, (x, t))
        for left, right in ((ours.secrets, theirs.secrets), (ours.publics, theirs.publics)):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_weight_in_several_plans_is_kept_once(tmp_path: Path) -> None:
    at = shared.stores(tmp_path)
    module = shared.chain(1)
    one, two = shared.planned(module), shared.planned(module, "inputs+weights", shared.batch()[:2])
    plans = {plan.digest(): plan for plan in (one, two)}
    offers = [{"settings": {}, "parts": {"model": digest}, "reveal": []} for digest in plans]
    shared.share(at, shared.a_model(plans=plans, offers=offers))
    assert len(plans) == 2
    manifest = at[1].open("house", shared.CLIENT_A).manifest
    used = [set(items.values()) for items in manifest["secret"].values()]
    assert used[0] == used[1] == set(range(len(manifest["items"])))


def test_clients_that_are_not_named_learn_nothing(tmp_path: Path) -> None:
    at = shared.stores(tmp_path)
    shared.share(at, shared.a_model(clients=["a", "c"]))
    for client in (shared.CLIENT_B, shared.OWNER, ""):
        with shared.Parties(at, client) as session:
            with pytest.raises(JobError) as refused:
                session.describe("house")
            with pytest.raises(JobError) as absent:
                session.describe("nothing")
            assert str(refused.value) == str(absent.value).replace("nothing", "house")
    assert [(entry.name, entry.clients) for entry in at[0].models(shared.CLIENT_A)] == [
        ("house", (shared.CLIENT_A,))
    ]
    assert at[0].models(shared.CLIENT_B) == []
    assert [entry.name for entry in at[0].models(shared.OWNER)] == ["house"]
    assert at[0].models(shared.OTHER_OWNER) == []


def test_a_simulation_has_no_models() -> None:
    with Lockstep("simulate", {}) as session, pytest.raises(JobError, match="cluster's parties"):
        session.describe("house")


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def nothing_is_left(at: Any) -> bool:
    return all(not [path for path in store.folder.glob("*") if path.name != ".lock"] for store in at)


def test_a_name_is_its_owners(tmp_path: Path) -> None:
    at, model = shared.stores(tmp_path), shared.a_model()
    first = shared.share(at, model)
    with pytest.raises(JobError, match=r"already at party 0; replace it \(--replace\)"):
        shared.share(at, model)
    for replace in (False, True):
        with pytest.raises(JobError, match="taken at party 0; choose another name"):
            shared.share(at, shared.a_model(replace=replace), shared.OTHER_OWNER)
    again = shared.share(at, shared.a_model(replace=True))
    assert again != first
    assert [store.models()[0].share_id for store in at] == [again] * 3
    with pytest.raises(JobError, match="no model 'house' of this owner"):
        at[0].remove("house", shared.OTHER_OWNER)
    for store in at:
        store.remove("house", shared.OWNER)
    assert nothing_is_left(at)


class Lossy:
    """A party's stream that does something else at one message."""

    def __init__(self, stream: Any, at: str, act: Any) -> None:
        self._stream, self._at, self._act = stream, at, act

    def send(self, header: Any, tensors: Any = ()) -> None:
        self._stream.send(header, tensors)

    def receive(self, *arguments: Any) -> Any:
        header, tensors = self._stream.receive(*arguments)
        if self._at in header:
            return self._act(self._stream, header, tensors)
        return header, tensors


def lost(stream: Any, header: Any, tensors: Any) -> Any:
    stream._link.drop()
    raise LinkError("gone")


@pytest.mark.parametrize("at_message", ["terms", "client", "item", "finish"])
def test_a_party_that_is_lost_before_the_commit_leaves_nothing_anywhere(
    tmp_path: Path, at_message: str
) -> None:
    at = shared.stores(tmp_path)
    with pytest.raises(LinkError, match="party 1"):
        shared.share(at, shared.a_model(), meddle=lambda i, s: Lossy(s, at_message, lost) if i == 1 else s)
    assert nothing_is_left(at)


def test_a_party_that_is_lost_between_the_commits_is_named(tmp_path: Path) -> None:
    at = shared.stores(tmp_path)
    with pytest.raises(
        LinkError, match=r"complete at parties 0 and 2 and perhaps not at party 1 .*model share --replace"
    ):
        shared.share(at, shared.a_model(), meddle=lambda i, s: Lossy(s, "commit", lost) if i == 1 else s)
    assert [len(store.models()) for store in at] == [1, 0, 1]
    share_id = shared.share(at, shared.a_model(replace=True))
    assert [store.models()[0].share_id for store in at] == [share_id] * 3


def flipped(stream: Any, header: Any, tensors: Any) -> Any:
    return header, [
        tensor.bitwise_xor(1) if tensor.dtype == torch.uint8 else tensor + 1 for tensor in tensors
    ]


@pytest.mark.parametrize("at_message", ["client", "public"])
def test_what_arrives_changed_is_refused(tmp_path: Path, at_message: str) -> None:
    at = shared.stores(tmp_path)
    with pytest.raises(JobError, match="came changed"):
        shared.share(at, shared.a_model(), meddle=lambda i, s: Lossy(s, at_message, flipped) if i == 2 else s)
    assert nothing_is_left(at)


def test_parties_that_got_different_terms_keep_nothing(tmp_path: Path) -> None:
    def other_clients(stream: Any, header: Any, tensors: Any) -> Any:
        return {**header, "terms": {**header["terms"], "clients": [shared.CLIENT_B]}}, tensors

    at = shared.stores(tmp_path)
    with pytest.raises(JobError, match="different models; nothing was kept"):
        shared.share(
            at, shared.a_model(), meddle=lambda i, s: Lossy(s, "terms", other_clients) if i == 2 else s
        )
    assert nothing_is_left(at)


@pytest.mark.parametrize("field", ["name", "share", "clients", "offers", "plans", "approvals", "constants", "secret",
                                   "items", "public", "tensors", "files", "shared_at"])  # fmt: skip
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], {"x": None}])
def test_hostile_terms_are_one_sentence(tmp_path: Path, field: str, value: Any) -> None:
    def twisted(stream: Any, header: Any, tensors: Any) -> Any:
        return {**header, "terms": {**header["terms"], field: value}}, tensors

    if field == "clients" and value in (None, []):
        return  # all, or nobody
    at = shared.stores(tmp_path)
    with pytest.raises(JobError) as error:
        shared.share(at, MODEL, meddle=lambda i, s: Lossy(s, "terms", twisted))
    assert "internal" not in str(error.value)
    assert nothing_is_left(at)


MODEL = shared.a_model()


def test_an_owner_is_told_what_is_wrong_with_its_model(tmp_path: Path) -> None:
    at, model = shared.stores(tmp_path), MODEL
    digest = next(iter(model.plans))
    for changes, match in [
        ({"name": "../up"}, "a model's name must be"),
        ({"files": {"../up": b""}}, "cannot be called"),
        ({"files": {"a/../../up": b""}}, "cannot be called"),
        ({"offers": []}, "at least one offer"),
        ({"offers": [{"settings": {}, "parts": {"a": digest}, "reveal": []}]}, "exactly those"),
        ({"offers": [{"settings": {}, "parts": {"a": digest}, "reveal": ["b"]}]}, "an offer must have"),
        ({"offers": [{"settings": {}, "parts": {"a": [digest]}, "reveal": []}]}, "an offer must have"),
        ({"offers": [{**model.offers[0], "settings": {"a": float("nan")}}]}, "what JSON can hold"),
        ({"offers": [{**model.offers[0], "settings": {"a": torch}}]}, "what JSON can hold"),
        ({"plans": {"0" * 64: model.plans[digest]}}, "exactly those"),
    ]:
        with pytest.raises(JobError, match=match):
            shared.share(at, shared.a_model(**changes))
    assert nothing_is_left(at)


def test_settings_are_read_as_they_travel(tmp_path: Path) -> None:
    at = shared.stores(tmp_path)
    settings = {"sizes": (1, 2), "steps": {10: "a", 9: "b"}}
    shared.share(at, shared.a_model(offers=[{**MODEL.offers[0], "settings": settings}]))
    with shared.Parties(at) as session:
        found = session.describe("house").offers[0]["settings"]
    assert found == {"sizes": [1, 2], "steps": {"10": "a", "9": "b"}}


def test_a_party_loads_only_what_the_owner_approved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if such a model had come to rest: the digests are compared again at each load."""

    def swapped(stream: Any, header: Any, tensors: Any) -> Any:
        given = header["terms"]["approvals"]
        approvals = dict(zip(given, [*list(given.values())[1:], *list(given.values())[:1]], strict=True))
        return {**header, "terms": {**header["terms"], "approvals": approvals}}, tensors

    at = shared.stores(tmp_path)
    with pytest.raises(JobError, match="not the one that its owner approves"):
        shared.share(at, MODEL, meddle=lambda i, s: Lossy(s, "terms", swapped))
    monkeypatch.setattr(sharing, "_checked", lambda header: (header["terms"], header["replace"]))
    monkeypatch.setattr(sharing, "_digest", lambda terms: "")
    shared.share(at, MODEL, meddle=lambda i, s: Lossy(s, "terms", swapped))
    with shared.Parties(at) as session:
        description = session.describe("house")
        with pytest.raises(JobError, match="has not approved this plan as it is kept here"):
            session.load_shared("first", description, shared.part_of(MODEL, "first"))


def test_shares_of_different_operations_never_mix(tmp_path: Path) -> None:
    at, model = shared.stores(tmp_path), MODEL
    shared.share(at, model)
    with shared.Parties(at) as session:
        description = session.describe("house")
    again = shared.a_model(replace=True)
    with pytest.raises(LinkError):
        shared.share(at, again, meddle=lambda i, s: Lossy(s, "commit", lost) if i == 1 else s)
    with shared.Parties(at) as session:
        with pytest.raises(JobError, match="different shares of house"):
            session.describe("house")
        with pytest.raises(JobError, match="party 0 holds another share of house"):
            session.load_shared("first", description, shared.part_of(model, "first"))


def test_a_client_believes_no_single_party(tmp_path: Path) -> None:
    """Each of the three must vouch for the same description, files and constants included."""
    at = shared.stores(tmp_path)
    shared.share(at, MODEL)
    with shared.Parties(at) as session:
        (fields, (data,)), *others = session._send(Describe("house"), [[], [], []])
    honest = [(fields, [data]), *others]
    assert read_description(honest).name == "house"
    description = fields["description"]
    for changes in (
        {"clients": None},
        {"offers": [{**description["offers"][0], "reveal": []}]},
        {"share": "0" * 32},
        {"files": "0" * 64},
        {"plans": {}},
    ):
        with pytest.raises(JobError, match="different shares of house"):
            read_description([({**fields, "description": {**description, **changes}}, [data]), *others])
    for index in (1, 2):
        twisted = list(honest)
        twisted[index] = ({"digest": "0" * 64}, [])
        with pytest.raises(JobError, match="different shares of house"):
            read_description(twisted)
    with pytest.raises(JobError, match="other files of house"):
        read_description([(fields, [data.bitwise_xor(1)]), *others])
    for broken in (
        [({}, []), *others],
        [(fields, []), *others],
        [({**fields, "description": None}, [data]), *others],
    ):
        with pytest.raises(JobError, match="cannot read"):
            read_description(broken)
