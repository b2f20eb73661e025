"""What a client makes of texts and images before a call, and of numbers after it, in the clear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import JobError
from sfumato.inference.loading import Loaded
from sfumato.inference.texts import BUCKETS, bucket_of, padded, tokenized

__all__ = ["Reader"]


class Reader:
    """Of one model: ``extra`` are its inputs beside token ids; ``padding``: whether texts are padded, to which of the
    ``buckets``."""

    def __init__(
        self,
        loaded: Loaded,
        extra: tuple[str, ...],
        max_length: int,
        *,
        padding: bool,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        self.loaded, self._extra, self.max_length, self.padding = loaded, extra, max_length, padding
        self._buckets = buckets

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has."""
        return int(self.loaded.model.config.vocab_size)

    def inputs(self, texts: Any, inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Tensors by name, and how many tokens each text has (None of images).

        Raises:
            JobError: what is given does not fit the model.
        """
        if (texts is None) == (not inputs):
            raise JobError(
                "give texts or images, or tensors by name (input_ids=..., pixel_values=...), not both"
            )
        if self.loaded.images:
            return {"pixel_values": self._pixels(texts, inputs)}, None
        if texts is not None:
            texts = [texts] if isinstance(texts, str | tuple) else list(texts)
            if not texts:
                raise JobError("there is no text in the list; give at least one")
            rows = tokenized(self._tokenizer("read a text"), texts, self.max_length, self._extra)
        else:
            rows = self._rows(inputs)
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        if not self.padding and len(set(sizes.tolist())) > 1:
            raise JobError(
                "with padding=False all texts of a call have the same number of tokens; call it for each"
            )
        exact = not self.padding
        length = bucket_of(int(sizes.max()), self.max_length, exact=exact, buckets=self._buckets)
        given = padded(rows, length, self.loaded.pad)
        if not self.padding or self.loaded.padding is None:
            given.pop("attention_mask")
        return given, sizes

    def _rows(self, inputs: Mapping[str, Any]) -> list[dict[str, list[int]]]:
        """Rows of tokens from tensors; a mask says how long each is."""
        known = {"input_ids", "attention_mask", *self._extra}
        if unknown := sorted(set(inputs) - known):
            raise JobError(f"this model takes no {unknown[0]}; it takes {', '.join(sorted(known))}")
        if "input_ids" not in inputs:
            raise JobError("input_ids are missing; give them, or texts")
        tensors = {n: torch.as_tensor(v) for n, v in inputs.items() if v is not None}
        ids = tensors["input_ids"]
        if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            raise JobError("input_ids must be whole numbers of shape (texts, tokens)")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            raise JobError(f"input_ids must lie in the vocabulary of {self.vocabulary} tokens")
        wrong = next((n for n, t in tensors.items() if t.shape != ids.shape), None)
        if wrong is not None:
            raise JobError(f"{wrong} has shape {list(tensors[wrong].shape)}, not that of input_ids")
        mask = tensors.pop("attention_mask", torch.ones_like(ids))
        sizes = mask.sum(-1)
        first = torch.arange(ids.shape[1])[None] < sizes[:, None]
        if not torch.equal(mask.bool(), first) or int(sizes.min()) < 1:
            raise JobError(
                "attention_mask must have its ones first and at least one in each row; pad at the end"
            )
        bucket_of(int(sizes.max()), self.max_length)
        return [{n: t[i, : int(sizes[i])].tolist() for n, t in tensors.items()} for i in range(len(ids))]

    def _pixels(self, images: Any, inputs: Mapping[str, Any]) -> Tensor:
        if images is not None:
            processor = self.loaded.processor
            if processor is None:
                raise JobError(
                    "there is no image processor beside this model; give pixel_values=, normalised as it was trained"
                )
            images = list(images) if isinstance(images, list | tuple) else [images]
            inputs = {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}
        if set(inputs) != {"pixel_values"}:
            raise JobError("an image model takes images, or pixel_values=(images, channels, height, width)")
        pixels = torch.as_tensor(inputs["pixel_values"]).to(torch.float32)
        if pixels.dim() != 4 or pixels.numel() == 0 or not bool(pixels.isfinite().all()):
            raise JobError("pixel_values must be finite, of shape (images, channels, height, width)")
        return pixels

    def prompt(self, prompt: Any) -> list[int]:
        """The token ids of a text, or those that are given.

        Raises:
            JobError: they are none of the vocabulary.
        """
        if isinstance(prompt, str):
            ids = list(self._tokenizer("read a prompt")(prompt)["input_ids"])
        else:
            given = torch.as_tensor(prompt)
            if given.dim() not in (1, 2) or (given.dim() == 2 and len(given) != 1):
                raise JobError(
                    "generate takes one prompt: a text, or token ids of shape (tokens,) or (1, tokens)"
                )
            ids = given.reshape(-1).tolist()
        if not all(isinstance(i, int) and 0 <= i < self.vocabulary for i in ids):
            raise JobError(
                f"token ids of a prompt must be whole numbers in the vocabulary of {self.vocabulary} tokens"
            )
        return ids

    def stops(self, stop: str | int | Sequence[str | int] | None) -> tuple[frozenset[int], tuple[str, ...]]:
        """Tokens and texts to stop after; by default the model's end of sequence."""
        if stop is None:
            config = getattr(self.loaded.model, "generation_config", None) or self.loaded.model.config
            end = config.eos_token_id
            stop = [] if end is None else [end] if isinstance(end, int) else list(end)
        given = [stop] if isinstance(stop, str | int) else list(stop)
        texts = tuple(s for s in given if isinstance(s, str))
        if texts and self.loaded.tokenizer is None:
            raise JobError("without a tokenizer there is no text to stop at; give token ids")
        if "" in texts:
            raise JobError("an empty text to stop at is in every text; leave it out")
        return frozenset(s for s in given if isinstance(s, int)), texts

    # ---- after a call ---------------------------------------------------------------------------------------

    def decoded(self, tokens: list[int]) -> str:
        """Their text; empty without a tokenizer."""
        tokenizer = self.loaded.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True))

    def labels(
        self, outputs: Mapping[str, Tensor], given: Mapping[str, Tensor], lengths: Tensor | None
    ) -> list[Any] | None:
        """The likeliest class of each input, the likeliest token at each mask, or after each text."""
        logits, loaded = outputs.get("logits"), self.loaded
        if logits is None:
            return None
        if loaded.task.endswith("classification"):
            names = loaded.model.config.id2label
            return [names.get(int(i), int(i)) for i in logits.argmax(-1)]
        if loaded.tokenizer is None or lengths is None:
            return None
        best = logits.argmax(-1)
        if loaded.task == "causal-lm":
            return [loaded.tokenizer.decode([int(best[i, n - 1])]) for i, n in enumerate(lengths.tolist())]
        masks = given["input_ids"][:, : best.shape[1]] == loaded.tokenizer.mask_token_id
        return [
            [loaded.tokenizer.decode([int(t)]) for t in row[mask]]
            for row, mask in zip(best, masks, strict=True)
        ]

    def _tokenizer(self, purpose: str) -> Any:
        if self.loaded.tokenizer is None:
            raise JobError(
                f"there is no tokenizer beside this model to {purpose} with; put its files into the model's folder, "
                "or give token ids"
            )
        return self.loaded.tokenizer
