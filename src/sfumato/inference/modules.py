"""What is captured of a transformers model: one call on a padded batch, a prompt, or one further token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

__all__ = ["Choose", "Decode", "OneCall", "Prefill", "has_rotary", "takes"]

#: What is added to scores of padding where a model adds biases of its own to them: e^-24 of a weight is left.
_PADDING = -24.0


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(type(model).forward).parameters


def has_rotary(model: nn.Module) -> bool:
    """Whether positions turn queries and keys, so that only distances count."""
    return any("Rotary" in type(module).__name__ for module in model.modules())


class OneCall(nn.Module):
    """All tensors that a model returns by name, for inputs by name.

    ``padding`` says how a two-dimensional ``attention_mask`` reaches the model: ``keys`` (a boolean over the keys),
    ``bias`` (for models whose scores carry a bias: a number that is added), ``whole`` (as it is, for models that make
    several masks of it), or ``None`` (padding comes last and the model looks back only, so that nothing of it is
    seen).
    """

    def __init__(self, model: nn.Module, padding: str | None) -> None:
        super().__init__()
        self.model, self.padding = model, padding

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """``inputs``: ``input_ids`` (texts, tokens) and what belongs to them, or ``pixel_values``."""
        given: dict[str, Any] = dict(inputs)
        mask = given.pop("attention_mask", None)
        if mask is not None and self.padding is not None:
            keys = (mask > 0)[:, None, None, :]
            added = (1.0 - keys.to(torch.float32)) * _PADDING
            given["attention_mask"] = {"keys": keys, "bias": added, "whole": mask}[self.padding]
        if takes(self.model, "use_cache"):
            given["use_cache"] = False
        found = self.model(**given, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class _Kept(Cache):
    """What every layer hands over, in order; subclasses say what it gets back."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given, so that nobody needs it."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values to attend to."""
        key_states, value_states = (
            self._seen(0, layer_idx, key_states),
            self._seen(1, layer_idx, value_states),
        )
        self.keys.append(key_states)
        self.values.append(value_states)
        return key_states, value_states

    def _seen(self, which: int, layer: int, new: Tensor) -> Tensor:
        return new

    def stacked(self) -> Tensor:
        """(2, layers, 1, heads, tokens, width): keys, then values."""
        return torch.stack([torch.stack(self.keys), torch.stack(self.values)])


class _Inserted(_Kept):
    """Earlier tokens' keys and values, with the new token's in its place."""

    def __init__(self, kept: Tensor, slot: Tensor) -> None:
        super().__init__()
        self._kept = kept
        self._here = (torch.arange(kept.shape[-2]) == slot)[:, None]

    def _seen(self, which: int, layer: int, new: Tensor) -> Tensor:
        return torch.where(self._here, new, self._kept[which, layer])


class _Causal(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._cache = "cache" if takes(model, "cache") else "past_key_values"
        self._last = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}

    def _logits(self, cache: _Kept, mask: Tensor, positions: Tensor, **tokens: Any) -> Tensor:
        """(1, vocabulary) of the last position."""
        found = self.model(
            **tokens, position_ids=positions, attention_mask=mask, use_cache=True, return_dict=True,
            **{self._cache: cache}, **self._last,
        )  # fmt: skip
        logits: Tensor = found.logits[:, -1]
        return logits


class Prefill(_Causal):
    """A prompt at the end of ``ids`` (1, tokens), padding before it: the logits of its last token, and all layers' keys
    and values (2, layers, 1, heads, length, width) with room for what follows."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__(model)
        self.length = length

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``mask`` (1, 1, tokens, tokens): who looks at whom. ``places``: learnt positions, if the model has any."""
        cache = _Kept()
        places = torch.arange(ids.shape[1])[None] if places is None else places
        logits = self._logits(cache, mask, places, input_ids=ids)
        return logits, F.pad(cache.stacked(), (0, 0, 0, self.length - ids.shape[1]))


class Decode(_Causal):
    """One token at the public place ``slot`` (): its logits, and the keys and values with its own put in."""

    def forward(
        self,
        mask: Tensor,
        kept: Tensor,
        slot: Tensor,
        ids: Tensor | None = None,
        hot: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``mask`` (1, 1, 1, length). The token is ``ids`` (1, 1), or the place of the 1 in ``hot``
        (1, vocabulary)."""
        cache = _Inserted(kept, slot)
        places = slot.reshape(1, 1) if places is None else places
        if ids is not None:
            return self._logits(cache, mask, places, input_ids=ids), cache.stacked()
        assert hot is not None
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        embeds = torch.matmul(hot, table.weight)[:, None] * float(getattr(table, "embed_scale", 1.0))
        return self._logits(cache, mask, places, inputs_embeds=embeds), cache.stacked()


class Choose(nn.Module):
    """The token with the largest of logits plus noise (1, vocabulary): its number (1,), and with ``hot`` the row with a
    1 at it as well."""

    def __init__(self, *, hot: bool) -> None:
        super().__init__()
        self.hot = hot

    def forward(self, logits: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Largest of Gumbel noise plus logits: a draw from their softmax."""
        total = logits if noise is None else logits + noise
        if not self.hot:
            return (total.argmax(-1),)
        size = total.shape[-1]
        row = F.one_hot(total.argmax(-1), size).to(torch.float32)
        return torch.matmul(row, torch.arange(size, dtype=torch.float32)[:, None])[:, 0], row
