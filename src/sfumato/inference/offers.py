"""What the owner of a transformers model shares: plans for all lengths that it offers, and files for clients."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.inference.generation import RELEASES, Wishes
from sfumato.inference.texts import padded, tokenized
from sfumato.runtime.cluster import Cluster
from sfumato.runtime.offered import files_in, in_clear
from sfumato.runtime.sharing import ModelToShare, share_model

if TYPE_CHECKING:
    from sfumato.inference.model import SecureModel

__all__ = ["SUFFIXES", "Terms", "lessons", "offered", "share"]

#: Of files that clients get: nothing that can hold code.
SUFFIXES = (".json", ".txt", ".model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the owner grants.

    ``lengths``: tokens that texts, or prompts, are padded to; ``texts``: how many in a call. ``tokens``: new tokens
    that a text may be written on by, with what more fits the cache's length; None: the model answers in one call.
    ``releases``: what of a written text may be opened, as in `SecureModel.generate`; each is an offer.
    ``temperatures``: of draws under the protocol, None for the likeliest token. ``clients``: who may use it; None for
    every client of the cluster.
    """

    lengths: Sequence[int] = (32,)
    texts: int = 1
    tokens: int | None = None
    releases: Sequence[str] = ("tokens",)
    temperatures: Sequence[float | None] = (None,)
    clients: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise JobError("an offer needs at least one length, of one token or more")
        if self.texts < 1:
            raise JobError(f"a call takes at least one text, not {self.texts}")
        if self.tokens is not None and (self.tokens < 1 or not self.releases or not self.temperatures):
            raise JobError(
                "texts are written on by at least one token, under at least one release and temperature"
            )
        if unknown := [name for name in self.releases if name not in RELEASES]:
            raise JobError(f"there is no release {unknown[0]!r}; use one of {', '.join(RELEASES)}")


def offered(model: SecureModel, name: str, terms: Terms, *, replace: bool = False) -> ModelToShare:
    """Plans for all that is offered, captured and calibrated here in the clear, and the files of the clients.

    Raises:
        JobError: terms that this model cannot serve.
    """
    if model.loaded.images:
        raise JobError("models of images are shared one plan at a time: sfumato.share(model.plan(...), ...)")
    found = list[tuple[dict[str, Any], dict[str, Plan], list[str]]]()
    for length in terms.lengths:
        if length > model.max_length:
            raise JobError(
                f"the length {length} is more than max_length={model.max_length}; offer fewer tokens"
            )
        found += (
            _calls(model, terms.texts, length) if terms.tokens is None else _written(model, terms, length)
        )
    offers = [
        {
            "settings": settings,
            "parts": {part: plan.digest() for part, plan in parts.items()},
            "reveal": reveal,
        }
        for settings, parts, reveal in found
    ]
    plans = {plan.digest(): plan for _, parts, _ in found for plan in parts.values()}
    return ModelToShare(
        name=name, plans=plans, offers=offers, files=_files(model), clients=terms.clients, replace=replace
    )


def _calls(
    model: SecureModel, texts: int, length: int
) -> list[tuple[dict[str, Any], dict[str, Plan], list[str]]]:
    """One call on texts that are padded to a length."""
    loaded, planner = model.loaded, model._planner
    known = (
        tokenized(loaded.tokenizer, ["a"], length, planner.extra) if loaded.tokenizer is not None else [{}]
    )
    blank: dict[str, list[int]] = {name: [0] * length for name in ("input_ids", *planner.extra)}
    rows = [{n: ids for n, ids in blank.items() if n == "input_ids" or n in known[0]}] * texts
    inputs: dict[str, Tensor] = padded(rows, length, loaded.pad)
    if not model.padding or loaded.padding is None:
        inputs.pop("attention_mask")
    settings = {
        **_common(model), "title": f"{loaded.task}, {texts} x {length} tokens",
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
    }  # fmt: skip
    return [(settings, {"call": planner.one_call(inputs)[1]}, ["call"])]


def _written(
    model: SecureModel, terms: Terms, length: int
) -> list[tuple[dict[str, Any], dict[str, Plan], list[str]]]:
    """Texts that are written on, one offer for each release and temperature."""
    if model.loaded.task != "causal-lm" or terms.texts != 1 or terms.tokens is None:
        raise JobError(
            f"a model for {model.loaded.task} does not write texts on; offer it without tokens, or one text"
        )
    found = []
    for release, temperature in itertools.product(terms.releases, terms.temperatures):
        if release == "logits" and temperature is not None:
            continue  # the client draws from logits as it likes
        wishes = Wishes(max_new_tokens=terms.tokens, release=release)
        layout = model._layout([0] * length, wishes)
        if layout.prompt != length:
            raise JobError(
                f"prompts are padded to {layout.prompt} tokens, not to {length}; offer {layout.prompt}"
            )
        hot = release == "end"
        parts = {"prefill": model._planner.prefill(layout)[1]}
        if layout.length > layout.prompt:
            parts["decode"] = model._planner.decode(layout, hot=hot)[1]
        if release != "logits":
            parts["choose"] = model._planner.choose(layout, hot=hot, temperature=temperature)[1]
        settings = {
            **_common(model), "title": f"{layout.length - length + 1} tokens after {length}, {release}",
            "prompt": length, "length": layout.length, "release": release, "temperature": temperature,
        }  # fmt: skip
        found.append(
            (settings, parts, ["choose"] if release != "logits" else [p for p in parts if p != "choose"])
        )
    if not found:
        raise JobError(
            "a temperature is for draws under the protocol; offer release 'tokens' or 'end' with it"
        )
    return found


def _common(model: SecureModel) -> dict[str, Any]:
    return {"task": model.loaded.task, "padding": model.padding}


def _files(model: SecureModel) -> dict[str, bytes]:
    """Configuration and tokenizer in the hub's layout."""
    inner = model.loaded.model
    with tempfile.TemporaryDirectory(prefix="sfumato-") as scratch:
        config = copy.deepcopy(inner.config)
        config.architectures = [type(inner).__name__]
        config.save_pretrained(scratch)
        if getattr(inner, "generation_config", None) is not None:
            inner.generation_config.save_pretrained(scratch)
        if model.loaded.tokenizer is not None:
            model.loaded.tokenizer.save_pretrained(scratch)
        return files_in(Path(scratch), SUFFIXES)


def lessons(model: ModelToShare) -> list[tuple[str, str]]:
    """What is offered, and who learns what by it, a row for each."""
    offers = [offer["settings"] for offer in model.offers]
    plans = list(model.plans.values())
    secret = any(plan.secret_weights for plan in plans)
    seen = sorted({name.partition(": ")[2] for plan in plans for name in in_clear("", plan)})
    calls = max(len(plan.secret_nodes) for plan in plans)
    opened = {part for offer in model.offers for part in offer["reveal"]}
    what = "the chosen tokens" if opened == {"choose"} else "the model's outputs"
    written = " and its cache" if "prefill" in opened else ""
    return [
        ("offered", "; ".join(dict.fromkeys(settings["title"] for settings in offers))),
        ("the parties", f"graphs (up to {calls} calls), shapes and calibrated ranges; how many tokens are written"),
        ("the parties, of the weights", (", ".join(seen[:4]) or "nothing") if secret else "all"),
        ("clients", "the same; tokenizer and configuration"),
        ("opened to the client", f"{what}{written}; and whether values left their ranges"),
        ("not prevented", "learning from results: a client chooses inputs freely, and calls as often as it likes"),
        ("for", "every client of the cluster" if model.clients is None else ", ".join(model.clients)),
    ]  # fmt: skip


def share(
    model: SecureModel,
    name: str,
    cluster: str | Path,
    terms: Terms | None = None,
    *,
    keys: str | Path | None = None,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Give the parties of a cluster a model and its plans to keep; clients then use it as ``"cluster:NAME"``.

    Returns:
        The share's id, common to the three parties.

    Raises:
        JobError: terms that the model cannot serve, not an owner's certificate, or a name that is taken.
        LinkError: a party cannot be reached, or is lost; then no party keeps anything.
    """
    path = Path(cluster)
    with torch.no_grad():
        made = offered(model, name, terms or Terms(), replace=replace)
    return share_model(Cluster.load(path), keys or path.parent, made, progress=progress)
