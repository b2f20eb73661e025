"""The texts of a call as embeddings, as diffusers makes them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.diffusion.parts import listening
from sfumato.errors import JobError

if TYPE_CHECKING:
    from sfumato.diffusion.request import Request

__all__ = ["embeddings"]

log = logging.getLogger(__name__)

_SHAPES = "prompt_embeds and negative_prompt_embeds must be of one shape (prompts, tokens, width)"


def embeddings(pipe: Any, request: Request, *, guided: bool, encode: bool) -> tuple[Tensor, Tensor | None]:
    """Embeddings of all texts (texts, tokens, width), the unconditional half first, or zeros and the token ids; the
    caller's own embeddings are never encoded.

    Raises:
        JobError: one sentence on the text or the embeddings that do not fit.
    """
    encoder, heard = (pipe, []) if encode or pipe.text_encoder is None else listening(pipe)
    if pipe.text_encoder is None and (
        request.prompt is not None or (guided and request.negative_prompt_embeds is None)
    ):
        raise JobError("this pipeline has no text encoder; give prompt_embeds and negative_prompt_embeds")
    try:
        with _untold(pipe, request, guided):
            embeds, negative = encoder.encode_prompt(
                request.prompt,
                torch.device("cpu"),
                request.num_images_per_prompt,
                guided,
                request.negative_prompt,
                prompt_embeds=request.prompt_embeds,
                negative_prompt_embeds=request.negative_prompt_embeds,
                clip_skip=request.clip_skip,
            )
    except IndexError:
        if request.clip_skip is None:
            raise JobError(
                "the tokenizer knows tokens that this text encoder has no embeddings for; load both from one model"
            ) from None
        raise JobError(f"clip_skip={request.clip_skip} is more than this text encoder has layers") from None
    except (ValueError, TypeError):
        raise JobError(_SHAPES) from None
    width = pipe.unet.config.cross_attention_dim
    for given in (embeds, negative) if guided else (embeds,):
        if isinstance(width, int) and given.shape[-1] != width:
            raise JobError(f"this U-Net takes embeddings of width {width}, not {given.shape[-1]}")
    if guided and embeds.shape != negative.shape:
        raise JobError(_SHAPES)
    embeds = (torch.cat([negative, embeds]) if guided else embeds).detach()
    if not heard:
        return embeds, None
    if set(request.callback_on_step_end_tensor_inputs) - {"latents"}:
        raise JobError(
            "with a secret text encoder the parties hold the embeddings; a callback can ask for 'latents' alone"
        )
    if len(heard) != (2 if guided else 1):
        raise JobError(
            "with a secret text encoder give prompt_embeds and negative_prompt_embeds both, or neither of them"
        )
    return embeds, torch.cat(heard[::-1])


@contextlib.contextmanager
def _untold(pipe: Any, request: Request, guided: bool) -> Iterator[None]:
    """diffusers quotes in its log what it cuts off a long prompt; say that something is cut, and not what."""
    longest, texts = pipe.tokenizer.model_max_length, []
    for given in (request.prompt, request.negative_prompt if guided else None):
        texts += [given] if isinstance(given, str) else given or []
    if texts and max(map(len, pipe.tokenizer(texts).input_ids)) > longest:
        log.warning(
            "a prompt has more than the %d tokens that the text encoder takes; the rest is cut off", longest
        )
    theirs = logging.getLogger(type(pipe).__module__)
    kept = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(kept)
