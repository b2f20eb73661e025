"""Two-stage distillation of a student with cheap operations from its teacher, and the baselines without it.

Stage ``hidden``: the mean square between the attention scores of every layer before softmax, masked entries 0, and
that between the embedding's output and every layer's. Stage ``prediction``: soft cross-entropy to the teacher's
logits at temperature 1. The student starts from the teacher's weights. Without distillation it learns the labels,
from the teacher's weights (``d``) or from random ones (``pd``), as in the papers' tables; or nothing (``all``): what
the replacements alone do to the teacher.

Source: MPCFormer, section 2.3 of the digest; Ditto's quantization-aware distillation, 2.6 (the same, with fake
quantization). The published rates, 5e-5 and 1e-5 for BERT-base over hours of a GPU, are :data:`PEAKS` here, in the same
ratio; a cosine takes both to zero, and the student has no dropout, as its targets leave nothing to regularize.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from sfumato.errors import JobError

from ..loop import run
from .batches import Batch, Blocks, Rows
from .fit import fit_outputs
from .marill import freeze, group_heads, layers_of, merge_heads
from .replace import Replaced, Scores, apply, attentions, save_student, watched
from .score import mean_interval
from .teacher import TASK, label_loss, load, measure, task_of, test_set, train_set

__all__ = ["RECIPES", "distil", "hidden_loss", "make_student", "prediction_loss", "summary", "train_student"]

#: What is replaced, by recipe; ``marill`` replaces nothing and takes --frozen, --rank and --merged, as all others may.
RECIPES = {
    "quad": Replaced("quad", "softmax"),
    "mpcformer": Replaced("quad", "2quad"),
    "mpcformer-2relu": Replaced("quad", "2relu"),
    "secformer": Replaced("gelu", "2quad"),
    "ditto": Replaced("quad", "softmax", "ditto"),
    "ditto-gelu": Replaced("gelu", "softmax", "ditto"),
    "marill": Replaced(),
}
#: Highest learning rates of the two stages, and of learning from labels.
PEAKS = {"hidden": 5e-4, "prediction": 1e-4, "labels": 3e-4}
#: LoRA's few parameters take larger steps.
LORA_RATE = 4.0
#: Share of the time that the first stage takes.
HIDDEN = 0.6
#: Batches whose attention patterns group the heads.
_PATTERNS = 4


def hidden_loss(
    student: Any, teacher: Any, scores: list[Scores], known: list[Scores], batch: Batch
) -> Tensor:
    """Sum over the layers of the mean square between scores, and over embedding and layers of that between outputs.

    Both models must be watched (``scores`` and ``known``). Layers whose heads were merged have no scores that could be
    compared; their outputs are.
    """
    for part in (*scores, *known):
        part.watching = True
    call = {"attention_mask": batch.mask, "output_hidden_states": True}
    with torch.no_grad():
        wanted = teacher(batch.ids, **call).hidden_states
    found = student(batch.ids, **call).hidden_states
    pairs = [(s.kept, t.kept) for s, t in zip(scores, known, strict=True) if s.kept.shape == t.kept.shape]
    pairs += list(zip(found, wanted, strict=True))
    return torch.stack([functional.mse_loss(mine, theirs) for mine, theirs in pairs]).sum()


def prediction_loss(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """-softmax(teacher) . log softmax(student), mean over sentences, or over pieces of a text."""
    with torch.no_grad():
        wanted = teacher(batch.ids, attention_mask=batch.mask).logits.softmax(-1)
    found = student(batch.ids, attention_mask=batch.mask).logits.log_softmax(-1)
    return -(wanted * found).sum(-1).mean()


@torch.no_grad()
def _orders(teacher: Any, batches: Rows | Blocks, merged: int) -> list[list[int]]:
    """How the heads of every layer are grouped, by the teacher's patterns on a few batches."""
    model = copy.deepcopy(teacher).eval()
    parts = watched(model)
    patterns: list[list[Tensor]] = [[] for _ in parts]
    for part in parts:
        part.watching = True
    for number in range(_PATTERNS):
        batch = batches(number)
        model(batch.ids, attention_mask=batch.mask)
        allowed = batch.mask[:, None, None].bool()
        if model.config.model_type == "gpt2":
            allowed = allowed & torch.ones(batch.ids.shape[1], batch.ids.shape[1]).tril().bool()
        for found, part in zip(patterns, parts, strict=True):
            weights = part.kept.masked_fill(~allowed, -1e4).softmax(-1)
            found.append(weights.transpose(0, 1).flatten(1))  # lengths differ: one row for each head
    return [group_heads(torch.cat(found, 1), merged) for found in patterns]


def make_student(
    teacher: Any, replaced: Replaced, batches: Rows | Blocks, base: Any = None, seed: int | None = None
) -> Any:
    """A copy of the teacher with the replacements, fake quantization included.

    ``base``: the public model, which frozen layers and the layers under LoRA have their weights from; a random start
    (``seed``) instead of the teacher's weights is for the baseline without both.

    Raises:
        JobError: frozen layers or LoRA without a base, or too many frozen layers.
    """
    if replaced.frozen > len(layers_of(teacher)):
        raise JobError(
            f"the teacher has {len(layers_of(teacher))} layers; --frozen {replaced.frozen} is too much"
        )
    if (replaced.frozen or replaced.rank) and base is None:
        raise JobError("frozen layers and LoRA keep the weights of a public model; name it with --base")
    student = copy.deepcopy(teacher)
    if seed is not None:
        torch.manual_seed(seed)
        student = type(teacher)(copy.deepcopy(teacher.config))
    if replaced.frozen or replaced.rank:
        freeze(student, base, len(layers_of(student)) if replaced.rank else replaced.frozen)
    if replaced.merged > 1:
        orders = _orders(teacher, batches, replaced.merged)
        merge_heads(student, orders, replaced.merged, replaced.frozen)
    return apply(student, replaced, fake=True)


def train_student(
    student: Any,
    teacher: Any,
    replaced: Replaced,
    batches: Rows | Blocks,
    out: Path,
    name: str,
    minutes: float,
    *,
    without: str = "",
) -> Any:
    """Both stages, or what is said by ``without``; averaged weights. Goes on from checkpoints in ``out``."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    scores, known = [part.scores for part in attentions(student)], watched(teacher)
    if not without:
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    stages: dict[str, tuple[float, Callable[[int], Tensor]]]
    if without == "all":
        stages = {}
    elif without:
        stages = {"labels": (1.0, lambda n: label_loss(student, batches(n)))}
    else:
        stages = {
            "hidden": (HIDDEN, lambda n: hidden_loss(student, teacher, scores, known, batches(n))),
            "prediction": (1 - HIDDEN, lambda n: prediction_loss(student, teacher, batches(n))),
        }
    for stage, (share, step) in stages.items():
        checkpoint = out / f"{name}-{stage}.ckpt"
        peak = PEAKS[stage] * (LORA_RATE if replaced.rank else 1.0)
        average = run(f"{name}-{stage}", student, step, checkpoint, share * minutes, peak, weight_decay=0.01)
        student.load_state_dict(average.state)
        for part in (*scores, *known):
            part.watching, part.kept = False, torch.empty(0)
    return student.eval()


def name_of(
    task: str, recipe: str, replaced: Replaced, without: str, seed: int, *, fitted: bool = False
) -> str:
    """What a student's folder is called."""
    changed = [f"{key}{getattr(replaced, key)}" for key in ("frozen", "rank") if getattr(replaced, key)]
    changed += [f"merged{replaced.merged}"] if replaced.merged > 1 else []
    changed += ["fitted"] if fitted else []
    return "-".join([task, recipe, *changed, *([f"without-{without}"] if without else []), str(seed)])


def distil(
    folder: Path,
    data: Path,
    out: Path,
    recipe: str,
    minutes: float,
    seed: int,
    *,
    changes: Replaced | None = None,
    without: str = "",
    base: Path | None = None,
    fitted: bool = False,
) -> Path:
    """Distil a student from the teacher in ``folder`` and measure both with it; the folder the student is in.

    ``changes``: frozen layers, rank and merged heads, on top of the recipe. ``without``: ``""``, ``"d"``, ``"pd"`` or
    ``"all"``. ``fitted``: with :mod:`.fit` before the training.

    Raises:
        DataError: the task's texts are missing below ``data``.
        JobError: the recipe does not fit the teacher or the base.
    """
    if not (folder / TASK).is_file():
        raise JobError(f"{folder} is no teacher: it has no {TASK}; make one with the command teacher")
    out.mkdir(parents=True, exist_ok=True)
    replaced = RECIPES[recipe]
    if changes is not None:
        replaced = replace(replaced, frozen=changes.frozen, rank=changes.rank, merged=changes.merged)
    task, (teacher, tokenizer) = task_of(folder), load(folder)
    public = None if base is None else AutoModel.from_pretrained(base, local_files_only=True)
    batches = train_set(tokenizer, data, task, seed)
    name = name_of(task, recipe, replaced, without, seed, fitted=fitted)
    torch.manual_seed(seed)
    student = make_student(teacher, replaced, batches, public, seed if without == "pd" else None)
    if fitted:
        fit_outputs(student, teacher, batches, first=replaced.frozen)
    student = train_student(student, teacher, replaced, batches, out, name, minutes, without=without)
    scores = measure(student, test_set(tokenizer, data, task), data, task, teacher.eval())
    save_student(
        out / name, student, tokenizer, task, replaced,
        recipe=recipe, without=without, seed=seed, minutes=minutes, scores=scores,
    )  # fmt: skip
    return out / name


def summary(out: Path) -> list[dict[str, Any]]:
    """One row for each kind of student in ``out``, over its seeds; also written to ``scores.json`` there.

    The interval of a mean over seeds is Student's t; with one seed there is none.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(out.glob(f"*/{TASK}")):
        found = json.loads(path.read_text("utf-8"))
        groups.setdefault((path.parent.name.rsplit("-", 1)[0], found["task"]), []).append(found)
    rows = []
    for (name, task), members in groups.items():
        row: dict[str, Any] = {"name": name, "task": task, "seeds": [member["seed"] for member in members]}
        for key in ("accuracy", "perplexity", "teacher", "difference", "ratio", "agreement"):
            values = [member["scores"][key] for member in members if key in member["scores"]]
            if values:
                row[key] = mean_interval(values)
        rows.append(row | {"scores": [member["scores"] for member in members]})
    (out / "scores.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows
