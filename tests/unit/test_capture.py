"""From modules to programs: structure of arguments and results, clean-up, and errors that name everything at
once."""

from __future__ import annotations

import json
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato.errors import CaptureError, JobError
from sfumato.graph.capture import capture
from sfumato.graph.evaluate import evaluate
from sfumato.graph.program import Program


def targets(program: Program) -> list[str]:
    return [node.target for node in program.nodes]


def replay(program: Program, *args: Any, **kwargs: Any) -> Any:
    values = {**program.weights, **program.bind(args, kwargs)}
    return program.assemble(evaluate(program.nodes, values, program.output_names))


class Mixed(nn.Module):
    """Nested arguments and results, a constant argument, a repeated and a constant result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, more: dict[str, Any], scale: Any = 2.0, flag: bool = True) -> Any:
        y = self.linear(x) * scale
        if flag:
            y = y + more["a"][0]
        return {"y": y, "pair": (y, [more["a"][1]]), "none": None}


def test_structure_of_arguments_and_results() -> None:
    module = Mixed().eval()
    x, a = torch.randn(2, 3), [torch.randn(3), torch.randn(1)]
    program = capture(module, (x, {"a": a}), {"scale": 3.0})
    assert [i.source for i in program.user_inputs] == ["x", "more_a_0", "more_a_1", "scale"]
    other = torch.randn(2, 3)
    got = replay(program, other, more={"a": a}, scale=-1.5)
    want = module(other, {"a": a}, scale=-1.5)
    assert list(got) == ["y", "pair", "none"]
    torch.testing.assert_close(got["y"], want["y"])
    assert isinstance(got["pair"], tuple)
    assert got["pair"][1][0].shape == (1,)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(2, 4), {"a": [torch.zeros(3), torch.zeros(1)]}), {}, r"x has shape \[2, 4\]"),
        ((torch.zeros(2, 3),), {}, "more is missing"),
        ((torch.zeros(2, 3), {"a": [torch.zeros(3)]}), {}, r"more.a must be a list or tuple of 2"),
        ((torch.zeros(2, 3), {"b": 1}), {}, "must have the keys a"),
        ((torch.zeros(2, 3), {"a": [torch.zeros(3), torch.zeros(1)]}), {"flag": False}, "constant True"),
        ((torch.zeros(2, 3), {"a": [torch.zeros(3), torch.zeros(1)]}), {"wrong": 1}, "wrong was not part"),
        (
            (torch.zeros(2, 3), {"a": [torch.zeros(3), torch.zeros(1)]}),
            {"x": torch.zeros(2, 3)},
            "given twice",
        ),
        ((torch.zeros(2, 3), {"a": [torch.zeros(3), "text"]}), {}, "must be a tensor"),
    ],
)
def test_a_call_that_does_not_fit_is_one_sentence(args: Any, kwargs: Any, message: str) -> None:
    program = capture(Mixed(), (torch.randn(2, 3), {"a": [torch.randn(3), torch.randn(1)]}), {"flag": True})
    with pytest.raises(JobError, match=message):
        program.bind(args, kwargs)


@dataclass
class Record:
    first: Tensor
    second: Tensor


Pair = namedtuple("Pair", "left right")


def test_named_tuples_come_back() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return Pair(x + 1, x * 2)

    program = capture(Module(), (torch.ones(2),))
    again = Program.from_json(json.loads(json.dumps(program.to_json())))
    got = replay(again, torch.ones(2))
    assert isinstance(got, Pair)
    assert got.left.tolist() == [2, 2]


def test_an_unknown_class_becomes_a_dict() -> None:
    program = capture(Mixed(), (torch.randn(2, 3), {"a": [torch.randn(3), torch.randn(1)]}))
    data = program.to_json()
    data["result"] = {"class": "os:system", "fields": [["y", {"leaf": "o0"}]]}
    assert list(replay_json(data, program)) == ["y"]


def replay_json(data: dict[str, Any], program: Program) -> Any:
    again = Program.from_json(data, program.weights)
    return replay(again, torch.randn(2, 3), {"a": [torch.randn(3), torch.randn(1)]})


def test_what_changes_nothing_is_gone() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.unused = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x.contiguous().clone().detach()).to(torch.float64).to(x.dtype) / 1.0 + 0
            _ = y.exp()
            a, b = (y.view(2, 2) * torch.ones_like(x).view(2, 2)).chunk(2, dim=1)
            return torch.cat([b, a], 1).unbind(0)[1]

    program = capture(Module(), (torch.randn(4),))
    assert targets(program) == [
        "aten.reshape.default", "aten.full.default", "aten.reshape.default", "aten.mul.Tensor",
        "aten.slice.Tensor", "aten.slice.Tensor", "aten.cat.default", "aten.select.int",
    ]  # fmt: skip
    assert not program.weights
    assert replay(program, torch.arange(4.0)).tolist() == [3, 2]


def test_in_place_writes_and_no_grad_blocks_are_inlined() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu_(x + 1)
            with torch.no_grad():
                y = y * 2
            y[:, 0].add_(1)
            return y

    program = capture(Module(), (torch.randn(2, 3),))
    assert all(not t.split(".")[1].endswith("_") for t in targets(program))
    assert replay(program, torch.tensor([[-5.0, 1, 0], [0, 0, 0]])).tolist() == [[1, 4, 2], [3, 2, 2]]


def test_half_precision_is_read_as_float() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).half()
    program = capture(module, (torch.randn(2, 4).half(),))
    assert all(node.dtype is torch.float32 for node in program.nodes)
    assert program.weights["0.weight"].dtype is torch.float16
    assert replay(program, torch.randn(2, 4)).dtype is torch.float32


def test_same_padding_becomes_numbers() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Conv1d(4, 2, 4, padding="same")).eval()

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.one = module

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x)[:, 0])

    wrapped, x = Module().eval(), torch.randn(1, 1, 4, 6)
    program = capture(wrapped, (x,))
    assert "aten.constant_pad_nd.default" in targets(program)
    assert not [t for t in targets(program) if t.endswith(".padding")]
    torch.testing.assert_close(replay(program, x), wrapped(x))


def test_json_round_trip_keeps_the_digest_and_no_weights() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).eval()
    program = capture(module, (torch.randn(1, 3, 8, 8),))
    text = json.dumps(program.to_json())
    assert len(text) < 5000
    again = Program.from_json(json.loads(text), program.weights)
    assert again == program
    assert again.digest() == program.digest()
    assert str(again) == str(program)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(replay(again, x), module(x))


def test_everything_impossible_is_listed_at_once() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x) + torch.rand(x.shape)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.noise = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.noise(x) * torch.bernoulli(x)

    with pytest.raises(CaptureError, match="random") as caught:
        capture(Outer(), (torch.rand(3),))
    assert len(caught.value.problems) == 3
    assert "at noise" in caught.value.problems[0]


def test_a_branch_on_values_is_one_sentence() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if bool((x > 0).all()) else x - 1

    with pytest.raises(CaptureError, match="data-dependent control flow") as caught:
        capture(Module(), (torch.rand(3),))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format 99"),
        (lambda d: d["nodes"][0].__setitem__(1, "os.system.default"), "unknown target"),
        (lambda d: d["nodes"][0].__setitem__(1, "aten.from_file.default"), "unknown target"),
        (lambda d: d["nodes"][0].__setitem__(1, "aten.relu_.default"), "unknown target"),
        (lambda d: d["nodes"][0].__setitem__(2, [{"ref": "ghost"}]), "ghost before it exists"),
        (lambda d: d["nodes"][0].__setitem__(5, [-1]), "no fixed shape"),
        (lambda d: d["nodes"].append(d["nodes"][0]), "defined twice"),
        (lambda d: d.pop("inputs"), "not the JSON"),
        (lambda d: d.update(nodes=[1]), "not the JSON"),
    ],
)
def test_broken_json_is_refused(change: Any, message: str) -> None:
    data = json.loads(json.dumps(capture(nn.Linear(2, 2), (torch.zeros(1, 2),)).to_json()))
    change(data)
    with pytest.raises(CaptureError, match=message):
        Program.from_json(data)
