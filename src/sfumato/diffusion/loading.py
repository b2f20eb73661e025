"""A StableDiffusionPipeline from a folder or the hub, in float32, checked before anything runs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging as transformers_logging

from sfumato.diffusion.adapters import own
from sfumato.diffusion.denoiser import check_unet
from sfumato.errors import JobError
from sfumato.zoo import DISTILLED, distilled_weights, embedded_path

__all__ = [
    "check_class",
    "check_pipeline",
    "load_clip",
    "load_pipeline",
    "own_component",
    "without_bars",
]

_SERVED = "StableDiffusionPipeline"
#: Other pipelines of the same parts and the same call, which run as a StableDiffusionPipeline.
_ALIKE = (_SERVED, "LatentConsistencyModelPipeline")
#: Those that start from a picture, which take the parts of all.
_PICTURED = ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
_FOR = f"SecurePipeline serves {_SERVED} (Stable Diffusion 1.x, 2.x and models distilled from them)"
#: What others need, by a part of the name: the first that fits.
_NEEDS = {
    "ControlNet": "a control image and a second network",
    "Adapter": "a control image and a second network",
    "XL": "two text encoders and embeddings of the image's size",
    "Kandinsky": "image embeddings of a prior",
    "Audio": "a decoder to sound",
    "Video": "a network over many frames",
    "AnimateDiff": "a network over many frames",
    "StableDiffusion3": "a transformer in place of the U-Net",
    "Flux": "a transformer in place of the U-Net",
    "PixArt": "a transformer in place of the U-Net",
    "Sana": "a transformer in place of the U-Net",
    "Transformer": "a transformer in place of the U-Net",
    "Upscale": "a low-resolution picture beside the noise",
    "Depth2Img": "a depth map beside the noise",
    "InstructPix2Pix": "a picture beside the noise",
    "Img2Img": "a picture to start from: use SecureImg2ImgPipeline",
    "Inpaint": "a picture and a mask: use SecureInpaintPipeline",
}
_REFUSED = {
    "subfolder": "a pipeline has a folder of its own; give its path",
    "custom_pipeline": "code of a community pipeline is not run; load it with diffusers and use from_pipe",
    "device_map": "the client's part runs on the CPU; leave it out",
    "quantization_config": "quantized weights have no fixed-point words; leave it out",
}
#: Options that say where a hub id's files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def load_pipeline(path_or_id: str | Path, served: str = _SERVED, **options: Any) -> Any:
    """The diffusers pipeline ``served`` behind a folder, a hub id, ``"embedded"`` or ``"embedded-distilled"``,
    checked as by `check_pipeline`.

    Raises:
        JobError: nothing is there, or it is no StableDiffusionPipeline (one sentence).
    """
    for name, advice in _REFUSED.items():
        if options.pop(name, None) is not None:
            raise JobError(f"from_pretrained takes no {name}: {advice}")
    embedded = str(path_or_id) in ("embedded", DISTILLED)
    source = str(embedded_path()) if embedded else str(path_or_id)
    folder = Path(source).expanduser()
    index = folder / "model_index.json"
    if embedded and not index.is_file():
        raise JobError(
            "this installation has no embedded model; give the folder or hub id of a StableDiffusionPipeline"
        )
    if folder.is_file():
        raise JobError(
            f"{source} is a single file; load it with {_SERVED}.from_single_file and use from_pipe"
        )
    if folder.is_dir() and not index.is_file():
        raise JobError(f"{source} is not a pipeline folder: it has no model_index.json")
    if not folder.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise JobError(f"there is no pipeline folder {source}")
    if index.is_file():
        source = str(folder)
        check_class(_class_name(index), source, served)
        options.setdefault("variant", _variant(folder))
        options.setdefault("local_files_only", True)
    # Said outright, because diffusers otherwise recommends accelerate at length.
    options.setdefault("low_cpu_mem_usage", importlib.util.find_spec("accelerate") is not None)
    made = _pipeline_class(served)
    try:
        with without_bars() if embedded else contextlib.nullcontext():
            if not index.is_file():
                where = {name: options[name] for name in _WHERE if options.get(name) is not None}
                found = Path(hf_hub_download(source, index.name, **where))
                check_class(_class_name(found), source, served)
            pipe = made.from_pretrained(source, **options)
            if str(path_or_id) == DISTILLED:
                pipe.unet.load_state_dict(load_file(distilled_weights()))
                pipe.register_to_config(_name_or_path=DISTILLED)
    except JobError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"cannot load the pipeline {source}: {line[:300]}") from error
    return check_pipeline(pipe, served)


def check_class(named: Any, source: str, served: str = _SERVED) -> None:
    """Refuse a pipeline by the name of its class.

    Raises:
        JobError: one sentence on what it needs that is not served.
    """
    if named in _ALIKE or (named in _PICTURED and served in _PICTURED):
        return
    # A community pipeline names a module of its own beside the class.
    name = str(named[-1] if isinstance(named, list) and named else named)
    if isinstance(named, list) or not hasattr(diffusers, name):
        raise JobError(f"{source} holds a {name}, a pipeline that diffusers does not have; {_FOR}")
    needs = next((f", which needs {what}" for part, what in _NEEDS.items() if part in name), "")
    raise JobError(f"{source} holds a {name}{needs}; {_FOR}")


def check_pipeline(pipe: Any, served: str = _SERVED) -> Any:
    """A pipeline of our own with every component in float32 and eval mode; that of the caller stays as it is.

    Memory is shared: a component costs memory again only where it was not in float32.

    Raises:
        JobError: one sentence on what this pipeline needs that is not served.
    """
    name = type(pipe).__name__
    if not hasattr(pipe, "components"):
        raise JobError(f"a {name} is no diffusers pipeline; {_FOR}")
    check_class(name, "this object", served)
    if name != served:
        pipe = _as_served(pipe, served)
    for part in ("unet", "vae", "scheduler", "tokenizer"):
        if getattr(pipe, part, None) is None:
            raise JobError(f"this pipeline has no {part}; give a whole {_SERVED}")
    double = copy.copy(pipe)
    for part, component in pipe.components.items():
        double.__dict__[part] = own_component(part, component)
    check_unet(double.unet)
    channels, own_channels = double.unet.config.in_channels, double.vae.config.latent_channels
    if channels not in (own_channels, *([2 * own_channels + 1] if "Inpaint" in served else [])):
        raise JobError(
            f"this U-Net takes {channels} channels, the latents have {own_channels}: that of an inpainting model runs "
            "in SecureInpaintPipeline, other image conditions are not served"
        )
    return double


def own_component(part: str, component: Any) -> Any:
    """A copy of one component that may be changed without changing the caller's."""
    return own(part, component) if isinstance(component, nn.Module) else copy.deepcopy(component)


def _as_served(pipe: Any, served: str) -> Any:
    """The same components as another of diffusers' pipelines."""
    needs = bool(pipe.config.get("requires_safety_checker", True)) and pipe.safety_checker is not None
    # The constructor would change the configuration of the caller's scheduler (clip_sample, steps_offset).
    given = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _pipeline_class(served)(**given, requires_safety_checker=needs)
    made.scheduler = pipe.scheduler
    return made


def load_clip(path_or_id: str) -> tuple[Any, Any]:
    """(CLIP model, its tokenizer) of a folder or a hub id, in float32."""
    from transformers import AutoTokenizer, CLIPModel

    with without_bars():
        return CLIPModel.from_pretrained(path_or_id).float(), AutoTokenizer.from_pretrained(path_or_id)


def _pipeline_class(name: str) -> Any:
    """A class of diffusers, imported without remarks on image processors that nobody uses."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return getattr(diffusers, name)
    finally:
        transformers_logging.set_verbosity(level)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
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


def _class_name(index: Path) -> Any:
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        raise JobError(f"{index} cannot be read as JSON") from None


def _variant(folder: Path) -> str | None:
    """``fp16`` where the folder holds only such weights."""
    names = [p.name for p in (folder / "unet").glob("*") if p.suffix in (".safetensors", ".bin")]
    plain = [name for name in names if ".fp16." not in name and ".fp16-" not in name]
    return "fp16" if names and not plain else None
