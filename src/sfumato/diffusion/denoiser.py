"""The U-Net as it is captured: one call gives the conditional and the unconditional output of the same
sample."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sfumato.errors import JobError

__all__ = ["Denoiser", "check_unet", "rescaled"]

_SPLITTING_LATE = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
}


def check_unet(unet: Any) -> None:
    """Refuse U-Nets that need more than a sample, a timestep and text.

    Raises:
        JobError: one sentence on what the U-Net asks for.
    """
    config = unet.config
    for name, what in (
        ("addition_embed_type", "extra embeddings (as SDXL and Kandinsky do)"),
        ("class_embed_type", "class labels"),
        ("num_class_embeds", "class labels"),
        ("encoder_hid_dim_type", "projected or image embeddings"),
    ):
        if config.get(name) is not None:
            raise JobError(
                f"this U-Net takes {what} ({name}={config[name]!r}), which SecurePipeline does not serve yet"
            )


class Denoiser(nn.Module):
    """``unet`` on a sample of batch B with text of batch 2B (unconditional half first) if ``guided``, else B.

    Up to the first cross-attention both halves are the same, so what comes before is computed once and then doubled,
    which is free on shares; the result is exactly that of a doubled sample.

    ``rescale``: (guidance weight, share of the rescaled output); with it both halves are combined here, because the
    spread of the outputs is secret.
    """

    def __init__(self, unet: nn.Module, *, guided: bool, rescale: tuple[float, float] | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.guided, self.rescale = guided, rescale

    @property
    def _splits_late(self) -> bool:
        config: Any = self.unet.config
        kinds = {*config.down_block_types, config.mid_block_type, *config.up_block_types}
        return kinds <= _SPLITTING_LATE and not config.dual_cross_attention

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Model outputs (2B or B, C, H, W); B with ``rescale``. ``extra``: channels beside the
        sample's, of batch B."""
        if extra is not None:
            sample = torch.cat([sample, extra], 1)
        late = self.guided and self._splits_late
        if self.guided and not late:
            sample = torch.cat([sample, sample])
        with _doubling(self.unet) if late else contextlib.nullcontext():
            output: Tensor = self.unet(
                sample,
                timestep,
                encoder_hidden_states=encoder_hidden_states,
                timestep_cond=timestep_cond,
                return_dict=False,
            )[0]
        return output if self.rescale is None else rescaled(output, *self.rescale)


def rescaled(output: Tensor, guidance: float, share: float) -> Tensor:
    """diffusers' ``rescale_noise_cfg`` of an output that holds both halves: guided, and brought towards the spread
    that the conditional half has in each image (the factor of Bessel is in both, and cancels)."""
    without, towards = output.chunk(2)
    combined = without + guidance * (towards - without)
    ratio = torch.sqrt(_spread(towards)) * torch.rsqrt(_spread(combined))
    return combined * (share * ratio + (1.0 - share))


def _spread(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return (centred * centred).mean(dim=(1, 2, 3), keepdim=True)


@contextlib.contextmanager
def _doubling(unet: Any) -> Iterator[None]:
    """While active, the sample doubles where it first meets text of twice its batch; skips and time
    follow."""

    def at_attention(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, text = args[0], kwargs["encoder_hidden_states"]
        return (_as_many(hidden, text.shape[0]), *args[1:]), kwargs

    def at_resnet(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, time = args[0], args[1]
        return hidden, time if time is None else _as_many(time, hidden.shape[0]), *args[2:]

    def at_up_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden, skips = kwargs["hidden_states"], kwargs["res_hidden_states_tuple"]
        return args, {**kwargs, "res_hidden_states_tuple": tuple(_as_many(s, hidden.shape[0]) for s in skips)}

    handles = []
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            handles.append(module.register_forward_pre_hook(at_attention, with_kwargs=True))
        elif isinstance(module, ResnetBlock2D):
            handles.append(module.register_forward_pre_hook(at_resnet))
    handles += [block.register_forward_pre_hook(at_up_block, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_many(x: Tensor, batch: int) -> Tensor:
    return x if x.shape[0] == batch else torch.cat([x, x])
