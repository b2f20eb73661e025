"""Transformers of published sizes with random weights, for what their secure inference costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from sfumato.errors import JobError

from .train.text.marill import LoraLinear, set_heads
from .train.text.replace import Quad, Replaced, apply

__all__ = ["SHAPES", "Shape", "change", "with_quad"]

#: Deviation that a layer's low-rank change has for inputs of deviation 1: a sixth of the layer's own at width 768.
_LORA_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by ``make()``, whose argument is token ids (1, tokens) below ``vocabulary``; ``causal``: it answers with
    the next token's id, as the published rows "32 -> 1" do."""

    name: str
    make: Callable[[], nn.Module]
    vocabulary: int
    causal: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model with random weights, in evaluation mode."""
        torch.manual_seed(seed)
        return self.make().eval().requires_grad_(False)

    def ids(self, tokens: int, seed: int) -> Tensor:
        """Random token ids (1, tokens)."""
        return torch.randint(0, self.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


class _Last(nn.Module):
    """Hidden states of the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.model(ids).last_hidden_state
        return states


class _Next(nn.Module):
    """The id of the likeliest next token (1,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1)


def _bert(layers: int, width: int) -> Callable[[], nn.Module]:
    config: dict[str, Any] = {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    return lambda: _Last(BertModel(BertConfig(**config), add_pooling_layer=False))


def _roberta() -> nn.Module:
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514)
    return _Last(RobertaModel(config, add_pooling_layer=False))


def _gpt2(layers: int, width: int) -> Callable[[], nn.Module]:
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    return lambda: _Next(GPT2LMHeadModel(config))


#: By name.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("bert-base", _bert(12, 768), 30522),
        Shape("bert-large", _bert(24, 1024), 30522),
        Shape("roberta-base", _roberta, 50265),
        Shape("gpt2-base", _gpt2(12, 768), 50257, causal=True),
        Shape("gpt2-medium", _gpt2(24, 1024), 50257, causal=True),
    )
}  # fmt: skip


def with_quad(model: nn.Module) -> nn.Module:
    """The model with Quad as every activation of its feed-forward layers; changed in place."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, Quad())
    return model


def change(model: Any, replaced: Replaced) -> nn.Module:
    """A student's changes in a model of :data:`SHAPES`, in place.

    Heads are merged in the order they have, and LoRA's B is random, so that its product has a range to plan for:
    neither changes what a run costs.

    Raises:
        JobError: the changes do not fit the model.
    """
    inner = model.model
    if replaced == Replaced("quad"):
        return with_quad(model)
    heads = inner.config.num_attention_heads
    if heads % replaced.merged:
        raise JobError(f"{heads} heads do not merge by {replaced.merged}; choose a divisor of {heads}")
    if replaced.merged > 1 and not replaced.frozen:  # with frozen layers `apply` does
        set_heads(inner, heads // replaced.merged)
    if replaced != Replaced():
        apply(inner, replaced)
    for module in inner.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_b, std=_LORA_SCALE / module.lora_b.shape[0] ** 0.5)
    return cast(nn.Module, model.eval().requires_grad_(False))
