"""The denoiser's ranges, measured in the clear on a few prompts of our own, once per model and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.picture import Picture, blank_like, drawn_like
from sfumato.diffusion.probe import probe_schedule
from sfumato.diffusion.request import Prepared
from sfumato.diffusion.sampling import guided
from sfumato.diffusion.schedule import KINDS
from sfumato.graph.kept import place, release

__all__ = [
    "PROMPTS",
    "Trajectories",
    "cache_file",
    "decoder_samples",
    "trajectories",
]

#: Various, and short enough for small text encoders; the first ones most, as slow models are measured on fewer. Many
#: of a kind: what a prompt asks for moves the ranges more than the noise does (docs/design/008).
PROMPTS = (
    "a handwritten seven",
    "a photo of a horse",
    "a small dress",
    "a harbour at sunset",
    "the number 0",
    "an old fisherman",
    "a sneaker",
    "",
    "the digit four",
    "a leather bag",
    "a bowl of fruit",
    "a photo of a shirt",
    "a red bus in the city",
    "number 1",
    "an ankle boot",
    "two people, talking",
    "a handwritten two",
    "a warm coat",
    "a pair of trousers",
    "the digit 5",
    "a forest in the fog",
    "a sandal",
    "a pullover",
    "a t-shirt",
)
_BUDGET_S = 60.0
#: Trajectories that tell how runs differ, and calls of all of them that are measured.
_RUNS = 24
_SAMPLES = 240
_SHORTEST = 4
_FORMAT = 7

Sample = tuple[tuple[Tensor], dict[str, Any]]


class Trajectories(NamedTuple):
    """``samples``: arguments of the denoiser, a list for each trajectory, which counts as one run; ``clips`` and
    ``blends``: those of a scheduler's clamp and of the blend with a picture; ``finals``: the latents at the end of
    each; ``partial``: arguments of the denoiser's outer blocks, with the features that they took up."""

    samples: list[list[Sample]]
    clips: list[list[Sample]]
    blends: list[list[Sample]]
    finals: list[Tensor]
    partial: list[list[Sample]]


def trajectories(
    pipe: Any,
    denoiser: Denoiser,
    prepared: Prepared,
    prompts: Sequence[str] = PROMPTS,
    *,
    progress: bool = True,
) -> Trajectories:
    """Arguments of the denoiser along plain trajectories: all timesteps, ``prompts`` in turn, noises of their own.

    Slow models get fewer prompts, then shorter trajectories. The prompt and the picture of a call are not used: ranges
    are public.
    """
    one_s = _seconds(denoiser, prepared)
    longest = max(_SHORTEST, int(_BUDGET_S / (3 * one_s)))
    if len(prepared.schedule.steps) > longest:
        last = round(prepared.request.unguided_steps * longest / len(prepared.schedule.steps))
        request = replace(prepared.request, unguided_steps=last)
        prepared = replace(prepared, request=request, schedule=request.probed(pipe.scheduler, longest))
    steps, batch = len(prepared.schedule.steps), prepared.batch
    # Each trajectory costs its calls, then about twice that again to measure what was recorded.
    wanted = max(-(-len(prompts) // batch), _RUNS)
    whole = None if prepared.picture is None else _from_noise(pipe, prepared)
    calls = 3 * steps + (0 if whole is None else len(whole.schedule.steps) / 2)
    runs = max(1, min(wanted, int(_BUDGET_S / (calls * one_s))))
    kept = max(2, min(steps, _SAMPLES // runs))
    recorded = {round(i * (steps - 1) / max(kept - 1, 1)) for i in range(kept)}
    found = Trajectories([], [], [], [], [])
    with tqdm(total=runs * steps, desc="calibrating", delay=2.0, disable=not progress, leave=False) as bar:
        for run in range(runs):
            text = _text(pipe, prepared, prompts, run)
            picture = None if whole is None else _picture(pipe, denoiser, whole, prompts, run)
            for kind in (found.samples, found.clips, found.blends, found.partial):
                kind.append([])
            for k, sample in enumerate(_trajectory(denoiser, prepared, picture, text, run, found)):
                if k in recorded:
                    found.samples[-1].append(sample)
                bar.update()
    return found


def decoder_samples(vae: Any, finals: list[Tensor]) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    """Arguments of the image decoder: so many of the last latents as there is time for."""
    weights = sum(p.numel() for p in vae.decoder.parameters())
    pixels = finals[0].shape[0] * finals[0].shape[-2] * finals[0].shape[-1]
    # Most of a decoder works at several times the latents' resolution.
    one_s = max(0.005, 12 * weights * pixels / 40e9)
    return [((latents,), {}) for latents in finals[: max(1, int(_BUDGET_S / (3 * one_s)))]]


def _seconds(denoiser: Denoiser, prepared: Prepared) -> float:
    """Rough time of one call by the model's size alone, so that the same model always gets the same ranges."""
    weights = sum(p.numel() for p in denoiser.parameters())
    pixels = prepared.latents.shape[0] * prepared.latents.shape[-2] * prepared.latents.shape[-1]
    products = weights * pixels / 8 * (2 if prepared.guided else 1)
    return max(0.02, products / 40e9)


def _from_noise(pipe: Any, prepared: Prepared) -> Prepared:
    """The same for a run of as many steps that starts at noise."""
    steps = max(_SHORTEST, len(prepared.schedule.steps))
    return replace(prepared, schedule=probe_schedule(pipe.scheduler, steps, eta=prepared.request.eta))


def _picture(pipe: Any, denoiser: Denoiser, whole: Prepared, prompts: Sequence[str], run: int) -> Picture:
    """The picture that a run starts from: every other one is the model's own, of another prompt."""
    assert whole.picture is not None
    vae, factor, own = pipe.vae, pipe.vae_scale_factor, None
    if run % 2 == 0:
        drawn = Trajectories([[]], [[]], [[]], [], [[]])
        text, blank = _text(pipe, whole, prompts, run + 3), blank_like(whole.picture, vae, factor)
        for _ in _trajectory(denoiser, whole, blank, text, run + 3, drawn):
            pass
        own = drawn.finals[0]
    return drawn_like(whole.picture, vae, run, factor, own)


def _trajectory(
    denoiser: Denoiser,
    prepared: Prepared,
    picture: Picture | None,
    text: Tensor,
    run: int,
    found: Trajectories,
) -> Iterator[Sample]:
    """The float trajectory of a group of prompts with the embeddings ``text``, with noise of its own, step by step, in
    the scale that the model sees; what happens between the steps, and its end, go to ``found``."""
    schedule, guidance, ways = prepared.schedule.in_input_scale(), prepared.guidance, prepared.ways
    source = torch.Generator().manual_seed(7_000 + run)
    first = torch.randn(prepared.latents.shape, generator=source) * schedule.init_sigma
    if picture is not None and not picture.pure:
        first = picture.noised(schedule, 0)
    held: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS}
    features: Tensor | None = None
    held["samples"][0] = held["returned"][0] = first
    for k, step in enumerate(schedule.steps):
        extra = None if picture is None else picture.extra
        kwargs = call_kwargs(schedule.timesteps[k], text, prepared.condition, extra)
        yield (held["samples"][k],), kwargs
        way = ways[k]
        if way.partial:
            kwargs = {**kwargs, "features": features}
            found.partial[-1].append(((held["samples"][k],), kwargs))
        with torch.no_grad():
            output = denoiser(held["samples"][k], **kwargs)
        if way.keeps:
            output, features = output
        if guidance is not None:
            output = guided(output, 1.0 if way.single and not way.known else guidance)
        held["outputs"][k] = output
        if step.clip is not None:
            value = step.clip.value.of(held, k)
            found.clips[-1].append(((value,), {}))
            held["clipped"][k] = value.clamp(step.clip.low, step.clip.high)
        following = step.result.of(held, k)
        if step.result.noise:
            following = following + step.result.noise * torch.randn(first.shape, generator=source)
        held["returned"][k + 1] = following
        if picture is not None and picture.mask is not None:
            found.blends[-1].append(((following, picture.mask), {}))  # type: ignore[arg-type]
            following = picture.mask * following + (1 - picture.mask) * picture.noised(schedule, k + 1)
        held["samples"][k + 1] = following
    found.finals.append(held["samples"][len(schedule.steps)])


def _text(pipe: Any, prepared: Prepared, prompts: Sequence[str], run: int) -> Tensor:
    """Embeddings of the ``run``-th group of prompts, as many tokens as those of the call."""
    group = [prompts[(run * prepared.batch + i) % len(prompts)] for i in range(prepared.batch)]
    embeds, negative = pipe.encode_prompt(
        group, torch.device("cpu"), 1, prepared.guided, clip_skip=_clip_skip(prepared)
    )
    text: Tensor = torch.cat([negative, embeds]) if prepared.guided else embeds
    # Embeddings of the caller's own may have another length than the tokenizer's.
    tokens = prepared.embeds.shape[1]
    return text.repeat(1, -(-tokens // text.shape[1]), 1)[:, :tokens].detach()


def _clip_skip(prepared: Prepared) -> int | None:
    """Layers that the call leaves out at the end of the text encoder; it does not reach the caller's embeddings."""
    return None if prepared.request.prompt is None else prepared.request.clip_skip


# ---- on disk -----------------------------------------------------------------------------------------------


def cache_file(
    weights: str,
    prepared: Prepared,
    profile: str,
    secret: str,
    part: str = "unet",
    prompts: Sequence[str] = PROMPTS,
) -> Path:
    """Where the ranges of one part of a model (by the digest of its weights) for these settings are kept."""
    own = _of_text(prepared) if part == "text" else _of_denoising(prepared)
    settings = {"format": _FORMAT, "release": release(), "weights": weights, **own}
    settings |= {"profile": profile, "secret": secret, "part": part, "prompts": list(prompts)}
    return place("calibration", settings, ".json")


def _of_text(prepared: Prepared) -> dict[str, Any]:
    request, ids = prepared.request, prepared.ids
    return {
        "ids": None if ids is None else list(ids.shape),
        "guided": prepared.guided,
        "clip_skip": request.clip_skip,
        "repeats": request.num_images_per_prompt,
    }


def _of_denoising(prepared: Prepared) -> dict[str, Any]:
    schedule, picture = prepared.schedule, prepared.picture
    return {
        "shape": list(prepared.latents.shape),
        "embeds": list(prepared.embeds.shape),
        "clip_skip": _clip_skip(prepared),
        "guidance": float(prepared.request.guidance_scale)
        if prepared.guided or prepared.condition is not None
        else None,
        "steps": [asdict(step) for step in schedule.steps],
        "picture": None
        if picture is None
        else [picture.pure, picture.mask is not None, picture.extra is not None, *schedule.noised],
        **_cuts(prepared.request),
    }


def _cuts(request: Any) -> dict[str, Any]:
    """Cost cuts by which the trajectories differ from those without."""
    given = {"unguided": request.unguided_steps, "reuse": request.reuse_features - 1}
    return {"cuts": given} if any(given.values()) else {}
