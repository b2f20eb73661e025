"""The kernel baseline: its sensitivity, its noise, and that nothing private passes but the release."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfumato.dp import kernel
from sfumato.dp.accountant import Event
from sfumato.dp.kernel import KernelSettings, RandomFeatures, embedded_sums, release, train_kernel
from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError

SMALL = KernelSettings(frequencies=300, block=100, per_class=8, steps=2)


def digits(count: int, size: int = 8) -> tuple[Tensor, Tensor]:
    images = torch.randint(
        0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return images, torch.arange(count) % 3


@pytest.mark.parametrize("value", [0, 255, None])
def test_one_record_moves_the_sums_by_exactly_one(value: int | None) -> None:
    images, labels = digits(20)
    if value is not None:
        images[-1] = value
    features = RandomFeatures(1, 8, SMALL, seed=0)
    with_it = embedded_sums(features, images, labels, 3, SMALL.counted)
    without = embedded_sums(features, images[:-1], labels[:-1], 3, SMALL.counted)
    rows = (with_it - without).norm(dim=1)
    assert float(rows[labels[-1]]) == pytest.approx(1.0, abs=1e-6)
    assert int((rows > 1e-9).sum()) == 1


def test_features_are_of_a_gaussian_kernel() -> None:
    """Error: four standard deviations of the mean of F cosines."""
    settings = KernelSettings(frequencies=20_000, windows=((1.0, 1.0),), narrow=0.3, wide=0.3000001)
    features = RandomFeatures(3, 4, settings, seed=1)
    x, y = torch.rand(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    found = (features(x, slice(None)) * features(y, slice(None))).sum(1)
    squared = ((x - y) ** 2).flatten(1).mean(1)
    wanted = torch.exp(-squared / (2 * 0.3**2))
    assert float((found - wanted).abs().max()) < 4 / math.sqrt(20_000)
    # Blocks of frequencies estimate the same kernel: their mean is the whole.
    blocks = [slice(i, i + 5_000) for i in range(0, 20_000, 5_000)]
    parts = torch.stack([(features(x, b) * features(y, b)).sum(1) for b in blocks])
    torch.testing.assert_close(parts.mean(0), found, atol=1e-5, rtol=0)


def test_windows_see_a_part_of_the_image() -> None:
    features = RandomFeatures(1, 8, KernelSettings(frequencies=500, windows=((0.5, 1.0),)), seed=0)
    seen = (features.frequencies.view(500, 8, 8) != 0).double()
    assert int(seen.amax(2).sum(1).max()) <= 5
    assert float(seen.mean(0).min()) > 0.03  # every pixel, the corners least (about 1/16)


def test_the_release_is_noised_as_accounted() -> None:
    images, labels = digits(30)
    features = RandomFeatures(1, 8, SMALL, seed=0)
    exact = embedded_sums(features, images, labels, 3, SMALL.counted)
    args = features, images, labels, 3, SMALL.counted
    first, events = release(*args, 1.0, 1e-5, SecretStream())
    second, _ = release(*args, 1.0, 1e-5, SecretStream())
    assert len(events) == 1
    sigma = events[0].noise_multiplier
    assert (events[0].sample_rate, events[0].steps) == (1.0, 1)
    assert sigma == pytest.approx(3.73, abs=0.06)  # analytic Gaussian mechanism at (1, 1e-5), sensitivity 1
    noises = torch.stack([first - exact, second - exact]).flatten(1)
    spread = 4 * sigma / math.sqrt(2 * noises.shape[1])
    for noise in noises:
        assert float(noise.std()) == pytest.approx(sigma, abs=spread)
        assert float(noise.mean()) == pytest.approx(0.0, abs=4 * sigma / math.sqrt(noises.shape[1]))
    correlation = torch.corrcoef(noises)[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(noises.shape[1])
    assert release(*args, math.inf, 1e-5, SecretStream())[1] == ()


def test_nothing_private_is_used_but_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits(30)
    fixed = torch.rand(3, 601, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    event = Event(1.0, 3.7, 1)
    monkeypatch.setattr(kernel, "release", lambda *_: (fixed.clone(), (event,)))
    wanted = torch.tensor([0, 1, 2, 2])
    drawn = [
        train_kernel(x, y, epsilon=1.0, delta=1e-5, stream=SecretStream(), classes=3, settings=SMALL).sample(
            wanted, seed=4
        )
        for x, y in ((images, labels), (255 - images[:7], labels[:7].flip(0)))
    ]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (4, 1, 8, 8)
    assert drawn[0].dtype == torch.uint8


def test_the_generator_matches_the_classes() -> None:
    """Two classes, bright at the left or the right, many records: what is drawn is bright on the same side."""
    images = torch.zeros(2000, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(2000) % 2
    images[labels == 0, :, :, :4] = 230
    images[labels == 1, :, :, 4:] = 230
    settings = KernelSettings(frequencies=400, block=200, per_class=10, steps=150)
    state = torch.random.get_rng_state()
    made = train_kernel(
        images, labels, epsilon=1.0, delta=1e-5, stream=SecretStream(bytes(32)), classes=2, settings=settings
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made.steps == 150
    assert len(made.events) == 1
    found = made.sample(torch.tensor([0, 1]).repeat(50), seed=1).double().mean((0, 1, 2))
    drawn = made.sample(torch.tensor([0, 1]).repeat(50), seed=1).double()
    left, right = drawn[..., :4].mean((1, 2, 3)), drawn[..., 4:].mean((1, 2, 3))
    assert found.shape == (8,)
    assert bool((left[0::2] > right[0::2] + 100).all())
    assert bool((right[1::2] > left[1::2] + 100).all())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.rand(4, 1, 8, 8)}, "images are bytes"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one label an image"),
        ({"labels": torch.full((4,), 5)}, "outside 0 to 2"),
        ({"minutes": 0.0}, "minutes"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], words: str) -> None:
    images, labels = digits(4)
    given = {"images": images, "labels": labels, "minutes": 1.0} | change
    with pytest.raises(JobError, match=words):
        train_kernel(**given, epsilon=1.0, delta=1e-5, stream=SecretStream(), classes=3, settings=SMALL)  # type: ignore[arg-type]


def test_labels_of_samples_are_checked() -> None:
    images, labels = digits(9)
    made = train_kernel(
        images, labels, epsilon=math.inf, delta=1e-5, stream=SecretStream(), classes=3, settings=SMALL
    )
    with pytest.raises(JobError, match="0 to 2"):
        made.sample(torch.tensor([3]), seed=0)
    assert made.sample(torch.zeros(0, dtype=torch.int64), seed=0).shape == (0, 1, 8, 8)
