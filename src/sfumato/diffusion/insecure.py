"""INSECURE: HE-Diffusion, and the attack that reads every image from what its server sees. A reference, not a sampler.

HE-Diffusion encrypts the *update* of the sampler with CKKS and runs the U-Net in the clear, on the decrypted latents
and the plaintext prompt. Whoever runs that U-Net holds x_t and eps, and so x0. No pipeline and no sampler's name leads
here. After each product TenSEAL takes the prime 67043329 for the scale 2^26, an error of 1e-3 that adds up.

Source: [HEDiff], after a description of its authors' code (PLMS, N = 8192, chain 31 + 6 x 26 + 31 bits, scale 2^26).
Ours are what that leaves open: HILL's cost of each channel by itself, and mirrors that do not repeat the edge.
"""

from __future__ import annotations

import importlib
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.sampling import guided
from sfumato.errors import JobError
from sfumato.zoo import RECOMMENDED_GUIDANCE

__all__ = ["LABEL", "HeRun", "Seen", "he_diffusion", "plms", "read_x0", "selected", "server_view"]

#: Stands in every output.
LABEL = "INSECURE: the server's U-Net sees prompt, latents and noise prediction in the clear"

_DEGREE, _CHAIN, _SCALE_BITS = 8192, (31, *(26,) * 6, 31), 26
#: Linear multistep estimates of orders 2, 3 and 4, the latest prediction first.
_MULTISTEP = (
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
_SECOND_DIFFERENCE = ((-1.0, 2.0, -1.0), (2.0, -4.0, 2.0), (-1.0, 2.0, -1.0))


@dataclass(frozen=True, slots=True)
class Seen:
    """What the server sees in the clear at one call of the U-Net.

    ``latents`` and ``output`` (1, C, h, w) in float64: the U-Net's input x_t and the guided noise prediction.
    ``abar``: the public cumulative alpha of ``timestep``.
    """

    timestep: int
    abar: float
    latents: Tensor
    output: Tensor


@dataclass(frozen=True, slots=True)
class HeRun:
    """INSECURE. One image by HE-Diffusion.

    ``images`` (1, channels, H, W) in [0, 1] and ``latents`` (1, C, h, w) in float64: the client's result. ``text``
    (2, tokens, width): the embeddings of "" and of the prompt, which the server sees, too. ``seen``: by call of the
    U-Net, one more than steps. By step: ``encrypted``, the share of the entries that is in the ciphertext, and
    ``ciphertext_bytes``, serialized, to the server and back. ``seconds`` of all steps, of which ``ckks_seconds`` for
    selection, encryption, updates and decryption; keys and decoder are not counted.
    """

    images: Tensor
    latents: Tensor
    text: Tensor
    seen: tuple[Seen, ...]
    encrypted: tuple[float, ...]
    ciphertext_bytes: tuple[int, ...]
    seconds: float
    ckks_seconds: float
    label: str = LABEL

    def __repr__(self) -> str:
        share = sum(self.encrypted) / len(self.encrypted)
        return (
            f"HeRun({self.label}; {len(self.encrypted)} steps, {self.seconds:.2f} s, {sum(self.ciphertext_bytes):,} "
            f"ciphertext bytes, {share:.0%} of the entries encrypted)"
        )


def he_diffusion(
    pipe: Any,
    prompt: str,
    steps: int,
    seed: int,
    *,
    guidance: float = RECOMMENDED_GUIDANCE,
    threshold: float = 0.01,
) -> HeRun:
    """INSECURE: ``prompt`` drawn by HE-Diffusion with a diffusers StableDiffusionPipeline ``pipe``.

    At each step the client splits the latents into what is encrypted and what is not (`selected`), encrypts, and
    decrypts and merges what comes back; the server scales and adds under encryption, and runs the U-Net in the clear.

    Raises:
        JobError: TenSEAL is not installed, the network does not predict noise, or a setting is out of range.
    """
    if not 0.0 <= threshold < 1.0:
        raise JobError(f"threshold must lie in [0, 1), not {threshold!r}")
    if not 1 <= steps <= 1000:
        raise JobError(f"steps must lie in [1, 1000], not {steps!r}")
    exchange, scheduler = _Exchange(_tenseal(), threshold), plms(pipe)
    scheduler.set_timesteps(steps)
    times = list(dict.fromkeys(int(t) for t in scheduler.timesteps))  # PNDM lists its second call, too
    abars = [float(scheduler.alphas_cumprod[t]) for t in times] + [float(scheduler.final_alpha_cumprod)]
    denoiser, seen = Denoiser(pipe.unet, guided=True).eval(), list[Seen]()
    with torch.no_grad():
        towards, without = pipe.encode_prompt([prompt], torch.device("cpu"), 1, True)
    text, size = torch.cat([without, towards]), pipe.unet.config.sample_size

    def predicted(latents: Tensor, k: int) -> Tensor:
        """By the server, from the latents in the clear."""
        given = call_kwargs(torch.tensor(times[k]), text, None)
        with torch.no_grad():
            output = denoiser(latents.float(), **given).double()
        seen.append(Seen(times[k], abars[k], latents, guided(output, guidance)))
        return seen[-1].output

    shape = (1, pipe.unet.config.in_channels, size, size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    past, began = list[Tensor](), time.monotonic()
    for k, (abar, following) in enumerate(pairwise(abars)):
        factor = math.sqrt(following / abar)
        weight = math.sqrt(1.0 - following) - factor * math.sqrt(1.0 - abar)
        exchange.send(latents)
        past.insert(0, predicted(latents, k))
        if k == 0:
            probe = exchange.updated(latents, factor, weight * past[0])
            estimate = (past[0] + predicted(probe, min(1, steps - 1))) / 2
        else:
            order = _MULTISTEP[min(k, len(_MULTISTEP)) - 1]
            estimate = torch.stack([c * e for c, e in zip(order, past, strict=False)]).sum(0)
        latents = exchange.updated(latents, factor, weight * estimate)
    seconds = time.monotonic() - began
    return HeRun(
        images=_decoded(pipe, latents),
        latents=latents,
        text=text,
        seen=tuple(seen),
        encrypted=tuple(exchange.shares),
        ciphertext_bytes=tuple(exchange.sizes),
        seconds=seconds,
        ckks_seconds=exchange.seconds,
    )


def plms(pipe: Any) -> Any:
    """The pipeline's schedule as HE-Diffusion steps it: PLMS, which is PNDM without its Runge-Kutta steps.

    Its first step takes two calls of the network; then the orders go up to four.

    Raises:
        JobError: the network predicts something else than noise.
    """
    config = pipe.scheduler.config
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise JobError(
            f"HE-Diffusion is written for networks that predict noise, not {config['prediction_type']!r}; "
            "take a model with prediction_type 'epsilon'"
        )
    return diffusers.PNDMScheduler.from_config(config, skip_prk_steps=True)


# ---- which entries are encrypted ---------------------------------------------------------------------------


def selected(latents: Tensor, threshold: float = 0.01) -> Tensor:
    """True (1, C, h, w) where HE-Diffusion encrypts: all but the entries whose zeroing distorts least.

    Zeroing entry i costs |x_i| rho_i with HILL's rho, of each channel by itself; the cheapest are left in plaintext
    while their costs sum up to at most ``threshold`` of the total. At least one entry is encrypted.
    """
    costs = (latents.abs() * _hill(latents)).flatten()
    ordered, order = costs.sort()
    left = ordered.cumsum(0) <= threshold * costs.sum()
    left[-1] = False
    kept = torch.ones_like(costs, dtype=torch.bool)
    kept[order[left]] = False
    return kept.reshape(latents.shape)


def _hill(latents: Tensor) -> Tensor:
    """HILL's cost of a change: L15 * (1 / (L3 * |H * x|)), H the second difference, Ln the n x n mean."""
    kernel = latents.new_tensor(_SECOND_DIFFERENCE)[None, None]
    planes = latents.reshape(-1, 1, *latents.shape[-2:])
    residual = functional.conv2d(_mirrored(planes, 1), kernel).abs()
    smooth = functional.avg_pool2d(_mirrored(residual, 1), 3, 1)
    cost = 1.0 / smooth.clamp(min=1e-10)  # a flat place: infinite, but for this
    return functional.avg_pool2d(_mirrored(cost, 7), 15, 1).reshape(latents.shape)


def _mirrored(planes: Tensor, by: int) -> Tensor:
    """Padded by mirroring at the outermost entries, as often as it takes: torch's own reflects once."""
    return torch.from_numpy(np.pad(planes.numpy(), ((0, 0), (0, 0), (by, by), (by, by)), mode="reflect"))


# ---- CKKS --------------------------------------------------------------------------------------------------


class _Exchange:
    """Client and server over one key pair: the server's context lacks the secret key, and messages are bytes."""

    def __init__(self, seal: Any, threshold: float) -> None:
        self._seal, self._threshold = seal, threshold
        self._client = seal.context(seal.SCHEME_TYPE.CKKS, _DEGREE, coeff_mod_bit_sizes=list(_CHAIN))
        self._client.global_scale = 2.0**_SCALE_BITS
        self._server = self._client.copy()
        self._server.make_context_public()
        self.seconds, self.shares, self.sizes = 0.0, list[float](), list[int]()
        self._mask, self._sent = torch.ones(0, dtype=torch.bool), b""

    def send(self, latents: Tensor) -> None:
        """The client chooses, encrypts and sends: once a step."""
        began = time.monotonic()
        self._mask = selected(latents, self._threshold)
        self._sent = self._seal.ckks_vector(self._client, latents[self._mask].tolist()).serialize()
        self.shares.append(float(self._mask.double().mean()))
        self.sizes.append(len(self._sent))
        self.seconds += time.monotonic() - began

    def updated(self, latents: Tensor, factor: float, addend: Tensor) -> Tensor:
        """``factor`` times the latents that were sent, plus ``addend``: the encrypted entries by the server under
        encryption (depth 1), the others beside it; the client decrypts and merges."""
        began = time.monotonic()
        held = self._seal.ckks_vector_from(self._server, self._sent)
        back = (held * factor + addend[self._mask].tolist()).serialize()
        merged = factor * latents + addend
        values = self._seal.ckks_vector_from(self._client, back).decrypt()
        merged[self._mask] = torch.tensor(values, dtype=torch.float64)
        self.sizes[-1] += len(back)
        self.seconds += time.monotonic() - began
        return merged


def _tenseal() -> Any:
    try:
        return importlib.import_module("tenseal")
    except ImportError as error:
        raise JobError('HE-Diffusion needs TenSEAL; pip install "sfumato[he]"') from error


# ---- the attack --------------------------------------------------------------------------------------------


def read_x0(run: HeRun) -> tuple[Tensor, ...]:
    """What the server computes at each of its calls: x0 = (x_t - sigma_t eps) / sqrt(abar_t), in latents.

    No key, no ciphertext and no knowledge of the client goes in: what `Seen` holds, and the public schedule.
    """
    return tuple((s.latents - math.sqrt(1.0 - s.abar) * s.output) / math.sqrt(s.abar) for s in run.seen)


def server_view(pipe: Any, run: HeRun) -> Tensor:
    """The pictures (calls, C, H, W) in [0, 1] that the server reads (`read_x0`), by its own decoder."""
    return _decoded(pipe, torch.cat(read_x0(run)))


def _decoded(pipe: Any, latents: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return (made / 2 + 0.5).clamp(0.0, 1.0)
