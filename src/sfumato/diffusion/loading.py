"""A StableDiffusionPipeline from a folder or the hub, in float32, checked before anything runs."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sfumato.diffusion.denoiser import check_unet
from sfumato.errors import JobError
from sfumato.zoo import embedded_path

__all__ = ["check_pipeline", "load_pipeline", "weights_digest"]

_SERVED = "StableDiffusionPipeline"


def load_pipeline(path_or_id: str | Path, **options: Any) -> Any:
    """The diffusers pipeline behind a folder, a hub id or ``"embedded"``; half precision is widened to
    float32.

    Raises:
        JobError: nothing is there, or it is no StableDiffusionPipeline (one sentence).
    """
    source = str(embedded_path()) if str(path_or_id) == "embedded" else str(path_or_id)
    folder = Path(source)
    index = folder / "model_index.json"
    if folder.is_dir() and not index.is_file():
        raise JobError(f"{source} is not a pipeline folder: it has no model_index.json")
    if str(path_or_id) == "embedded" and not index.is_file():
        raise JobError(
            "this installation has no embedded model; give the folder or hub id of a StableDiffusionPipeline"
        )
    if not folder.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise JobError(f"there is no pipeline folder {source}")
    if index.is_file():
        named = _class_name(index)
        if named != _SERVED:
            raise JobError(
                f"{source} holds a {named}; SecurePipeline serves {_SERVED} (Stable Diffusion 1.x and 2.x)"
            )
        options.setdefault("variant", _variant(folder))
        options.setdefault("local_files_only", True)
    # Said outright, because diffusers otherwise recommends accelerate at length.
    options.setdefault("low_cpu_mem_usage", importlib.util.find_spec("accelerate") is not None)
    try:
        with _silent() if str(path_or_id) == "embedded" else contextlib.nullcontext():
            pipe = _pipeline_class().from_pretrained(source, **options)
    except JobError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"cannot load the pipeline {source}: {line[:300]}") from error
    return check_pipeline(pipe)


def check_pipeline(pipe: Any) -> Any:
    """The pipeline with every component in float32 and eval mode.

    Raises:
        JobError: one sentence on what this pipeline needs that is not served.
    """
    name = type(pipe).__name__
    if name != _SERVED:
        raise JobError(f"a {name} cannot run securely yet; SecurePipeline serves {_SERVED}")
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            if any(p.is_floating_point() and p.dtype is not torch.float32 for p in _tensors(component)):
                component.float()
            component.eval().requires_grad_(False)
    check_unet(pipe.unet)
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise JobError(
            f"this U-Net takes {pipe.unet.config.in_channels} channels, more than the latents' "
            f"{pipe.vae.config.latent_channels}: inpainting and image conditioning are not served yet"
        )
    return pipe


def weights_digest(*modules: nn.Module) -> str:
    """16 hex digits of the modules' configuration and weights."""
    state = hashlib.blake2b(digest_size=8)
    for module in modules:
        config: Any = module.config
        state.update(
            repr(sorted((config if isinstance(config, dict) else config.to_dict()).items())).encode()
        )
        for name, tensor in module.state_dict().items():
            state.update(name.encode())
            state.update(tensor.detach().contiguous().cpu().view(torch.uint8).reshape(-1).numpy().tobytes())
    return state.hexdigest()


def _pipeline_class() -> Any:
    """StableDiffusionPipeline, imported without remarks on image processors that nobody uses."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        from diffusers import StableDiffusionPipeline
    finally:
        transformers_logging.set_verbosity(level)
    return StableDiffusionPipeline


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the libraries' progress bars, for a model that loads in a moment."""
    kept = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in kept:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in kept:
            library.enable_progress_bar()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _class_name(index: Path) -> str:
    try:
        return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    except (OSError, ValueError):
        raise JobError(f"{index} cannot be read as JSON") from None


def _variant(folder: Path) -> str | None:
    """``fp16`` where the folder holds only such weights."""
    names = [p.name for p in (folder / "unet").glob("*") if p.suffix in (".safetensors", ".bin")]
    plain = [name for name in names if ".fp16." not in name and ".fp16-" not in name]
    return "fp16" if names and not plain else None
