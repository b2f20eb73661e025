"""The private step: what one record can do to it, what noise is in it, and what it refuses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, distributed, nn

from sfumato.dp.gradients import Gradients
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.randomness import SecretStream
from sfumato.dp.trainable import choose
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TOKENS, Denoiser, conditional_unet, text_encoder


def stream(number: int = 0) -> SecretStream:
    return SecretStream(number.to_bytes(32, "big"))


def private(module: nn.Module, rate: float = 1.0, **settings: object) -> PrivateOptimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    asked = {"noise_multiplier": 0.0, "clip": 1.0, "expected_batch": 1.0, "stream": stream()} | settings
    return PrivateOptimizer(torch.optim.SGD(trained, lr=rate), **asked)  # type: ignore[arg-type]


def given_gradients(*rows: Tensor) -> nn.ParameterList:
    """Parameters whose per-record gradients are `rows`, each (records, \\*shape)."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(r.shape[1:])) for r in rows])
    for p, r in zip(module, rows, strict=True):
        p.grad_sample = r.clone()
    return module


def released(module: nn.Module) -> Tensor:
    """What the step subtracted at rate 1, negated back: the private gradient."""
    return -torch.cat([p.detach().flatten() for p in module.parameters()])


@given(
    scales=st.lists(st.floats(0, 1e6), min_size=1, max_size=5),
    clip=st.floats(1e-6, 1e3),
    batch=st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_the_step_without_noise_is_algorithm_1(scales: list[float], clip: float, batch: int) -> None:
    torch.manual_seed(0)
    scale = torch.tensor(scales)
    rows = [
        scale.view(-1, 1, 1) * torch.randn(len(scales), 3, 2),
        scale.view(-1, 1) * torch.randn(len(scales), 4),
    ]
    module = given_gradients(*rows)
    optimizer = private(module, clip=clip, expected_batch=batch)
    optimizer.accumulate()
    optimizer.step()
    flat = torch.cat([r.flatten(1) for r in rows], 1).double()
    factors = 1 / torch.clamp(flat.norm(dim=1) / clip, min=1)
    expected = (factors[:, None] * flat).sum(0) / batch
    assert torch.allclose(released(module).double(), expected, rtol=1e-5, atol=1e-5 * clip / batch)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4, 1e18, 1e30, math.inf, math.nan])
def test_one_record_never_weighs_more_than_the_clip(scale: float, normalise: bool) -> None:
    torch.manual_seed(0)
    others = torch.randn(4, 50)
    outlier = torch.full((1, 50), scale)
    for clip in (1e-6, 1.0, 30.0):
        steps = []
        for rows in (others, torch.cat([others, outlier])):
            module = given_gradients(rows)
            optimizer = private(module, clip=clip, normalise=normalise)
            optimizer.accumulate()
            steps.append(module[0].summed_grad.double())
        assert steps[0].isfinite().all()
        # Rounding of the sum, of norm up to 5C, comes on top.
        assert (steps[1] - steps[0]).norm() <= clip * (1 + 1e-5) + 1e-6 * clip * 5


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("value", [0.3, 1 / 2000, 1e-3])
def test_a_record_of_four_million_entries_weighs_one_clip(value: float, normalise: bool) -> None:
    """Squares of that many equal entries, added up in float32, give a norm that is off by up to a thousandth."""
    clip = 0.25
    module = given_gradients(torch.full((1, 4_000_000), value))
    optimizer = private(module, clip=clip, normalise=normalise)
    optimizer.accumulate()
    found = float(module[0].summed_grad.double().norm())
    assert found <= clip * (1 + 1e-6)
    norm = value * 2000
    assert found == pytest.approx(clip * (norm / (norm + 0.01) if normalise else 1.0), rel=3e-6)


def test_a_record_that_is_not_finite_counts_as_nobody() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(3, 4), torch.randn(3, 2)]
    broken = [r.clone() for r in rows]
    broken[0][1, 2], broken[1][2, 0] = math.inf, math.nan
    left = given_gradients(*[r[:1] for r in rows])
    found = given_gradients(*broken)
    for module in (left, found):
        optimizer = private(module)
        optimizer.accumulate()
        optimizer.step()
    assert torch.equal(released(found), released(left))


def test_normalised_steps_do_not_depend_on_the_clip() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 40)
    steps = []
    for clip in (1e-6, 1.0, 100.0):
        module = given_gradients(rows)
        optimizer = private(module, clip=clip, normalise=True, noise_multiplier=2.0, expected_batch=3)
        optimizer.accumulate()
        optimizer.step()
        steps.append(released(module))
    assert torch.allclose(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    assert torch.allclose(steps[2], steps[1], rtol=1e-4, atol=1e-6)


def outliers(draws: int) -> tuple[Denoiser, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    torch.manual_seed(1)
    model = Denoiser(conditional_unet(), text_encoder())
    choose(model.unet, model.encoder, what="lora", rank=2)
    wanted = torch.randn(3, 8, 8)

    def losses(noisy: Tensor, times: Tensor, ids: Tensor) -> Tensor:
        return 1e4 * (model(noisy, times, ids) - wanted).square().mean((1, 2, 3))

    return model, losses


@pytest.mark.parametrize("draws", [1, 4])
def test_an_outlier_weighs_one_clip_through_a_whole_model(draws: int) -> None:
    """Adapters, embeddings, several draws, physical batches of different sizes: ‖Σ(D ∪ {x}) - Σ(D)‖ <= C."""
    model, losses = outliers(draws)
    gradients = Gradients(model, draws)
    records = 5
    noisy = torch.randn(records * draws, 3, 8, 8)
    noisy[-draws:] *= 1e3  # the last record is the outlier
    times = torch.randint(0, 1000, (records * draws,))
    ids = torch.randint(0, 11, (records, TOKENS))
    ids[-1] = 11  # a token of its own
    clip = 0.01
    sums = []
    for members, physical in ((records - 1, 2), (records, 3)):
        optimizer = private(model, clip=clip)
        for start in range(0, members, physical):
            stop = min(start + physical, members)
            rows = slice(start * draws, stop * draws)
            gradients.backward(losses(noisy[rows], times[rows], ids[start:stop]))
            optimizer.accumulate()
        sums.append(torch.cat([p.summed_grad.flatten() for p in optimizer.params]).double())
        optimizer.zero_grad()
    difference = float((sums[1] - sums[0]).norm())
    assert difference <= clip * (1 + 1e-5) + 1e-6 * clip * records
    assert difference > 0.99 * clip  # and it was an outlier


def test_draws_are_averaged_before_they_are_clipped() -> None:
    """Opposite draws of one record cancel; clipped one by one they would not."""
    layer = nn.Linear(3, 1, bias=False)
    gradients = Gradients(layer, draws=2)
    optimizer = private(layer)
    x = torch.tensor([[100.0, 0.0, 0.0], [-99.9, 0.0, 0.0]])
    gradients.backward(gradients(x).sum(1))
    optimizer.accumulate()
    assert torch.allclose(layer.weight.summed_grad, torch.tensor([[0.05, 0.0, 0.0]]), atol=1e-4)


@pytest.mark.parametrize("physical", [0, 1, 4])
def test_noise_is_as_stated_whatever_the_physical_batch(physical: int) -> None:
    """Zero gradients: each step is N(0, (σC/B)²), independent of the others and of how often records were added."""
    sigma, clip, batch, size, steps = 1.7, 0.3, 16.0, 4_000, 4
    module = nn.ParameterList([nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(2, size // 2))])
    optimizer = private(module, noise_multiplier=sigma, clip=clip, expected_batch=batch)
    noises, before = [], released(module)
    for _ in range(steps):
        for _ in range(physical):
            for p in module:
                p.grad_sample = torch.zeros(3, *p.shape)
            optimizer.accumulate()
        optimizer.step()
        noises.append((released(module) - before).double())
        before = released(module)
    for noise in noises:
        assert stats.kstest(noise.numpy(), "norm", args=(0, sigma * clip / batch)).pvalue > 1e-4
    # Between steps and between parameters: correlations of 2 * 4,000 and 4,000 pairs, within 5 standard errors.
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(steps)
    assert correlations.abs().max() < 5 / math.sqrt(2 * size)
    first, second = torch.stack(noises).split(size, 1)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 5 / math.sqrt(
        4 * size
    )


def test_mean_and_covariance_of_the_step() -> None:
    """Over many steps on the same records: mean Σclip/B, covariance (σC/B)² I."""
    torch.manual_seed(0)
    rows = torch.randn(5, 6) * torch.tensor([0.1, 1, 1, 3, 9]).view(-1, 1)
    sigma, clip, batch, trials = 0.8, 1.5, 4.0, 4_000
    module = given_gradients(rows)
    optimizer = private(module, noise_multiplier=sigma, clip=clip, expected_batch=batch)
    found = []
    for _ in range(trials):
        module[0].data.zero_()
        module[0].grad_sample = rows.clone()
        optimizer.accumulate()
        optimizer.step()
        found.append(released(module))
    steps = torch.stack(found).double()
    std = sigma * clip / batch
    expected = (rows / torch.clamp(rows.norm(dim=1, keepdim=True) / clip, min=1)).sum(0) / batch
    assert ((steps.mean(0) - expected).abs() < 5 * std / math.sqrt(trials)).all()
    covariance = torch.cov(steps.t()) / std**2
    assert ((covariance - torch.eye(6)).abs() < 5 * math.sqrt(2 / trials)).all()


def test_the_divisor_is_the_expected_batch_whoever_came() -> None:
    for records in (1, 2, 7):
        module = given_gradients(torch.full((records, 1), 0.25))
        optimizer = private(module, expected_batch=4)
        optimizer.accumulate()
        optimizer.step()
        assert float(released(module)) == pytest.approx(records * 0.25 / 4)


def test_physical_batches_add_up_to_the_logical_one() -> None:
    torch.manual_seed(0)
    rows = torch.randn(7, 5)
    steps = []
    for parts in ([7], [1, 6], [3, 0, 4]):
        module = given_gradients(rows)
        optimizer = private(module, noise_multiplier=1.0, expected_batch=7)
        for part in rows.split(parts):
            module[0].grad_sample = part.clone()
            optimizer.accumulate()
        optimizer.step()
        steps.append(released(module))
    assert torch.allclose(steps[1], steps[0], atol=1e-6)
    assert torch.allclose(steps[2], steps[0], atol=1e-6)


def test_a_step_forgets_the_last_batch() -> None:
    module = given_gradients(torch.full((1, 1), 0.5))
    optimizer = private(module)
    optimizer.accumulate()
    with pytest.raises(JobError, match=r"no per-record gradient.*backward"):
        optimizer.accumulate()  # the same records a second time
    optimizer.step()
    optimizer.step()  # an empty logical batch
    assert float(released(module)) == 0.5


def test_schedulers_and_state_reach_the_inner_optimizer() -> None:
    module = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    inner = torch.optim.AdamW(list(module), lr=0.1)
    optimizer = PrivateOptimizer(inner, noise_multiplier=1.0, clip=1.0, expected_batch=2, stream=stream())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.05
    assert optimizer.state_dict()["state"][0]["step"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and not negative"),
        ({"clip": 0.0}, "clip must be finite and positive"),
        ({"clip": math.nan}, "clip must be finite"),
        ({"expected_batch": 0}, "expected_batch must be finite and positive"),
        ({"gamma": 0.0}, "gamma must be finite and positive"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(JobError, match=message):
        private(nn.Linear(2, 1), **settings)


def test_misuse_is_refused() -> None:
    module = given_gradients(torch.ones(2, 1), torch.ones(3, 1))
    optimizer = private(module)
    with pytest.raises(JobError, match="different numbers of records"):
        optimizer.accumulate()
    with pytest.raises(JobError, match="no closure"):
        optimizer.step(lambda: 0.0)
    for call in (optimizer.signal_skip_step, optimizer.pre_step, optimizer.add_noise, optimizer.scale_grad):
        with pytest.raises(JobError, match="two calls"):
            call()
    with pytest.raises(JobError, match="no parameter that requires a gradient"):
        PrivateOptimizer(
            torch.optim.SGD([torch.zeros(1)], lr=1),
            noise_multiplier=1,
            clip=1,
            expected_batch=1,
            stream=stream(),
        )


def train_apart(rank: int, meeting: Path, results: object) -> None:
    """One of two processes: its records' gradients are rank + 1, and rank 1 has no noise of its own."""
    store = distributed.FileStore(str(meeting), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module = given_gradients(torch.full((2, 1_000), 1e-4 * (rank + 1)))
    optimizer = private(module, noise_multiplier=1.0, expected_batch=8, stream=stream(rank))
    optimizer.accumulate()
    optimizer.step()
    results.put((rank, released(module).tolist()))  # type: ignore[attr-defined]
    distributed.destroy_process_group()


def test_several_processes_make_one_step_with_noise_once(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=train_apart, args=(rank, tmp_path / "meeting", results)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert found[0] == found[1]
    noise = stream(0).normal((1_000,), 1.0)
    expected = (noise + 2 * 1e-4 + 2 * 2e-4) / 8
    assert torch.allclose(torch.tensor(found[0]), expected, atol=1e-6)
