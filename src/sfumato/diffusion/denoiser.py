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

__all__ = ["Denoiser", "check_reuse", "check_unet", "rescaled"]

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

    ``keeps`` (DeepCache, Ma et al. 2024): there is a second output, the features that enter the last up block (B or 2B,
    channels, height, width). A call that is given ``features`` runs the outer blocks alone, on these.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        guided: bool,
        rescale: tuple[float, float] | None = None,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        self.unet: Any = unet
        self.guided, self.rescale, self.keeps = guided, rescale, keeps

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
        features: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Model outputs (2B or B, C, H, W); B with ``rescale``. ``extra``: channels beside the
        sample's, of batch B."""
        if extra is not None:
            sample = torch.cat([sample, extra], 1)
        late = self.guided and self._splits_late
        if self.guided and not late:
            sample = torch.cat([sample, sample])
        output: Tensor
        with _doubling(self.unet) if late else contextlib.nullcontext(), _listening(self.unet) as heard:
            if features is not None:
                output = _outer(self.unet, sample, timestep, encoder_hidden_states, timestep_cond, features)
            else:
                output = self.unet(
                    sample,
                    timestep,
                    encoder_hidden_states=encoder_hidden_states,
                    timestep_cond=timestep_cond,
                    return_dict=False,
                )[0]
        output = output if self.rescale is None else rescaled(output, *self.rescale)
        return (output, heard[0]) if self.keeps and features is None else output


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


def check_reuse(unet: Any) -> None:
    """
    Raises:
        JobError: the outer blocks of this U-Net cannot run without the others.
    """
    config = unet.config
    kinds = {config.down_block_types[0], config.up_block_types[-1]}
    if len(config.up_block_types) < 2 or not kinds <= _SPLITTING_LATE:
        raise JobError(
            f"reuse_features needs two levels of plain blocks, and this U-Net's outer ones are "
            f"{' and '.join(sorted(kinds))}; leave it out"
        )


def _outer(
    unet: Any, sample: Tensor, timestep: Tensor, text: Tensor, condition: Tensor | None, features: Tensor
) -> Tensor:
    """As the U-Net's own forward does, with the first down block and the last up block alone."""
    time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), condition)
    time = time if unet.time_embed_act is None else unet.time_embed_act(time)
    hidden = unet.conv_in(2 * sample - 1.0 if unet.config.center_input_sample else sample)
    down, up = unet.down_blocks[0], unet.up_blocks[-1]

    def given(block: Any) -> dict[str, Any]:
        crossed = getattr(block, "has_cross_attention", False)
        return {"temb": time, **({"encoder_hidden_states": text} if crossed else {})}

    _, skips = down(hidden_states=hidden, **given(down))
    skips = (hidden, *skips)[: len(up.resnets)]  # without what goes down
    output: Tensor = up(hidden_states=features, res_hidden_states_tuple=skips, **given(up))
    if unet.conv_norm_out is not None:
        output = unet.conv_act(unet.conv_norm_out(output))
    output = unet.conv_out(output)
    return output


@contextlib.contextmanager
def _listening(unet: Any) -> Iterator[list[Tensor]]:
    """What enters the last up block while active."""
    heard: list[Tensor] = []
    if len(unet.up_blocks) < 2:
        yield heard
        return
    handle = unet.up_blocks[-2].register_forward_hook(lambda _, __, output: heard.append(output))
    try:
        yield heard
    finally:
        handle.remove()


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
