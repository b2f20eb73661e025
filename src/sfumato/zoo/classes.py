"""Models that draw by class: small enough to study, of three kinds (pixel U-Net, colour U-Net, transformer)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import JobError
from sfumato.zoo.dit import DiT
from sfumato.zoo.unet import ClassUNet

__all__ = [
    "FEW",
    "KINDS",
    "NAMES",
    "TUNED",
    "ClassModel",
    "Kind",
    "load_class_model",
    "save_class_model",
    "student_kind",
    "weights_path",
]

_WEIGHTS = Path(__file__).resolve().parent / "weights"
#: A variant's name before that of the profile whose functions it was tuned to.
TUNED = "tuned-"
#: The variant that draws in a few steps, one call each (`sfumato.zoo.train.few`).
FEW = "few"
#: Where a file keeps the processor seconds of tuning; and a student's steps and the timestep of the last.
_SPENT, _STEPS, _OFFSET = "tuning_cpu_s", "steps", "steps_offset"
_LINEAR = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
#: The same for networks so small that noise which they predict samples none of the digits (private-diffusion.md 3.2,
#: trap 2, and here): at the first steps an image is the sample less its noise, divided by 0.007. They predict v instead
#: (Salimans and Ho 2022), in which nothing is divided. Nor clipped: DDIM's clip takes errors of one side from a black
#: background and keeps its noise, which leaves a grey haze (100 digits of 50 steps: Frechet distance 62.7, not 14.0).
_VELOCITY = {**_LINEAR, "prediction_type": "v_prediction", "clip_sample": False}
#: Stable Diffusion's, as the embedded pipeline has it.
_SCALED = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """What a model is, without its weights.

    ``shape`` of one sample; ``labels``: the judge's class of each class; ``guidance``: recommended weight of the class,
    None to sample without; ``latent``: samples are latents of the embedded pipeline's image decoder; ``reference``: the
    real data that its images are compared with (`references`).
    """

    network: Callable[[], Any]
    shape: tuple[int, int, int]
    labels: tuple[int, ...]
    scheduler: Mapping[str, Any]
    guidance: float | None
    judge: str
    reference: str
    latent: bool = False


#: CipherDM's network on digits 0 and 1 (private-diffusion.md 3.3), with Mish, and on all digits; a colour U-Net on
#: CIFAR-10; a transformer on the embedded pipeline's latents and classes.
KINDS: Mapping[str, Kind] = {
    "mnist01": Kind(ClassUNet, (1, 28, 28), (0, 1), _VELOCITY, None, "grey", "mnist01"),
    "mnist01-mish": Kind(
        lambda: ClassUNet(activation="mish"), (1, 28, 28), (0, 1), _VELOCITY, None, "grey", "mnist01"
    ),
    "mnist10": Kind(
        lambda: ClassUNet(base=8, groups=4, times=(16, 32)), (1, 28, 28), tuple(range(10)), _VELOCITY, None, "grey",
        "mnist10",
    ),
    "cifar10": Kind(
        lambda: ClassUNet(3, 16, (1, 2, 4), 1, (2,), 8, (32, 64)), (3, 32, 32), tuple(range(10)), _LINEAR, 2.0,
        "cifar10", "cifar10",
    ),
    "dit": Kind(DiT, (4, 8, 8), tuple(range(20)), _SCALED, 3.0, "grey", "embedded", latent=True),
}  # fmt: skip
NAMES = tuple(KINDS)


@dataclass(frozen=True, slots=True)
class ClassModel:
    """A trained model of a `Kind`. ``embeddings``: (classes, 1, width); ``null``: (1, 1, width), for no class.

    ``variant``: empty, or which other network of the same kind it is, such as ``"tuned-cipherdm"``, one that was tuned
    to the functions of that profile; ``tuning_cpu_s``: processor seconds of that. ``steps``: of a student, the only
    number that it was taught.
    """

    name: str
    kind: Kind
    network: nn.Module = field(repr=False)
    embeddings: Tensor = field(repr=False)
    variant: str = ""
    tuning_cpu_s: float | None = None
    steps: int | None = None

    @property
    def null(self) -> Tensor:
        return torch.zeros_like(self.embeddings[:1])


def student_kind(kind: Kind, steps_offset: int) -> Kind:
    """The kind of a student (``FEW``): guidance is in it, its steps are DDIM's, the last at the timestep
    ``steps_offset``."""
    return replace(kind, scheduler={**kind.scheduler, "steps_offset": steps_offset}, guidance=None)


def weights_path(name: str, folder: Path | None = None, variant: str = "") -> Path:
    """The file of a model's weights; in ``folder``, or where sfumato keeps those that come with it."""
    full = f"{name}-{variant}" if variant else name
    return (folder or _WEIGHTS) / f"{full}.safetensors"


def load_class_model(name: str, folder: Path | None = None, variant: str = "") -> ClassModel:
    """
    Raises:
        JobError: there is no such model, or its weights are not here or not its own.
    """
    if name not in KINDS:
        raise JobError(f"there is no model {name!r}; use one of {', '.join(NAMES)}")
    kind, path = KINDS[name], weights_path(name, folder, variant)
    if not path.is_file():
        raise JobError(f"the weights of {path.stem} do not come with sfumato; {_command(name, variant)}")
    tensors, metadata = _read(path)
    state = {key: value.float() for key, value in tensors.items()}
    network = kind.network()
    try:
        embeddings = state.pop("embeddings")
        network.load_state_dict(state)
        spent = float(metadata[_SPENT]) if _SPENT in metadata else None
        steps = int(metadata[_STEPS]) if variant == FEW else None
        kind = student_kind(kind, int(metadata[_OFFSET])) if variant == FEW else kind
    except (KeyError, RuntimeError, ValueError):
        raise JobError(f"{path} does not hold the weights of {path.stem}; train them anew") from None
    return ClassModel(name, kind, network.eval(), embeddings, variant, spent, steps)


def _command(name: str, variant: str) -> str:
    """How to make weights that are not there."""
    if variant == FEW:
        return f"train them with python -m sfumato.zoo.train.few --model {name} --weights FOLDER --out FOLDER"
    profile = variant.removeprefix(TUNED)
    if profile == variant:
        return f"train them with python -m sfumato.zoo.train --classes {name} --data FOLDER --out FOLDER"
    command = "python -m sfumato.study.tune"
    return f"tune them with {command} --classes {name} --profile {profile} --data FOLDER --out FOLDER"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_class_model(model: ClassModel, folder: Path) -> Path:
    """Write the weights in half precision; the file."""
    state = {**model.network.state_dict(), "embeddings": model.embeddings}
    path = weights_path(model.name, folder, model.variant)
    metadata = {} if model.tuning_cpu_s is None else {_SPENT: f"{model.tuning_cpu_s:.1f}"}
    if model.steps is not None:
        metadata |= {_STEPS: str(model.steps), _OFFSET: str(model.kind.scheduler["steps_offset"])}
    save_file(
        {key: value.detach().half().contiguous() for key, value in state.items()}, path, metadata or None
    )
    return path
