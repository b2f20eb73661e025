"""Components of a pipeline that are ours alone: float32 copies that share what they can, adapters merged into them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from sfumato.errors import JobError

__all__ = ["Kept", "adapter_state", "merged", "own"]

_ADAPTED = ("unet", "text_encoder")
Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What was made of some modules last, kept until one of them, or a tensor of theirs, is another or was written
    to."""

    def __init__(self) -> None:
        self._known: tuple[Any, list[Any], list[tuple[int, int]], Made] | None = None

    def get(self, settings: Any, modules: Sequence[nn.Module], make: Callable[[], Made]) -> Made:
        """``make()``, or what it gave for the same ``settings`` and the same ``modules`` in the same state."""
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        # They are kept themselves: an id may come again.
        held, marks = [*modules, *tensors], [_mark(tensor) for tensor in tensors]
        if self._known is not None:
            before, known, at, made = self._known
            same = len(known) == len(held) and all(a is b for a, b in zip(known, held, strict=True))
            if same and before == settings and at == marks:
                return made
        made = make()
        self._known = settings, held, marks, made
        return made

    def forget(self) -> None:
        """Free what was kept."""
        self._known = None


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Version and sum of the words of a tensor. Fusing an adapter writes through ``.data``, which leaves the version as
    it was."""
    values = tensor.detach()
    if values.is_meta:
        return 0, 0
    if values.dtype is torch.float32:
        # Two numbers a word where that is possible: these sums run at the memory's speed.
        paired = values.is_contiguous() and not (values.numel() % 2 or values.storage_offset() % 2)
        values = values.reshape(-1).view(torch.int64) if paired else values.view(torch.int32)
    return 0 if tensor.is_inference() else tensor._version, int(values.sum())


def own(name: str, module: nn.Module) -> nn.Module:
    """A copy in float32 and eval mode, without gradients, on the CPU; tensors that are so already are shared. Shapes
    without values (the meta device) stay such.

    Raises:
        JobError: the weights are quantized.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        weight = isinstance(tensor, nn.Parameter)
        if weight and not tensor.is_floating_point():
            raise JobError(f"the weights of {name} are quantized; load them in float32, float16 or bfloat16")
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        plain = tensor.detach().to("meta" if tensor.is_meta else "cpu", kind)
        memo[id(tensor)] = nn.Parameter(plain, requires_grad=False) if weight else plain
    double = copy.deepcopy(module, memo).eval()
    if name == "text_encoder" and not hasattr(double, "text_model"):
        # transformers 5 has no text_model any more, where diffusers looks for the last norm with clip_skip.
        double.__dict__["text_model"] = double
    return double


def adapter_state(pipe: Any) -> tuple[Any, ...]:
    """What changes when adapters are loaded, weighed, fused, switched or removed; empty without any."""
    return tuple(
        (name, path, tuple(x.active_adapters), tuple(sorted(x.scaling.items())), x.merged, x.disable_adapters)
        for name, path, x in _layers(pipe)
    )


def merged(pipe: Any, scale: float, kept: Kept[dict[str, nn.Module]] | None = None) -> Any:
    """The pipeline with the active adapters (LoRA) in the weights, all times ``scale``: the same values, and plans as
    cheap as without; ``pipe`` itself where there are none.

    Adapters that are fused already are in the weights: as in diffusers, ``scale`` does not reach them. ``kept``: where
    the merged components are kept for the next call. All else is the pipeline's as it is now.
    """
    kept, state = kept or Kept(), adapter_state(pipe)
    if not state:
        kept.forget()
        return pipe
    components = {name: getattr(pipe, name) for name in _ADAPTED if getattr(pipe, name, None) is not None}
    double = copy.copy(pipe)
    double.__dict__ |= kept.get(
        (scale, state),
        list(components.values()),
        lambda: {name: _merged(name, component, scale) for name, component in components.items()},
    )
    return double


def _merged(name: str, module: nn.Module, scale: float) -> nn.Module:
    double = own(name, module)
    for path, layer in list(_tuned(double)):
        if not layer.merged and not layer.disable_adapters:
            layer.scale_layer(scale)
            layer.merge(safe_merge=True)  # in a copy of the weights: ours are those of the unmerged module
        parent, _, child = path.rpartition(".")
        setattr(double.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(double, "peft_config"):
        del double.peft_config
    if hasattr(double, "_hf_peft_config_loaded"):
        vars(double)["_hf_peft_config_loaded"] = False
    return double


def _layers(pipe: Any) -> Iterator[tuple[str, str, Any]]:
    for name in _ADAPTED:
        component = getattr(pipe, name, None)
        if component is not None:
            yield from ((name, path, layer) for path, layer in _tuned(component))


def _tuned(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that peft has put in place of others. Without peft there can be none."""
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from ((path, layer) for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer))
