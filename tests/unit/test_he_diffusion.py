"""HE-Diffusion computes what it should, and hides nothing of it from its server."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sfumato
from sfumato.diffusion import insecure
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.insecure import HeRun, he_diffusion, plms, read_x0, selected, server_view
from sfumato.diffusion.loading import load_pipeline
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.sampling import sample
from sfumato.errors import JobError
from sfumato.quality import psnr
from sfumato.zoo import RECOMMENDED_GUIDANCE

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

PROMPT, STEPS, SEED = "a handwritten seven", 4, 0
#: The last prime of 26 bits that N = 8192 allows, by which CKKS divides where TenSEAL takes it for 2^26.
PRIME = 67043329


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("embedded")


@pytest.fixture(scope="module")
def run(pipe: Any) -> HeRun:
    return he_diffusion(pipe, PROMPT, STEPS, SEED)


def in_float(pipe: Any, text: Tensor) -> Tensor:
    """The latents of the same run by diffusers' own PLMS, without encryption."""
    denoiser = Denoiser(pipe.unet, guided=True).eval()
    first = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(SEED))
    schedule = probe_schedule(plms(pipe), STEPS)
    return sample(
        lambda z, t, both: denoiser(z, **call_kwargs(t, both, None)),
        schedule,
        first,
        text,
        RECOMMENDED_GUIDANCE,
    )


def test_the_encrypted_run_is_the_float_run(pipe: Any, run: HeRun) -> None:
    """But for 2^26 / PRIME - 1 of relative error per update, which adds up."""
    wanted = in_float(pipe, run.text)
    assert float((run.latents - wanted).square().mean().sqrt()) < 1e-2 * float(wanted.std())
    assert float(psnr(run.images, insecure._decoded(pipe, wanted))) > 55


def test_an_update_is_exact_but_for_the_scale(pipe: Any) -> None:
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exchange = insecure._Exchange(insecure._tenseal(), 0.0)
    exchange.send(latents)
    factor, addend = 0.9, torch.full_like(latents, 0.25)
    scale = 2**26 / PRIME
    found = exchange.updated(latents, factor, addend)
    assert exchange.shares == [1.0]
    assert float((found - (scale * factor * latents + addend)).abs().max()) < 1e-3
    assert float((found - (factor * latents + addend)).square().mean().sqrt()) < 2e-3


def test_the_server_reads_the_image(pipe: Any, run: HeRun) -> None:
    read = server_view(pipe, run)
    assert read.shape == (STEPS + 1, *run.images.shape[1:])
    quality = psnr(read, run.images.expand_as(read))
    assert float(quality[-1]) > 30
    assert float(quality[-1]) > float(quality[0]) + 10
    error = read_x0(run)[-1] - run.latents
    assert float(error.square().mean().sqrt()) < 0.1 * float(run.latents.std())


def test_it_reads_as_much_where_every_entry_is_encrypted(pipe: Any) -> None:
    run = he_diffusion(pipe, PROMPT, STEPS, SEED, threshold=0.0)
    assert run.encrypted == (1.0,) * STEPS
    assert float(psnr(server_view(pipe, run)[-1:], run.images)) > 30


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.2])
def test_what_is_left_in_the_clear_is_the_most_that_the_threshold_allows(threshold: float) -> None:
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    costs = latents.abs() * insecure._hill(latents)
    kept = selected(latents, threshold)
    left = float(costs[~kept].sum())
    assert left <= threshold * float(costs.sum()) < left + float(costs[kept].min())
    assert float(costs[kept].min()) >= float(costs[~kept].max() if threshold else 0.0)


def test_about_a_tenth_is_left_in_the_clear() -> None:
    """Of Gaussian entries and equal costs 1 % of sum |x| lies below |x| = 0.142, where 11.3 % of them are."""
    latents = torch.randn((1, 4, 64, 64), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert 0.85 < float(selected(latents).double().mean()) < 0.92


def test_hills_cost_by_hand() -> None:
    """Of x = i^2 j^2 the second difference is -(2)(2) everywhere inside, so the cost is 1/4 there."""
    line = torch.arange(40, dtype=torch.float64) ** 2
    cost = insecure._hill((line[:, None] * line[None, :])[None, None])
    assert cost.shape == (1, 1, 40, 40)
    assert torch.allclose(cost[..., 10:-10, 10:-10], torch.tensor(0.25, dtype=torch.float64), atol=1e-12)


def test_the_counts(run: HeRun) -> None:
    assert len(run.seen) == STEPS + 1
    assert len(run.ciphertext_bytes) == len(run.encrypted) == STEPS
    assert [s.timestep for s in run.seen] == [751, 501, 501, 251, 1]
    assert min(run.ciphertext_bytes) > 500_000
    assert 0 < run.ckks_seconds <= run.seconds


def test_one_step_is_a_step_of_ddim(pipe: Any) -> None:
    """Heun's average at the one timestep there is."""
    run = he_diffusion(pipe, PROMPT, 1, SEED)
    assert [s.timestep for s in run.seen] == [1, 1]
    start, end = run.seen[0], float(plms(pipe).final_alpha_cumprod)
    estimate = (run.seen[0].output + run.seen[1].output) / 2
    x0 = (start.latents - math.sqrt(1 - start.abar) * estimate) / math.sqrt(start.abar)
    wanted = math.sqrt(end) * x0 + math.sqrt(1 - end) * estimate
    assert float((run.latents - wanted).abs().max()) < 1e-2


def test_it_says_that_it_is_insecure(run: HeRun) -> None:
    assert "INSECURE" in run.label
    assert "INSECURE" in repr(run)
    for described in (insecure, HeRun, he_diffusion):
        assert "INSECURE" in (described.__doc__ or "")


def test_no_pipeline_and_no_sampler_leads_to_it() -> None:
    """A study may compare with it; nothing that draws for a user imports it."""
    package = Path(sfumato.__file__).parent
    for file in package.rglob("*.py"):
        if "study" in file.relative_to(package).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            assert not any("insecure" in f"{module}.{name}".split(".") for name in names), file


def test_without_tenseal_the_error_names_the_extra(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal", None)
    with pytest.raises(JobError, match=r'pip install "sfumato\[he\]"'):
        he_diffusion(pipe, PROMPT, STEPS, SEED)


def test_settings_that_are_refused(pipe: Any) -> None:
    with pytest.raises(JobError, match="threshold must lie in"):
        he_diffusion(pipe, PROMPT, STEPS, SEED, threshold=1.0)
    with pytest.raises(JobError, match="steps must lie in"):
        he_diffusion(pipe, PROMPT, 0, SEED)
