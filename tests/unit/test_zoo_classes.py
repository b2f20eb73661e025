"""Models that draw by class: their size, their way through the compiler, their training, and what they draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from sfumato.diffusion.planned import PlannedNetwork
from sfumato.errors import JobError
from sfumato.graph.capture import capture
from sfumato.graph.planning import make_plan
from sfumato.zoo.classes import KINDS, ClassModel, load_class_model, save_class_model
from sfumato.zoo.dit import DiT
from sfumato.zoo.judge import ColourJudge, load_named_judge, save_judge
from sfumato.zoo.references import load_reference, reference_of, save_references
from sfumato.zoo.train.classes import cifar10, train_class_model, train_colour_judge
from sfumato.zoo.train.data import DataError
from sfumato.zoo.unet import ClassUNet

#: Small ones of each architecture: as made, and the shape of a sample.
SMALL: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {
    "silu": (ClassUNet, (1, 12, 12)),
    "mish": (lambda: ClassUNet(activation="mish"), (1, 12, 12)),
    "three levels": (lambda: ClassUNet(3, 8, (1, 2, 2), 1, (2,), 4, (16, 16)), (3, 16, 16)),
    "transformer": (lambda: DiT(width=24, layers=2, heads=2), (4, 8, 8)),
}


def awake(name: str) -> Any:
    """A network of `SMALL` whose layers that begin at zero do something."""
    torch.manual_seed(0)
    network = SMALL[name][0]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def inputs(network: Any, shape: tuple[int, int, int], time: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, *shape), torch.tensor(time), 0.3 * torch.randn(2, 1, network.label_width)


def test_network_of_cipherdm_has_as_many_parameters_as_published() -> None:
    for name in ("mnist01", "mnist01-mish"):
        network = KINDS[name].network()
        assert sum(p.numel() for p in network.parameters()) + 2 * network.label_width == 15_881


@pytest.mark.parametrize("name", SMALL)
def test_times_of_one_and_of_each_sample_agree_and_a_class_matters(name: str) -> None:
    network, shape = awake(name), SMALL[name][1]
    sample, time, label = inputs(network, shape, 321.0)
    with torch.no_grad():
        got = network(sample, time, label)
        torch.testing.assert_close(network(sample, time.expand(2), label), got)
        assert got.shape == sample.shape
        assert (network(sample, time, 0 * label) - got).abs().amax() > 1e-3
        assert (network(sample, torch.tensor(7.0), label) - got).abs().amax() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_planned_network_predicts_what_the_float_one_does(name: str) -> None:
    network, shape = awake(name), SMALL[name][1]
    examples = [inputs(network, shape, time) for time in (1.0, 250.0, 500.0, 750.0, 981.0)]
    calls = [((z,), {"timestep": t, "encoder_hidden_states": y}) for z, t, y in examples]
    program = capture(network, *calls[2])
    plan = make_plan(program, calibration=calls, client_known=("encoder_hidden_states",))
    sample, time, label = examples[2]
    with PlannedNetwork(plan) as planned, torch.no_grad():
        got, wanted = planned(sample, time, label), network(sample, time, label).double()
    assert (got - wanted).norm() < 1e-2 * wanted.norm()


def test_written_weights_are_read_again_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = KINDS["mnist01"]
    network = kind.network().eval()
    model = ClassModel("mnist01", kind, network, torch.randn(2, 1, network.label_width))
    save_class_model(model, tmp_path)
    again = load_class_model("mnist01", tmp_path)
    assert torch.equal(again.embeddings, model.embeddings.half().float())
    assert not again.null.any()
    assert again.null.shape == (1, 1, network.label_width)
    for key, value in network.state_dict().items():
        assert torch.equal(again.network.state_dict()[key], value.half().float())
    (tmp_path / "mnist01.safetensors").rename(tmp_path / "dit.safetensors")
    with pytest.raises(JobError, match="does not hold the weights of dit"):
        load_class_model("dit", tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no model 'mnist02'; use one of mnist01, "):
        load_class_model("mnist02")
    with pytest.raises(JobError, match="--classes cifar10"):
        load_class_model("cifar10", tmp_path)
    with pytest.raises(JobError, match="--classes cifar10"):
        load_named_judge("cifar10", tmp_path)
    with pytest.raises(JobError, match="no features of real images for cifar10"):
        load_reference("cifar10", tmp_path)
    with pytest.raises(DataError, match="no CIFAR-10 files"):
        cifar10(tmp_path, train=True)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Random images in the layout of CIFAR-10's files."""
    (tmp_path / "cifar10").mkdir()
    random = np.random.default_rng(0)
    for name in ("train_a", "train_b", "test"):
        images = random.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(70, dtype=np.uint8) % 10
        np.savez(tmp_path / "cifar10" / f"cifar10_{name}.npz", images=images, labels=labels)
    return tmp_path


def test_one_step_of_training_gives_weights_that_load(colours: Path) -> None:
    images, labels = cifar10(colours, train=True)
    assert images.shape == (140, 3, 32, 32)
    assert labels[72] == 2
    train_class_model("cifar10", colours, colours, minutes=1e-6)
    model = load_class_model("cifar10", colours)
    fresh = KINDS["cifar10"].network().state_dict()
    assert model.network.leave.bias.abs().sum() > 0
    assert model.network.state_dict().keys() == fresh.keys()
    train_colour_judge(colours, colours, minutes=1e-6)
    judge = load_named_judge("cifar10", colours)
    assert judge.classify(images).shape == (140,)
    assert judge.extract(images).shape == (140, 96)


def test_judge_of_colours_takes_bytes_and_floats_and_no_grey_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_judge(ColourJudge(), tmp_path / "judge-cifar10.safetensors")
    judge = load_named_judge("cifar10", tmp_path)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(judge.extract(images), judge.extract(images / 255))
    with pytest.raises(ValueError, match="colour images of 32x32"):
        judge.classify(images[:, :1])


def test_references_are_read_as_written(tmp_path: Path) -> None:
    features = torch.randn(2100, 5, generator=torch.Generator().manual_seed(0))
    save_references({"some": reference_of(features)}, tmp_path)
    held = load_reference("some", tmp_path)
    torch.testing.assert_close(held.mean, features.double().mean(0))
    torch.testing.assert_close(held.covariance, torch.cov(features.double().T))
    assert len(held.features) == 2000
    assert torch.cdist(held.features.float(), features).amin(1).max() < 0.01


@pytest.mark.parametrize("name", sorted({kind.reference for kind in KINDS.values()} - {"cifar10"}))
def test_references_that_come_with_sfumato_are_of_the_right_widths(name: str) -> None:
    held = load_reference(name)
    assert (held.mean.shape, held.covariance.shape, held.features.shape) == ((96,), (96, 96), (2000, 96))
    assert torch.linalg.eigvalsh(held.covariance.double()).min() > -1e-6
    # Of 2,000 of the same images: the standard error of a mean is a 45th of a deviation.
    away = (held.features.double().mean(0) - held.mean).abs()
    assert (away <= 5 * held.covariance.diagonal().sqrt() / 2000**0.5 + 1e-3).all()


def drawn(model: ClassModel, steps: int, each: int) -> tuple[Tensor, Tensor]:
    """Images in [0, 1], ``each`` of every class, and their class numbers; no guidance, fixed seed."""
    scheduler = DDIMScheduler(**model.kind.scheduler)
    scheduler.set_timesteps(steps)
    classes = torch.arange(len(model.kind.labels)).repeat_interleave(each)
    sample = torch.randn(len(classes), *model.kind.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for time in scheduler.timesteps:
            noise = model.network(sample, time, model.embeddings[classes])
            sample = scheduler.step(noise, time, sample).prev_sample
    return (sample / 2 + 0.5).clamp(0, 1), torch.tensor(model.kind.labels)[classes]


#: The others are trained by command (docs/corrections.md).
SHIPPED = ["mnist01", "mnist01-mish", "mnist10", "dit"]


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_that_come_with_sfumato_load(name: str) -> None:
    model = load_class_model(name)
    assert model.embeddings.shape == (len(model.kind.labels), 1, model.network.label_width)
    assert not model.network.training
    assert all(p.isfinite().all() for p in model.network.parameters())


@pytest.mark.parametrize("name", ["mnist01", "mnist01-mish"])
def test_digits_zero_and_one_are_recognised(name: str) -> None:
    images, wanted = drawn(load_class_model(name), steps=20, each=20)
    right = load_named_judge("grey").classify(images, among=(0, 1)) == wanted
    assert right.sum() >= 36
