"""Transformers models that an owner shares with real parties, and what a client can do with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from tiny_transformers import made, tokenizer

from sfumato.errors import JobError
from sfumato.inference.model import SecureModel
from sfumato.inference.offers import Terms, offered, share
from sfumato.inference.texts import TEXTS
from sfumato.runtime.local import LocalCluster
from sfumato.shell.cli import app

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("own_cache"), pytest.mark.timeout(300)]

TEXT, PROMPT = "the meeting has been moved", "a letter and the"
TASKS = {"bert": "sequence-classification", "gpt2": "causal-lm"}


def owned(name: str, **options: Any) -> SecureModel:
    calibration = [text.lower() for text in TEXTS[:3]]
    return SecureModel.from_model(
        made(name), tokenizer(), task=TASKS[name], secret="inputs+weights", profile="fast", calibration=calibration,
        **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Three real parties with a classifier and a writer; the cluster file in the folder of an owner and of a client."""
    with LocalCluster(threads=1, clients=("client",)) as cluster:
        text = cluster.ready().to_toml()
        found = {name: cluster.folder / "cluster" / name / "cluster.toml" for name in ("owner", "client")}
        for file in found.values():
            file.write_text(text, encoding="utf-8")
        share(owned("bert"), "reviews", found["owner"], Terms(lengths=(8, 16)))
        folder = tmp_path_factory.mktemp("gpt2")
        made("gpt2").save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        (folder / "texts.txt").write_text("\n".join(text.lower() for text in TEXTS[:3]), encoding="utf-8")
        said = CliRunner().invoke(
            app,
            ["model", "share-text", str(folder), "--name", "writer", "--cluster", str(found["owner"]), "--length", "8",
             "--tokens", "3", "--release", "tokens", "--release", "end", "--client", "client", "--profile", "fast",
             "--yes", "--calibrate-on", str(folder / "texts.txt")], env={"COLUMNS": "120"},
        )  # fmt: skip
        assert said.exit_code == 0, said.output
        for words in ("tokens after 8, end", "the chosen tokens;", "shared as cluster:writer"):
            assert words in said.output
        listed = CliRunner().invoke(
            app, ["model", "list", "--cluster", str(found["owner"])], env={"COLUMNS": "120"}
        )
        assert "1 x 8 tokens" in listed.output
        yield found


def opened(file: Path, name: str) -> Any:
    model = SecureModel.from_pretrained(f"cluster:{name}", cluster=file)
    model.set_progress_bar_config(disable=True)
    return model


def test_a_client_classifies_with_a_model_that_it_never_has(files: dict[str, Path]) -> None:
    ids = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = made("bert")(ids).logits[0]
    with opened(files["client"], "reviews") as model:
        assert all(weight.is_meta for weight in model.loaded.model.parameters())
        found = model(TEXT)
        assert float((found.logits[0] - expected).norm() / expected.norm()) < 3e-2
        assert found.labels == [f"LABEL_{int(expected.argmax())}"]
        assert found.report.setup_bytes < 1000, "no weight leaves or reaches the client"
        assert found.report.same_cost(model.estimate(TEXT))
        longer = model("the meeting has been moved to the end of the day and")
        assert sum(longer.report.bytes_sent) > sum(found.report.bytes_sent)
        with pytest.raises(
            JobError, match=r"not offered for input_ids \[2, 8\].*sequence-classification, 1 x 8 tokens"
        ):
            model([TEXT, TEXT])
        with pytest.raises(JobError, match="longer than max_length=16"):
            model("the " * 17)
    printed = CliRunner().invoke(
        app,
        ["classify", TEXT, "--model", "cluster:reviews", "--cluster", str(files["client"])],
        env={"COLUMNS": "90"},
    )
    assert printed.exit_code == 0, printed.output
    assert f"LABEL_{int(expected.argmax())}" in printed.output


def test_a_client_writes_with_a_model_that_it_never_has(files: dict[str, Path]) -> None:
    ids = torch.tensor([tokenizer()(PROMPT)["input_ids"]])
    plain = made("gpt2").generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with opened(files["client"], "writer") as model:
        for release in ("tokens", "end"):
            found = model.generate(PROMPT, max_new_tokens=3, release=release, stop=())
            assert found.tokens == [int(i) for i in plain[0, ids.shape[1] :]]
            assert (
                found.report.bytes_sent
                == model.estimate_generate(PROMPT, max_new_tokens=3, release=release).bytes_sent
            )
        assert {offer["release"] for offer in model.offers} == {"tokens", "end"}
        for options, words in (
            (
                {"max_new_tokens": 3, "release": "logits"},
                r"not offered for 3 tokens after 4 with release='logits'; it offers",
            ),
            ({"max_new_tokens": 99}, "not offered for 99 tokens"),
            ({"do_sample": True, "max_new_tokens": 2}, "temperature=1;"),
        ):
            with pytest.raises(JobError, match=words):
                model.generate(PROMPT, **options)
        with pytest.raises(JobError, match="not offered for input_ids"):
            model(PROMPT)


def test_parties_open_no_logits(files: dict[str, Path]) -> None:
    """The client's own check is left out here: it is for its convenience alone."""
    with opened(files["client"], "writer") as model:
        offers = model._offered.texts
        offers += [{**o, "settings": {**o["settings"], "release": "logits"}} for o in offers]
        with pytest.raises(JobError, match=r"the owner of writer does not let .* be opened"):
            model.generate(PROMPT, max_new_tokens=2, release="logits")


def test_what_the_owner_decides(files: dict[str, Path]) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("reviews", {"profile": "fast"}, "the owner of cluster:reviews decides on profile; leave it out"),
        ("reviews", {"task": "causal-lm"}, "is shared for sequence-classification, not for causal-lm"),
        ("none", {}, "there is no model 'none'"),
    ]
    for name, options, words in cases:
        with pytest.raises(JobError, match=words):
            SecureModel.from_pretrained(f"cluster:{name}", cluster=files["client"], **options)
    with pytest.raises(JobError, match=r"give its file, cluster='.../cluster.toml'"):
        SecureModel.from_pretrained("cluster:reviews")


def test_terms_that_a_model_cannot_serve() -> None:
    for given, words in (
        ({"lengths": ()}, "at least one length"),
        ({"texts": 0}, "at least one text"),
        ({"tokens": 0}, "at least one token"),
        ({"tokens": 2, "releases": ("never",)}, "there is no release 'never'"),
    ):
        with pytest.raises(JobError, match=words):
            Terms(**given)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="does not write texts on"):
        offered(owned("bert"), "x", Terms(tokens=2, lengths=(8,)))
    with pytest.raises(JobError, match="offer fewer tokens"):
        offered(owned("bert", max_length=8), "x", Terms(lengths=(16,)))
    with pytest.raises(JobError, match="padded to 8 tokens, not to 5"):
        offered(owned("gpt2"), "x", Terms(lengths=(5,), tokens=2))
