"""Plans of one session share a secret weight once, and forget it with the last plan that has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.graph.capture import capture
from sfumato.graph.plan import Plan
from sfumato.graph.planning import make_plan
from sfumato.runtime.backend import Backend
from sfumato.runtime.remote import open_backend
from sfumato.runtime.weights import content_key


class Twice(nn.Module):
    """The same layer two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))  # type: ignore[no-any-return]


class Once(nn.Module):
    """The same layer alone, under the same name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def planned(module: nn.Module) -> Plan:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    return make_plan(capture(module.eval(), (x,)), secret="inputs+weights", calibration=[((x,), {})])


def result(backend: Backend, name: str, plan: Plan, path: str, x: Tensor) -> Tensor:
    (argument,) = plan.client_inputs
    backend.put(f"{path}/x", x)
    backend.call(name, path, {argument: f"{path}/x"}, {}, [f"{path}/y"])
    return backend.reveal(f"{path}/y")


@torch.no_grad()
def test_a_weight_is_shared_once_and_kept_as_long_as_a_plan_has_it() -> None:
    torch.manual_seed(0)
    first, other = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(2, 8)
    one, two = planned(Once(first)), planned(Twice(first))
    with open_backend("simulate") as backend:
        backend.load("one", one)
        once = backend.report().setup_bytes
        backend.load("two", two)
        assert backend.report().setup_bytes == once
        backend.load("one", planned(Once(other)))  # of other weights; "two" still has the first ones
        found = result(backend, "two", two, "a", x)
        assert float((found - Twice(first)(x)).abs().max()) < 1e-3
        assert float((result(backend, "one", planned(Once(other)), "b", x) - other(x)).abs().max()) < 1e-3
        before = backend.report().setup_bytes
        backend.load("two", planned(Twice(other)))
        backend.load("one", one)  # the first weights were forgotten with "two"
        assert backend.report().setup_bytes == before + once


@torch.no_grad()
def test_equal_weights_of_one_model_do_not_show() -> None:
    """Zeros and ones, of biases and gains say, are shared apart, like any others."""
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in pair:
        for weight in layer.parameters():
            weight.zero_()
    costs = []
    for module in (pair, other):
        with open_backend("simulate") as backend:
            backend.load("model", planned(module))
            costs.append(backend.report().setup_bytes)
    assert costs[0] == costs[1]


def test_stand_ins_that_take_no_memory_have_a_content() -> None:
    """Zeros of one element, spread: what an estimate of a shared model loads for its weights."""
    for shape in ((1,), (3, 1), (3, 4)):
        spread, plain = torch.zeros(()).expand(shape), torch.zeros(shape)
        assert content_key(spread) == content_key(plain)
