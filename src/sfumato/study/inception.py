"""Fréchet distances in the features of InceptionV3, those of published FID, by torch-fidelity (extra ``[eval]``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.kept import keep, place
from sfumato.quality import Features, frechet

__all__ = ["Inception", "inception_distances"]

_BATCH = 25
#: The layer that FID is of (Heusel et al. 2017).
_LAYER = "2048"


class Inception:
    """InceptionV3 with the weights of a file that torch-fidelity publishes (``weights-inception-2015-12-05-*.pth``).

    Raises:
        JobError: there is no torch-fidelity, or the file does not hold its weights.
    """

    def __init__(self, weights: Path) -> None:
        if not weights.is_file():
            raise JobError(f"there is no file {weights}; give torch-fidelity's weights of InceptionV3")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # the latter where torchvision does not fit torch
            raise JobError(
                f'torch-fidelity cannot be imported ({error}); install it with pip install "sfumato[eval]"'
            ) from None
        with weights.open("rb") as file:
            self._digest = hashlib.file_digest(file, "blake2b").hexdigest()
        try:
            with _tensors_alone():
                self._network: Any = FeatureExtractorInceptionV3(
                    "inception", [_LAYER], feature_extractor_weights_path=str(weights)
                )
        except Exception:  # what is no such file fails in torch in many ways
            raise JobError(f"{weights} does not hold torch-fidelity's weights of InceptionV3") from None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, 2048) of images (N, C, H, W) in bytes, grey or coloured; nothing is kept, as private images want it."""
        found = [self._network(part.expand(-1, 3, -1, -1))[0] for part in images.split(_BATCH)]
        return torch.cat(found).contiguous()

    def extract(self, images: Tensor) -> Tensor:
        """(N, 2048) of images (N, C, H, W) in bytes, grey or coloured; kept on disk."""
        seen = hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        facts = {"weights": self._digest, "images": seen, "shape": list(images.shape)}
        file = place("inception", facts, ".safetensors")
        try:
            return load(file.read_bytes())["features"]
        except (OSError, SafetensorError):
            pass
        features = self.features(images)
        keep(file, lambda scratch: save_file({"features": features}, scratch))
        return features


def inception_distances(
    examiner: Inception,
    rows: Mapping[str, Tensor],
    base: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Fréchet distance of each row's images (N, C, H, W), bytes, to as many of the row ``base``.

    The distance grows as images get fewer, and with fewer than 2048 the covariances are singular: compare rows of one
    size. ``progress(done, all)`` counts rows.

    Raises:
        JobError: a row has fewer than two images, or more than ``base``.
    """
    theirs = examiner.extract(rows[base])
    found = {}
    for done, (name, images) in enumerate(rows.items()):
        if len(images) > len(theirs):
            raise JobError(f"{name} has {len(images)} images, {base} only {len(theirs)}; draw as many")
        if progress is not None:
            progress(done, len(rows))
        if name == base:
            found[name] = 0.0
        else:
            ours = Features.of(examiner.extract(images))
            found[name] = frechet(ours, Features.of(theirs[: len(images)]))
    if progress is not None:
        progress(len(rows), len(rows))
    return found


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Nothing but tensors is unpickled: torch-fidelity asks torch for anything that a file holds."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
