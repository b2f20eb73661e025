"""What the owner of a pipeline shares: plans for all settings that it offers, and the files that clients get."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from tqdm import tqdm

from sfumato.diffusion.adapters import merged
from sfumato.diffusion.request import Request, image_size
from sfumato.diffusion.settings import SCHEDULERS, WEIGHED, Settings
from sfumato.errors import JobError
from sfumato.graph.plan import Plan
from sfumato.runtime.offered import files_in, in_clear
from sfumato.runtime.sharing import ModelToShare

if TYPE_CHECKING:
    from sfumato.diffusion.pipeline import SecurePipeline

__all__ = [
    "OPENED", "Terms", "asked", "configuration", "configuration_file", "lessons", "offered",
]  # fmt: skip

#: What the client may see opened.
OPENED = ("image", "latents")
#: Components without secrets: the tokenizer, the scheduler and a safety checker work at the client.
_ALWAYS = ("tokenizer", "scheduler", "safety_checker", "feature_extractor")
_INDEX = "model_index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the owner grants: every combination of ``steps``, ``guidance`` and ``schedulers`` is one offer.

    ``schedulers``: names as in `SCHEDULERS`, by default the pipeline's own. ``opens``: ``"image"`` (the decoder's
    output alone), ``"latents"`` (the U-Net's outputs and what is made of them, too), or None for the least that
    works. ``clients``: who may use it; None for every client of the cluster.
    """

    steps: Sequence[int] = (50,)
    guidance: Sequence[float] = (7.5,)
    schedulers: Sequence[str] = ()
    height: int | None = None
    width: int | None = None
    images: int = 1
    opens: str | None = None
    clients: Sequence[str] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.schedulers if name not in SCHEDULERS]
        if unknown:
            raise JobError(f"there is no scheduler {unknown[0]!r}; use one of {', '.join(SCHEDULERS)}")
        if self.opens not in (None, *OPENED):
            raise JobError(f"what may be opened is one of {', '.join(OPENED)}, not {self.opens!r}")
        if (self.height is None) != (self.width is None):
            raise JobError("height and width go together; give both, or neither for the model's own")
        if not self.steps or not self.guidance:
            raise JobError("an offer needs at least one number of steps and one guidance scale")


def asked(pipe: Any, request: Request) -> Settings:
    """What a request to a pipeline asks for, its defaults filled in."""
    height, width = image_size(pipe, request)
    return Settings(
        scheduler=type(pipe.scheduler).__name__,
        steps=request.num_inference_steps,
        guidance=float(request.guidance_scale),
        height=height,
        width=width,
        images=request.num_images_per_prompt,
        configured=hashlib.blake2b(configuration(pipe.scheduler), digest_size=16).hexdigest(),
    )


def configuration(scheduler: Any) -> bytes:
    """The values that a scheduler was made with, as JSON. What a configuration carries along for other classes is left
    out."""
    names, config = inspect.signature(type(scheduler).__init__).parameters, scheduler.config
    values = {name: config[name] for name in names if name in config}
    return json.dumps(values, default=_plain, indent=1, sort_keys=True).encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def configuration_file(scheduler: str) -> str:
    """Where the configuration of an offered scheduler, by its class, is among the clients' files."""
    return f"schedulers/{scheduler}.json"


def offered(pipe: SecurePipeline, name: str, terms: Terms, *, replace: bool = False) -> ModelToShare:
    """Plans for all settings, captured and calibrated here in the clear, and the files of the clients; active adapters
    are in the weights of both.

    Raises:
        JobError: terms that contradict each other or that this pipeline cannot serve.
    """
    own = pipe.scheduler
    schedulers = [getattr(diffusers, SCHEDULERS[s]).from_config(own.config) for s in terms.schedulers] or [
        own
    ]
    wanted = list(itertools.product(schedulers, terms.steps, terms.guidance))
    plans, offers = dict[str, Plan](), list[dict[str, Any]]()
    try:
        for scheduler, steps, guidance in tqdm(wanted, desc="planning", unit="offer", delay=2.0, leave=False):
            pipe.scheduler = scheduler
            given = {"num_inference_steps": steps, "guidance_scale": guidance, "height": terms.height,
                     "width": terms.width, "num_images_per_prompt": terms.images}  # fmt: skip
            settings, parts = asked(pipe, Request.of({"prompt": "", **given})), pipe.plans(**given)
            digests = {part: plan.digest() for part, plan in parts.items()}
            plans |= {digests[part]: plan for part, plan in parts.items()}
            offers.append(
                {"settings": asdict(settings), "parts": digests, "reveal": _reveal(parts, terms.opens)}
            )
        pipe.scheduler = schedulers[0]
        # Adapters merged, as in the plans: a component saved beside them would reach clients without its own weights.
        files = _files(merged(pipe._pipe, 1.0), [c for c, part in WEIGHED.items() if part in digests])
        files |= {configuration_file(type(s).__name__): configuration(s) for s in schedulers}
    finally:
        pipe.scheduler = own
    return ModelToShare(
        name=name, plans=plans, offers=offers, files=files, clients=terms.clients, replace=replace
    )


def _reveal(parts: Mapping[str, Plan], opens: str | None) -> list[str]:
    """The parts whose outputs may be opened."""
    if "vae" in parts and opens in (None, "image"):
        return ["vae"]
    if opens == "image":
        raise JobError(
            "the image decoder runs at the client here, which needs the latents for it: "
            "let latents be opened, or keep the weights of the decoder secret"
        )
    return [part for part in parts if part != "text"]


# ---- files -------------------------------------------------------------------------------------------------


def _files(pipe: Any, hidden: Sequence[str]) -> dict[str, bytes]:
    """A folder in diffusers' layout, by relative path; of ``hidden`` components the configuration alone."""
    with tempfile.TemporaryDirectory(prefix="sfumato-") as scratch:
        folder = Path(scratch)
        pipe.save_config(folder)
        for name in (*_ALWAYS, *WEIGHED):
            component = getattr(pipe, name, None)
            if component is None:
                continue
            if name in hidden and hasattr(component, "save_config"):
                component.save_config(folder / name)
            elif name in hidden:
                component.config.save_pretrained(folder / name)
            elif name == "scheduler":
                _save_scheduler(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        return files_in(folder)


def _save_scheduler(scheduler: Any, folder: Path) -> None:
    """Without the values that were its class's own defaults: another scheduler that is made from this one takes its own
    for them, at the client as at the owner."""
    scheduler.save_pretrained(folder)
    path = folder / type(scheduler).config_name
    defaults = scheduler.config.get("_use_default_values", ())
    kept = {k: v for k, v in json.loads(path.read_bytes()).items() if k not in defaults}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True), encoding="utf-8")


# ---- what others learn -------------------------------------------------------------------------------------


def lessons(model: ModelToShare) -> list[tuple[str, str]]:
    """Who learns what by the offer, a row for each."""
    parts = {part: model.plans[digest] for offer in model.offers for part, digest in offer["parts"].items()}
    secret = any(plan.secret_weights for plan in model.plans.values())
    graphs = ", ".join(f"{part} ({len(plan.secret_nodes)} calls)" for part, plan in parts.items())
    seen = _some([name for part, plan in parts.items() for name in in_clear(part, plan)]) or "nothing"
    given = sorted({path.split("/")[0] for path in model.files if path.endswith(".safetensors")})
    got = [f"all of {', '.join(given)}"] if given else []
    if not secret:
        got.append("of the U-Net what its own computing reads, such as the keys and values of the text")
    opened = {part for offer in model.offers for part in offer["reveal"]}
    return [
        ("the parties", f"graph, shapes and calibrated ranges of {graphs}; steps, guidance and timesteps of a run"),
        ("the parties, of the weights", seen if secret else "all of the U-Net"),
        ("clients", "the same; tokenizer, scheduler and configurations"),
        ("clients, of the weights", "; ".join(got) or "nothing beside that"),
        ("opened to the client", f"{_opened(opened)}; and whether values left their ranges"),
        ("not prevented", "learning from results: a client chooses inputs freely, and calls as often as it likes"),
    ]  # fmt: skip


def _opened(parts: Collection[str]) -> str:
    if "unet" not in parts:
        return "the image alone"
    latents = "the latents of every step, and so the outputs of the U-Net"
    return (
        f"the image, and {latents}" if "vae" in parts else f"{latents}: the client decodes the image itself"
    )


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
