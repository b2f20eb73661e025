"""Per-record gradients of whole models equal autograd's on batches of one record; what cannot be right is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sfumato.dp.gradients import Gradients, problems, validate
from sfumato.dp.trainable import choose
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import (
    TOKENS,
    WIDTH,
    Denoiser,
    autoencoder,
    class_unet,
    compare,
    conditional_unet,
    sampled,
    text_encoder,
)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("what", ["attention", "all", "lora"])
def test_a_conditional_unet(what: str, layout: str, draws: int) -> None:
    torch.manual_seed(0)
    unet = conditional_unet()
    choose(unet, what=what, rank=2 if what == "lora" else None)
    if what == "lora":  # a fresh adapter's B is zero, and with it the gradient of A
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p.data, std=0.1)
    rows = 3 * draws
    noisy = torch.randn(rows, 3, 8, 8)
    if layout == "channels last":
        noisy = noisy.to(memory_format=torch.channels_last)
    inputs = [noisy, torch.randint(0, 1000, (rows,)), torch.randn(rows, TOKENS, WIDTH)]
    assert compare(unet, lambda *of: unet(*of).sample, inputs, draws) < 1


@pytest.mark.parametrize("what", ["attention", "all", "conditioning"])
def test_a_class_conditional_unet(what: str) -> None:
    torch.manual_seed(0)
    unet = class_unet()
    choice = choose(unet, what=what)
    assert any(name.startswith("unet.class_embedding") for name in choice.names)
    inputs = [torch.randn(6, 3, 8, 8), torch.randint(0, 1000, (6,)), torch.randint(0, 4, (6,))]
    assert compare(unet, lambda *of: unet(*of).sample, inputs, 2) < 1


def test_an_autoencoder() -> None:
    torch.manual_seed(0)
    # In float64: the true gradient of a bias of attention's keys is zero, and rounding grows with all others.
    model = autoencoder().double()
    assert compare(model, lambda x: model(x).sample, [torch.randn(3, 3, 8, 8).double()], 1) < 1


@pytest.mark.parametrize("draws", [1, 3])
def test_a_text_encoder_that_sees_each_record_once(draws: int) -> None:
    torch.manual_seed(0)
    model = Denoiser(conditional_unet(), text_encoder()).double()
    choose(model.unet, model.encoder, what="attention")
    rows = 3 * draws
    inputs = [
        torch.randn(rows, 3, 8, 8).double(),
        torch.randint(0, 1000, (rows,)),
        torch.randint(0, 12, (3, TOKENS)),
    ]
    assert compare(model, model, inputs, draws) < 1


def test_evaluation_mode_and_training_mode_are_the_same_without_dropout() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    assert compare(layer, layer, [torch.randn(3, 4)], 1) < 1


class Twice(nn.Module):
    """One layer run twice, hung in two places; one weight in two layers; one layer whose output is dropped once."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        self.one(x * 3)
        return self.tied(self.other(self.one(x).tanh()).tanh())


@pytest.mark.parametrize("draws", [1, 3])
def test_shared_parameters_count_each_use_that_matters(draws: int) -> None:
    torch.manual_seed(0)
    model = Twice()
    assert compare(model, model, [torch.randn(4 * draws, 2, 4)], draws) < 1


def test_an_empty_batch_has_no_records() -> None:
    layer = nn.Conv2d(3, 4, 3)
    gradients = Gradients(layer, draws=2)
    found = sampled(gradients, gradients(torch.randn(0, 3, 5, 5)).flatten(1).sum(1))
    assert {name: tuple(g.shape) for name, g in found.items()} == {
        "weight": (0, 4, 3, 3, 3),
        "bias": (0, 4),
    }


def test_nothing_is_recorded_without_gradients() -> None:
    gradients = Gradients(nn.Linear(3, 2))
    with torch.no_grad():
        output = gradients(torch.randn(2, 3))
    assert not output.requires_grad
    assert gradients.module.weight.requires_grad


def test_narrow_arithmetic_gives_gradients_of_the_parameters_type() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    x = torch.randn(4, 3, 8)
    gradients = Gradients(layer)
    exact = sampled(gradients, gradients(x).flatten(1).square().sum(1))
    with torch.autocast("cpu", torch.bfloat16):
        output = gradients(x)
    found = sampled(gradients, output.float().flatten(1).square().sum(1))
    for name, truth in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - truth).abs().max() < 0.05 * truth.abs().max()


def test_a_module_that_does_not_see_the_rows_is_named() -> None:
    gradients = Gradients(text_encoder())
    ids = torch.randint(0, 12, (3, TOKENS))
    with pytest.raises(JobError, match=r"position_embedding.*position_ids of shape \(rows, tokens\)"):
        gradients.backward(gradients(ids).last_hidden_state.flatten(1).sum(1))
    # The error leaves nothing behind.
    positions = torch.arange(TOKENS).expand(3, -1)
    output = gradients(ids, position_ids=positions).last_hidden_state
    assert len(sampled(gradients, output.flatten(1).sum(1))) > 0


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    gradients = Gradients(model)
    with pytest.raises(JobError, match=r"reached idle\.weight, idle\.bias"):
        gradients.backward(model["used"](torch.randn(2, 3)).sum(1))


def test_a_weight_used_behind_its_modules_back_is_found() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.table.weight.t()

    gradients = Gradients(Tied())
    ids = torch.randint(0, 5, (4, 2))
    with pytest.raises(JobError, match=r"table\.weight are not autograd's"):
        gradients.verify(lambda: gradients(ids).flatten(1).square().sum(1))


class Mixed(nn.Module):
    """A linear layer followed by something between the records."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.inner(x))


@pytest.mark.parametrize(
    ("mix", "x"),
    [
        (lambda y: y - y.mean(0), torch.arange(12.0).reshape(4, 3)),
        # Of equal records the others' parts cancel, and autograd's sum shows nothing.
        (lambda y: y + y.roll(1, 0) - y.roll(2, 0), torch.ones(4, 3)),
    ],
    ids=["centred", "cancelling"],
)
def test_records_that_mix_are_found(mix: Callable[[Tensor], Tensor], x: Tensor) -> None:
    gradients = Gradients(Mixed(mix))
    with pytest.raises(JobError, match="mixes records"):
        gradients.verify(lambda: gradients(x).square().sum(1))


@pytest.mark.parametrize(("what", "draws"), [("all", 1), ("attention", 2)])
def test_a_sound_model_is_verified(what: str, draws: int) -> None:
    torch.manual_seed(0)
    unet = conditional_unet()
    choose(unet, what=what)
    gradients = Gradients(unet, draws)
    rows = 3 * draws
    noisy = torch.randn(rows, 3, 8, 8).to(memory_format=torch.channels_last)
    times, text = torch.randint(0, 1000, (rows,)), torch.randn(rows, TOKENS, WIDTH)
    gradients.verify(lambda: gradients(noisy, times, text).sample.flatten(1).square().sum(1))
    # It leaves nothing behind, and the next batch is as ever.
    assert all(p.grad is None and p.grad_sample is None for p in unet.parameters())
    gradients.backward(gradients(noisy, times, text).sample.flatten(1).square().sum(1))
    assert all(p.grad is None for p in unet.parameters())


class Counter(nn.Module):
    """Remembers how much it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.inner = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.sum()
        return self.inner(x)


def test_a_buffer_that_keeps_private_data_is_refused() -> None:
    gradients = Gradients(Counter())
    with pytest.raises(JobError, match="buffer"):
        gradients.backward(gradients(torch.randn(2, 3)).sum(1))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y) * self.scale


def test_all_problems_are_reported_at_once() -> None:
    unet = conditional_unet()
    unet.enable_gradient_checkpointing()
    model = nn.ModuleDict(
        {
            "unet": unet,
            "norm": nn.BatchNorm2d(3),
            "running": nn.InstanceNorm1d(3, track_running_stats=True),
            "attention": nn.MultiheadAttention(4, 2),
            "memory": nn.GRU(3, 3),
            "pair": TwoInputs(),
            "scaled": nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
            "table": nn.Embedding(3, 2, max_norm=1.0),
            "drop": nn.Dropout(0.1),
        }
    )
    with pytest.raises(JobError) as caught:
        validate(model)
    message = str(caught.value)
    for part in (
        "norm (BatchNorm2d)",
        "running",
        "attention (Mul",
        "memory",
        "pair",
        "table",
        "checkpointing",
    ):
        assert part in message
    assert "drop" not in message
    assert "\n" not in message
    # Batch norm mixes records even where it is not trained; the rest may stay, frozen.
    model.requires_grad_(False)
    unet.disable_gradient_checkpointing()
    assert [line.split()[0] for line in problems(model)[:2]] == ["norm", "running"]
    assert len(problems(model)) == 3  # and nothing is trained


def test_frozen_parts_of_any_kind_are_allowed() -> None:
    model = nn.ModuleDict({"memory": nn.GRU(3, 3).requires_grad_(False), "out": nn.Linear(3, 2)})
    assert problems(model) == []


@pytest.mark.parametrize(
    ("draws", "losses", "message"),
    [
        (0, 4, "draws must be at least 1"),
        (3, 4, "4 rows are not a whole number of records of 3 draws"),
        (1, None, r"one loss per row, not a tensor of shape \(\)"),
    ],
)
def test_bad_batches_are_refused(draws: int, losses: int | None, message: str) -> None:
    with pytest.raises(JobError, match=message):
        Gradients(nn.Linear(3, 2), draws).backward(torch.zeros(() if losses is None else (losses,)))


def test_two_batches_do_not_run_together_unseen() -> None:
    gradients = Gradients(nn.Linear(3, 2))
    gradients.backward(gradients(torch.randn(2, 3)).sum(1))
    with pytest.raises(JobError, match="last batch"):
        gradients.backward(gradients(torch.randn(2, 3)).sum(1))


def test_a_model_is_wrapped_once_and_comes_back_plain() -> None:
    layer = nn.Linear(3, 2)
    gradients = Gradients(layer)
    with pytest.raises(JobError, match="already has per-record hooks"):
        Gradients(layer)
    assert gradients.to_standard_module() is layer
    layer(torch.randn(2, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert not hasattr(layer.weight, "grad_sample")


def test_a_failed_forward_pass_leaves_the_weights_trainable() -> None:
    gradients = Gradients(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        gradients(torch.randn(2, 5))
    assert all(p.requires_grad for p in gradients.parameters())
