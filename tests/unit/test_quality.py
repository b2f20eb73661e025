"""Measures of image sets, against what they are by definition."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.errors import JobError
from sfumato.quality import (
    Features,
    accuracy,
    f1_of_two,
    frechet,
    frechet_difference,
    precision_recall,
    psnr,
)


def normal(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_of_gaussians_with_known_distance() -> None:
    """Commuting covariances: |m|^2 + sum (sqrt a - sqrt b)^2."""
    a = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    b = torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)
    turn = torch.linalg.qr(normal(3, 3, 0)).Q
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    one = Features(torch.zeros(3, dtype=torch.float64), turn @ torch.diag(a) @ turn.T)
    two = Features(shift, turn @ torch.diag(b) @ turn.T)
    assert frechet(one, two) == pytest.approx(float((shift**2).sum()) + 1 + 0 + 4)
    assert frechet(one, two) == pytest.approx(frechet(two, one))
    assert frechet(one, one) < 1e-12


def test_frechet_of_covariances_that_do_not_commute() -> None:
    a, b = (torch.cov(normal(50, 4, seed).T) + torch.eye(4) for seed in (1, 2))
    zero = torch.zeros(4, dtype=torch.float64)
    values, vectors = torch.linalg.eig(a @ b)
    root = float((vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)).real.trace())
    wanted = float(a.trace() + b.trace()) - 2 * root
    assert frechet(Features(zero, a), Features(zero, b)) == pytest.approx(wanted)


def test_the_interval_of_a_difference_holds_the_truth() -> None:
    """Two sets of pairs that differ by a shift of known distance."""
    real = Features(torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    theirs = normal(2000, 5, 3) + 1.0
    ours = theirs + 0.1
    found = frechet_difference(ours, theirs, real, relative=False)
    assert found.low < 5 * (1.1**2 - 1.0) < found.high
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.2  # what both share cancels
    assert frechet_difference(theirs, theirs, real).high == 0.0
    with pytest.raises(JobError, match="no pairs"):
        frechet_difference(ours[:10], theirs, real)


def test_wilson_interval() -> None:
    said = torch.tensor([1] * 90 + [0] * 10)
    found = accuracy(said, torch.ones(100, dtype=torch.long))
    assert found.value == 0.9
    assert found.low == pytest.approx(0.8256, abs=1e-4)
    assert found.high == pytest.approx(0.9448, abs=1e-4)
    with pytest.raises(JobError, match="0 images"):
        accuracy(said[:0], said[:0])


def test_f1() -> None:
    wanted, said = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 7])
    assert f1_of_two(said, wanted, (0, 1)) == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert f1_of_two(torch.tensor([5, 5]), torch.tensor([0, 1]), (0, 1)) == 0.0


def test_precision_and_recall_of_sets_apart_and_alike() -> None:
    a, b = normal(300, 3, 5), normal(300, 3, 6)
    precision, recall = precision_recall(a, b)
    assert precision > 0.9
    assert recall > 0.9
    assert precision_recall(a + 100, b) == (0.0, 0.0)
    precision, recall = precision_recall(0.2 * a, b)  # a part of the real ones alone
    assert precision > 0.95
    assert recall < 0.5


def test_psnr() -> None:
    found = psnr(
        torch.full((2, 1, 4, 4), 0.5), torch.stack([torch.full((1, 4, 4), 0.6), torch.full((1, 4, 4), 0.5)])
    )
    assert found[0] == pytest.approx(-10 * math.log10(0.01), abs=1e-4)
    assert found[1] == 100.0


def test_features_need_two_images() -> None:
    with pytest.raises(JobError, match="at least two"):
        Features.of(torch.zeros(1, 4))
