"""What is trained: which modules, how many numbers, nothing else moves, and adapters fold back into a plain model."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from sfumato.dp.gradients import Gradients
from sfumato.dp.optimizer import PrivateOptimizer
from sfumato.dp.randomness import SecretStream
from sfumato.dp.trainable import CHOICES, Choice, attention_modules, choose, merge
from sfumato.errors import JobError

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TOKENS, Denoiser, class_unet, conditional_unet, text_encoder

CONDITIONAL = [
    "down_blocks.0.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
]


def digests(module: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }


def steps(model: Denoiser, choice: Choice, count: int = 1) -> None:
    gradients = Gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.Adam(choice.parameters, lr=1e-2),
        noise_multiplier=1.0,
        clip=1.0,
        expected_batch=2,
        stream=SecretStream(bytes(32)),
    )
    for _ in range(count):
        noisy, times = torch.randn(2, 3, 8, 8), torch.randint(0, 1000, (2,))
        gradients.backward(
            gradients(noisy, times, torch.randint(0, 12, (2, TOKENS))).square().mean((1, 2, 3))
        )
        optimizer.accumulate()
        optimizer.step()
    gradients.to_standard_module()


def test_attention_modules_are_numbered_down_middle_up() -> None:
    assert list(attention_modules(conditional_unet())) == CONDITIONAL
    assert list(attention_modules(class_unet())) == [
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    ]


def test_a_tenth_block_comes_after_the_ninth() -> None:
    many = nn.Module()
    blocks = [nn.ModuleList([Attention(8, heads=2, dim_head=4)]) for _ in range(11)]
    many.down_blocks = nn.ModuleList(blocks)
    assert [name.split(".")[1] for name in attention_modules(many)] == [str(i) for i in range(11)]


@pytest.mark.parametrize("first", [1, 2, 4])
def test_whole_blocks_and_the_embedder_are_trained_from_the_first_on(first: int) -> None:
    unet, encoder = conditional_unet(), text_encoder()
    choice = choose(unet, encoder, first=first)
    assert list(choice.modules) == CONDITIONAL[first - 1 :]
    wanted = {
        f"unet.{n}" for n, _ in unet.named_parameters() if n.startswith(tuple(CONDITIONAL[first - 1 :]))
    }
    wanted |= {f"conditioning.{n}" for n, _ in encoder.named_parameters()}
    assert set(choice.names) == wanted
    # The whole block: norms, both projections, feed-forward.
    for part in ("norm.weight", "proj_in.weight", "proj_out.bias", "transformer_blocks.0.ff.net.2.weight"):
        assert f"unet.up_blocks.1.attentions.1.{part}" in wanted
    trained = [p for m in (unet, encoder) for p in m.parameters() if p.requires_grad]
    assert [id(p) for p in choice.parameters] == [id(p) for p in trained]
    assert choice.trained == sum(p.numel() for p in trained)
    assert choice.total == sum(p.numel() for m in (unet, encoder) for p in m.parameters())
    assert choice.describe() == (
        f"attention modules {first} to 4 of 4 and the conditioning embedder: "
        f"{choice.trained:,} of {choice.total:,} parameters"
    )


def test_the_other_choices() -> None:
    unet, encoder = conditional_unet(), text_encoder()
    assert choose(unet, encoder, what="all").trained == choose(unet, encoder, what="all").total
    assert all(name.startswith("conditioning.") for name in choose(unet, encoder, what="conditioning").names)
    labelled = class_unet()
    assert choose(labelled, what="conditioning").names == ("unet.class_embedding.weight",)
    # A choice does away with the one before.
    choose(labelled, what="all")
    assert choose(labelled, what="attention", first=4).trained < 2_000


@pytest.mark.parametrize("what", CHOICES)
def test_only_what_was_chosen_changes(what: str) -> None:
    torch.manual_seed(0)
    model = Denoiser(conditional_unet(), text_encoder())
    choice = choose(model.unet, model.encoder, what=what, rank=2 if what == "lora" else None)
    moved = choice.watch()
    with pytest.raises(JobError, match=r"left all trained parameters of .* as they were"):
        moved()
    before = digests(model)
    steps(model, choice, 2)
    after = digests(model)
    moved()
    changed = {name for name in before if before[name] != after[name]}
    expected = {name.replace("conditioning.", "encoder.", 1) for name in choice.names}
    # Noise reaches every number that is trained, so all of it has moved.
    assert changed == expected


def test_adapters_sit_on_the_attention_projections() -> None:
    unet = conditional_unet()
    choice = choose(unet, what="lora", rank=3, first=3)
    adapted = {name.split(".lora_")[0] for name in choice.names}
    assert adapted == {
        f"unet.up_blocks.1.attentions.{i}.transformer_blocks.0.{attention}.{leaf}"
        for i in (0, 1)
        for attention in ("attn1", "attn2")
        for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    }
    # Of widths 8 and 8: 3 * (8 + 8) numbers each.
    assert choice.trained == len(adapted) * 3 * 16
    assert choice.describe().startswith("adapters of rank 3 in attention modules 3 to 4 of 4: ")


def test_merged_adapters_leave_a_plain_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain_names = set(conditional_unet().state_dict())
    model = Denoiser(conditional_unet(), text_encoder())
    steps(model, choose(model.unet, model.encoder, what="lora", rank=2), 3)
    unet = model.unet.eval()
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, TOKENS, 8)
    with torch.no_grad():
        adapted = unet(*inputs).sample
        assert merge(unet) is unet
        merged = unet(*inputs).sample
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert set(unet.state_dict()) == plain_names
    unet.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(*inputs).sample, merged)
    assert merge(unet) is unet  # nothing is left to merge


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "everything"}, "one of attention, lora, conditioning, all, not 'everything'"),
        ({"what": "lora"}, r"LoRA needs a rank of at least 1 \(--rank\)"),
        ({"what": "lora", "rank": 0}, "a rank of at least 1"),
        ({"what": "all", "rank": 4}, "a rank belongs to LoRA alone"),
        ({"first": 5}, "first=5 is outside the attention modules 1 to 4"),
        ({"first": 0}, "outside"),
        ({"what": "all", "first": 2}, "leave it at 1 for 'all'"),
        ({"what": "conditioning"}, "has no conditioning embedder"),
    ],
)
def test_bad_choices_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        choose(conditional_unet(), **settings)  # type: ignore[arg-type]


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(JobError, match="Linear has no attention module"):
        choose(nn.Linear(2, 2))


def test_lora_without_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(JobError, match=r"sfumato\[dp\]"):
        choose(conditional_unet(), what="lora", rank=2)
