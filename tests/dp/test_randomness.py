"""The secret stream: its distributions, its independence, and what it refuses."""

from __future__ import annotations

import copy
import math
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.dp.randomness import SecretStream
from sfumato.errors import JobError, ProtocolError

KEY = bytes(range(32))
#: Fixed keys below make a test's outcome fixed too; the level only says how odd an outcome had to be.
LEVEL = 1e-4


def test_normal_is_gaussian() -> None:
    draws = SecretStream(KEY).normal((200_000,), 3.0)
    assert draws.dtype == torch.float32
    assert stats.kstest(draws.double().numpy(), "norm", args=(0, 3.0)).pvalue > LEVEL
    # The tails, where a sum of too few terms or a bad logarithm would show.
    beyond = int((draws.abs() > 3.0 * 3.5).sum())
    assert stats.binomtest(beyond, len(draws), 2 * stats.norm.sf(3.5)).pvalue > LEVEL


def test_both_halves_of_a_pair_are_independent() -> None:
    # A request of 2 n draws holds cosines first and sines of the same pairs after.
    first, second = SecretStream(KEY).normal((2, 50_000), 1.0).double().numpy()
    for f in (np.asarray, np.abs, np.square):
        assert stats.pearsonr(f(first), f(second)).pvalue > LEVEL


def test_normal_shapes_and_zero() -> None:
    stream = SecretStream(KEY)
    for shape in ((), (0, 3), (1,), (3, 5, 7), (70_001,)):  # the last is of more than one piece
        assert stream.normal(shape, 1.0).shape == shape
    assert not stream.normal((5,), 0.0).any()


def test_coins_have_their_probability() -> None:
    stream = SecretStream(KEY)
    for probability in (1 / 30, 0.5, 0.999):
        coins = stream.coins(300_000, probability)
        assert coins.dtype == torch.bool
        assert stats.binomtest(int(coins.sum()), len(coins), probability).pvalue > LEVEL
    assert stream.coins(100, 1.0).all()
    assert not stream.coins(100, 0.0).any()
    assert stream.coins(0, 0.5).shape == (0,)


def test_coins_of_steps_are_independent() -> None:
    first, second = SecretStream(KEY).coins(400_000, 0.1).reshape(2, -1).double()
    assert stats.binomtest(int((first * second).sum()), len(first), 0.01).pvalue > LEVEL


def test_uniforms() -> None:
    drawn = SecretStream(KEY).uniform((400, 500))
    assert (drawn.dtype, drawn.shape) == (torch.float32, (400, 500))
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    grid = drawn.double() * 2**24
    assert torch.equal(grid, grid.round())
    assert (grid % 2 == 1).any()  # no coarser one
    # Five standard errors: 1/sqrt(12 n).
    assert float(drawn.double().mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * drawn.numel()))
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-4


def test_the_largest_uniform_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of ones would round up to 1 in float32 if more than 24 bits were kept."""
    monkeypatch.setattr(SecretStream, "_words", lambda self, count: np.full(count, 2**64 - 1, np.uint64))
    assert SecretStream().uniform((2,)).tolist() == [1 - 2**-24] * 2


def test_children_are_independent_and_do_not_depend_on_what_was_drawn() -> None:
    stream, again = SecretStream(KEY), SecretStream(KEY)
    stream.normal((10,), 1.0)
    noise = stream.child("noise").normal((1000,), 1.0)
    assert torch.equal(noise, again.child("noise").normal((1000,), 1.0))
    for other in (stream.child("coins"), stream.child("noise2"), again, SecretStream()):
        assert abs(float(torch.corrcoef(torch.stack([noise, other.normal((1000,), 1.0)]))[0, 1])) < 0.15


def test_a_stream_never_repeats() -> None:
    stream = SecretStream(KEY)
    draws = torch.cat([stream.normal((50,), 1.0) for _ in range(20)])
    assert len(draws.unique()) == len(draws)
    # Nor do two streams of the operating system's keys.
    assert not torch.equal(SecretStream().normal((4,), 1.0), SecretStream().normal((4,), 1.0))


def test_torch_seeds_do_not_touch_it() -> None:
    torch.manual_seed(0)
    first = SecretStream().normal((4,), 1.0)
    torch.manual_seed(0)
    assert not torch.equal(first, SecretStream().normal((4,), 1.0))


def test_what_it_refuses() -> None:
    stream = SecretStream()
    stream.child("noise")
    with pytest.raises(ProtocolError, match="'noise' was given out twice"):
        stream.child("noise")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ProtocolError, match="cannot be copied or saved"):
            copied(stream)
    with pytest.raises(JobError, match="32 bytes, not 3"):
        SecretStream(b"abc")
    with pytest.raises(JobError, match="between 0 and 1"):
        stream.coins(3, 1.5)
    with pytest.raises(JobError, match="between 0 and 1"):
        stream.coins(3, float("nan"))
    with pytest.raises(JobError, match="none or more"):
        stream.coins(-1, 0.5)
    for std in (-1.0, float("inf"), float("nan")):
        with pytest.raises(JobError, match="standard deviation"):
            stream.normal((3,), std)


def test_another_process_cannot_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # A forked worker (a data loader's) would otherwise see the same noise as its parent.
    stream = SecretStream()
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(ProtocolError, match="another process"):
        stream.normal((3,), 1.0)
    with pytest.raises(ProtocolError, match="another process"):
        stream.child("noise")
