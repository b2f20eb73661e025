"""A transformers model that its owner has shared with a cluster, for a client: the owner's plans, no weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.inference.generation import Wishes
from sfumato.inference.layout import Layout
from sfumato.inference.loading import TASKS, Loaded, bare_model
from sfumato.inference.model import SecureModel
from sfumato.inference.offers import SUFFIXES
from sfumato.inference.plans import Planner
from sfumato.inference.reading import Reader
from sfumato.runtime.backend import Backend
from sfumato.runtime.offered import caller_of, fetched, load_part, write_files
from sfumato.runtime.remote import open_backend
from sfumato.runtime.report import CostReport
from sfumato.runtime.shared_model import Description

__all__ = ["SharedModel", "SharedPlanner", "open_shared"]

Offer = Mapping[str, Any]


class SharedPlanner(Planner):
    """Finds the plans that the owner offers for a call, and has the parties load them from their own store."""

    def __init__(self, loaded: Loaded, description: Description) -> None:
        options = next(iter(description.plans.values())).options
        padding = bool(description.offers[0]["settings"]["padding"])
        super().__init__(
            loaded, secret=options.secret, profile=options.profile, calibration=None, exact=not padding
        )
        self.description, self.padding = description, padding
        self.title = f"cluster:{description.name}"
        self.calls = [o for o in description.offers if "call" in o["parts"]]
        self.texts = [o for o in description.offers if "prefill" in o["parts"]]

    def load(self, backend: Backend, name: str, plan: Plan) -> None:
        """Have the parties take the weights from their store."""
        load_part(backend, self.description, name, plan)

    def one_call(self, inputs: Mapping[str, Tensor]) -> tuple[str, Plan]:
        """Name and plan of a call with inputs like these.

        Raises:
            JobError: no such call is offered.
        """
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        found = next((o for o in self.calls if o["settings"]["inputs"] == shapes), None)
        if found is None:
            asked = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise JobError(f"{self.title} is not offered for {asked}; {self.offers()}")
        return self._part(found, "call")

    def layout(self, count: int, wishes: Wishes) -> Layout:
        """Places for a prompt of ``count`` tokens and what follows, in the smallest offer that has room for both.

        Raises:
            JobError: no offer has.
        """
        temperature = wishes.temperature if wishes.do_sample and wishes.release != "logits" else None
        if count == 0:
            raise JobError("an empty prompt has no token to go on from; give some text")
        room = []
        for offer in self.texts:
            s = offer["settings"]
            fits = count == s["prompt"] or (self.padding and count < s["prompt"])
            if fits and s["prompt"] + wishes.max_new_tokens - 1 <= s["length"]:
                room.append(s)
        found = [s for s in room if (s["release"], s["temperature"]) == (wishes.release, temperature)]
        if not found:
            drawn = f", temperature={temperature:g}" if temperature is not None else ""
            raise JobError(
                f"{self.title} is not offered for {wishes.max_new_tokens} tokens after {count} with "
                f"release={wishes.release!r}{drawn}; {self.offers()}"
            )
        least = min(found, key=lambda s: (s["length"], s["prompt"]))
        return Layout(count, least["prompt"], least["length"], self._loaded.pad, self.learnt)

    def prefill(self, layout: Layout) -> tuple[str, Plan]:
        """Of a prompt of this layout."""
        return self._part(self._text(layout), "prefill")

    def decode(self, layout: Layout, *, hot: bool) -> tuple[str, Plan]:
        """Of one further token."""
        return self._part(self._text(layout, hot), "decode")

    def choose(self, layout: Layout, *, hot: bool, temperature: float | None) -> tuple[str, Plan]:
        """Of the largest logit; with a ``temperature``, of a draw."""
        found = [o for o in self._texts_of(layout, hot) if o["settings"]["temperature"] == temperature]
        return self._part(next(o for o in found if "choose" in o["parts"]), "choose")

    def offers(self) -> str:
        """What is offered, in words."""
        titles = dict.fromkeys(str(offer["settings"]["title"]) for offer in (*self.calls, *self.texts))
        return f"it offers {'; '.join(titles)}"

    def _texts_of(self, layout: Layout, hot: bool | None) -> list[Offer]:
        places = (layout.prompt, layout.length)
        found = [o for o in self.texts if (o["settings"]["prompt"], o["settings"]["length"]) == places]
        return [o for o in found if hot is None or (o["settings"]["release"] == "end") == hot]

    def _text(self, layout: Layout, hot: bool | None = None) -> Offer:
        return self._texts_of(layout, hot)[0]

    def _part(self, offer: Offer, part: str) -> tuple[str, Plan]:
        digest = offer["parts"][part]
        return f"{part}-{digest[:16]}", self.description.plans[digest]


class SharedModel(SecureModel):
    """A `SecureModel` whose weights and plans are its owner's."""

    def __init__(
        self,
        description: Description,
        *,
        cluster: str | Path | None,
        keys: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        loaded = _loaded(description)
        self._offered = planner = SharedPlanner(loaded, description)
        lengths = sorted({o["settings"]["inputs"]["input_ids"][1] for o in planner.calls})
        reader = Reader(
            loaded,
            planner.extra,
            max(lengths, default=loaded.longest),
            padding=planner.padding,
            buckets=lengths,
        )
        opened = partial(open_backend, cluster=cluster, keys=keys, options={**(options or {})})
        self._start(planner, reader, opened, options or {})
        self.backend = "local"

    @property
    def offers(self) -> list[dict[str, Any]]:
        """What may be asked for, by offer."""
        return [dict(offer["settings"]) for offer in self._offered.description.offers]

    def estimate(self, texts: Any = None, **inputs: Any) -> CostReport:
        """As `SecureModel.estimate`; the client has no weights to send."""
        return replace(super().estimate(texts, **inputs), setup_bytes=0)

    def estimate_generate(self, prompt: Any, *, stop: Any = None, **options: Any) -> CostReport:
        """As `SecureModel.estimate_generate`; the client has no weights to send."""
        return replace(super().estimate_generate(prompt, stop=stop, **options), setup_bytes=0)

    def _layout(self, prompt: Sequence[int], wishes: Wishes) -> Layout:
        return self._offered.layout(len(prompt), wishes)


def open_shared(
    name: str,
    *,
    task: str | None = None,
    cluster: str | Path | None,
    keys: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    decided: Sequence[str] = (),
) -> SharedModel:
    """The client's side of the model ``name``, whose description a short session fetches.

    Raises:
        JobError: no such model for this client, one for another task, or one that is no transformers model.
    """
    description = fetched(name, cluster=cluster, keys=keys, options=options, decided=decided)
    known = {"call", "prefill", "decode", "choose"}
    if any(not set(offer["parts"]) <= known for offer in description.offers):
        raise JobError(f"cluster:{name} is no transformers model; use {caller_of(description)}")
    found = description.offers[0]["settings"].get("task")
    if found not in TASKS or task not in (None, found):
        raise JobError(f"cluster:{name} is shared for {found}, not for {task}; leave task out")
    return SharedModel(description, cluster=cluster, keys=keys, options=options)


def _loaded(description: Description) -> Loaded:
    """The owner's model without weights, and its tokenizer.

    Raises:
        JobError: the files hold something that is not served, or that could run code.
    """
    task = str(description.offers[0]["settings"]["task"])
    with tempfile.TemporaryDirectory(prefix="sfumato-") as scratch:
        write_files(description, Path(scratch), SUFFIXES)
        return bare_model(Path(scratch), task, f"cluster:{description.name}")
