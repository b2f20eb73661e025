"""A pipeline that its owner has shared with a cluster, for a client: the owner's plans, and none of its weights."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
import transformers
from torch import Tensor, nn

from sfumato.diffusion.adapters import adapter_state
from sfumato.diffusion.loading import load_pipeline, without_bars
from sfumato.diffusion.offers import asked, configuration, configuration_file
from sfumato.diffusion.pipeline import SecurePipeline
from sfumato.diffusion.plans import Planner
from sfumato.diffusion.request import Prepared, Request
from sfumato.diffusion.settings import WEIGHED, Settings, in_words
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.runtime.backend import Backend
from sfumato.runtime.offered import caller_of, fetched, load_part, write_files
from sfumato.runtime.report import CostReport
from sfumato.runtime.shared_model import Description

__all__ = ["SharedPipeline", "SharedPlanner", "open_shared", "pipeline_of"]

_INDEX = "model_index.json"
#: Nothing that can hold code: files come from somebody else.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
#: The library of a component, and what it must be one of.
_KINDS: dict[str, tuple[Any, str]] = {
    "tokenizer": (transformers, "PreTrainedTokenizerBase"),
    "scheduler": (diffusers, "SchedulerMixin"),
    "text_encoder": (transformers, "PreTrainedModel"),
    "unet": (diffusers, "UNet2DConditionModel"),
    "vae": (diffusers, "AutoencoderKL"),
    "feature_extractor": (transformers, "ImageProcessingMixin"),
}
#: Differences between two configurations that an error names.
_TOLD = 3
_CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
#: Arguments of a call that an offer leaves to the client; all others are the offer's, or stay at their defaults.
_FREE = frozenset((
    "prompt", "negative_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
))  # fmt: skip


class SharedPlanner(Planner):
    """Finds the plans that the owner offers for a request, and has the parties load them from their own store."""

    def __init__(self, description: Description) -> None:
        options = description.plans[_parts(description)["unet"]].options
        super().__init__(secret=options.secret, profile=options.profile, calibration=None, hidden=frozenset())
        self.description = description
        self.title = f"cluster:{description.name}"
        self._offers = [(Settings.from_json(offer["settings"]), offer) for offer in description.offers]

    @property
    def settings(self) -> list[Settings]:
        """All that is offered."""
        return [settings for settings, _ in self._offers]

    def offer(self, pipe: Any, request: Request) -> Mapping[str, Any]:
        """The offer that a request matches.

        Raises:
            JobError: none does: says what is offered; or the request wants opened what the owner keeps closed.
        """
        wanted = asked(pipe, request)
        alike = [(s, offer) for s, offer in self._offers if s.is_but_for_configuration(wanted)]
        if not alike:
            raise JobError(f"{self.title} offers {in_words(self.settings)}; ask its owner for more")
        found = next((offer for settings, offer in alike if settings == wanted), None)
        if found is None:
            raise self._configured_otherwise(alike[0][0], pipe.scheduler)
        matched = {*wanted.arguments(), *_FREE}
        for field in fields(Request):
            value = getattr(request, field.name)
            if field.name not in matched and (isinstance(value, Tensor) or value != field.default):
                raise JobError(f"{self.title} is not offered with another {field.name}; leave it out")
        if request.prompts != 1:
            raise JobError(f"{self.title} takes one prompt a call; call it once for each")
        if "text" in found["parts"] and (
            request.prompt is None or request.negative_prompt_embeds is not None
        ):
            raise JobError(f"the parties encode the text of {self.title}; give a prompt, not embeddings")
        opens_latents = (
            request.output_type == "latent" or "latents" in request.callback_on_step_end_tensor_inputs
        )
        if opens_latents and "unet" not in found["reveal"]:
            raise JobError(
                f"the owner of {self.title} does not let latents be opened; ask for the image alone"
            )
        return found

    def _configured_otherwise(self, offered: Settings, scheduler: Any) -> JobError:
        """The scheduler's class is right, and its configuration is not the one that ranges were measured with."""
        if not offered.configured:
            return JobError(
                f"{self.title} was shared without its scheduler's configuration; its owner must share it again"
            )
        known = json.loads(self.description.files.get(configuration_file(offered.scheduler), b"{}"))
        given = json.loads(configuration(scheduler))
        found = [
            f"{name}={known.get(name)!r} in place of {given.get(name)!r}"
            for name in sorted({*known, *given})
            if known.get(name) != given.get(name)
        ]
        more = f" and {len(found) - _TOLD} more" * (len(found) > _TOLD)
        return JobError(
            f"{self.title} offers {offered.scheduler} with {', '.join(found[:_TOLD])}{more}; "
            "configure pipe.scheduler so"
        )

    def plans(self, prepared: Prepared, *, progress: bool = True) -> dict[str, Plan]:
        """As those of `Planner`, made by the owner long ago."""
        del progress
        parts = dict(self.offer(prepared.pipe, prepared.request)["parts"])
        if prepared.request.output_type == "latent":
            parts.pop("vae", None)
        return {part: self.description.plans[digest] for part, digest in parts.items()}

    def load(self, backend: Backend, name: str, plan: Plan) -> None:
        """Have the parties take a part's weights from their store; on shapes, stand-ins of the same types do."""
        load_part(backend, self.description, name, plan)


class SharedPipeline(SecurePipeline):
    """A `SecurePipeline` whose weights and plans are its owner's. What a call leaves out is as first offered."""

    def __init__(
        self,
        description: Description,
        *,
        cluster: str | Path | None,
        keys: str | Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        parts = _parts(description)
        chosen = description.plans[parts["unet"]].options
        super().__init__(
            pipeline_of(description),
            secret=chosen.secret,
            profile=chosen.profile,
            cluster=cluster,
            keys=keys,
            options=options,
            public_components=[c for c in ("text_encoder", "vae") if WEIGHED[c] not in parts],
        )
        self._planner = self._offered = SharedPlanner(description)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `SecurePipeline.__call__`.

        Raises:
            JobError: the owner does not offer such a call; says what is offered.
        """
        given = inspect.signature(SecurePipeline.__call__).bind(self, *args, **kwargs)
        given.arguments = self._filled(given.arguments)
        return SecurePipeline.__call__(*given.args, **given.kwargs)

    def plain(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises:
        JobError: always."""
        raise JobError(
            f"the weights of {self._offered.title} are at the parties alone; it has no run in the clear"
        )

    def estimate(self, prompt: str | list[str] = "", **arguments: Any) -> CostReport:
        """As `SecurePipeline.estimate`; the client has no weights to send."""
        report = super().estimate(prompt, **self._filled(arguments))
        return replace(report, setup_bytes=0)

    def plans(self, prompt: str | list[str] = "", **arguments: Any) -> dict[str, Plan]:
        """As `SecurePipeline.plans`."""
        return super().plans(prompt, **self._filled(arguments))

    @property
    def offers(self) -> list[dict[str, Any]]:
        """Arguments of the calls that are offered, and the scheduler of each."""
        return [{"scheduler": s.scheduler, **s.arguments()} for s in self._offered.settings]

    def _filled(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        first = self._offered.settings[0].arguments()
        return {**arguments, **{name: value for name, value in first.items() if arguments.get(name) is None}}

    def _prepared(self, request: Request) -> Prepared:
        if adapter_state(self._pipe):
            raise JobError(
                f"adapters belong in the weights of {self._offered.title}, which its owner has; remove them"
            )
        self._offered.offer(self._pipe, request)
        return super()._prepared(request)


def open_shared(
    name: str,
    *,
    cluster: str | Path | None,
    keys: str | Path | None = None,
    options: dict[str, Any] | None = None,
    decided: Sequence[str] = (),
) -> SharedPipeline:
    """The client's pipeline of the model ``name``, whose description a short session fetches.

    ``decided``: arguments of the caller that the owner decides instead.

    Raises:
        JobError: no such model for this client, or one that is no pipeline.
    """
    description = fetched(name, cluster=cluster, keys=keys, options=options, decided=decided)
    return SharedPipeline(description, cluster=cluster, keys=keys, options=options)


def _parts(description: Description) -> Mapping[str, str]:
    """Plan digests of the first offer by part.

    Raises:
        JobError: this is the model of no pipeline.
    """
    if any("unet" not in offer["parts"] for offer in description.offers) or not description.offers:
        raise JobError(f"cluster:{description.name} is no pipeline; use {caller_of(description)}")
    parts: Mapping[str, str] = description.offers[0]["parts"]
    return parts


# ---- the diffusers pipeline --------------------------------------------------------------------------------


def pipeline_of(description: Description) -> Any:
    """A StableDiffusionPipeline from the owner's files; components that are secret are on the meta device.

    Raises:
        JobError: the files hold something that is not served, or that could run code.
    """
    title, parts = f"cluster:{description.name}", _parts(description)
    with tempfile.TemporaryDirectory(prefix="sfumato-") as scratch, without_bars():
        folder = Path(scratch)
        write_files(description, folder, _SUFFIXES)
        index = _index(folder, title)
        bare: dict[str, Any] = {
            c: _bare(index[c], folder / c) for c, part in WEIGHED.items() if part in parts
        }
        return load_pipeline(folder, use_safetensors=True, **bare)


def _index(folder: Path, title: str) -> dict[str, Any]:
    """Classes by component, each one of diffusers' or transformers' own."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        found = {name: tuple(kind) for name, kind in index.items() if isinstance(kind, list) and any(kind)}
    except (OSError, ValueError, AttributeError):
        raise JobError(f"the files of {title} are no pipeline's; its owner must share it again") from None
    classes = {}
    for name, (library, kind) in found.items():
        if name == "safety_checker" and (library, kind) == _CHECKER:
            continue
        module, base = _KINDS.get(name, (None, ""))
        classes[name] = getattr(module, str(kind), None) if module is not None else None
        if getattr(module, "__name__", None) != library or not _is(
            classes[name], getattr(module, base, None)
        ):
            raise JobError(f"{title} has a component {name} of a kind that is not served")
    return classes


def _is(found: Any, base: Any) -> bool:
    return isinstance(found, type) and isinstance(base, type) and issubclass(found, base)


def _bare(kind: Any, folder: Path) -> nn.Module:
    """A model from its configuration alone, without weights."""
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
