"""Marill's three changes of a model: a public prefix, LoRA that stays unmerged, merged heads.

Source: Marill, section 4.2 of the digest. What a secure run saves by each is the plan's matter; these are the modules
whose structure it reads, and the training that makes up for them is in :mod:`.distil`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sfumato.errors import JobError

__all__ = [
    "LoraLinear", "Prefix", "Rest", "add_lora", "freeze", "group_heads", "layers_of", "merge_heads",
    "prefix_parts", "set_heads", "split",
]  # fmt: skip


def layers_of(model: Any) -> Any:
    """The transformer layers of a BERT- or GPT-2-type model.

    Raises:
        JobError: it is of another type.
    """
    kind = model.config.model_type
    if kind not in ("bert", "gpt2"):
        raise JobError(f"a model of type {kind} cannot be changed; take one of type bert or gpt2")
    base = model.base_model
    return base.encoder.layer if kind == "bert" else base.h


# ---- layer freezing --------------------------------------------------------------------------------------------------


class _Given(nn.Module):
    """Embeddings that pass on what they are given as such."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Tensor:
        return inputs_embeds


class _Nothing(nn.Module):
    """Position embeddings of hidden states that have theirs already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros((), device=positions.device)


def _with(module: Any, **parts: Any) -> Any:
    """A copy of a module with some parts replaced; the others, and all weights, are the module's own."""
    made = copy.copy(module)
    made._modules = {**module._modules, **parts}
    return made


class Prefix(nn.Module):
    """Embeddings and the first layers: what the client computes by itself, with public weights only.

    ``forward(ids, mask)``: (N, L) int64 each; hidden states (N, L, width).
    """

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        base, kept = model.base_model, nn.ModuleList(list(layers_of(model))[:layers])
        if model.config.model_type == "bert":
            self.base = _with(base, encoder=_with(base.encoder, layer=kept), pooler=None)
        else:
            self.base = _with(base, h=kept, ln_f=nn.Identity())

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.base(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return found


class Rest(nn.Module):
    """The other layers and the head: what stays secret. ``forward(hidden, mask)``: logits."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        base, kept = model.base_model, nn.ModuleList(list(layers_of(model))[layers:])
        if model.config.model_type == "bert":
            own = _with(base, encoder=_with(base.encoder, layer=kept), embeddings=_Given())
        else:
            own = _with(base, h=kept, wpe=_Nothing())
        self.model = _with(model, **{model.base_model_prefix: own})

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        extra = {} if self.model.config.model_type == "bert" else {"use_cache": False}
        found: Tensor = self.model(inputs_embeds=hidden, attention_mask=mask, **extra).logits
        return found


def split(model: Any, layers: int) -> tuple[Prefix, Rest]:
    """``rest(prefix(ids, mask), mask)`` is ``model(ids, mask).logits`` in eval mode; both hold the model's own weights.

    Raises:
        JobError: there are not so many layers.
    """
    if not 0 <= layers <= len(layers_of(model)):
        raise JobError(
            f"the model has {len(layers_of(model))} layers; a prefix of {layers} cannot be split off"
        )
    return Prefix(model, layers), Rest(model, layers)


def prefix_parts(model: Any, layers: int) -> list[nn.Module]:
    """The modules of embeddings and of the first ``layers``."""
    base = model.base_model
    tables = [base.embeddings] if model.config.model_type == "bert" else [base.wte, base.wpe]
    return [*tables, *list(layers_of(model))[:layers]]


@torch.no_grad()
def freeze(model: Any, base: Any, layers: int) -> None:
    """Give embeddings and the first ``layers`` the weights of the public ``base`` and train them no more, in place.

    Raises:
        JobError: the base has other shapes.
    """
    for mine, known in zip(prefix_parts(model, layers), prefix_parts(base, layers), strict=True):
        try:
            mine.load_state_dict(known.state_dict())
        except RuntimeError as error:
            raise JobError(
                f"the base model does not fit the teacher: {error}; name the base it was made from"
            ) from None
        mine.requires_grad_(False)


# ---- LoRA ------------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """x W + (x A) B, never merged: W public, so local on shares; A (inputs, rank) and B (rank, outputs) secret.

    B starts at zero, so that the layer starts as W alone. ``weight`` and ``bias`` are those of ``layer`` under the same
    names; for GPT-2's transposed layers ``weight`` stays transposed.
    """

    def __init__(self, layer: nn.Linear | Any, rank: int) -> None:
        transposed = isinstance(layer, Conv1D)
        shape = layer.weight.shape
        inputs, outputs = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        super().__init__(1, 1)
        self.in_features, self.out_features, self.transposed = inputs, outputs, transposed
        self.weight, self.bias = layer.weight, layer.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(inputs, rank) / inputs**0.5)
        self.lora_b = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        return functional.linear(x, weight, self.bias) + torch.matmul(
            torch.matmul(x, self.lora_a), self.lora_b
        )


def add_lora(model: Any, rank: int, first: int) -> None:
    """LoRA in every linear layer from layer ``first`` on, in place; only it, pooler and classifier stay trainable.

    Raises:
        JobError: the rank is not between 1 and the width.
    """
    width = model.config.hidden_size
    if not 1 <= rank < width:
        raise JobError(f"a rank of {rank} saves nothing at width {width}; choose 1 to {width - 1}")
    model.base_model.requires_grad_(False)
    if model.config.model_type == "bert" and model.base_model.pooler is not None:
        model.base_model.pooler.requires_grad_(True)
    for layer in list(layers_of(model))[first:]:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear or isinstance(child, Conv1D):
                    setattr(parent, name, LoraLinear(child, rank))


# ---- merged heads ----------------------------------------------------------------------------------------------------


def group_heads(patterns: Tensor, merged: int) -> list[int]:
    """An order of the heads in which each ``merged`` neighbours attend alike.

    ``patterns``: weights (heads, n), all that were seen of a head in one row. Alike is the cosine between two rows.
    The most similar pair of free heads starts a group, which then takes the free head most similar to its members
    until it is full.

    Raises:
        JobError: the number of heads is no multiple of ``merged``.
    """
    heads = patterns.shape[0]
    if merged < 1 or heads % merged:
        raise JobError(f"{heads} heads do not merge by {merged}; choose a divisor of {heads}")
    if merged == 1:
        return list(range(heads))
    flat = functional.normalize(patterns, dim=-1)
    alike = (flat @ flat.T).fill_diagonal_(-1.0)
    free, order = set(range(heads)), list[int]()
    while free:
        left = sorted(free)
        best = int(alike[left][:, left].argmax())
        group = [left[best // len(left)], left[best % len(left)]]
        while len(group) < merged:
            rest = sorted(free - set(group))
            group.append(rest[int(alike[rest][:, group].mean(1).argmax())])
        order += group
        free -= set(group)
    return order


@torch.no_grad()
def _permute(layer: Any, kind: str, columns: Tensor) -> None:
    """Put the columns of queries, keys and values of a layer, and the rows of its output, in this order."""
    if kind == "bert":
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            part.weight.copy_(part.weight[columns])
            part.bias.copy_(part.bias[columns])
        dense = layer.attention.output.dense
        dense.weight.copy_(dense.weight[:, columns])
        return
    width = len(columns)
    whole = torch.cat([columns + k * width for k in range(3)])
    layer.attn.c_attn.weight.copy_(layer.attn.c_attn.weight[:, whole])
    layer.attn.c_attn.bias.copy_(layer.attn.c_attn.bias[whole])
    layer.attn.c_proj.weight.copy_(layer.attn.c_proj.weight[columns])


def set_heads(model: Any, heads: int, first: int = 0) -> None:
    """Let the layers from ``first`` on have ``heads`` heads, in place; their columns are split anew.

    Raises:
        JobError: the model scales its scores by something else than 1/sqrt(d).
    """
    size = model.config.hidden_size // heads
    for layer in list(layers_of(model))[first:]:
        if model.config.model_type == "bert":
            attention = layer.attention.self
            attention.num_attention_heads, attention.attention_head_size = heads, size
        else:
            attention = layer.attn
            attention.num_heads, attention.head_dim = heads, size
            if attention.scale_attn_by_inverse_layer_idx or not attention.scale_attn_weights:
                raise JobError(
                    "scores with a scale other than 1/sqrt(d) cannot be merged; keep this model's heads"
                )
        attention.scaling = size**-0.5
    if first == 0:
        model.config.num_attention_heads = heads


def merge_heads(model: Any, orders: list[list[int]], merged: int, first: int = 0) -> None:
    """Merge each ``merged`` heads of the layers from ``first`` on into one, in place: h/m heads of m d columns.

    ``orders``: of the heads, for each layer of the model (:func:`group_heads`). All parameters are kept; a merged
    head's scores are the sum of its members' over sqrt(m). With ``merged`` 1 only the order changes, which changes
    nothing. The configuration follows where all layers are merged, so that a saved model needs no note of it.
    """
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    for layer, order in list(zip(layers_of(model), orders, strict=True))[first:]:
        columns = (torch.tensor(order)[:, None] * size + torch.arange(size)).flatten()
        _permute(layer, model.config.model_type, columns)
    set_heads(model, heads // merged, first)
