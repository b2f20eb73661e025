"""The known faults of public DP training code, each built from stock Opacus beside the form here that lacks it.

Source: papers/dp-latent-diffusion, sections 4.3, 6 and 7. A test holds two things: the faulty form does fail in the
way described (else the test would prove nothing), and the form here does not.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sfumato.dp.gradients import Gradients
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.randomness import SecretStream
from sfumato.dp.trainable import choose
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TOKENS, WIDTH, conditional_unet, error, one_by_one

# Opacus warns of its own defaults: torch's generator for the noise, hooks on inputs without gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def value(layer: nn.Linear) -> float:
    return float(layer.weight.detach())


def ours(module: nn.Module, stream: SecretStream | None = None, **settings: float) -> PrivateOptimizer:
    asked = {"noise_multiplier": 0.0, "clip": 1.0, "expected_batch": 1.0} | settings
    inner = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    return PrivateOptimizer(inner, stream=stream or SecretStream(bytes(32)), **asked)


def stock(module: nn.Module, **settings: float) -> DPOptimizer:
    asked = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1} | settings
    inner = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    return DPOptimizer(inner, **asked)


def one_weight(value: float = 0.0) -> nn.Linear:
    """w x; with the loss sum(w x) a record's gradient is x."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def test_the_divisor_is_the_logical_batch_not_the_physical_one() -> None:
    """Section 6.1: `make_private` on the loader of physical batches divides by 4 what has 32 records."""
    logical, physical = 32, 4
    records = torch.full((logical, 1), 0.5)

    layer = one_weight()
    loader = DataLoader(TensorDataset(records), batch_size=physical)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=layer,
        optimizer=torch.optim.SGD(layer.parameters(), lr=1.0),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for start in range(0, logical, physical):
        optimizer.signal_skip_step(start + physical < logical)
        model(records[start : start + physical]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert -value(layer) == pytest.approx(0.5 * logical / physical)  # eight times too much

    layer = one_weight()
    gradients, mine = Gradients(layer), ours(layer, expected_batch=logical)
    for part in records.split(physical):
        gradients.backward(gradients(part).sum(1))
        mine.accumulate()
    mine.step()
    assert -value(layer) == pytest.approx(0.5)


def test_a_flag_left_in_the_queue_does_not_shift_batches() -> None:
    """Section 6.5: a loop that ends early leaves a skip flag, and the next logical batch makes no step."""
    layer = one_weight()
    model, optimizer = GradSampleModule(layer, loss_reduction="sum"), stock(layer)
    loader = DataLoader(TensorDataset(torch.ones(8, 1)), batch_sampler=[range(8)])
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as batches:
        for _ in batches:
            break
    model(torch.ones(2, 1)).sum().backward()
    optimizer.step()  # a whole logical batch of two; its step is taken for the first part of the last one
    assert value(layer) == 0

    layer = one_weight()
    gradients, mine = Gradients(layer), ours(layer)
    gradients.backward(gradients(torch.ones(2, 1)).sum(1))
    mine.accumulate()
    mine.step()
    assert -value(layer) == pytest.approx(2, rel=1e-5)
    assert mine._step_skip_queue == []
    with pytest.raises(JobError, match="nothing is skipped"):
        mine.signal_skip_step(True)


@pytest.mark.parametrize("layout", ["channels last", "permuted"])
def test_convolutions_read_inputs_of_any_memory_layout(layout: str) -> None:
    """Section 6.6: stock hooks give other numbers for the same input in another layout, and no error."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(5, 4, 6, 6)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    else:  # how a spatial transformer feeds its output projection: tokens turned back into an image
        x = torch.randn(5, 36, 4).reshape(5, 6, 6, 4).permute(0, 3, 1, 2)

    def losses(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows).flatten(1).square().sum(1)

    expected = one_by_one(layer, lambda i: losses(layer, x[i : i + 1]), 5)
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    losses(wrapped, x).sum().backward()
    faulty = {"weight": layer.weight.grad_sample, "bias": layer.bias.grad_sample}
    relative = (faulty["weight"] - expected["weight"]).norm() / expected["weight"].norm()
    assert relative > 0.5
    # Which is why verifying a model against autograd finds it.
    assert error(faulty, expected) > 1e4
    wrapped.to_standard_module()

    gradients = Gradients(layer)
    gradients.backward(losses(gradients, x))
    assert error({name: g for name, _, g in gradients.records()}, expected) < 1


@pytest.mark.parametrize("draws", [4, 12])
def test_several_rows_of_one_record_weigh_one_clip(draws: int) -> None:
    """Section 4.3: rows of one record, clipped one by one, weigh as many clips as there are rows."""
    rows = torch.full((draws, 1), 100.0)

    layer = one_weight()
    model, optimizer = GradSampleModule(layer, loss_reduction="sum"), stock(layer)
    model(rows).sum().backward()
    optimizer.step()
    assert abs(value(layer)) == pytest.approx(draws, rel=1e-4)

    layer = one_weight()
    gradients, mine = Gradients(layer, draws), ours(layer)
    gradients.backward(gradients(rows).sum(1))
    mine.accumulate()
    mine.step()
    assert abs(value(layer)) <= 1 + 1e-5


def test_noise_is_added_once_for_a_logical_batch() -> None:
    """Noise at every physical batch is a wrong scale: here sqrt(8) times what was asked."""
    parts, size = 8, 20_000

    def layer_of_zeros() -> nn.Linear:
        layer = nn.Linear(size, 1, bias=False)
        nn.init.zeros_(layer.weight)
        return layer

    layer = layer_of_zeros()
    model, optimizer = GradSampleModule(layer, loss_reduction="sum"), stock(layer, noise_multiplier=1.0)
    total = torch.zeros_like(layer.weight)
    for _ in range(parts):
        model(torch.zeros(2, size)).sum().backward()
        optimizer.pre_step()  # clips and adds noise: once for each part
        total += layer.weight.grad
        optimizer.zero_grad()
    assert float(total.std()) == pytest.approx(math.sqrt(parts), rel=0.05)

    layer = layer_of_zeros()
    gradients, mine = Gradients(layer), ours(layer, noise_multiplier=1.0)
    for _ in range(parts):
        gradients.backward(gradients(torch.zeros(2, size)).sum(1))
        mine.accumulate()
    mine.step()
    # The standard error of a standard deviation is 1/sqrt(2 * size) = 0.5 %.
    assert float(layer.weight.detach().std()) == pytest.approx(1.0, rel=0.025)
    for part in (mine.pre_step, mine.add_noise):
        with pytest.raises(JobError, match="two calls"):
            part()


def test_gradient_checkpointing_is_refused_before_training() -> None:
    """Section 7: stock hooks leave checkpointed parameters without per-record gradients, and say nothing then."""
    torch.manual_seed(0)
    unet = conditional_unet().train()
    choose(unet, what="all")
    unet.enable_gradient_checkpointing()
    inputs = torch.randn(2, 3, 8, 8), torch.randint(0, 1000, (2,)), torch.randn(2, TOKENS, WIDTH)
    wrapped = GradSampleModule(unet, loss_reduction="sum")
    wrapped(*inputs).sample.square().mean().backward()
    silent = [n for n, p in unet.named_parameters() if p.grad is not None and p.grad_sample is None]
    assert len(silent) > 20
    wrapped.to_standard_module()

    with pytest.raises(JobError, match=r"gradient checkpointing is on.*disable_gradient_checkpointing\(\)"):
        Gradients(unet)
    unet.disable_gradient_checkpointing()
    Gradients(unet).to_standard_module()


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


def adapted(module: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, module)


def test_adapters_put_in_place_after_the_wrapping_are_noticed() -> None:
    """Section 7: stock hooks do not see adapters that came later; a loop that trains what has a gradient goes on."""
    torch.manual_seed(0)
    model = Projection()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    adapted(model)
    wrapped(torch.randn(3, 4)).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert all(getattr(p, "grad_sample", None) is None for p in trained.values())
    assert all(
        p.grad is not None for p in trained.values()
    )  # an ordinary optimizer would step on these, unclipped

    model = Projection()
    gradients = Gradients(model)
    adapted(model)
    with pytest.raises(JobError, match=r"reached to_q\.lora_A.*wrap the model after its adapters"):
        gradients.backward(gradients(torch.randn(3, 4)).square().sum(1))

    model = adapted(Projection())
    gradients, mine = Gradients(model), ours(model)
    before = copy.deepcopy(model.state_dict())
    gradients.backward(gradients(torch.randn(3, 4)).square().sum(1))
    mine.accumulate()
    mine.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained)


def test_an_optimizer_made_before_the_adapters_is_noticed_after_one_step() -> None:
    """Section 7: the step acts on parameters that the model no longer uses."""
    torch.manual_seed(0)
    unet = conditional_unet()
    choice = choose(unet, what="attention")
    mine = ours(unet)
    choice = choose(unet, what="lora", rank=2)
    moved = choice.watch()
    gradients = Gradients(unet)
    inputs = torch.randn(2, 3, 8, 8), torch.randint(0, 1000, (2,)), torch.randn(2, TOKENS, WIDTH)
    gradients.backward(gradients(*inputs).sample.square().mean((1, 2, 3)))
    with pytest.raises(JobError, match="make the optimizer after the choice"):
        mine.accumulate()
    with pytest.raises(JobError, match="make the optimizer after the choice"):
        mine.step()
    with pytest.raises(JobError, match="adapters as they were"):
        moved()


def noise(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().clone()


def test_noise_cannot_be_drawn_again_from_a_seed() -> None:
    """Sections 5 and 7: stock noise follows torch's seed, its secure mode does not load; ours follows a secret key."""
    runs = []
    for _ in range(2):
        torch.manual_seed(23)  # the public code's default
        layer = one_weight()
        model, optimizer = GradSampleModule(layer, loss_reduction="sum"), stock(layer, noise_multiplier=1.0)
        model(torch.zeros(1, 1)).sum().backward()
        optimizer.step()
        runs.append(noise(layer))
    assert torch.equal(runs[0], runs[1])  # anyone can subtract it

    if importlib.util.find_spec("torchcsprng") is None:  # no release of it fits a current torch
        with pytest.raises(ImportError, match="torchcsprng"), warnings.catch_warnings():
            PrivacyEngine(secure_mode=True)

    runs = []
    for key in (None, None, bytes(32), bytes(32)):
        torch.manual_seed(23)
        layer = one_weight()
        ours(layer, SecretStream(key), noise_multiplier=1.0).step()
        runs.append(noise(layer))
    assert not torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])  # the key decides, and nothing but the key
    torch.manual_seed(24)
    layer = one_weight()
    ours(layer, SecretStream(bytes(32)), noise_multiplier=1.0).step()
    assert torch.equal(noise(layer), runs[2])


def test_a_tiny_clip_is_not_swamped_by_a_constant() -> None:
    """Section 7: stock clipping divides by ‖g‖ + 1e-6, which halves every record at the published C = 1e-6."""
    record = torch.tensor([[1e-6]])  # of norm C exactly: Algorithm 1 leaves it as it is

    layer = one_weight()
    model, optimizer = GradSampleModule(layer, loss_reduction="sum"), stock(layer, max_grad_norm=1e-6)
    model(record).sum().backward()
    optimizer.step()
    assert -value(layer) == pytest.approx(0.5e-6, rel=1e-3)

    layer = one_weight()
    gradients, mine = Gradients(layer), ours(layer, clip=1e-6)
    gradients.backward(gradients(record).sum(1))
    mine.accumulate()
    mine.step()
    assert -value(layer) == pytest.approx(1e-6, rel=1e-5)


def test_an_empty_logical_batch_still_makes_a_noisy_step() -> None:
    """Section 5: a step left out would show that nobody was drawn. A stock step needs a backward pass before it."""
    layer = one_weight()
    GradSampleModule(layer, loss_reduction="sum")
    with pytest.raises(ValueError, match="not initialized"):
        stock(layer, noise_multiplier=1.0).step()

    layer = one_weight()
    ours(layer, noise_multiplier=1.0).step()
    assert value(layer) != 0


def test_the_padding_row_of_an_embedding_gets_no_gradient() -> None:
    """Found here: stock hooks give the padding row a gradient that autograd does not, and it takes room in the norm."""
    torch.manual_seed(0)
    table = nn.Embedding(4, 3, padding_idx=0)
    ids = torch.tensor([[0, 1, 0], [2, 0, 0]])
    wrapped = GradSampleModule(table, loss_reduction="sum")
    (wrapped(ids) + 1).square().sum().backward()
    assert table.weight.grad_sample[:, 0].abs().max() > 0
    wrapped.to_standard_module()

    gradients = Gradients(table)
    gradients.backward((gradients(ids) + 1).square().sum((1, 2)))
    assert table.weight.grad_sample[:, 0].abs().max() == 0


def test_a_module_hung_in_two_places_counts_once() -> None:
    """Found here: stock hooks are put on such a module twice, and its gradient is twice what it should be."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 1, bias=False)
            self.others = nn.Sequential(self.first)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = Shared()
    x = torch.ones(1, 2)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped(x).sum().backward()
    faulty = model.first.weight.grad_sample
    wrapped.to_standard_module()
    assert torch.equal(faulty, 2 * x[None])

    gradients = Gradients(model)
    gradients.backward(gradients(x).sum(1))
    assert torch.equal(model.first.weight.grad_sample, x[None])
