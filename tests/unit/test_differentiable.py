"""Published methods with gradients: the formula's values and slopes, and networks that run as their plans do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfumato.catalogue import ENTRIES, Entry, get
from sfumato.catalogue.differentiable import Approximated, differentiable
from sfumato.diffusion.planned import PlannedNetwork
from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.planning import make_plan
from sfumato.graph.published import methods_of
from sfumato.study import tune
from sfumato.zoo.classes import load_class_model
from sfumato.zoo.train import loop, tuned
from sfumato.zoo.train.classes import Labelled, denoising
from sfumato.zoo.train.tuned import tune_class_model

REPLACED = ("silu", "mish", "gelu", "softmax", "layer_norm")


def functions(profile: str) -> Approximated:
    return Approximated({name: get(entry) for name, entry in methods_of(profile, {}).items()})


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES.values() if e.secure and e.function in REPLACED], ids=lambda e: e.name
)
def test_values_are_those_of_the_formula(entry: Entry) -> None:
    shape = (6, 32) if entry.of.rows else (192, 1)
    x = np.random.default_rng(0).uniform(entry.lo, entry.hi, shape)
    wanted = entry.exact(x)
    np.testing.assert_allclose(
        differentiable(entry)(torch.from_numpy(x)).numpy(), wanted, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "name", ["cipherdm.silu", "crypten.silu", "cipherdm.softmax-clamped", "sdu.layer-norm"]
)
def test_gradients_are_slopes(name: str) -> None:
    x = torch.linspace(-3.1, 2.4, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(differentiable(get(name)), (x,))


def test_a_straight_gradient_is_that_of_the_exact_softmax() -> None:
    """The scores are so far apart that CipherDM's exponentials nearly cancel: its own slope is useless there."""
    x = torch.cat([torch.zeros(1), torch.full((195,), -9.0)]).double().requires_grad_()
    towards = torch.linspace(-1.0, 1.0, 196, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(torch.softmax(x, -1), x, towards)
    y = differentiable(get("cipherdm.softmax"), straight=True)(x)
    np.testing.assert_allclose(
        y.detach().numpy(), get("cipherdm.softmax").exact(x.detach().numpy()), atol=1e-9
    )
    torch.testing.assert_close(torch.autograd.grad(y, x, towards)[0], wanted)


@pytest.mark.parametrize(("name", "profile"), [("mnist01", "usg-loose"), ("mnist10", "sdu"), ("dit", "sdu")])
def test_a_network_runs_as_its_plan_does(name: str, profile: str) -> None:
    model, draw = load_class_model(name), torch.Generator().manual_seed(1)

    def inputs(time: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(2, *model.kind.shape, generator=draw), torch.tensor(time), model.embeddings[[0, 1]]

    calls = [
        ((z,), {"timestep": t, "encoder_hidden_states": y})
        for z, t, y in map(inputs, (1.0, 250.0, 500.0, 750.0, 981.0))
    ]
    program = capture(model.network, *calls[2])
    plan = make_plan(program, calibration=calls, profile=profile, client_known=("encoder_hidden_states",))
    sample, time, label = inputs(500.0)
    with PlannedNetwork(plan) as planned, torch.no_grad():
        wanted, exact = planned(sample, time, label), model.network(sample, time, label).double()
        with functions(profile):
            found = model.network(sample, time, label).double()
    assert (found - wanted).norm() < 0.25 * (exact - wanted).norm()


def test_functions_of_the_time_alone_stay_exact_and_so_does_what_has_no_entry() -> None:
    x = torch.linspace(-8.0, 8.0, 12)
    with functions("iron"):  # of GELU and softmax alone, both by tables
        assert torch.equal(functional.silu(x.reshape(1, 3, 4)), functional.silu(x).reshape(1, 3, 4))
    with functions("cipherdm"):
        inside, outside = functional.silu(x.reshape(1, 3, 4)), functional.silu(x.reshape(3, 4))
    assert torch.equal(outside, functional.silu(x).reshape(3, 4))
    assert (inside - functional.silu(x).reshape(1, 3, 4)).abs().amax() > 1e-3


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """MNIST's files of a few digits, drawn by the network itself, and one garment."""
    from diffusers import DDIMScheduler

    model = load_class_model("mnist01")
    scheduler = DDIMScheduler(**model.kind.scheduler)
    scheduler.set_timesteps(10)
    labels = torch.arange(16) % 2
    sample = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for time in scheduler.timesteps:
            sample = scheduler.step(
                model.network(sample, time, model.embeddings[labels]), time, sample
            ).prev_sample
    images = ((sample / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    def write(file: Path, values: Tensor) -> None:
        sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
        file.write_bytes(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes())

    for name, count in (("mnist", 16), ("fashion_mnist", 1)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train-images-idx3-ubyte", images[:count, 0])
        write(tmp_path / name / "train-labels-idx1-ubyte", labels[:count].to(torch.uint8))
    return tmp_path


def loss(data: Path, out: Path, variant: str, within: AbstractContextManager[Any]) -> float:
    """Of the weights in ``out``, on noise that is the same each time."""
    known = load_class_model("mnist01", out if variant else None, variant)
    model = Labelled(known.kind)
    model.network.load_state_dict(known.network.state_dict())
    model.table.weight.data.copy_(known.embeddings[:, 0])
    step = denoising("mnist01", model.eval(), data, out, 16)
    torch.manual_seed(5)
    with torch.no_grad(), within:
        return sum(float(step(i)) for i in range(4)) / 4


def test_tuning_lowers_the_loss_under_the_functions(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(loop.time, "thread_time", lambda: float(next(ticks)))  # a step takes a second
    monkeypatch.setattr(tuned, "_BATCH", 16)
    arguments = [
        "--classes",
        "mnist01",
        "--profile",
        "cipherdm",
        "--data",
        str(digits),
        "--out",
        str(tmp_path),
    ]
    assert tune.main([*arguments, "--minutes", "0.4"]) == 0
    spent = load_class_model("mnist01", tmp_path, "tuned-cipherdm").tuning_cpu_s
    assert spent is not None
    assert spent > 0
    approximated = functions("cipherdm")
    before = loss(digits, tmp_path, "", approximated)
    assert loss(digits, tmp_path, "tuned-cipherdm", approximated) < 0.8 * before
    # It goes on from where it was, and counts on.
    assert tune.main([*arguments, "--minutes", "0.45"]) == 0
    again = load_class_model("mnist01", tmp_path, "tuned-cipherdm").tuning_cpu_s
    assert again is not None
    assert again > spent


def test_what_cannot_be_tuned_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(JobError, match=r"sfumato\.study\.tune --classes mnist01 --profile other"):
        load_class_model("mnist01", tmp_path, "tuned-other")
    with pytest.raises(JobError, match="--classes cifar10"):
        tune_class_model("cifar10", "tuned-sdu", functions("sdu"), tmp_path, tmp_path, 1.0)
    arguments = ["--classes", "mnist01", "--profile", "sdu", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert tune.main(arguments) == 2
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main([*arguments, "--minutes", "0"])
