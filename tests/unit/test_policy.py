"""What a machine lets a client do with a shared model, and every way round that it must not take.

`test_each_check_is_needed` at the end switches the checks off one by one and sees that a way opens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_parties as shared

import sfumato as sf
from sfumato.errors import InsecureError, JobError, ProtocolError
from sfumato.graph.certificate import watched
from sfumato.graph.plan import Plan, load_side
from sfumato.link.memory import memory_links
from sfumato.runtime import handles, machine, sharing
from sfumato.runtime.backend import Term
from sfumato.runtime.commands import Call, Certify, Command, Drop, Load, Put, Reveal, WeightsSpec
from sfumato.runtime.machine import make_machine
from sfumato.runtime.policy import (
    OPEN,
    Approval,
    Closure,
    Host,
    ModelId,
    Part,
    after_own,
    check_offers,
    opens,
)
from sfumato.runtime.shared_model import Description
from sfumato.runtime.store import ModelStore

MODEL = shared.a_model()
FIRST, LAST = (MODEL.plans[shared.part_of(MODEL, name)] for name in ("first", "last"))
CLOSED = "the owner of house does not let .* be opened"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> list[ModelStore]:
    stores = shared.stores(tmp_path_factory.mktemp("at"))
    shared.share(stores, MODEL)
    return stores


class Attack:
    """A client's session with both parts loaded, ``x`` open and ``hidden`` closed."""

    def __init__(self, at: list[ModelStore], **options: Any) -> None:
        self.session = shared.Parties(at, options=options)
        self.description: Description = self.session.describe("house")
        for part in ("first", "last"):
            self.session.load_shared(part, self.description, shared.part_of(MODEL, part))
        self.session.put("x", shared.batch())
        self.calls = 0
        self.run("first", "x", "hidden")

    def run(self, name: str, handle: str, output: str, **extra: str) -> None:
        """One call of a loaded plan of one input, as `Backend.call` makes it."""
        self.calls += 1
        plan = self.session._plans[name]
        (argument,) = plan.client_inputs
        self.session.call(name, f"call{self.calls}", {argument: handle, **extra}, {}, [output])

    def own(self, name: str, plan: Plan) -> None:
        self.session.load(name, plan)

    def do(self, *commands: Command) -> None:
        """Commands as a client sends them that does not use `Backend`."""
        for command in commands:
            self.session._send(command, [[], [], []])

    def opened(self, handle: str) -> torch.Tensor:
        """What a reveal gives to a client that asks for no certificate."""
        return self.session._opened(self.session._send(Reveal(handle), [[], [], []]))

    def refused(self, handle: str) -> None:
        with pytest.raises(JobError, match=CLOSED):
            self.opened(handle)


@pytest.fixture
def attack(at: list[ModelStore]) -> Iterator[Attack]:
    made = Attack(at)
    yield made
    made.session.close()


def plain(*modules: int) -> torch.Tensor:
    value = shared.batch()
    for seed in modules:
        value = shared.chain(seed)(value)
    return value.detach()


# ---- what is allowed ----------------------------------------------------------------------------------------------


def test_the_approved_way(attack: Attack) -> None:
    attack.refused("hidden")
    attack.session.affine("half", [Term("hidden", 0.5), Term("x", 0.25)], "half")
    attack.refused("half")
    attack.run("last", "hidden", "y")
    assert float((attack.session.reveal("y") - plain(1, 2)).abs().max()) < 1e-3
    attack.run("last", "half", "z")
    expected = shared.chain(2)(0.5 * plain(1) + 0.25 * plain()).detach()
    assert float((attack.session.reveal("z") - expected).abs().max()) < 1e-3
    assert float((attack.opened("x") - shared.batch()).abs().max()) < 1e-4


def test_certificates_of_approved_parts_are_given(attack: Attack) -> None:
    assert watched(FIRST)
    attack.session.certify("hidden")
    attack.session.put("far", 100 * shared.batch())
    attack.run("first", "far", "wild")
    with pytest.raises(sf.RangeError, match="left the range"):
        attack.session.certify("wild")


def test_a_clients_own_plan_and_values_stay_its_own(attack: Attack) -> None:
    attack.own("mine", shared.planned(shared.chain(5)))
    attack.run("mine", "x", "own")
    assert float((attack.session.reveal("own") - plain(5)).abs().max()) < 1e-3


# ---- ways round ---------------------------------------------------------------------------------------------------


def weight_names(plan: Plan) -> list[str]:
    names = list(load_side(plan).secrets)
    assert names
    return names


def by_name(attack: Attack) -> None:
    """Weights are no handles, whatever they might be called."""
    for part, plan in (("first", FIRST), ("last", LAST)):
        for name in weight_names(plan):
            for handle in (name, f"{part}:{name}", f"{part}/{name}", f"house:{name}"):
                for command in (Reveal(handle), Drop(handle)):
                    with pytest.raises(JobError, match="there is no value"):
                        attack.do(command)


def weights_as_inputs(attack: Attack) -> None:
    """A client that could choose some weights of a part would read the others off its results."""
    (argument,) = LAST.client_inputs
    for i, name in enumerate(weight_names(LAST)):
        kind = LAST.secret_type(name)
        attack.session.put("chosen", torch.zeros(kind.shape), kind.frac, kind.ring)
        with pytest.raises(JobError, match="takes exactly its inputs"):
            attack.do(Call("last", f"w{i}", {argument: "x", name: "chosen"}, {}, ("y",)))
        with pytest.raises(JobError, match="takes exactly its inputs"):
            attack.do(Call("last", f"v{i}", {argument: "x"}, {name: torch.zeros(kind.shape)}, ("y",)))


def results_as_publics(attack: Attack) -> None:
    """Nor any value in the middle of a part."""
    (argument,) = LAST.client_inputs
    for i, node in enumerate(LAST.program.nodes):
        with pytest.raises(JobError, match="takes exactly its inputs"):
            attack.do(Call("last", f"m{i}", {argument: "x"}, {node.name: torch.zeros(node.shape)}, ("y",)))


def own_plan_under_an_approved_name(attack: Attack) -> None:
    """The name of a part is the client's; approval is the plan's."""
    attack.own("last", shared.planned(shared.chain(5)))
    attack.run("last", "hidden", "y")
    attack.refused("y")
    attack.run("last", "x", "z")  # and it has its own weights, not the model's
    assert float((attack.opened("z") - plain(5)).abs().max()) < 1e-3


def own_plan_with_the_approved_digest(attack: Attack) -> None:
    """A plan's digest does not cover weights: with other ones it is the client's plan."""
    own = replace(LAST, program=replace(LAST.program, weights=_others(LAST)))
    assert own.digest() == LAST.digest()
    attack.own("mine", own)
    attack.run("mine", "hidden", "y")
    attack.refused("y")
    attack.do(Load("bare", own.for_parties(), WeightsSpec("public")))  # and without any it gets none
    (argument,) = LAST.client_inputs
    with pytest.raises(JobError, match="was not given to this run"):
        attack.do(Call("bare", "bare", {argument: "x"}, {}, ("z",)))


def _others(plan: Plan) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in plan.program.weights.items()}


def own_plan_on_closed(attack: Attack) -> None:
    """Whatever a client computes of a closed value is closed, for good: also behind a part whose results open."""
    attack.own("mine", shared.planned(shared.chain(5)))
    attack.run("mine", "hidden", "y")
    attack.refused("y")
    attack.run("last", "y", "z")
    attack.refused("z")
    attack.session.affine("w", [Term("z", 1.0), Term("x", 1.0)], "w")
    attack.refused("w")


def certificate_of_own_plan(attack: Attack) -> None:
    """A client's plan says what its certificate counts: on a closed value that would be any question about it."""
    attack.own("mine", shared.planned(shared.chain(5)))
    attack.run("mine", "hidden", "y")
    with pytest.raises(JobError, match="does not let the certificate of 'mine' be opened"):
        attack.do(Certify("ask", (("mine", (f"call{attack.calls}:samples",)),)))
    attack.run("last", "y", "z")
    with pytest.raises(JobError, match="does not let the certificate of 'last' be opened"):
        attack.do(Certify("ask2", (("last", (f"call{attack.calls}:samples",)),)))


def certificate_by_another_plan(attack: Attack) -> None:
    """The plan of the run judges it, not one that took its name since."""
    run = f"call{attack.calls}:samples"
    attack.do(Load("first", shared.planned(shared.chain(5)).for_parties(), WeightsSpec("public")))
    with pytest.raises(JobError, match="not of the plan"):
        attack.do(Certify("ask", (("first", (run,)),)))


def samples_as_handles(attack: Attack) -> None:
    """What a run leaves for its certificate is no value."""
    run = f"call{attack.calls}:samples"
    with pytest.raises(JobError, match="there is no value"):
        attack.do(Reveal(run))
    (argument,) = FIRST.client_inputs
    attack.do(
        Call("first", "again", {argument: "x"}, {}, ("other",), "hidden")
    )  # samples called like a value
    attack.refused("hidden")
    attack.do(Drop("hidden"))  # the samples
    attack.refused("hidden")


def affine_of_closed(attack: Attack) -> None:
    """Neither a factor, nor rows, nor a constant, nor an open companion opens a value."""
    for i, terms in enumerate(
        ([Term("hidden", 1.0)], [Term("hidden", 3.0, 0, 1)], [Term("x", 1.0), Term("hidden", 1e-3)])
    ):
        attack.session.affine(f"a{i}", terms, f"a{i}")
        attack.refused(f"a{i}")
    attack.session.affine("x", [Term("x", 1.0), Term("hidden", 1.0)], "same")  # over an open name
    attack.refused("x")


def put_and_drop(attack: Attack) -> None:
    """A label belongs to the value, not to its name."""
    attack.session.put("hidden", shared.batch())
    assert float((attack.opened("hidden") - shared.batch()).abs().max()) < 1e-4
    attack.run("first", "hidden", "hidden")  # over its own input
    attack.refused("hidden")
    attack.session.drop("hidden")
    with pytest.raises(JobError, match="there is no value"):
        attack.opened("hidden")
    attack.run("first", "x", "x")
    attack.refused("x")


def outputs_over_handles(attack: Attack) -> None:
    """Results that take a name twice, or that of an input."""
    (argument,) = FIRST.client_inputs
    with pytest.raises(JobError, match="has 1 outputs, 2 were named"):
        attack.do(Call("first", "two", {argument: "x"}, {}, ("a", "a")))
    attack.do(Call("last", "over", {argument: "hidden"}, {}, ("hidden",)))
    attack.opened("hidden")  # the result of the open part; the closed value is gone


def a_path_again(attack: Attack) -> None:
    """Masks are drawn once: a path is used once, also that of a reveal."""
    (argument,) = LAST.client_inputs
    attack.do(Call("last", "p", {argument: "hidden"}, {}, ("y",)))
    with pytest.raises(ProtocolError, match="twice"):
        attack.do(Call("last", "p", {argument: "x"}, {}, ("y",)))


def shapes_of_inputs(attack: Attack) -> None:
    """An input of another shape or ring would be another function of the weights."""
    (argument,) = LAST.client_inputs
    attack.session.put("wide", torch.zeros(8, 8))
    with pytest.raises(JobError, match="the input"):
        attack.do(Call("last", "s", {argument: "wide"}, {}, ("y",)))


def own_plan_names_the_model(attack: Attack) -> None:
    """The weights of a model come with its approved plans alone."""
    for named, match in (
        ({"plan": "0" * 64}, "has not approved this plan"),
        ({"share": "0" * 32}, "holds another share of house"),
        ({"model": "other"}, "there is no model"),
        ({"model": "../house"}, "a model's name must be"),
    ):
        plan = {"model": "house", "share": attack.description.share_id, "plan": LAST.digest(), **named}
        with pytest.raises(JobError, match=match):
            attack.do(Load("mine", plan, WeightsSpec("model")))
    extra = {"model": "house", "share": attack.description.share_id, "plan": LAST.digest(), "format": 2}
    with pytest.raises(JobError, match="by its name, share and plan digest alone"):
        attack.do(Load("mine", extra, WeightsSpec("model")))


WAYS = [
    by_name,
    weights_as_inputs,
    results_as_publics,
    own_plan_under_an_approved_name,
    own_plan_with_the_approved_digest,
    own_plan_on_closed,
    certificate_of_own_plan,
    certificate_by_another_plan,
    samples_as_handles,
    affine_of_closed,
    put_and_drop,
    outputs_over_handles,
    a_path_again,
    shapes_of_inputs,
    own_plan_names_the_model,
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_way_round_is_closed(at: list[ModelStore], way: Callable[[Attack], None], fused: bool) -> None:
    if not fused and way not in (own_plan_on_closed, affine_of_closed, put_and_drop):
        return
    way(Attack(at, fused=fused))


def test_public_inputs_have_the_captured_shape(at: list[ModelStore]) -> None:
    with shared.Parties(at) as session:
        description = session.describe("house")
        digest = shared.part_of(MODEL, "known")
        session.load_shared("known", description, digest)
        plan = description.plans[digest]
        session.put("x", shared.batch())
        inputs = {plan.client_inputs[0]: "x"}
        good = {n: torch.zeros(plan.program.types[n][0]) for n in plan.public_inputs}
        assert good
        for bad in (
            {},
            {**good, next(iter(plan.constants)): torch.zeros(8)},
            {n: torch.zeros(4, *t.shape) for n, t in good.items()},
            {n: t.to(torch.int64) for n, t in good.items()},
        ):
            with pytest.raises(JobError, match="of a part of house"):
                session._send(Call("known", "run", inputs, bad, ("y",)), [[], [], []])


def test_another_owners_part_does_not_open_a_value(tmp_path: Path) -> None:
    """A client that owns a model, too, cannot open others' values with it, nor count them."""
    at = shared.stores(tmp_path)
    shared.share(at, MODEL)
    mine = shared.planned(shared.chain(9))
    offers = [{"settings": {}, "parts": {"model": mine.digest()}, "reveal": ["model"]}]
    accomplice = shared.a_model("mine", plans={mine.digest(): mine}, offers=offers)
    shared.share(at, accomplice, shared.OTHER_OWNER)
    attack = Attack(at)
    attack.session.load_shared("mine", attack.session.describe("mine"), mine.digest())
    attack.run("mine", "x", "fine")
    attack.opened("fine")
    attack.run("mine", "hidden", "y")
    attack.refused("y")
    with pytest.raises(JobError, match="does not let the certificate of 'mine' be opened"):
        attack.do(Certify("ask", (("mine", (f"call{attack.calls}:samples",)),)))
    attack.run("last", "y", "z")  # it went through another's plan: closed for good
    attack.refused("z")


@pytest.mark.parametrize("name", ["evil", "house"])
def test_an_owner_that_picks_anothers_share_id_gets_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Share ids are told to clients: neither values nor weights of a session go by them alone."""
    at = shared.stores(tmp_path)
    shared.share(at, MODEL)
    attack = Attack(at)  # has loaded the weights, holds a closed value
    chosen = attack.description.share_id
    monkeypatch.setattr(sharing, "secrets", SimpleNamespace(token_hex=lambda count: chosen))
    mine = shared.planned(shared.chain(9))
    kinds = [[plan.secret_type(weight) for weight in weight_names(plan)] for plan in (FIRST, mine)]
    assert kinds[0] == kinds[1]  # as an attacker would choose them
    offers = [{"settings": {}, "parts": {"model": mine.digest()}, "reveal": ["model"]}]
    evil = shared.a_model(name, plans={mine.digest(): mine}, offers=offers)
    if name == "evil":
        with pytest.raises(JobError, match="has a model with this share id; share yours again"):
            shared.share(at, evil, shared.OTHER_OWNER)
    for store in at:
        store.remove("house", shared.OWNER)  # the session goes on with what it has loaded
    shared.share(at, evil, shared.OTHER_OWNER)
    described = attack.session.describe(name)
    assert described.share_id == chosen
    attack.session.load_shared("evil", described, mine.digest())
    attack.run("evil", "x", "own")
    assert float((attack.opened("own") - plain(9)).abs().max()) < 1e-3  # its weights, not the victim's
    attack.run("evil", "hidden", "y")
    attack.refused("y")


def test_parties_that_run_approved_programs_only_refuse_a_clients_plan(at: list[ModelStore]) -> None:
    with shared.Parties(at, programs="approved") as session:
        for form in ("public", "stored"):
            with pytest.raises(JobError, match="not plans of clients"):
                session._send(Load("mine", LAST.for_parties(), WeightsSpec(form)), [[], [], []])  # type: ignore[arg-type]
        description = session.describe("house")
        session.load_shared("last", description, LAST.digest())


def test_a_client_chooses_neither_its_name_nor_the_store_nor_a_protocol_without_secrecy(
    tmp_path: Path,
) -> None:
    link = memory_links(3)[0]
    keys = {1: bytes(32), 2: bytes(32)}
    made = make_machine(
        0, link, keys, {"client": "x", "store": str(tmp_path), "programs": "any", "host": None}
    )
    assert made._host == Host()
    given = {"store": str(tmp_path), "key": "k", "client": shared.CLIENT_A, "programs": "approved"}
    host = make_machine(0, link, keys, {"host": given})._host
    assert (host.client, host.programs) == (shared.CLIENT_A, "approved")
    assert host.store is not None
    for wrong in ("Any", "", "approved", None, "all"):  # anything but "any" is the strict one
        assert Host.of(0, {"programs": wrong}).programs == "approved"
    with pytest.raises(InsecureError):
        make_machine(0, link, keys, {"protocol": "plain", "host": given})


# ---- the rules alone ----------------------------------------------------------------------------------------------


def test_labels() -> None:
    mine, other = Closure(ModelId("o", "m", "1")), Closure(ModelId("o", "n", "2"))
    opening, closing = Part(mine.model, True), Part(mine.model, False)
    assert opening.after([OPEN, OPEN]) == OPEN
    assert closing.after([OPEN]) == {mine}
    assert opening.after([frozenset({mine})]) == OPEN
    assert opening.after([frozenset({mine}), frozenset({other})]) == {replace(other, foreign=True)}
    assert opening.after([after_own([frozenset({mine})])]) == {replace(mine, foreign=True)}
    assert closing.judged([frozenset({mine})]) == OPEN
    assert closing.judged([frozenset({other})]) == {replace(other, foreign=True)}
    for other_id in (
        mine.model._replace(share_id="3"),
        mine.model._replace(name="n"),
        mine.model._replace(owner="p"),
    ):
        assert Part(other_id, True).after([frozenset({mine})]) == {replace(mine, foreign=True)}
    assert after_own([OPEN]) == OPEN


def test_an_approval_covers_program_plan_and_policy() -> None:
    offer = {"settings": {}, "parts": {"last": LAST.digest()}, "reveal": ["last"]}
    approval = Approval.of(LAST, [offer])
    assert Approval.of(LAST, [{**offer, "reveal": []}]).policy != approval.policy
    assert Approval.of(FIRST, [offer]).plan != approval.plan
    assert opens([{**offer, "reveal": []}, offer], LAST.digest())
    assert not opens([{**offer, "parts": {"other": LAST.digest()}}], LAST.digest())
    check_offers([offer], [LAST.digest()])


# ---- each check is needed -----------------------------------------------------------------------------------------


def _no_check(*_: Any) -> None:
    pass


def _all_open(*_: Any) -> Any:
    return OPEN


MUTATIONS: list[tuple[str, Any, str, Any, list[Callable[[Attack], None]]]] = [
    ("reveal and certify", machine, "check_open", _no_check,
     [affine_of_closed, own_plan_on_closed, certificate_of_own_plan, put_and_drop]),
    ("affine", machine, "_joined", _all_open, [affine_of_closed, certificate_of_own_plan]),
    ("own plans", handles, "after_own", _all_open,
     [own_plan_under_an_approved_name, own_plan_with_the_approved_digest, own_plan_on_closed, certificate_of_own_plan]),
    ("exact inputs", handles.Loaded, "check", _no_check, [weights_as_inputs, results_as_publics]),
    ("foreign values", Part, "judged", lambda self, labels: OPEN, [own_plan_on_closed, certificate_of_own_plan]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "instead", "way"),
    [
        pytest.param(o, n, i, way, id=f"{what}: {way.__name__}")
        for what, o, n, i, ways in MUTATIONS
        for way in ways
    ],
)
def test_each_check_is_needed(
    at: list[ModelStore], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, instead: Any, way: Any
) -> None:
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        way(Attack(at))


def test_a_put_takes_the_place_of_a_value(attack: Attack) -> None:
    kind = Put("hidden", "Z64", 18, (4, 8))
    with pytest.raises(JobError):
        attack.do(kind)  # without shares nothing changes
    attack.refused("hidden")
