"""What a study draws with: a denoiser, its schedule, texts, and who judges the images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.loading import load_pipeline
from sfumato.diffusion.loop import call_kwargs
from sfumato.diffusion.samplers import solver
from sfumato.errors import JobError
from sfumato.graph.kept import weights_digest
from sfumato.study.clip import clip_examiner
from sfumato.zoo import DISTILLED, RECOMMENDED_GUIDANCE, embedded_path
from sfumato.zoo.classes import FEW, NAMES, ClassModel, load_class_model, weights_path
from sfumato.zoo.judge import load_named_judge
from sfumato.zoo.references import Reference, load_reference
from sfumato.zoo.train.evaluate import plain_prompt

__all__ = ["SUBJECTS", "Examiner", "Subject", "has_student", "of_pipeline", "subject"]

#: Those that come with sfumato.
SUBJECTS = ("embedded", *NAMES)
_CLASSES = 20
_USUAL_GUIDANCE = 7.5


class Examiner(Protocol):
    """Who judges images (N, C, H, W) in [0, 1]."""

    def extract(self, images: Tensor) -> Tensor:
        """Features (N, d)."""

    def classify(self, images: Tensor, *, among: Sequence[int]) -> Tensor:
        """Class numbers (N,), each the likeliest of these."""


class _Doubled(nn.Module):
    """A denoiser by class on a sample of batch B with texts of batch 2B."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.network(torch.cat([sample, sample]), timestep, encoder_hidden_states)
        return output


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model and what belongs to it.

    ``single``, ``guided``: the denoiser for one half, and for both; called with (sample, timestep,
    encoder_hidden_states). ``texts``: (prompts, tokens, width) in the order of ``labels``, the judge's class of each
    prompt (empty where it has none); ``null``: (1, tokens, width). ``shape``: of one sample. ``decode``: samples to
    images (N, C, H, W) in [0, 1]. ``guidance``: None for a model that is sampled without. ``asked``: (prompts, d), what
    the judge says of the prompts themselves, where it is CLIP. ``steps``: the only number that a student was taught.
    """

    name: str
    single: nn.Module
    guided: nn.Module
    scheduler: Any
    texts: Tensor
    null: Tensor
    shape: tuple[int, ...]
    guidance: float | None
    decode: Callable[[Tensor], Tensor] = field(repr=False)
    labels: tuple[int, ...] = ()
    judge: Examiner | None = None
    reference: Reference | None = None
    asked: Tensor | None = None
    variant: str = ""
    tuning_cpu_s: float | None = None
    folder: str = ""
    steps: int | None = None

    def of(self, variant: str) -> Subject:
        """The same with another network of its kind, such as one that was tuned; empty for its own.

        Raises:
            JobError: there is none of this name.
        """
        if variant == self.variant:
            return self
        return subject(self.name, self.folder, variant=variant)

    @property
    def digest(self) -> str:
        """16 hex digits of the weights: what draws, the texts, and what judges."""
        judge: Any = self.judge
        modules = [self.single, *([judge] if isinstance(judge, nn.Module) else [])]
        found = hashlib.blake2b(weights_digest(*modules).encode(), digest_size=8)
        for tensor in (self.texts, *([] if self.reference is None else [self.reference.mean])):
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The exact network on (B, *shape), with texts of batch B or 2B; in float32."""
        network = self.single if len(text) == len(sample) else self.guided
        with torch.no_grad():
            output: Tensor = network(sample, **call_kwargs(timestep, text, None))
        return output

    def text(self, prompts: Sequence[int], *, guided: bool) -> Tensor:
        """Texts of these prompts, after as many empty ones if ``guided``."""
        towards = self.texts[list(prompts)]
        return torch.cat([self.null.expand(len(prompts), -1, -1), towards]) if guided else towards

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(seeds, *shape): what a generator of each seed draws first."""
        return torch.stack(
            [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )


@cache
def subject(
    name: str, folder: str = "", prompts: tuple[str, ...] = (), clip: str = "", variant: str = ""
) -> Subject:
    """One of :data:`SUBJECTS`, or with ``prompts`` any pipeline by its folder or hub id. ``folder``: of weights that do
    not come with sfumato; ``clip``: a CLIP model, by folder or hub id, that examines a pipeline's images; ``variant``:
    another network of a model by class.

    Raises:
        JobError: there is none of this name, or its weights are not here.
    """
    if prompts:
        pipe = load_pipeline(name, "StableDiffusionPipeline")
        made = of_pipeline(name, pipe, list(prompts), guidance=_USUAL_GUIDANCE)
        if not clip:
            return made
        examiner = clip_examiner(clip)
        return replace(made, judge=examiner, asked=examiner.of_prompts(list(prompts)))
    if name == "embedded" and variant in ("", "distilled"):
        return _embedded(variant)
    if variant and name not in NAMES:
        raise JobError(
            f"{name} has no other network {variant!r}; only the models {', '.join(NAMES)} have some"
        )
    if name not in NAMES:
        raise JobError(
            f"there is no model {name!r} for studies; use one of {', '.join(SUBJECTS)}, or a pipeline and --prompts"
        )
    return _by_class(load_class_model(name, _own(name, folder, variant), variant), folder)


def has_student(name: str, folder: str = "") -> bool:
    """Whether the weights of a model's few-step student, which is made by command, are here."""
    return weights_path(name, _own(name, folder, FEW), FEW).is_file()


def _own(name: str, folder: str, variant: str = "") -> Path | None:
    """The folder, if it has weights of this name; else those that come with sfumato are taken."""
    return Path(folder) if folder and weights_path(name, Path(folder), variant).is_file() else None


def _embedded(variant: str) -> Subject:
    pipe = load_pipeline(DISTILLED if variant else str(embedded_path()), "StableDiffusionPipeline")
    prompts = [plain_prompt(label) for label in range(_CLASSES)]
    made = of_pipeline("embedded", pipe, prompts, guidance=RECOMMENDED_GUIDANCE)
    return replace(
        made, labels=tuple(range(_CLASSES)), judge=load_named_judge("grey"), reference=load_reference("embedded"),
        guidance=None if variant else made.guidance, variant=variant,
    )  # fmt: skip


def of_pipeline(name: str, pipe: Any, prompts: list[str], *, guidance: float) -> Subject:
    """The denoiser of a diffusers pipeline, with these prompts and DDIM; without a judge.

    Raises:
        JobError: it does not predict noise, or cannot be read as DDIM.
    """
    if pipe.scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        raise JobError(f"studies need a model that predicts noise; {name} does not")
    with torch.no_grad():
        texts, blank = pipe.encode_prompt(prompts, torch.device("cpu"), 1, True)
    unet = pipe.unet.eval()
    size = unet.config.sample_size
    vae = pipe.vae.eval()

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            image: Tensor = vae.decode(latents.float() / vae.config.scaling_factor).sample
        return (image / 2 + 0.5).clamp(0, 1)

    return Subject(
        name, Denoiser(unet, guided=False).eval(), Denoiser(unet, guided=True).eval(),
        solver("ddim", pipe.scheduler.config), texts.detach(), blank[:1].detach(),
        (unet.config.in_channels, size, size), guidance, decode,
    )  # fmt: skip


def _by_class(model: ClassModel, folder: str) -> Subject:
    kind = model.kind
    if kind.latent:
        inner = subject("embedded").decode
    else:

        def inner(sample: Tensor) -> Tensor:
            return (sample.float() / 2 + 0.5).clamp(0, 1)

    # Features are compared within one judge: both from the folder, or both from sfumato.
    beside = Path(folder) if kind.judge == "cifar10" and folder else None
    return Subject(
        model.name, model.network.eval(), _Doubled(model.network).eval(), solver("ddim", kind.scheduler),
        model.embeddings.detach(), model.null.detach(), kind.shape, kind.guidance, inner, kind.labels,
        load_named_judge(kind.judge, beside), load_reference(kind.reference, beside), None, model.variant,
        model.tuning_cpu_s, folder, model.steps,
    )  # fmt: skip
