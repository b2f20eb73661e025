"""Small random-weight models of every supported family, run under the protocols and compared with float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor, nn

from sfumato.errors import CaptureError
from sfumato.graph.capture import capture
from sfumato.graph.execute import execute
from sfumato.graph.plan import Plan, client_side, load_side
from sfumato.graph.planning import make_plan
from sfumato.protocol.base import Protocol
from sfumato.protocol.plain import Plain
from sfumato.protocol.rep3 import Rep3
from sfumato.ring import dpf
from sfumato.ring.fixed import decode, encode
from sfumato.runtime.components import index_keys, split_index
from sfumato.session.drive import simulate
from sfumato.session.session import Session
from sfumato.types import Shared, SharedIndex

PROTOCOLS: dict[str, type[Protocol]] = {"plain": Plain, "rep3": Rep3}
IDS = torch.tensor([[48, 3, 5, 7, 49, 49]])
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def run(plan: Plan, protocol: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's result, with the plan as a party would receive it: through JSON and without weights."""
    received = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    call, load = client_side(plan, args, kwargs), load_side(plan)
    kind = PROTOCOLS[protocol]
    indices = {name: received.index_type(name) for name in call.secrets}
    keys = {
        name: split_index(call.secrets[name], index) for name, index in indices.items() if index is not None
    }

    async def main(session: Session) -> list[Tensor | None]:
        moves = kind()

        async def share(name: str, value: Tensor) -> Shared | SharedIndex:
            index = received.index_type(name)
            if index is not None:
                if kind.parties == 1:
                    return SharedIndex(index, (value,))
                return SharedIndex(index, index_keys(index, name, dpf.ALGORITHM, *keys[name][session.party]))
            type = received.secret_type(name)
            words = encode(value, type.ring, type.frac) if session.party == 0 else None
            return await moves.share(session.fork(f"share {name}"), words, 0, type)

        secrets = {name: await share(name, value) for name, value in call.secrets.items()}
        weights: dict[str, Any] = {name: await share(name, value) for name, value in load.secrets.items()}
        outs = await execute(
            moves, session.fork("run"), received, secrets, call.publics, {**weights, **load.publics}
        )
        opened = [await moves.reveal(session.fork(f"open {i}"), out, (0,)) for i, out in enumerate(outs)]
        return [
            None if words is None else decode(words, out.frac)
            for words, out in zip(opened, outs, strict=True)
        ]

    results, _ = simulate(main, parties=kind.parties)
    values = {**call.outputs, **dict(zip(plan.secret_outputs, results[0], strict=True))}
    return plan.program.assemble(values)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    return model, (torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 5, 16)), {}


def unet2d() -> Case:
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    return model, (torch.randn(1, 1, 8, 8), 7), {}


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip


class Encode(nn.Module):
    """The mean and log-variance of an image's latent."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = autoencoder()

    def forward(self, x: Tensor) -> Tensor:
        latent: Tensor = self.vae.encode(x).latent_dist.parameters
        return latent


class Decode(nn.Module):
    """A latent's image."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = autoencoder()

    def forward(self, z: Tensor) -> Any:
        return self.vae.decode(z)


def clip() -> Case:
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=49, bos_token_id=48, pad_token_id=0,
    )  # fmt: skip
    return transformers.CLIPTextModel(config), (IDS,), {}


def bert() -> Case:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    return transformers.BertModel(config), (IDS,), {"attention_mask": mask}


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=48, eos_token_id=49
    )
    return transformers.GPT2LMHeadModel(config), (IDS,), {}


def llama() -> Case:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaModel(config), (IDS,), {}


def t5() -> Case:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config), (IDS,), {}


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return transformers.ViTModel(config), (torch.randn(1, 3, 16, 16),), {}


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return (
        model,
        (torch.randn(1, 4, 8, 8),),
        {"timestep": torch.tensor([7]), "class_labels": torch.tensor([3])},
    )


class Block(nn.Module):
    """A residual block with batch norms."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.short = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.short(x))


def resnet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model, (torch.randn(1, 3, 16, 16),), {}


def vgg() -> Case:
    layers: list[nn.Module] = []
    for inside, out in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(inside, out, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2, 2)]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Linear(144, 5), nn.Dropout()
    )
    return model, (torch.randn(1, 3, 16, 16),), {}


CASES: dict[str, Callable[[], Case]] = {
    "unet": unet,
    "unet2d": unet2d,
    "vae-encode": lambda: (Encode(), (torch.randn(1, 1, 16, 16),), {}),
    "vae-decode": lambda: (Decode(), (torch.randn(1, 4, 4, 4),), {}),
    "clip": clip,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
    "dit": dit,
    "resnet": resnet,
    "vgg": vgg,
}
SECRET_WEIGHTS = ("unet2d", "clip", "bert", "t5", "resnet")
PUBLIC = {"bert": ("attention_mask",)}


def check(name: str, *protocols: str, **options: Any) -> Plan:
    """Random weights and inputs; secure results must be within 1% of the float one, in the same structure."""
    torch.manual_seed(1)
    module, args, kwargs = CASES[name]()
    module.eval()
    plan = make_plan(capture(module, args, kwargs), public=PUBLIC.get(name, ()), **options)
    with torch.no_grad():
        want = module(*args, **kwargs)
    expected = [want.logits] if name == "gpt2" else tensors(want)  # its cache object was switched off
    for protocol in protocols:
        got = run(plan, protocol, args, kwargs)
        assert type(got) is type(want)
        for a, b in zip(tensors(got), expected, strict=True):
            assert a.shape == b.shape
            assert float((a - b).norm() / b.norm()) < 1e-2
    return plan


@pytest.mark.parametrize("name", CASES)
def test_secret_inputs(name: str) -> None:
    plan = check(name, "rep3", "plain", relocate=False)
    assert plan.secret_nodes


@pytest.mark.parametrize("name", SECRET_WEIGHTS)
def test_secret_weights(name: str) -> None:
    plan = check(name, "rep3", secret="inputs+weights")
    assert plan.secret_weights


@pytest.mark.parametrize("name", ["clip", "bert", "gpt2"])
def test_a_prompt_alone_stays_at_the_client(name: str) -> None:
    """With public weights nothing is left for the parties, and the result is the float one."""
    plan = check(name, "plain")
    assert not plan.secret_nodes


def test_keys_and_values_of_a_known_prompt_move_to_the_client() -> None:
    torch.manual_seed(1)
    module, args, kwargs = unet()
    program = capture(module.eval(), args, kwargs)
    everywhere = make_plan(program)
    moved = make_plan(program, client_known=("encoder_hidden_states",), calibration=everywhere.calibration)
    assert len(moved.secret_nodes) < len(everywhere.secret_nodes)
    got = run(moved, "rep3", args, kwargs)
    with torch.no_grad():
        want = module(*args).sample
    assert float((got.sample - want).norm() / want.norm()) < 1e-2


class Filled(nn.Module):
    """Scores that a mask fills by itself, without attention."""

    def forward(self, scores: Tensor, attention_mask: Tensor) -> Tensor:
        return scores.masked_fill(attention_mask == 0, torch.finfo(torch.float32).min).softmax(-1)


def test_a_mask_that_cannot_be_secret_names_its_remedy() -> None:
    given = (torch.randn(2, 6), torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(CaptureError, match=r"too large for fixed point.*public=.'attention_mask'"):
        make_plan(capture(Filled(), given))


def test_a_mask_of_the_client_needs_no_remedy() -> None:
    """One 0/1 value for all layers, and the rows of words in place of ids."""
    module, args, kwargs = bert()
    plan = make_plan(capture(module.eval(), args, kwargs), relocate=False)
    masks = [n for n in plan.program.nodes if n.target == "sfumato.to_float"]
    assert len(masks) == 1
    assert [n.target for n in plan.secret_nodes].count("sfumato.masked_attention") == 2
    got = run(plan, "plain", args, kwargs)
    with torch.no_grad():
        want = module(*args, **kwargs)
    assert float((tensors(got)[0] - tensors(want)[0]).abs().max()) < 1e-2
