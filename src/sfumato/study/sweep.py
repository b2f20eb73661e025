"""Rows of a study, chunk by chunk: each chunk is a file, so an interrupted sweep goes on where it was, also elsewhere.

With Ray (extra ``[ray]``) chunks are drawn on every machine of a cluster; results come back to the one that asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sfumato.errors import JobError
from sfumato.graph.kept import keep
from sfumato.runtime.memory import hold_memory
from sfumato.study.draw import Drawer
from sfumato.study.setting import Setting
from sfumato.study.subject import subject

__all__ = ["Chunk", "Row", "Sweep"]

#: Seeds of studies begin here; training used others.
FIRST_SEED = 50_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images ``start`` to ``start + images`` of a row: prompts in turn, a seed for each.

    ``row`` is a setting as JSON; ``weights``, ``prompts`` and ``clip`` are those of `subject`: what a worker on another
    machine needs.
    """

    subject: str
    row: str
    start: int
    images: int
    backend: str
    weights: str = ""
    prompts: tuple[str, ...] = ()
    clip: str = ""

    @property
    def setting(self) -> Setting:
        return Setting.from_json(json.loads(self.row))

    @property
    def seeds(self) -> list[int]:
        return [FIRST_SEED + self.start + i for i in range(self.images)]


@dataclass(frozen=True, slots=True)
class Row:
    """What was drawn of a setting. ``images`` (N, C, H, W) bytes; ``features`` (N, d) and ``said`` (N,) by the judge,
    ``wanted`` (N,); seconds of all chunks together, and processor seconds."""

    setting: Setting
    backend: str
    images: Tensor
    features: Tensor
    said: Tensor
    wanted: Tensor
    seconds: float
    cpu_s: float

    def first(self, images: int) -> Row:
        """The same of the first so many images, for comparison with a smaller row."""
        cut = {name: getattr(self, name)[:images] for name in ("images", "features", "said", "wanted")}
        share = images / max(1, len(self.images))
        return Row(self.setting, self.backend, **cut, seconds=self.seconds * share, cpu_s=self.cpu_s * share)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Settings of one subject, ``images`` of each, in files under ``folder``.

    ``chunk``: images drawn at once. ``ray``: address of a cluster, ``"auto"``, or None for this process alone.
    ``weights``, ``prompts`` and ``clip``: as in `subject`.
    """

    folder: Path
    subject: str
    images: int
    chunk: int = 100
    backend: str = "plain"
    ray: str | None = None
    weights: str = ""
    prompts: tuple[str, ...] = ()
    clip: str = ""

    def run(
        self, settings: Sequence[Setting], progress: Callable[[int, int], None] | None = None
    ) -> list[Row]:
        """Draw what is missing, then all rows. ``progress(done, all)`` counts chunks.

        Raises:
            JobError: settings that do not fit the subject, or no Ray where one was asked for.
        """
        if self.images % self.chunk:
            raise JobError(
                f"{self.images} images do not divide into chunks of {self.chunk}; choose another number"
            )
        chunks = [self.chunk_of(s, start) for start in range(0, self.images, self.chunk) for s in settings]
        missing = [chunk for chunk in chunks if _read(self.file(chunk)) is None]
        done = len(chunks) - len(missing)
        if progress is not None:
            progress(done, len(chunks))
        drawn = _here(missing) if self.ray is None else _with_ray(missing, self.ray)
        for chunk, data in drawn:
            file = self.file(chunk)
            keep(file, lambda scratch, data=data: scratch.write_bytes(data))  # type: ignore[misc]
            if not file.is_file():
                raise JobError(f"{file} cannot be written; choose another folder")
            done += 1
            if progress is not None:
                progress(done, len(chunks))
        return [self.row(setting) for setting in settings]

    def row(self, setting: Setting) -> Row:
        """What the files hold of a setting.

        Raises:
            JobError: a chunk is missing.
        """
        parts = []
        for start in range(0, self.images, self.chunk):
            part = _read(self.file(self.chunk_of(setting, start)))
            if part is None:
                raise JobError(f"{setting.name}: images from {start} on are not drawn yet")
            parts.append(part)
        joined = {
            name: torch.cat([part[name] for part in parts])
            for name in ("images", "features", "said", "wanted")
        }
        spent = torch.stack([part["spent"] for part in parts]).sum(0)
        return Row(setting, self._backend(setting), **joined, seconds=float(spent[0]), cpu_s=float(spent[1]))

    def file(self, chunk: Chunk) -> Path:
        """Where a chunk is kept."""
        setting, name = chunk.setting, f"{chunk.start:06d}-{chunk.images}.safetensors"
        return self.folder / self._place(setting.network) / f"{setting.digest}-{chunk.backend}" / name

    def _place(self, network: str) -> str:
        """A folder's name: the model's, with a digest of weights that do not come with it; of a pipeline, a digest of
        what it is asked for."""
        if self.prompts:
            facts = json.dumps([self.subject, self.prompts, self.clip])
            return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
        if self.weights or network:
            return f"{self.subject}-{_weights(self.subject, self.weights, network)}"
        return self.subject

    def chunk_of(self, setting: Setting, start: int) -> Chunk:
        """The chunk of a row that begins with image ``start``."""
        row = json.dumps(setting.to_json())
        more = (self.weights, self.prompts, self.clip)
        return Chunk(self.subject, row, start, self.chunk, self._backend(setting), *more)

    def _backend(self, setting: Setting) -> str:
        return "exact" if setting.profile is None else self.backend


@cache
def _weights(name: str, folder: str, network: str) -> str:
    return subject(name, folder, variant=network).digest


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError):
        return None


def drawn(chunk: Chunk, drawer: Drawer) -> bytes:
    """The file of a chunk: bytes of images, and what the judge says of them."""
    model = drawer.subject
    prompts = [(chunk.start + i) % len(model.texts) for i in range(chunk.images)]
    found = drawer.draw(chunk.setting, prompts, chunk.seeds)
    images = (found.images * 255).round().to(torch.uint8).contiguous()
    if model.judge is None:
        features, said = torch.zeros((chunk.images, 0)), torch.zeros(chunk.images, dtype=torch.int64)
    else:
        features, said = model.judge.extract(images), model.judge.classify(images, among=model.labels)
    labels = [model.labels[i] if model.labels else 0 for i in prompts]
    return save(
        {
            "images": images, "features": features.float().contiguous(), "said": said, "wanted": torch.tensor(labels),
            "spent": torch.tensor([found.seconds, found.cpu_s], dtype=torch.float64),
        }
    )  # fmt: skip


class _Workshop:
    """Drawers that are kept from chunk to chunk."""

    def __init__(self) -> None:
        self._drawers: dict[tuple[Any, ...], Drawer] = {}

    def draw(self, chunk: Chunk) -> bytes:
        """The file of a chunk."""
        backend = "plain" if chunk.backend == "exact" else chunk.backend
        drawn_with = (chunk.subject, chunk.weights, chunk.prompts, chunk.clip)
        key = (*drawn_with, chunk.images, backend)
        if key not in self._drawers:
            hold_memory()
            self._drawers[key] = Drawer(subject(*drawn_with), chunk.images, backend)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small batches are slower with more
        try:
            return drawn(chunk, self._drawers[key])
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        for drawer in self._drawers.values():
            drawer.close()
        self._drawers.clear()


_AT_WORKER = _Workshop()


def _draw_at_worker(chunk: Chunk) -> bytes:
    return _AT_WORKER.draw(chunk)


def _here(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
    workshop = _Workshop()
    try:
        for chunk in chunks:
            yield chunk, workshop.draw(chunk)
    finally:
        workshop.close()


def _with_ray(chunks: Sequence[Chunk], address: str) -> Iterator[tuple[Chunk, bytes]]:
    try:
        import ray
    except ImportError:
        raise JobError('Ray is not installed; install it with pip install "sfumato[ray]"') from None
    began = not ray.is_initialized()
    try:
        if began:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except ConnectionError:
        raise JobError(f"there is no Ray cluster at {address!r}; start one with ray start --head") from None
    try:
        remote: Any = ray.remote(num_cpus=1)(_draw_at_worker)
        waiting = {remote.remote(chunk): chunk for chunk in chunks}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for future in ready:
                yield waiting.pop(future), ray.get(future)
    finally:
        if began:
            ray.shutdown()
