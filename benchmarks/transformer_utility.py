"""What a profile does to trained classifiers: accuracy, agreement with float, bytes a sentence.

    python benchmarks/transformer_utility.py --data TEXTS MODELS/sst2-0=puma MODELS/sst2-0=fast:mixed \
        STUDENTS/sst2-ditto-0=ditto STUDENTS/sst2-ditto-0=fast:mixed

FOLDER=PROFILE[:RING]: a teacher or a student of ``python -m sfumato.zoo.train.text``. Sentences and weights are
secret, but for the weights that a student with frozen layers or LoRA shares with its public base; sentences are padded
to 48 pieces under a secret mask, 16 in a batch; ranges come from sentences of the training set. Accuracy is by the
plan's arithmetic in the clear (``plain``), whose agreement with the protocol the tests hold; bytes and rounds are
exact, of the parties, for a batch. Pages: results/transformer-utility.json and .md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from tqdm import tqdm

import sfumato as sf
from sfumato.api import Deployment
from sfumato.runtime.remote import open_backend
from sfumato.study.profiles import public_weights
from sfumato.zoo.train.text.corpora import sentences
from sfumato.zoo.train.text.replace import Replaced, load_student
from sfumato.zoo.train.text.score import interval

RECORD, PAGE = common.RESULTS / "transformer-utility.json", common.RESULTS / "transformer-utility.md"
LENGTH, BATCH, CALIBRATION = 48, 16, 24


def encoded(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Ids and mask (texts, LENGTH)."""
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def changes(replaced: Replaced) -> str:
    """What is different in a student, in words."""
    more = [
        f"{replaced.frozen} layers frozen" * bool(replaced.frozen),
        f"LoRA, rank {replaced.rank}" * bool(replaced.rank),
        f"heads merged by {replaced.merged}" * (replaced.merged > 1),
    ]
    return ", ".join([replaced.activation, replaced.softmax, *filter(None, more)])


def examined(folder: Path, profile: str, ring: str, data: Path, examples: int) -> dict[str, Any]:
    """One row."""
    model, tokenizer, replaced = load_student(folder)
    task = json.loads((folder / "task.json").read_text("utf-8"))["task"]
    test, train = (sentences(data, task, train=known) for known in (False, True))
    batches = [encoded(tokenizer, test.texts[i : i + BATCH]) for i in range(0, examples - BATCH + 1, BATCH)]
    picked = np.random.default_rng(0).permutation(len(train.texts))[: BATCH * CALIBRATION].reshape(-1, BATCH)
    program = sf.capture(model, (), batches[0])
    plan = sf.make_plan(
        program, secret="inputs+weights", profile=profile, ring=ring,
        calibration=[((), encoded(tokenizer, [train.texts[i] for i in row])) for row in picked],
        public_weights=public_weights(program, model, model, replaced),
    )  # fmt: skip
    found, exact, errors = [], [], []
    # A published polynomial may overflow where a comparison takes it out: the parties' words wrap there, too.
    with Deployment(plan, open_backend("plain", options={"wraps": True, "certificate": False})) as deployment:
        for batch in tqdm(batches, desc=f"{folder.name} {profile}", leave=False):
            with torch.no_grad():
                wanted = model(**batch).logits
            logits = deployment(**batch).logits
            found.append(logits.argmax(-1))
            exact.append(wanted.argmax(-1))
            errors.append(float((logits - wanted).norm() / wanted.norm()))
    labels = np.array(test.labels[: len(batches) * BATCH])
    right = (torch.cat(found).numpy() == labels).astype(float)
    kept = (torch.cat(exact).numpy() == labels).astype(float)
    cost = sf.estimate(plan)
    return {
        "model": folder.name, "replaced": changes(replaced), "profile": profile,
        "ring": "mixed" if plan.options.mixed else plan.options.ring, "examples": len(labels),
        "accuracy": 100 * right.mean(), "float": 100 * kept.mean(),
        "change": [100 * x for x in interval(right - kept)],
        "agreement": 100 * float((torch.cat(found) == torch.cat(exact)).double().mean()),
        "error": float(np.mean(errors)), "mb": sum(cost.bytes_sent) / 1e6 / BATCH, "rounds": cost.rounds,
    }  # fmt: skip


def page(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# Trained classifiers under profiles", "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "), "",
        common.machine_line(common.machine()), "",
        "| model | activation, softmax, changes | profile | rings | sentences | accuracy | in float | change, 95 % "
        "| same class | relative error of logits | MB a sentence | rounds a batch |",
        "|" + "---|" * 12,
    ]  # fmt: skip
    for row in rows:
        low, high = row["change"]
        lines.append(
            f"| {row['model']} | {row['replaced']} | {row['profile']} | {row['ring']} | {row['examples']} | "
            f"{row['accuracy']:.1f} % | {row['float']:.1f} % | [{low:+.1f}, {high:+.1f}] | {row['agreement']:.1f} % | "
            f"{row['error']:.1e} | {row['mb']:.1f} | {row['rounds']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="FOLDER=PROFILE[:RING]")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--examples", type=int, default=560, help="sentences of the test set (default 560)")
    args = parser.parse_args()
    rows = []
    for text in args.rows:
        folder, _, rest = text.partition("=")
        profile, _, ring = rest.partition(":")
        rows.append(examined(Path(folder), profile, ring or "Z64", args.data, args.examples))
        print(json.dumps(rows[-1]), flush=True)
    RECORD.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
