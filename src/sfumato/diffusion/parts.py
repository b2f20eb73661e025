"""Text encoder and image decoder as they are captured when their weights are secret, and what they need around
them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import JobError
from sfumato.graph.plan import Plan, client_side
from sfumato.runtime.backend import Backend

__all__ = ["ImageDecoder", "TextEncoder", "decoded", "encoded", "listening", "text_samples"]

_VARIED = 8
_SEED = 11


class TextEncoder(nn.Module):
    """Token ids of all texts (unconditional half first if ``guided``) to what diffusers' ``encode_prompt`` gives
    for them, each ``repeats`` times.

    As in diffusers, ``clip_skip`` applies to the prompts alone.
    """

    def __init__(self, encoder: nn.Module, *, guided: bool, clip_skip: int | None, repeats: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.guided, self.clip_skip, self.repeats = guided, clip_skip, repeats

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (texts * repeats, tokens, width)."""
        if self.clip_skip is None:
            hidden: Tensor = self.encoder(ids)[0]
        else:
            outputs = self.encoder(ids, output_hidden_states=True)
            model: Any = getattr(self.encoder, "text_model", self.encoder)
            hidden = model.final_layer_norm(outputs[-1][-(self.clip_skip + 1)])
            if self.guided:
                half = ids.shape[0] // 2
                hidden = torch.cat([outputs[0][:half], hidden[half:]])
        if self.repeats == 1:
            return hidden
        texts, tokens, width = hidden.shape
        return (
            hidden.unsqueeze(1)
            .expand(texts, self.repeats, tokens, width)
            .reshape(texts * self.repeats, tokens, width)
        )


class ImageDecoder(nn.Module):
    """Latents to an image with values about [-1, 1], as StableDiffusionPipeline decodes them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        """The image (B, channels, height, width)."""
        image: Tensor = self.vae.decode(latents / self.scaling, return_dict=False)[0]
        return image


# ---- token ids ---------------------------------------------------------------------------------------------


class _Listener(nn.Module):
    """Stands where the text encoder was: keeps the ids it is asked to encode, and answers with zeros."""

    dtype = torch.float32

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.config: Any = encoder.config
        self.text_model = SimpleNamespace(final_layer_norm=lambda hidden: hidden)
        self.heard: list[Tensor] = []

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Any, ...]:
        if attention_mask is not None:
            raise JobError(
                "this text encoder takes an attention mask, which is not served with secret weights; "
                "use public_components=('text_encoder',)"
            )
        self.heard.append(ids)
        nothing = torch.zeros(*ids.shape, self.config.hidden_size)
        return nothing, (nothing,) * (self.config.num_hidden_layers + 1)


def listening(pipe: Any) -> tuple[Any, list[Tensor]]:
    """A copy of the pipeline whose ``encode_prompt`` does all but encode, and the list of ids it would encode:
    prompts first."""
    heard = _Listener(pipe.text_encoder)
    double = copy.copy(pipe)
    double.__dict__["text_encoder"] = heard
    return double, heard.heard


def text_samples(pipe: Any, prompts: tuple[str, ...], rows: int, *, both: bool) -> list[tuple[Any, Any]]:
    """Arguments of the text encoder for batches of ``rows``: the built-in prompts, then tokens drawn at random.

    A prompt of the caller holds other tokens than the built-in ones, so the tokens whose embeddings are largest
    and smallest are among those drawn. ``both``: every text is seen in both halves of a batch.
    """
    tokenizer, length = pipe.tokenizer, pipe.tokenizer.model_max_length
    known: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    table: Tensor = pipe.text_encoder.get_input_embeddings().weight.detach()
    source = torch.Generator().manual_seed(_SEED)
    varied = torch.randint(table.shape[0], (_VARIED, length), generator=source)
    by_size, some = table.norm(dim=1).argsort(), max(1, length // 4)
    for extreme in (by_size[:some], by_size[-some:]):
        for row in varied[::2]:
            row[torch.randperm(length, generator=source)[: len(extreme)]] = extreme
    varied[:, 0], varied[:, -1] = known[0, 0], known[0, -1]
    texts = torch.cat([known, varied])
    if both:
        texts = torch.cat([texts, texts.roll(rows // 2, 0)])
    whole = -(-len(texts) // rows) * rows
    texts = texts.repeat(-(-whole // len(texts)), 1)[:whole]
    return [((batch,), {}) for batch in texts.split(rows)]


# ---- on handles --------------------------------------------------------------------------------------------


def encoded(backend: Backend, plan: Plan, ids: Tensor) -> str:
    """The handle of the texts' embeddings: the client shares which tokens they are, and no more."""
    values, inputs = client_side(plan, (ids,)), dict[str, str]()
    for name, tensor in values.secrets.items():
        inputs[name] = f"text/{name}"
        backend.put_input(inputs[name], plan, name, tensor)
    backend.call("text", "text", inputs, values.publics, ["embeds"])
    backend.drop(*inputs.values())
    backend.certify("embeds")  # before the steps that they would spoil
    return "embeds"


def decoded(backend: Backend, plan: Plan, latents: str, shape: tuple[int, ...]) -> Tensor:
    """The image behind a handle of latents, opened to the client alone."""
    values = client_side(plan, (torch.zeros(shape),), held=("latents",))
    backend.call("vae", "vae", {"latents": latents}, values.publics, ["image"])
    return backend.reveal("image")
