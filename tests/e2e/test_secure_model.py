"""Tiny transformers models saved in the hub's format and loaded back: one call and texts written on, on shares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_transformers import SIZES, SPECIAL, made, tokenizer

from sfumato.errors import JobError
from sfumato.graph.edges import argument_type
from sfumato.graph.formats import Format
from sfumato.graph.plan import Plan
from sfumato.inference.handed import check_steps
from sfumato.inference.layout import Layout
from sfumato.inference.model import SecureModel
from sfumato.inference.texts import TEXTS
from sfumato.ops.softmax import plan_softmax

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT, PROMPT = "the meeting has been moved", "a letter and the"
CALIBRATION = [text.lower() for text in TEXTS[:3]]
Save = Callable[[str], str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """``saved(name)``: the folder of a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models")

    def save(name: str) -> str:
        path = folder / name
        if not path.exists():
            made(name).save_pretrained(path)
            if name not in ("vit", "clip-vision"):
                tokenizer().save_pretrained(path)
        return str(path)

    return save


def opened(path: str, **options: Any) -> SecureModel:
    given = {"secret": "inputs+weights", "backend": "simulate", "calibration": CALIBRATION, **options}
    model = SecureModel.from_pretrained(path, **given)
    model.set_progress_bar_config(disable=True)
    return model


# ---- one call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bert", "bert-mlm", "distilbert", "roberta", "gpt2", "llama", "t5", "clip-text"]
)
def test_a_text_model_answers_as_in_the_clear(saved: Save, name: str) -> None:
    """Padded to eight tokens under a secret mask, and without padding in the reference."""
    model, ids = opened(saved(name)), torch.tensor([tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        plain = model.loaded.model(ids)
    found = model(TEXT)
    key = "logits" if "logits" in plain else "last_hidden_state"
    expected = plain[key]
    got = found.outputs[key]
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 2e-3 * max(1.0, float(expected.abs().max()))
    assert found.report.same_cost(model.estimate(TEXT))
    assert (found.labels is None) == (key != "logits")


@pytest.mark.parametrize("name", ["vit", "clip-vision"])
def test_an_image_model_answers_as_in_the_clear(saved: Save, name: str) -> None:
    model, pixels = opened(saved(name), calibration=None), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = model.loaded.model(pixels)[0]
    found = model(pixel_values=pixels)
    got = next(iter(found.outputs.values()))
    assert float((got - expected).abs().max()) < 2e-3 * max(1.0, float(expected.abs().max()))


def test_a_batch_with_public_weights_and_its_labels(saved: Save) -> None:
    """Texts of different lengths in one batch, each as if alone; weights that everyone knows."""
    model = opened(saved("bert"), secret="inputs")
    texts = [TEXT, "not bad"]
    found = model(texts)
    assert found.logits is not None
    for row, text in zip(found.logits, texts, strict=True):
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            alone = model.loaded.model(ids).logits[0]
        assert float((row - alone).abs().max()) < 5e-3
    assert found.labels == [f"LABEL_{int(i)}" for i in found.logits.argmax(-1)]
    assert found.report.setup_bytes > 0


def test_which_tokens_are_padding_does_not_show_in_what_is_sent(saved: Save) -> None:
    """The commands of texts of two lengths in one bucket are the same; with exact lengths they are not."""
    model = opened(saved("bert"))
    short, long = model("not bad"), model("the meeting has been moved to")
    assert short.report.bytes_sent == long.report.bytes_sent
    assert short.report.client_bytes == long.report.client_bytes
    exact = opened(saved("bert"), padding=False)
    assert exact("not bad").report.total_bytes < exact(TEXT).report.total_bytes < short.report.total_bytes


def test_a_masked_token_is_named(saved: Save) -> None:
    model = opened(saved("bert-mlm"))
    text = "the <mask> has been"
    with torch.no_grad():
        best = model.loaded.model(torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, 1].argmax()
    assert model(text).labels == [[tokenizer().decode([int(best)])]]


def test_tensors_instead_of_texts(saved: Save) -> None:
    model = opened(saved("bert"))
    made = tokenizer()([TEXT, "not bad"], padding=True, return_tensors="pt", return_token_type_ids=False)
    both = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"])
    assert both.logits is not None
    assert float((both.logits - model([TEXT, "not bad"]).logits).abs().max()) < 5e-3  # type: ignore[operator]


def test_the_client_mask_costs_no_product() -> None:
    """A secret mask widens the exponentials' range, at some bits a score and nothing else."""
    public = plan_softmax(64, -6.0, 6.0, 0.0, 6.0, reach=2.0, tolerance=2e-4)
    hidden = plan_softmax(64, -26.0, 6.0, 0.0, 6.0, reach=2.0, tolerance=2e-4)
    assert public.exp.bits < hidden.exp.bits < 2 * public.exp.bits


# ---- token by token --------------------------------------------------------------------------------------------


def plainly(model: SecureModel, prompt: str, count: int) -> list[int]:
    """What transformers itself writes, greedily."""
    ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
    out = model.loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return [int(i) for i in out[0, ids.shape[1] :]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def writer(request: pytest.FixtureRequest, saved: Save, own_cache: None) -> SecureModel:
    return opened(saved(request.param))


@pytest.mark.parametrize("release", ["logits", "tokens", "end"])
def test_greedy_text_is_that_of_transformers(writer: SecureModel, release: str) -> None:
    found = writer.generate(PROMPT, max_new_tokens=5, release=release)
    assert found.tokens == plainly(writer, PROMPT, 5)
    assert found.text == tokenizer().decode(found.tokens, skip_special_tokens=True)
    assert (found.logits is not None) == (release == "logits")


def test_a_run_costs_what_was_estimated(writer: SecureModel) -> None:
    """All bytes, and the weights of three plans once; the session's first run also in rounds."""
    fresh = SecureModel(writer.loaded, secret="inputs+weights", backend="simulate", calibration=CALIBRATION)
    for release in ("tokens", "end"):
        options = {"max_new_tokens": 4, "release": release}
        report, estimate = (
            fresh.generate(PROMPT, stop=(), **options).report,
            fresh.estimate_generate(PROMPT, **options),
        )
        assert report.bytes_sent == estimate.bytes_sent
        assert report.client_bytes == estimate.client_bytes
        if release == "tokens":
            assert report.rounds == estimate.rounds
            assert report.setup_bytes == estimate.setup_bytes
    weights = sum(w.numel() for w in writer.loaded.model.parameters())
    assert estimate.setup_bytes < 1.3 * weights * 16  # two components of eight bytes are words, one is a seed


def test_the_same_noise_draws_the_same_text_wherever_the_choice_is_made(writer: SecureModel) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": True,
        "temperature": 2.0,
        "seed": 5,
        "stop": (),
    }
    found = [
        writer.generate(PROMPT, release=release, **options).tokens for release in ("logits", "tokens", "end")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0] != plainly(writer, PROMPT, 4)
    narrowed = writer.generate(PROMPT, release="logits", top_k=1, **options).tokens
    assert narrowed == plainly(writer, PROMPT, 4)[: len(narrowed)]


def test_stops_and_streams(writer: SecureModel) -> None:
    whole = writer.generate(PROMPT, max_new_tokens=4, stop=())
    cut = writer.generate(PROMPT, max_new_tokens=4, stop=whole.tokens[1])
    end = whole.tokens.index(whole.tokens[1]) + 1
    assert cut.tokens == whole.tokens[:end]
    pieces = list(writer.stream(PROMPT, max_new_tokens=4, stop=()))
    assert "".join(pieces) == whole.text
    assert len(pieces) == 4
    seen: list[tuple[int, str]] = []
    writer.generate(
        PROMPT, max_new_tokens=3, stop=(), callback=lambda token, text: seen.append((token, text))
    )
    assert [token for token, _ in seen] == whole.tokens[:3]


def test_at_the_end_nobody_learns_where_a_text_stops(writer: SecureModel) -> None:
    """A text that stops after one token costs as much as one that does not."""
    whole = writer.generate(PROMPT, max_new_tokens=4, stop=(), release="end")
    cut = writer.generate(PROMPT, max_new_tokens=4, stop=whole.tokens[0], release="end")
    assert cut.tokens == whole.tokens[:1]
    assert cut.report.bytes_sent == whole.report.bytes_sent
    assert cut.report.client_bytes == whole.report.client_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_exact_lengths_and_public_weights_write_the_same(saved: Save, name: str) -> None:
    model = opened(saved(name), secret="inputs", padding=False)
    for release in ("tokens", "end"):
        found = model.generate(PROMPT, max_new_tokens=3, release=release, stop=())
        assert found.tokens == plainly(model, PROMPT, 3)[:3]


@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_layers_that_look_at_a_window(name: str) -> None:
    """A writer stays within it; an encoder gets the mask of each layer."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {**SIZES, **SPECIAL, "initializer_range": 0.2, "max_position_embeddings": 64}
    if name == "modernbert":
        config = T.ModernBertConfig(**sizes, cls_token_id=1, sep_token_id=2, local_attention=4)
        encoder = T.ModernBertForSequenceClassification(config).eval()
        options: dict[str, Any] = {
            "task": "sequence-classification",
            "backend": "simulate",
            "calibration": CALIBRATION,
        }
        model = SecureModel.from_model(encoder, tokenizer(), secret="inputs+weights", **options)
        ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
        with torch.no_grad():
            expected = encoder(ids, attention_mask=torch.ones_like(ids)).logits
        assert float((model(TEXT).logits - expected).abs().max()) < 5e-3  # type: ignore[operator]
        return
    config = T.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8)
    writer = SecureModel.from_model(T.MistralForCausalLM(config).eval(), tokenizer(), task="causal-lm")
    with pytest.raises(JobError, match="more than the 8 positions"):
        writer.estimate_generate(PROMPT, max_new_tokens=9)


@pytest.mark.processes
def test_three_processes_write_the_same(saved: Save) -> None:
    with opened(saved("gpt2"), backend="local") as model:
        found = model.generate(PROMPT, max_new_tokens=3, release="end", stop=())
        again = model.generate(PROMPT, max_new_tokens=3, stop=())
        assert found.tokens == again.tokens == plainly(model, PROMPT, 3)[:3]
        assert (
            found.report.bytes_sent
            == model.estimate_generate(PROMPT, max_new_tokens=3, release="end").bytes_sent
        )
        assert (
            again.report.setup_bytes < 0.1 * found.report.setup_bytes
        )  # weights are there from the first run


# ---- what is refused -------------------------------------------------------------------------------------------


def test_what_cannot_be_loaded(saved: Save, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (saved("bert"), {"task": "translation"}, "there is no task 'translation'"),
        (str(tmp_path), {}, "it has no config.json"),
        (str(tmp_path / "none"), {}, "there is no model folder"),
        (saved("bert"), {"secret": "weights"}, "there is no secret 'weights'"),
        (saved("bert"), {"backend": "gpu"}, "there is no backend 'gpu'"),
        (saved("gpt2"), {"max_length": 100}, "max_length must lie between 1 and the model's 64"),
        (saved("bert"), {"trust_remote_code": True}, "takes no trust_remote_code"),
        (saved("bert"), {"calibration": []}, "calibration must be a list"),
        ("cluster:notes", {}, "cluster:notes is at the parties of a cluster; give its file"),
    ]
    for path, options, words in cases:
        with pytest.raises(JobError, match=words):
            SecureModel.from_pretrained(path, **options)


def test_what_a_call_refuses(saved: Save) -> None:
    model = opened(saved("bert"), max_length=8)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("the " * 9,), {}, "a text of 9 tokens is longer than max_length=8"),
        (("",), {}, "without tokens"),
        (([],), {}, "no text in the list"),
        ((), {}, "give texts or images"),
        ((), {"input_ids": torch.tensor([[999]])}, "must lie in the vocabulary"),
        ((), {"input_ids": torch.tensor([[5]]), "pixel_values": 1}, "takes no pixel_values"),
        (
            (),
            {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[0, 1]])},
            "pad at the end",
        ),
    ]
    for args, kwargs, words in calls:
        with pytest.raises(JobError, match=words):
            model(*args, **kwargs)
    with pytest.raises(JobError, match="does not write texts"):
        model.generate(PROMPT)
    with pytest.raises(JobError, match="give pixel_values"):
        opened(saved("vit"), calibration=None)([object()])
    with pytest.raises(JobError, match="must be pixel tensors of shape"):
        opened(saved("vit"))(pixel_values=torch.zeros(1, 3, 16, 16))
    nameless = SecureModel.from_model(model.loaded.model, task="sequence-classification", backend="simulate")
    with pytest.raises(JobError, match="no tokenizer"):
        nameless(TEXT)


def test_what_writing_refuses(writer: SecureModel) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"release": "never"}, "there is no release 'never'"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"do_sample": True, "top_k": 5}, "use release='logits'"),
        ({"top_k": 5, "release": "logits"}, "add do_sample=True"),
        ({"temperature": 0.0}, "must be positive"),
        ({"max_new_tokens": 63}, "more than the 64 positions"),
    ]
    for options, words in refused:
        with pytest.raises(JobError, match=words):
            writer.generate(PROMPT, **options)
    with pytest.raises(JobError, match="no token to go on from"):
        writer.generate("")
    with pytest.raises(JobError, match="takes one prompt"):
        writer.generate(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(JobError, match="takes no beams"):
        writer.estimate_generate(PROMPT, beams=3)


def test_the_parties_never_get_a_token(writer: SecureModel) -> None:
    """What is public in the plans of a run: the place of a token and nothing that follows from it."""
    writer.generate(PROMPT, max_new_tokens=2, release="end", stop=())
    plans: dict[str, Plan] = writer._planner._plans
    for name, plan in plans.items():
        allowed = {"slot"} if name.startswith("decode") else set()
        follows = {i.source for i in plan.program.user_inputs if i.shape == ()}
        assert follows <= allowed
        public = [i for i in plan.program.user_inputs if str(plan.places[i.name]) == "public"]
        assert {i.source for i in public} <= allowed
    assert isinstance(writer.loaded.model.get_input_embeddings().weight, Tensor)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_fast_calls_mix_rings(saved: Save, name: str) -> None:
    """With the client's mask, too; nearer to float than the profile's budget for a call, times the calls in a row."""
    options = {"calibration": None} if name == "vit" else {}
    model = opened(saved(name), profile="fast", **options)
    given = TEXT if name != "vit" else torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    call = {"pixel_values": given} if name == "vit" else {"texts": given}
    plan = model.plan(**call)
    assert any(note.startswith("mixed rings") for note in plan.notes)
    assert {"Z32", "Z64"} >= {plan.format_of(n.name).ring for n in plan.secret_nodes} >= {"Z32"}
    with torch.no_grad():
        inputs = (
            {"pixel_values": given}
            if name == "vit"
            else {"input_ids": torch.tensor([tokenizer()(TEXT)["input_ids"]])}
        )
        expected = model.loaded.model(**inputs).logits
    found = model(**call)
    error = float((found.outputs["logits"] - expected).norm() / expected.norm())
    assert error < (
        8e-2 if name == "vit" else 3e-2
    )  # an untrained ViT's logits are small beside what they come from
    assert found.report.same_cost(model.estimate(**call))


def test_a_public_prefix_runs_at_the_client(saved: Save) -> None:
    """Embeddings and the first of two layers: half of the bytes, the same answer."""
    whole = opened(saved("bert"))
    frozen = opened(saved("bert"), public_weights=("bert.embeddings.*", "bert.encoder.layer.0.*"))
    found, wanted = frozen(TEXT), whole(TEXT)
    assert float((found.outputs["logits"] - wanted.outputs["logits"]).abs().max()) < 5e-3
    assert sum(found.report.bytes_sent) < 0.6 * sum(wanted.report.bytes_sent)
    assert found.report.setup_bytes < 0.7 * wanted.report.setup_bytes
    with pytest.raises(JobError, match="fits no weight"):
        opened(saved("bert"), public_weights="bert.nothing.*")(TEXT)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("secret", ["inputs", "inputs+weights"])
def test_fast_text_mixes_rings_and_is_that_of_transformers(saved: Save, name: str, secret: str) -> None:
    """Caches, logits and rows go from plan to plan in one format, and every weight is shared once."""
    model = opened(saved(name), profile="fast", secret=secret)
    for release in ("logits", "tokens", "end"):
        found = model.generate(PROMPT, max_new_tokens=4, release=release, stop=())
        assert found.tokens == plainly(model, PROMPT, 4)[:4]
        estimate = model.estimate_generate(PROMPT, max_new_tokens=4, release=release)
        assert found.report.bytes_sent == estimate.bytes_sent
        assert found.report.client_bytes == estimate.client_bytes
    plans: dict[str, Plan] = model._planner._plans
    kept = {str(argument_type(p, "kept").ring) for n, p in plans.items() if n.startswith("decode")}
    assert kept == {"Z32"}
    shared: dict[str, set[Format]] = {}
    for plan in plans.values():
        for weight in plan.secret_weights:
            shared.setdefault(weight, set()).add(plan.format_of(weight))
    assert all(len(formats) == 1 for formats in shared.values())
    precise = opened(saved(name), secret=secret)
    wide = precise.estimate_generate(PROMPT, max_new_tokens=4, release="end")
    assert estimate.total_bytes < 0.9 * wide.total_bytes
    if secret == "inputs+weights":
        assert estimate.setup_bytes < 0.6 * wide.setup_bytes


def test_a_text_written_on_under_ditto_is_one_text_whatever_is_opened(saved: Save) -> None:
    model = opened(saved("llama"), profile="ditto")
    found = [
        model.generate(PROMPT, max_new_tokens=3, release=release, stop=()).tokens
        for release in ("logits", "end")
    ]
    assert found[0] == found[1]
    assert found[0] == plainly(model, PROMPT, 3)[:3]


def test_plans_that_do_not_fit_each_other_are_refused(saved: Save) -> None:
    """Before a party gets one of them."""
    mixed, wide = (opened(saved("gpt2"), profile=profile) for profile in ("fast", "precise"))
    layout = Layout(4, 8, 16, 0, True)
    with pytest.raises(JobError, match=r"the result 1 of Prefill is Z32.*takes Z64.*as kept; ask both plans"):
        check_steps(
            mixed._planner.prefill(layout)[1], wide._planner.decode(layout, hot=False)[1], None, hot=False
        )
