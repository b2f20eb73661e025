"""Training of the models that draw by class."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional

from .. import embedded_path
from ..classes import KINDS, ClassModel, Kind, save_class_model
from ..judge import JUDGES, ColourJudge, load_named_judge, save_judge
from ..references import Reference, reference_of, save_references
from .data import SETS, DataError, load_split
from .loop import Indices, Step, channels_last, run
from .unet import LATENTS
from .vae import encode_all

__all__ = [
    "Labelled",
    "cifar10",
    "denoising",
    "samples_of",
    "train_classes",
    "train_class_model",
    "train_colour_judge",
    "write_references",
]

DROP = 0.1
BATCH = 128


class Labelled(nn.Module):
    """A network and its table of classes, as they are trained."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.network = kind.network()
        self.table = nn.Embedding(len(kind.labels), self.network.label_width)
        nn.init.normal_(self.table.weight, std=0.02)

    @torch.no_grad()
    def copying(self, known: ClassModel) -> Self:
        """This one, with the weights of a trained model of its kind."""
        self.network.load_state_dict(known.network.state_dict())
        self.table.weight.copy_(known.embeddings[:, 0])
        return self

    def forward(self, noisy: Tensor, times: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
        label = self.table(labels) * kept[:, None]
        found: Tensor = self.network(noisy, times, label[:, None])
        return found


def cifar10(data: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) bytes and labels (N,) of CIFAR-10's files ``cifar10_train*.npz`` or ``cifar10_test*.npz``.

    Raises:
        DataError: there is no such file.
    """
    files = sorted((data / "cifar10").glob(f"cifar10_{'train' if train else 'test'}*.npz"))
    if not files:
        raise DataError(f"no CIFAR-10 files in {data / 'cifar10'}")
    held = [np.load(file) for file in files]
    images = torch.from_numpy(np.concatenate([part["images"] for part in held])).permute(0, 3, 1, 2)
    return images.contiguous(), torch.from_numpy(np.concatenate([part["labels"] for part in held])).long()


def samples_of(name: str, data: Path, out: Path) -> tuple[Tensor, Tensor]:
    """What a model learns: (N, *shape) bytes or latents, and the index of the class of each."""
    kind = KINDS[name]
    if name == "cifar10":
        return cifar10(data, train=True)
    split = load_split(data, train=True)
    if kind.latent:
        return torch.load(out / LATENTS, weights_only=True), split.labels
    chosen = split.labels < len(kind.labels)
    return split.images[chosen][:, :, 2:30, 2:30].contiguous(), split.labels[chosen]


def denoising(name: str, model: Labelled, data: Path, out: Path, batch: int | None = None) -> Step:
    """The training step of a model: its error in predicting noise (or v, where the kind says so) on a random batch,
    classes left out one time in ten. ``batch``: None for the usual one.

    Raises:
        DataError: the images are not in ``data``.
    """
    kind = KINDS[name]
    samples, labels = samples_of(name, data, out)
    draw = Indices(len(labels), batch or (BATCH if kind.latent else BATCH // 2), seed=3)
    alphas = DDIMScheduler(**kind.scheduler).alphas_cumprod
    mirrored, velocity = name == "cifar10", "prediction_type" in kind.scheduler

    def step(_: int) -> Tensor:
        chosen = draw()
        clean = samples[chosen]
        clean = clean.float() if kind.latent else clean.float() / 127.5 - 1.0
        if mirrored:
            flip = (torch.rand(len(clean)) < 0.5)[:, None, None, None]
            clean = torch.where(flip, clean.flip(-1), clean)
        noise, times = torch.randn_like(clean), torch.randint(0, len(alphas), (len(clean),))
        signal = alphas[times][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        kept = (torch.rand(len(clean)) >= DROP).float()
        wanted = signal.sqrt() * noise - (1 - signal).sqrt() * clean if velocity else noise
        guess = model(noisy.contiguous(memory_format=torch.channels_last), times, labels[chosen], kept)
        return (guess - wanted).square().mean()

    return step


def train_class_model(name: str, data: Path, out: Path, minutes: float) -> Path:
    """Train; the file of the averaged weights.

    Goes on from a checkpoint in ``out``; a transformer needs the cached latents there.
    """
    kind = KINDS[name]
    torch.manual_seed(0)
    model = channels_last(Labelled(kind))
    step = denoising(name, model, data, out)
    average = run(name, model, step, out / f"{name}.ckpt", minutes, peak=2e-3, decay=0.999)
    model.load_state_dict(average.state)
    return save_class_model(
        ClassModel(name, kind, model.network.eval(), model.table.weight[:, None].detach()), out
    )


def train_colour_judge(data: Path, out: Path, minutes: float) -> Path:
    """Train the judge of CIFAR-10's classes, print its accuracy on the test files; the file of its weights."""
    images, labels = cifar10(data, train=True)
    torch.manual_seed(0)
    judge = channels_last(ColourJudge())
    draw = Indices(len(labels), BATCH, seed=4)

    def step(_: int) -> Tensor:
        chosen = draw()
        x = functional.pad(judge.prepared(images[chosen]), (3, 3, 3, 3), mode="reflect")
        dy, dx = torch.randint(0, 7, (2,)).tolist()
        x = x[:, :, dy : dy + 32, dx : dx + 32]
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        scores = judge(x.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(scores, labels[chosen], label_smoothing=0.1)

    average = run(
        "judge-cifar10", judge, step, out / "judge-cifar10.ckpt", minutes, peak=3e-3, weight_decay=2e-2
    )
    judge.load_state_dict(average.state)
    seen, wanted = cifar10(data, train=False)
    right = float((judge.classify(seen) == wanted).float().mean())
    print(f"judge of CIFAR-10: {100 * right:.1f} % of {len(wanted)} test images", flush=True)
    path = out / JUDGES["cifar10"][1]
    save_judge(judge, path)
    return path


def write_references(data: Path, out: Path, judges: Path | None = None) -> Path:
    """Features of the real training images of every model whose data and judge are there; the file."""
    found: dict[str, Reference] = {}
    if (data / SETS[0]).is_dir():
        split = load_split(data, train=True)
        features = load_named_judge("grey").extract(split.images)
        for name, last in (("mnist01", 2), ("mnist10", 10), ("embedded", 20)):
            found[name] = reference_of(features[split.labels < last])
    if (data / "cifar10").is_dir() and judges is not None:
        judge = load_named_judge("cifar10", judges)
        found["cifar10"] = reference_of(judge.extract(cifar10(data, train=True)[0]))
    return save_references(found, out)


def train_classes(names: list[str], data: Path, out: Path, minutes: float) -> None:
    """Train these models, ``minutes`` each, with what they need; then write the features of real images."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if KINDS[name].latent:
            vae = AutoencoderKL.from_pretrained(embedded_path() / "vae").eval()
            with torch.no_grad():
                encode_all(vae, load_split(data, train=True).images, out / LATENTS)
        print(f"saved {train_class_model(name, data, out, minutes)}", flush=True)
    if "cifar10" in names:
        train_colour_judge(data, out, minutes / 4)
    write_references(data, out, out if "cifar10" in names else None)
