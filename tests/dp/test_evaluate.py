"""Classifiers, how they are trained and chosen, distances between sets of images, and the search for copies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.dp import evaluate
from sfumato.dp.classifiers import CNN, WRN, make_classifier
from sfumato.dp.evaluate import ClassifierRecipe, copies, distance, judge_features, train_classifier, utility
from sfumato.errors import JobError
from sfumato.zoo.train.data import read_idx

STILL = ClassifierRecipe(epochs=3, batch=16, shift=0.0, degrees=0.0)


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, brighter in the left half (class 0) or in the right one (class 1)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 1, 28, 28), generator=generator)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, :14] += 60
    images[labels == 1, :, :, 14:] += 60
    return images.to(torch.uint8), labels


@pytest.mark.parametrize("kind", ["cnn", "mlp", "wrn-10-1"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_classifiers_take_both_sizes(kind: str, channels: int, size: int) -> None:
    model = make_classifier(kind, channels, 7, size).eval()
    images = torch.rand(3, channels, size, size)
    assert model(images).shape == (3, 7)
    assert model.features(images).shape == (3, model.head.in_features)


def test_classifiers_are_the_papers() -> None:
    linear = [m for m in CNN(3, 10, 32).modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(2048, 128), (128, 10)]
    wide = WRN(40, 4, channels=3)
    # "8.9M" in the WRN paper; 40 = the first convolution, 36 in blocks, 3 shortcuts.
    assert sum(p.numel() for p in wide.parameters()) == pytest.approx(8.9e6, rel=0.01)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in wide.modules()) == 40


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [("resnet", 28, "use cnn"), ("cnn", 64, "resize"), ("wrn-15-1", 28, "6 n"), ("wrn-16-0", 28, "width")],
)
def test_no_such_classifier(kind: str, size: int, words: str) -> None:
    with pytest.raises(JobError, match=words):
        make_classifier(kind, 1, 10, size)


def test_moving_images() -> None:
    images = torch.rand(64, 2, 28, 28)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(evaluate.moved(images, STILL, generator), images, atol=1e-5, rtol=0)
    mirrored = evaluate.moved(images, replace(STILL, mirror=True), generator)
    same = (mirrored - images).abs().amax((1, 2, 3)) < 1e-4
    other = (mirrored - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert torch.equal(same, ~other)
    assert 16 < int(same.sum()) < 48
    # A dot moves by at most the shift each way, and no further when the image also turns about its centre.
    dot = torch.zeros(200, 1, 29, 29)
    dot[:, :, 14, 14] = 1.0
    seen = evaluate.moved(dot, replace(STILL, shift=2.0, degrees=90.0), generator).amax((0, 1))
    assert seen[11:18, 11:18].sum() == pytest.approx(float(seen.sum()))
    assert seen[12:17, 12:17].min() > 0


def test_a_classifier_learns_and_is_repeatable() -> None:
    images, labels = halves(400, 0)
    state = torch.random.get_rng_state()
    first = train_classifier("mlp", images, labels, seed=1, recipe=STILL)
    assert torch.equal(torch.random.get_rng_state(), state)
    test, wanted = halves(200, 1)
    assert float((evaluate.predict(first.model, test) == wanted).double().mean()) > 0.95
    again = train_classifier("mlp", images, labels, seed=1, recipe=STILL)
    assert torch.equal(first.model.head.weight, again.model.head.weight)
    other = train_classifier("mlp", images, labels, seed=2, recipe=STILL)
    assert not torch.equal(first.model.head.weight, other.model.head.weight)


def test_validation_images_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    trained: set[int] = set()
    judged: set[int] = set()

    def moved(shown: Tensor, recipe: ClassifierRecipe, generator: torch.Generator) -> Tensor:
        trained.update((shown[:, 0, 0, 0] * 255).round().int().tolist())
        return shown

    real = evaluate.predict

    def predict(model: evaluate.ImageClassifier, shown: Tensor) -> Tensor:
        judged.update(shown[:, 0, 0, 0].tolist())
        return real(model, shown)

    monkeypatch.setattr(evaluate, "moved", moved)
    monkeypatch.setattr(evaluate, "predict", predict)
    train_classifier("mlp", images, torch.arange(100) % 2, seed=0, recipe=STILL)
    assert len(judged) == 10
    assert trained == set(range(100)) - judged


@pytest.mark.parametrize("best", [1, 3])
def test_the_epoch_is_chosen_by_validation(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    images, _ = halves(60, 0)
    labels = torch.zeros(60, dtype=torch.int64)
    weights: list[Tensor] = []

    def predict(model: evaluate.ImageClassifier, shown: Tensor) -> Tensor:
        weights.append(model.head.weight.detach().clone())
        return torch.full((len(shown),), 0 if len(weights) == best else 1)

    monkeypatch.setattr(evaluate, "predict", predict)
    found = train_classifier("cnn", images, labels, seed=0, recipe=STILL, classes=2)
    assert (found.best_epoch, found.validation, len(weights)) == (best, 1.0, 3)
    assert torch.equal(found.model.head.weight, weights[best - 1])


def test_utility_of_good_and_of_meaningless_labels() -> None:
    images, labels = halves(300, 0)
    test = halves(200, 1)
    good, bad = (
        utility((images, y), test, kinds=["mlp"], seeds=[0, 1], recipe=STILL, classes=3)[0]
        for y in (labels, labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    )
    assert good.mean > 0.95 > 0.75 > bad.mean
    told = json.loads(json.dumps(good.to_json(), allow_nan=False))
    assert told["mean"] == pytest.approx(sum(told["accuracies"]) / 2)
    assert told["per_class"][2] is None  # no test image has class 2
    assert told["mean"] == pytest.approx(sum(told["per_class"][:2]) / 2)
    assert bad.spread == pytest.approx(abs(bad.accuracies[0] - bad.accuracies[1]) / 2**0.5)
    assert len(told["cpu_s"]) == 2
    assert good.trained_on == 300


def test_utility_refuses_what_does_not_fit() -> None:
    images, labels = halves(40, 0)
    with pytest.raises(JobError, match="one label an image"):
        utility((images, labels[:-1]), (images, labels))
    with pytest.raises(JobError, match="bring them to one"):
        utility((images, labels), (images[:, :, :20, :20], labels))
    with pytest.raises(JobError, match="too few"):
        utility((images[:10], labels[:10]), (images, labels))
    with pytest.raises(JobError, match="at least one kind"):
        utility((images, labels), (images, labels), kinds=[])
    with pytest.raises(JobError, match="share of validation"):
        ClassifierRecipe(validation=1.0)


def test_distances_order_and_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(300, 1, 2, 2, generator=generator)
    near = (real + 0.01).clone()
    far = 0.3 * real

    def features(images: Tensor) -> Tensor:
        return images.flatten(1)

    same = distance(real, real, features=features, name="pixels")
    close = distance(near, real, features=features, name="pixels", reconstructions=real + 0.005)
    away = distance(far, real, features=features, name="pixels")
    assert same.frechet == pytest.approx(0.0, abs=1e-9)
    assert (same.precision, same.recall, same.floor) == (1.0, 1.0, None)
    assert close.frechet == pytest.approx(4 * 0.01**2, rel=1e-3)  # equal covariances: the means alone
    assert close.floor == pytest.approx(4 * 0.005**2, rel=1e-3)
    assert away.frechet > close.frechet
    assert away.recall < 0.5
    assert json.loads(json.dumps(away.to_json()))["features"] == "pixels"
    with pytest.raises(JobError, match="two sets"):
        distance(real[:1], real, features=features, name="pixels")


def test_features_of_the_zoos_judge() -> None:
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    assert judge_features("grey")(images).shape == (5, 96)
    with pytest.raises(JobError, match="use grey"):
        judge_features("inception")


def test_copies_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    training, held, fresh = torch.randint(
        0, 256, (3, 1200, 1, 6, 6), generator=generator, dtype=torch.uint8
    ).unbind(0)
    stolen = fresh.clone()
    stolen[:300] = training[:300]
    honest, thief = copies(fresh, training, held), copies(stolen, training, held)
    assert (honest.identical, thief.identical) == (0, 300)
    assert honest.nearer < 0.03  # 1 % of real images, by the definition of the threshold
    assert 0.25 <= thief.nearer < 0.28
    brute = torch.cdist(fresh.flatten(1).double(), training.flatten(1).double()).amin(1) / 255 / 6
    assert honest.samples[2] == pytest.approx(float(brute.median()), abs=1e-3)
    assert honest.samples[2] == pytest.approx(honest.held_out[2], rel=0.05)
    with pytest.raises(JobError, match="one shape"):
        copies(fresh, training, held[:0])


def test_trained_on_real_digits(data_dir: Path) -> None:
    """What accuracies are read against: 2,000 real digits and a short training already make an MLP that is right on
    eight of ten (0.83 and 0.85 with two seeds)."""

    def of(kind: str) -> tuple[Tensor, Tensor]:
        files = (
            next((data_dir / "images" / "mnist").glob(f"{kind}*-{part}-*")) for part in ("images", "labels")
        )
        x, y = (torch.tensor(read_idx(file)[:2000]) for file in files)
        return x[:, None], y

    found = utility(
        of("train"), of("t10k"), kinds=["mlp"], seeds=[0], recipe=ClassifierRecipe(epochs=3, batch=64)
    )
    assert found[0].mean > 0.75
