"""What scripts written for diffusers do to a pipeline beside calling it: the same names, never a way into the clear."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import nn

from sfumato.diffusion.denoiser import check_unet
from sfumato.diffusion.loading import own_component
from sfumato.errors import JobError

__all__ = ["Surface"]

#: They save memory of an accelerator or choose a kernel; nothing of it applies to shares.
_NOTHING_TO_DO = frozenset((
    "disable_attention_slicing", "disable_freeu", "disable_xformers_memory_efficient_attention",
    "enable_attention_slicing", "enable_group_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload",
    "enable_xformers_memory_efficient_attention", "maybe_free_model_hooks", "reset_device_map", "set_attention_slice",
    "set_use_memory_efficient_attention_xformers",
))  # fmt: skip
_REFUSED = {
    "enable_freeu": "it filters secret features by frequency; leave it out",
    "load_ip_adapter": "image prompts are not served yet; use a text prompt",
}


class Surface:
    """Attributes and methods of the diffusers pipeline ``_pipe``, which is this object's own. An attribute that the
    pipeline has (a component, a setting) is read and set there."""

    _pipe: Any

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """This pipeline. Nothing is moved or narrowed: the client's part runs in float32 on the CPU.

        Raises:
            JobError: another device than the CPU.
        """
        for given in (*args, *kwargs.values()):
            if isinstance(given, str | torch.device) and torch.device(given).type != "cpu":
                raise JobError(f"the client's part runs on the CPU; leave .to({str(given)!r}) out")
        return self

    @property
    def interrupt(self) -> bool:
        """Set by a callback (here, or as ``_interrupt``) to stop after the current step."""
        return bool(self._pipe.__dict__.get("_interrupt", False))

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._pipe._interrupt = value

    def __getattr__(self, name: str) -> Any:
        pipe = self.__dict__.get("_pipe")
        if pipe is None or (name.startswith("_") and name not in pipe.__dict__):
            raise AttributeError(name)
        if name in _NOTHING_TO_DO:
            return _nothing
        if name in _REFUSED:
            return functools.partial(_refuse, name)
        found = getattr(pipe, name)
        # A method that returns the pipeline itself must not hand out one that computes in the clear.
        return self._guarded(found) if inspect.ismethod(found) and found.__self__ is pipe else found

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._pipe else result

        return guarded

    def __setattr__(self, name: str, value: Any) -> None:
        pipe = self.__dict__.get("_pipe")
        if pipe is None or name in self.__dict__ or name not in pipe.__dict__:
            object.__setattr__(self, name, value)
            return
        if name == "unet":
            check_unet(value)
        setattr(pipe, name, own_component(name, value) if isinstance(value, nn.Module) else value)


def _nothing(*_: Any, **__: Any) -> None:
    """Accepted, and without effect."""


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise JobError(f"{name} cannot be used: {_REFUSED[name]}")
