"""Every layer's sampler gives autograd's gradients of single records, whatever the memory layout and the draws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import compare


def bias_only(layer: nn.Linear) -> nn.Linear:
    layer.weight.requires_grad_(False)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear over tokens": (lambda: nn.Linear(4, 3), (6, 4)),
    "linear over a grid": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
    "bias alone": (lambda: bias_only(nn.Linear(4, 3)), (6, 4)),
    "layer norm": (lambda: nn.LayerNorm(4), (4,)),
    "layer norm over tokens": (lambda: nn.LayerNorm(4, bias=False), (6, 4)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "group norm of tokens": (lambda: nn.GroupNorm(2, 4), (4, 6)),
    "group norm of images": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "convolution 1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "convolution 1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (4, 9)),
    "convolution 2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 7)),
    "convolution 2d, 1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 7)),
    "convolution 2d, strided": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2),
        (4, 6, 7),
    ),
    "convolution 2d, 1x1 strided": (lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False), (4, 6, 7)),
    "convolution 2d, dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2)), (4, 6, 7)),
    "convolution 2d, reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 5, 7)),
    "convolution 2d, circular": (
        lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
        (4, 5, 7),
    ),
    "convolution 3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, stride=(1, 2, 1)), (2, 3, 4, 5)),
    "rms norm": (lambda: nn.RMSNorm(4), (6, 4)),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 5)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 3, 3)),
    "prelu": (lambda: nn.PReLU(4), (4, 3)),
}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("records", [1, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer(name: str, records: int, draws: int) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    assert compare(layer, layer, [torch.randn(records * draws, *shape)], draws) < 1


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("layout", ["channels last", "permuted", "every other row", "reversed upstream"])
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name.startswith(("convolution 2d", "group norm of im"))]
)
def test_any_memory_layout(name: str, layout: str, draws: int) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    x = torch.randn(4 * draws, *shape)
    forward: Callable[[Tensor], Tensor] = layer
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "permuted":
        x = torch.randn(shape[2], 4 * draws, shape[0], shape[1]).permute(1, 2, 3, 0)
    elif layout == "every other row":
        x = torch.randn(4 * draws, shape[0], 2 * shape[1], shape[2])[:, :, ::2]
    else:
        x = x.contiguous()

        def forward(x: Tensor) -> Tensor:
            return layer(x).permute(0, 3, 2, 1).flip(1)

    assert layout == "reversed upstream" or not x.is_contiguous()
    assert compare(layer, forward, [x], draws) < 1


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_an_embedding(shape: tuple[int, ...], padding: int | None, draws: int) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, padding_idx=padding)
    nn.init.normal_(table.weight)
    assert compare(table, table, [torch.randint(0, 7, (5 * draws, *shape))], draws) < 1
