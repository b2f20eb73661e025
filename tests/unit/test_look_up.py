"""Look-ups of the client's row numbers in secret tables: plans, uploads, and what a hostile client may send."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import CaptureError, JobError, RangeError, SfumatoError
from sfumato.graph.look_up import numbers_are_lighter
from sfumato.graph.plan import Plan, client_side
from sfumato.graph.program import Node, Ref
from sfumato.ring import dpf
from sfumato.runtime.backend import Backend
from sfumato.runtime.commands import Affine, PutIndex, Reveal, Term
from sfumato.runtime.components import split_index
from sfumato.runtime.remote import open_backend
from sfumato.types import Z32, Z64, Index

ROWS, WIDTH = 60, 4
IDS = torch.tensor([[0, 59, 7, 7], [31, 58, 1, 2]])


class Words(nn.Module):
    """Rows by each call that picks some: of a table, along another axis, by indices on two axes."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.table = nn.Embedding(rows, WIDTH)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        weight = self.table.weight
        folded = weight.reshape(10, -1, WIDTH)
        return self.table(ids), weight.t().index_select(1, ids[0]), folded[ids % 10, ids % 5]


def planned(module: nn.Module, ids: Tensor = IDS, **options: Any) -> Plan:
    return sf.make_plan(sf.capture(module.eval(), (ids,)), secret="inputs+weights", **options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Words())


def test_the_lighter_upload_is_chosen() -> None:
    """Six keys of 16 + 17 n + 16 bytes, or two components of 8 bytes a row; the plan follows."""
    assert [rows for rows in range(1, 400) if numbers_are_lighter(rows) != (rows > 43)] == []
    for rows, target in ((43, "aten.matmul.default"), (44, "sfumato.look_up")):
        module = nn.Sequential(nn.Embedding(rows, 2))
        made = planned(module, torch.tensor([[0, 42]]))
        assert [n.target for n in made.secret_nodes] == [target]
        sent = sf.estimate(made, certificate=False).client_bytes - 3 * 4 * 8  # less what is revealed
        keys, words = 2 * 6 * dpf.key_bytes(rows, Z64), 2 * 2 * rows * 8 + 4 * 32
        assert sent == (keys if rows == 44 else words)


@pytest.mark.parametrize("backend", ["plain", "simulate"])
@pytest.mark.parametrize(("ring", "frac"), [("Z64", 18), ("Z32", 12)])
def test_rows_are_those_of_the_float_model(backend: str, ring: str, frac: int) -> None:
    module = Words()
    made = planned(module, ring=ring, frac=frac)
    found = sf.run(made, (IDS,), backend=backend)
    with torch.no_grad():
        expected = module(IDS)
    for got, want in zip(found.outputs, expected, strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 2.0 ** -(frac + 1)
    if backend == "simulate":
        told = sf.estimate(made)
        assert (told.bytes_sent, told.client_bytes, told.rounds) == (
            found.cost.bytes_sent,
            found.cost.client_bytes,
            found.cost.rounds,
        )


def test_a_table_says_how_rows_are_found(plan: Plan) -> None:
    (line,) = [line for line in plan.table().splitlines() if "look_up" in line]
    assert line.split()[:4] == ["3", "look_up", "point", "function"]
    assert Plan.from_json(json.loads(json.dumps(plan.for_parties()))).digest() == plan.digest()


def test_ids_beyond_the_table_stop_at_the_client(plan: Plan) -> None:
    with pytest.raises(JobError, match="outside the 60 rows"):
        client_side(plan, (IDS + 10,))
    with open_backend("simulate") as backend, pytest.raises(RangeError, match="outside the 60 rows"):
        backend.put_index("ids", torch.tensor([60]), Index(Z64, ROWS, (1,)))


def test_public_ids_pick_rows_by_themselves() -> None:
    made = planned(Words(), public=("ids",))
    assert not any(n.target == "sfumato.look_up" for n in made.secret_nodes)


# ---- what a client may send ---------------------------------------------------------------------------------------

TYPE = Index(Z64, ROWS, tuple(IDS.shape))
GOOD = PutIndex("ids", "Z64", ROWS, TYPE.shape, dpf.ALGORITHM)


def keys() -> list[list[Tensor]]:
    return split_index(IDS, TYPE)


def cut(change: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    return [[change(tensor) for tensor in own] for own in keys()]


@pytest.fixture
def session(plan: Plan) -> Any:
    with open_backend("simulate", options={"certificate": False}) as backend:
        backend.load("words", plan)
        yield backend


@pytest.mark.parametrize(
    ("command", "attached", "match"),
    [
        (GOOD, lambda: cut(lambda t: t[..., 1:]), "the keys of ids are torch.uint8"),
        (GOOD, lambda: cut(lambda t: torch.cat([t, t], -1)), "the keys of ids are torch.uint8"),
        (GOOD, lambda: cut(lambda t: t[:, 1:]), "the keys of ids are torch.uint8"),
        (GOOD, lambda: cut(lambda t: t[:1]), "the keys of ids are torch.uint8"),
        (GOOD, lambda: cut(lambda t: t.to(torch.int64)), "the keys of ids are torch.int64"),
        (GOOD, lambda: [[] for _ in range(3)], "come as one tensor, not 0"),
        (GOOD, lambda: [own * 2 for own in keys()], "come as one tensor, not 2"),
        (replace(GOOD, form="dpf-aes128-v0"), keys, "of another form than dpf-aes128-v1"),
        (replace(GOOD, ring="B64"), keys, "shared in Z64 or Z32"),
        (replace(GOOD, ring="Z32"), keys, "the keys of ids are torch.uint8"),
        (replace(GOOD, rows=2**47), keys, "more rows than a party takes"),
        (replace(GOOD, shape=(2**40, 2**40)), keys, "the keys of ids are torch.uint8"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    session: Backend, command: PutIndex, attached: Callable[[], list[list[Tensor]]], match: str
) -> None:
    with pytest.raises(JobError, match=match):
        session._command(command, attached())


def call(session: Backend, plan: Plan, **given: str) -> None:
    inputs = {name: given.get(name, "ids") for name in plan.client_inputs}
    session.call("words", "call", inputs, {}, [f"y{i}" for i in range(len(plan.secret_outputs))])


@pytest.mark.parametrize(
    "type", [Index(Z64, 61, TYPE.shape), Index(Z32, ROWS, TYPE.shape), Index(Z64, ROWS, (8,))], ids=str
)
def test_row_numbers_of_another_table_are_refused(session: Backend, plan: Plan, type: Index) -> None:
    session.put_index("ids", IDS, type)
    with pytest.raises(JobError, match=r"holds row numbers .* takes row numbers"):
        call(session, plan)


def test_words_are_no_row_numbers_and_row_numbers_no_words(session: Backend, plan: Plan) -> None:
    session.put("ids", IDS.to(torch.float64), 0)
    with pytest.raises(JobError, match="a look-up takes row numbers"):
        call(session, plan)
    session.put_index("ids", IDS, TYPE)
    weight = next(iter(plan.secret_weights))
    refused: list[Callable[[], Any]] = [
        lambda: session._command(Reveal("ids")),
        lambda: session._command(Affine("z", (Term("ids", 1),), 0, "mix")),
        lambda: session.call("words", "again", {weight: "ids"}, {}, ["y0", "y1", "y2"]),
    ]
    for attempt in refused:
        with pytest.raises(JobError, match="only a look-up takes"):
            attempt()


def test_keys_of_noise_give_some_words(session: Backend, plan: Plan) -> None:
    """A client that follows no rule spoils its own result, and nothing else happens."""
    for name in plan.client_inputs:
        index = plan.index_type(name)
        assert index is not None
        session.put_index(name, torch.zeros(index.shape, dtype=torch.int64), index)
    name = plan.client_inputs[0]
    index = plan.index_type(name)
    assert index is not None
    drawn = torch.Generator().manual_seed(3)
    size = (2, index.numel, dpf.key_bytes(index.rows, index.ring))
    noise = [[torch.randint(0, 256, size, dtype=torch.uint8, generator=drawn)] for _ in range(3)]
    session._command(PutIndex(name, str(index.ring), index.rows, index.shape, dpf.ALGORITHM), noise)
    call(session, plan, **{n: n for n in plan.client_inputs})
    assert session.reveal("y0").shape == (*IDS.shape, WIDTH)


@pytest.mark.parametrize("change", ["another call", "no numbers", "three arguments", "no size", "no rows"])
def test_plans_that_misuse_row_numbers_are_refused(plan: Plan, change: str) -> None:
    def changed(node: Node) -> Node:
        if node.name == "embedding" and change == "another call":
            return replace(node, target="aten.add.Tensor")
        if node.name == "embedding" and change == "no numbers":
            return replace(node, args=(node.args[1], node.args[1]))
        if node.name == "embedding" and change == "three arguments":
            return replace(node, args=(*node.args, Ref("ids")))
        if node.name == "embedding_rows" and change in ("no size", "no rows"):
            return replace(node, args=(node.args[0], "many" if change == "no size" else 0))
        return node

    hostile = replace(plan, program=replace(plan.program, nodes=tuple(map(changed, plan.program.nodes))))
    with pytest.raises(CaptureError, match="row numbers"):
        Plan.from_json(json.loads(json.dumps(hostile.to_json())))


def test_a_watch_on_row_numbers_is_refused(plan: Plan) -> None:
    name, watch = next(iter(plan.watches.items()))
    hostile = replace(plan, watches={name: watch._replace(name="embedding_rows")})
    with pytest.raises(SfumatoError, match="row numbers"):
        Plan.from_json(json.loads(json.dumps(hostile.to_json())))
