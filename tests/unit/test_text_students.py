"""Students of text models: the runtime's rounding, losses that fall, folders that round-trip, Marill's identities."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import sfumato as sf
from sfumato.errors import JobError
from sfumato.ring.fixed import decode, encode
from sfumato.types import Ring
from sfumato.zoo.train import loop
from sfumato.zoo.train.text import distil
from sfumato.zoo.train.text.batches import Batch, Blocks, Rows
from sfumato.zoo.train.text.distil import (
    RECIPES,
    hidden_loss,
    make_student,
    name_of,
    prediction_loss,
    summary,
    train_student,
)
from sfumato.zoo.train.text.fit import fit_outputs
from sfumato.zoo.train.text.fixed import LEVELS, Level
from sfumato.zoo.train.text.marill import LoraLinear, group_heads, layers_of, merge_heads, split
from sfumato.zoo.train.text.replace import Replaced, apply, attentions, load_student, save_student, watched

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
VOCABULARY = 40
IDS = torch.tensor([[5, 9, 7, 8, 30, 2], [6, 21, 13, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def model_of(kind: str, seed: int = 0) -> Any:
    """A model of two layers and four heads, with weights that are large enough to matter."""
    torch.manual_seed(seed)
    model: Any
    if kind == "bert":
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=48, max_position_embeddings=16, num_labels=2,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1,
                eos_token_id=1, use_cache=False,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=["bert", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


def rows() -> Rows:
    """Sentences whose class is that of their first word."""
    draw = torch.Generator().manual_seed(1)
    found = [torch.randint(5, VOCABULARY, (3 + k % 4,), generator=draw).tolist() for k in range(24)]
    return Rows(found, [row[0] % 2 for row in found], pad=0, batch=8, seed=0)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    found: Tensor = model(ids, attention_mask=mask).logits
    return found


# ---- fake quantization -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "frac"), [(32, 8), (32, 16), (64, 18)])
def test_rounding_is_the_runtimes(bits: int, frac: int) -> None:
    steps = torch.arange(-4000, 4001) / 2.0**frac
    x = torch.cat([steps * 0.25, steps * 3.0 + 2.0 ** -(frac + 3), torch.randn(4000) * 30])  # ties among them
    wanted = decode(encode(x, Ring.named(f"Z{bits}"), frac), frac)
    assert torch.equal(Level(bits, frac)(x).double(), wanted)


def test_what_is_too_large_is_clamped_to_what_the_runtime_takes() -> None:
    x = torch.tensor([-1e9, 1e9, 3.0])
    found = Level(32, 8)(x)
    assert found.tolist()[2] == 3.0
    assert torch.all(found.abs() < 2.0**22)
    assert torch.all(found[:2].abs() > 2.0**22 * (1 - 1e-6))
    encode(found, Ring.named("Z32"), 8)  # which refuses more


def test_the_gradient_goes_straight_through() -> None:
    x = torch.tensor([0.1, -3.3, 1e9], requires_grad=True)
    (Level(32, 8)(x) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


def test_fine_levels_change_little_and_coarse_ones_more(model: Any) -> None:
    wanted = logits(model)
    errors = {}
    for name in LEVELS:
        faked = apply(copy.deepcopy(model), Replaced(levels=name), fake=True)
        assert set(faked.state_dict()) == set(model.state_dict())
        errors[name] = float((logits(faked) - wanted).abs().max())
    assert errors["puma"] < 1e-3 < errors["ditto"] < 0.5


def test_every_value_of_a_ditto_student_is_on_the_grid(model: Any) -> None:
    faked = apply(copy.deepcopy(model), RECIPES["ditto"], fake=True)
    seen: list[Tensor] = []
    for layer in layers_of(faked):
        layer.register_forward_hook(lambda *call: seen.append(call[2]))
    logits(faked)
    assert len(seen) == 2
    for hidden in seen:
        assert torch.equal(hidden * 2.0**8, (hidden * 2.0**8).round())


# ---- replacements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", ["softmax", "2quad", "2relu"])
def test_masked_words_change_nothing(model: Any, softmax: Any) -> None:
    student = apply(copy.deepcopy(model), Replaced("quad", softmax), fake=True)
    other = torch.where(MASK.bool(), IDS, 11)
    first, second = logits(student), logits(student, other)
    kept = MASK.bool() if first.ndim == 3 else slice(None)
    torch.testing.assert_close(first[kept], second[kept], atol=1e-5, rtol=1e-5)


def test_scores_of_masked_keys_are_not_compared(model: Any) -> None:
    parts = watched(model)
    for part in parts:
        part.watching = True
    logits(model)
    hidden = parts[0].kept[1, :, :, 4:]  # of the padding
    assert torch.count_nonzero(hidden) == 0
    assert torch.count_nonzero(parts[0].kept[0]) > 0
    if model.config.model_type == "gpt2":
        assert torch.count_nonzero(parts[0].kept[0].triu(1)) == 0


@pytest.mark.parametrize(
    ("replaced", "there", "gone"),
    [
        (Replaced("quad"), {"mul", "add"}, {"gelu", "sum", "div"}),
        (Replaced("quad", "2quad"), {"mul", "add", "sum", "div"}, {"gelu", "softmax"}),
        (Replaced("gelu", "2relu"), {"relu", "sum", "div"}, {"softmax"}),
    ],
)
def test_a_captured_student_runs_on_secrets(
    model: Any, replaced: Replaced, there: set[str], gone: set[str]
) -> None:
    student = apply(model, replaced)
    args, kwargs = (IDS[:1],), {"attention_mask": MASK[:1]}
    program = sf.capture(student, args, kwargs)
    targets = {node.target.split(".")[1] for node in program.nodes}
    assert there <= targets
    assert not gone & targets
    assert ("scaled_dot_product_attention" in targets) == (replaced.softmax == "softmax")
    plan = sf.make_plan(program, secret="inputs+weights", calibration=[(args, kwargs)])
    found = sf.run(plan, args, kwargs, backend="simulate").outputs["logits"]
    torch.testing.assert_close(found.float(), logits(student, IDS[:1], MASK[:1]), atol=2e-3, rtol=2e-3)


# ---- distillation ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock by which each step of training takes a second."""
    found = count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(thread_time=lambda: float(next(found))))
    return found


def batches_for(model: Any) -> Rows | Blocks:
    if model.config.model_type == "bert":
        return rows()
    stream = torch.randint(5, VOCABULARY, (200,), generator=torch.Generator().manual_seed(2))
    return Blocks(stream, 8, 4, 0)


@pytest.mark.parametrize("recipe", ["ditto", "mpcformer", "mpcformer-2relu"])
def test_both_stages_lower_their_losses(
    tmp_path: Path, model: Any, recipe: str, ticks: Iterator[int]
) -> None:
    batches, replaced = batches_for(model), RECIPES[recipe]
    student = make_student(model, replaced, batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = copy.deepcopy(model)
    known = watched(teacher)

    def losses(one: Any) -> tuple[float, float]:
        scores = [part.scores for part in attentions(one)]
        with torch.no_grad():
            hidden = hidden_loss(one.eval(), teacher, scores, known, batches(99))
            return float(hidden), float(prediction_loss(one, teacher, batches(99)))

    start = losses(student)
    trained = train_student(student, model, replaced, batches, tmp_path, "s", minutes=2)
    end = losses(trained)
    assert end[0] < 0.8 * start[0]
    assert end[1] < start[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    used = next(ticks)
    again = train_student(make_student(model, replaced, batches), model, replaced, batches, tmp_path, "s", 2)
    assert next(ticks) - used <= 4  # both stages were finished: two clocks are read, no step is made
    torch.testing.assert_close(logits(again), logits(trained))


def test_equal_models_have_no_loss_left(model: Any) -> None:
    student, teacher = copy.deepcopy(model), copy.deepcopy(model)
    batch = Batch(IDS, MASK, torch.zeros(2))
    with torch.no_grad():
        assert float(hidden_loss(student, teacher, watched(student), watched(teacher), batch)) < 1e-10
        entropy = -(logits(model).softmax(-1) * logits(model).log_softmax(-1)).sum(-1).mean()
        assert float(prediction_loss(student, teacher, batch)) == pytest.approx(float(entropy), rel=1e-5)


def test_a_random_start_is_not_the_teachers(model: Any) -> None:
    student = make_student(model, RECIPES["mpcformer"], batches_for(model), seed=3)
    assert not torch.equal(next(iter(student.parameters())), next(iter(model.parameters())))


def words() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))


@pytest.mark.parametrize("recipe", ["ditto", "mpcformer", "marill"])
def test_a_student_comes_back_from_its_folder(tmp_path: Path, model: Any, recipe: str) -> None:
    replaced = RECIPES[recipe]
    if recipe == "marill":
        replaced = Replaced(frozen=1, rank=2, merged=2)
    student = make_student(
        model, replaced, batches_for(model), base=model_of(model.config.model_type, seed=4)
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_b" in name:
                parameter.normal_(std=0.1)
    task = "sst2" if model.config.model_type == "bert" else "wikitext2"
    save_student(tmp_path / "s-0", student, words(), task, replaced, seed=0, scores={"accuracy": 80.0})
    back, _, known = load_student(tmp_path / "s-0", fake=True)
    assert known == replaced
    heads = [
        part.num_attention_heads if hasattr(part, "query") else part.num_heads for part in attentions(back)
    ]
    assert heads == ([4, 2] if recipe == "marill" else [4, 4])
    torch.testing.assert_close(logits(back), logits(student.eval()))
    plain, _, _ = load_student(tmp_path / "s-0")
    assert not any("Fake" in type(module).__name__ for module in plain.modules())
    torch.testing.assert_close(logits(plain), logits(student), atol=0.3, rtol=0.3)
    if model.config.model_type == "bert":
        with sf.SecureModel.from_pretrained(
            tmp_path / "s-0", backend="plain", calibration=["a a a"] * 2, padding=False
        ) as secure:
            # Not the network that the weights were made for, but for what replaced.json says.
            torch.testing.assert_close(logits(secure.loaded.model), logits(plain))
    changed = json.loads((tmp_path / "s-0" / "replaced.json").read_text()) | {"norm": "none"}
    (tmp_path / "s-0" / "replaced.json").write_text(json.dumps(changed))
    with pytest.raises(JobError, match="'norm', which this version does not know"):
        load_student(tmp_path / "s-0")


def test_scores_are_summed_up_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((80.0, 81.0, 82.0)):
        folder = tmp_path / name_of("sst2", "ditto", Replaced(merged=2), "d", seed)
        folder.mkdir()
        (folder / "task.json").write_text(
            json.dumps({"task": "sst2", "seed": seed, "scores": {"accuracy": accuracy}})
        )
    (row,) = summary(tmp_path)
    assert (row["name"], row["seeds"]) == ("sst2-ditto-merged2-without-d", [0, 1, 2])
    half = 4.303 / math.sqrt(3)
    assert row["accuracy"] == {"mean": 81.0, "interval": [round(81 - half, 4), round(81 + half, 4)]}
    assert json.loads((tmp_path / "scores.json").read_text())[0]["name"] == row["name"]


def test_the_fit_undoes_most_of_a_quadratic(model: Any) -> None:
    batches, teacher = batches_for(model), copy.deepcopy(model)
    known = watched(teacher)
    errors = {}
    for name in ("quad", "ditto", "marill"):
        student = make_student(model, RECIPES[name], batches)
        scores, batch = [part.scores for part in attentions(student)], batches(50)
        before = float(hidden_loss(student.eval(), teacher, scores, known, batch).detach())
        fit_outputs(student, model, batches, 30)
        errors[name] = float(hidden_loss(student, teacher, scores, known, batch).detach())
        assert name == "marill" or errors[name] < 0.3 * before
    assert errors["marill"] < 1e-3  # there is nothing to undo
    with pytest.raises(JobError, match="public weights under LoRA"):
        fit_outputs(apply(copy.deepcopy(model), Replaced("quad", rank=2)), model, batches)


# ---- Marill ----------------------------------------------------------------------------------------------------------


def test_prefix_and_rest_are_the_model(model: Any) -> None:
    for layers in (0, 1, 2):
        prefix, rest = split(model, layers)
        with torch.no_grad():
            torch.testing.assert_close(rest(prefix(IDS, MASK), MASK), logits(model))
    with pytest.raises(JobError, match="a prefix of 3 cannot be split off"):
        split(model, 3)


def test_the_rest_alone_can_be_captured(model: Any) -> None:
    prefix, rest = split(model, 1)
    with torch.no_grad():
        hidden = prefix(IDS[:1])
        wanted = rest(hidden)
    plan = sf.make_plan(sf.capture(rest, (hidden,)), secret="inputs+weights", calibration=[((hidden,), {})])
    found = sf.run(plan, (hidden,), backend="simulate").outputs
    torch.testing.assert_close(found.float(), wanted, atol=2e-3, rtol=2e-3)


def test_frozen_layers_keep_the_public_weights(tmp_path: Path, model: Any, ticks: Iterator[int]) -> None:
    base, replaced, batches = (
        model_of(model.config.model_type, seed=7),
        Replaced(frozen=1),
        batches_for(model),
    )
    student = make_student(model, replaced, batches, base=base)
    train_student(student, model, replaced, batches, tmp_path, "s", minutes=0.2)
    for mine, known in (
        (layers_of(student)[0], layers_of(base)[0]),
        (student.get_input_embeddings(), base.get_input_embeddings()),
    ):
        for name, value in known.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value)
    assert not torch.equal(
        next(iter(layers_of(student)[1].parameters())), next(iter(layers_of(model)[1].parameters()))
    )
    mixed = apply(copy.deepcopy(model), Replaced("quad", "2quad", "ditto", frozen=1), fake=True)
    first, second = layers_of(mixed)
    assert [part.scores.softmax for part in attentions(mixed)] == ["softmax", "2quad"]
    assert not any("Fake" in type(module).__name__ for module in first.modules())
    assert any("Fake" in type(module).__name__ for module in second.modules())
    with pytest.raises(JobError, match="name it with --base"):
        make_student(model, replaced, batches)


def test_lora_starts_as_the_base_and_trains_alone(model: Any) -> None:
    student = apply(copy.deepcopy(model), Replaced(rank=3))
    torch.testing.assert_close(logits(student), logits(model))
    found = [module for module in student.modules() if isinstance(module, LoraLinear)]
    assert len(found) == (12 if model.config.model_type == "bert" else 8)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert {"lora" in name or "pooler" in name or "classifier" in name for name in trained} == {True}
    x = torch.randn(2, found[0].in_features)
    nn.init.normal_(found[0].lora_b)
    with torch.no_grad():
        plain = (x @ found[0].weight if found[0].transposed else x @ found[0].weight.T) + found[0].bias
        torch.testing.assert_close(found[0](x), plain + x @ (found[0].lora_a @ found[0].lora_b))
    with pytest.raises(JobError, match="a rank of 32 saves nothing at width 32"):
        apply(copy.deepcopy(model), Replaced(rank=32))
    with pytest.raises(JobError, match="not trained together"):
        apply(copy.deepcopy(model), Replaced(rank=2, levels="ditto"), fake=True)


def test_heads_that_attend_alike_are_grouped() -> None:
    a, b = torch.rand(2, 50)
    patterns = torch.stack([a, b, a + 0.01 * torch.rand(50), b + 0.01 * torch.rand(50)])
    order = group_heads(patterns, 2)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert group_heads(patterns, 1) == [0, 1, 2, 3]
    assert sorted(group_heads(patterns, 4)) == [0, 1, 2, 3]
    with pytest.raises(JobError, match="4 heads do not merge by 3"):
        group_heads(patterns, 3)


def test_merging_one_head_with_nothing_is_the_identity(model: Any) -> None:
    wanted = logits(model)
    merge_heads(model, [[2, 0, 3, 1], [0, 1, 2, 3]], 1)
    assert model.config.num_attention_heads == 4
    torch.testing.assert_close(logits(model), wanted)


def test_a_merged_head_has_the_scores_of_its_members(model: Any) -> None:
    merged = copy.deepcopy(model)
    merge_heads(merged, [[0, 3, 1, 2]] * 2, 2)
    kept = []
    for one in (model, merged):
        parts = watched(one)
        parts[0].watching = True
        logits(one)
        kept.append(parts[0].kept)
    wanted = torch.stack([kept[0][:, 0] + kept[0][:, 3], kept[0][:, 1] + kept[0][:, 2]], 1) / math.sqrt(2)
    torch.testing.assert_close(kept[1], wanted)
    assert merged.config.num_attention_heads == 2
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_recipe_that_does_not_fit_says_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is no teacher"):
        distil.distil(tmp_path, tmp_path, tmp_path / "out", "ditto", 1, 0)
    with pytest.raises(JobError, match="no levels 'double'"):
        apply(model_of("bert"), Replaced(levels="double"))
