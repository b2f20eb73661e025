"""A transformers model with what belongs to it, from a folder or the hub, in float32, checked before anything runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from sfumato.errors import JobError
from sfumato.inference.modules import takes
from sfumato.zoo.train.text.replace import REPLACED, load_student

__all__ = ["TASKS", "Loaded", "bare_model", "check_model", "load_model"]

#: Tasks, the class that transformers loads for each, and the ending of the architectures that do it.
TASKS = {
    "sequence-classification": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "masked-lm": ("AutoModelForMaskedLM", "ForMaskedLM"),
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "image-classification": ("AutoModelForImageClassification", "ForImageClassification"),
    "text-encoder": ("CLIPTextModel", ("TextModel", "TextModelWithProjection")),
    "image-encoder": ("CLIPVisionModel", ("VisionModel", "VisionModelWithProjection")),
    "encoder": ("AutoModel", ("EncoderModel", "Model")),
}  # fmt: skip
#: Where the class for a task is not that of the table.
_BY_TYPE = {("t5", "encoder"): "T5EncoderModel", ("mt5", "encoder"): "MT5EncoderModel"}
_REFUSED = {
    "device_map": "the client's part runs on the CPU; leave it out",
    "quantization_config": "quantized weights have no fixed-point words; leave it out",
    "trust_remote_code": "code that comes with a model is not run; leave it out",
}
#: Looks back only: nothing of the padding behind a text is seen.
_LOOKS_BACK = ("clip_text_model",)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its task, and the tokenizer or image processor if there is one."""

    model: Any
    task: str
    tokenizer: Any = None
    processor: Any = None
    name: str = ""

    @property
    def causal(self) -> bool:
        """Whether every token looks back only."""
        return self.model.config.model_type in _LOOKS_BACK or any(
            getattr(module, "is_causal", False) for module in self.model.modules()
        )

    @property
    def images(self) -> bool:
        """Whether the model takes images, not texts."""
        return takes(self.model, "pixel_values") and not takes(self.model, "input_ids")

    @property
    def padding(self) -> str | None:
        """How `OneCall` tells the model what is padding."""
        if not takes(self.model, "attention_mask") or self.causal:
            return None
        if any("relative_attention_bias" in name for name, _ in self.model.named_parameters()):
            return "bias"
        return "keys" if self.window is None else "whole"

    @property
    def window(self) -> int | None:
        """How far layers look, if some do not look at everything."""
        config = self.model.config
        if not getattr(config, "use_sliding_window", True):
            return None
        found = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
        return found if isinstance(found, int) else None

    @property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        config = self.model.config
        found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if not isinstance(found, int):
            return 2048
        # RoBERTa's kind counts positions from behind its padding token.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        return found - offset

    @property
    def pad(self) -> int:
        """The token to pad with."""
        for source in (self.tokenizer, self.model.config):
            found = getattr(source, "pad_token_id", None)
            if isinstance(found, int) and 0 <= found < self.model.config.vocab_size:
                return found
        return 0


def load_model(path_or_id: str | Path, task: str | None = None, **options: Any) -> Loaded:
    """The model behind a folder or a hub id for a task; without one, the task that its architecture is for. A folder
    with ``replaced.json`` holds a student of `sfumato.zoo.train.text`, whose replacements are made.

    Raises:
        JobError: nothing is there, no such task, or a model that is not served; one sentence.
    """
    for name, advice in _REFUSED.items():
        if options.pop(name, None):
            raise JobError(f"from_pretrained takes no {name}: {advice}")
    if task is not None and task not in TASKS:
        raise JobError(f"there is no task {task!r}; use one of {', '.join(TASKS)}")
    source = str(path_or_id)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise JobError(f"{source} is no folder of a transformers model: it has no config.json")
        source = str(folder)
        options.setdefault("local_files_only", True)
    elif source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise JobError(f"there is no model folder {source}")
    where: dict[str, Any] = {
        n: options[n]
        for n in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
        if n in options
    }
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source, **where)
            task = task or _task_of(config, source)
            model = _class_for(config, task).from_pretrained(source, dtype=torch.float32, **options)
            if (folder / REPLACED).is_file():
                model = load_student(folder)[0]
    except JobError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"cannot load the model {source}: {line[:300]}") from error
    check_model(model)
    loaded = Loaded(model.eval(), task, name=Path(source).name)
    if loaded.images:
        return replace(loaded, processor=_optional(transformers.AutoImageProcessor, source, where))
    return replace(loaded, tokenizer=_optional(transformers.AutoTokenizer, source, where))


def bare_model(folder: Path, task: str, title: str) -> Loaded:
    """A model from its configuration alone, without weights, with the tokenizer beside it; code is not run.

    Raises:
        JobError: it is no model of transformers' own.
    """
    where = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder, **where)
            kind = getattr(transformers, (config.architectures or [""])[0], None)
            if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
                raise JobError(
                    f"{title} is of a class that transformers does not have; its owner must share it again"
                )
            model = kind(config).eval()
            if (folder / "generation_config.json").is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(folder, **where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(
            f"the files of {title} are no transformers model's ({type(error).__name__}); its owner must share it again"
        ) from None
    return Loaded(model, task, _optional(transformers.AutoTokenizer, str(folder), where), name=title)


def check_model(model: nn.Module) -> None:
    """Refuse what a plan cannot see.

    Raises:
        JobError: weights that are not floats.
    """
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise JobError(f"the weight {name} is {weight.dtype}; load the model before it is quantized")


def _task_of(config: Any, source: str) -> str:
    named = (config.architectures or [""])[0]
    for task, (_, endings) in TASKS.items():
        if named.endswith(endings):
            return task
    raise JobError(
        f"{source} is a {named or 'model without an architecture'}; give a task, one of {', '.join(TASKS)}"
    )


def _class_for(config: Any, task: str) -> Any:
    if config.model_type == "clip" and task == "encoder":
        raise JobError("a CLIP model has two encoders; use task='text-encoder' or task='image-encoder'")
    named = (config.architectures or [""])[0]
    if named.endswith(TASKS[task][1]) and (config.model_type, task) not in _BY_TYPE:
        found = getattr(transformers, named, None)
        if found is not None:
            return found
    return getattr(transformers, _BY_TYPE.get((config.model_type, task), TASKS[task][0]))


def _optional(kind: Any, source: str, where: dict[str, Any]) -> Any:
    """What may be missing: who gives token ids or pixels needs none."""
    with _quiet(), contextlib.suppress(Exception):
        return kind.from_pretrained(source, **where)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and remarks."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
