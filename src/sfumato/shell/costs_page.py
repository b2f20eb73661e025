"""The page of ``sfumato reproduce puma | ditto | mpcformer | marill``: what is measured here, and what papers print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sfumato.bench.machine import machine, machine_line
from sfumato.bench.page import markdown_table
from sfumato.study.costs import ROOM, CostRow
from sfumato.study.profiles import PUBLISHED
from sfumato.study.utility import PRINTED, Range, Student

__all__ = ["base_of", "cells", "heads", "page"]

_GIB = 1 << 30
_TITLES = {
    "puma": "PUMA: cost of published sizes",
    "ditto": "Ditto: cost of published sizes",
    "mpcformer": "MPCFormer: cost of each replacement",
    "marill": "Marill: cost of each change",
}
_SECRETS = "Random weights, all secret; token ids secret, as keys of point functions; "
_FACTORS = '"fewer" and "faster" are against a model\'s first row. '
#: By paper: what is secret, and what factors are against.
_READ = {
    "puma": (_SECRETS, _FACTORS),
    "ditto": (_SECRETS, _FACTORS),
    "mpcformer": (
        _SECRETS,
        '"fewer" and "faster" are against the unchanged model under the same functions: CrypTen\'s, or ours. ',
    ),
    "marill": (
        "Random weights, all secret but those that a row shares with a public base; token ids secret, as keys of "
        "point functions, or looked up by the client where the embeddings are public; ",
        '"fewer" and "faster" are against the row "all secret". ',
    ),
}
#: By paper: its own columns.
_MORE: Mapping[str, Mapping[str, Callable[[CostRow], str]]] = {
    "mpcformer": {"printed": lambda row: row.printed or "-"},
    "marill": {"client, s": lambda row: "-" if row.client_s is None else f"{row.client_s:.2f}"},
}
#: By paper: what its rows are, and the paper's own numbers.
_ABOUT = {
    "mpcformer": (
        "Rows of MPCFormer and CrypTen run the functions of CrypTen as published, with MPCFormer's in place of GELU "
        "and softmax, between our three parties. \"Printed\" are MPCFormer's factors of time, BERT-base at 128 (GLUE) "
        "or 512 tokens (IMDb), two parties and a dealer, its LayerNorm timed as BatchNorm; in all 2.2 to 5.3 times "
        "for Quad+2Quad. Errors show where published functions leave their ranges: "
        "CrypTen's LayerNorm on the small variance of random embeddings (about 0.001), which its softmax forgives and "
        "2Quad and 2ReLU do not; its GELU in the unchanged model; its reciprocal on the sums of 2Quad, about 25 for "
        "each token. Ranges of MPCFormer's own rows were measured beside the exact softmax. With random weights up to "
        "half of the rows of bert-base's later layers have no positive score at 128 tokens, so that 2ReLU divides by "
        "its epsilon, which few fraction bits hold badly."
    ),
    "marill": (
        "Frozen layers and embeddings keep the base model's public weights and run at the client; under LoRA all "
        "weights are public but A and B, x W + (x A) B unmerged. Heads merge in the order they have, which costs the "
        "same as grouped ones. Between three parties with replicated shares a secret product costs what its result "
        "does, not its weights, so LoRA changes what the parties hold and compute, and adds what (x A) B sends. "
        "Marill prints, against standard fine-tuning, on models of 1.3 to 3 billion parameters and over several "
        "protocols: 3.6 to 11.3 times less time (2.2 to 11.3 in a later version), 2.4 to 6.9 times fewer bytes, mostly "
        "more than 90 % of a task's score kept; its numbers for each change alone could not be read."
    ),
}  # fmt: skip


def base_of(rows: Sequence[CostRow], row: CostRow) -> CostRow:
    """The row that a row's factors are against: of the same model and length, the first unless it names another."""
    same = [r for r in rows if (r.model, r.tokens) == (row.model, row.tokens)]
    return next((r for r in same if r.label == row.against), same[0])


def heads(paper: str, networks: Sequence[str]) -> tuple[str, ...]:
    """The columns of the paper's table."""
    times = [head for name in networks for head in (f"{name}, s", "faster", f"{name}, least s")]
    return ("model", "row", "GB", "of it client", "fewer", "rounds", "error", *times, *_MORE.get(paper, {}))


def cells(paper: str, row: CostRow, base: CostRow, networks: Sequence[str]) -> tuple[str, ...]:
    """A row of the paper's table; ``base``: the row that its factors are against."""
    named = (f"{row.model}, {row.tokens}", row.label)
    more = [own(row) for own in _MORE.get(paper, {}).values()]
    if row.refused:
        return (*named, *("-",) * (5 + 3 * len(networks)), *more)
    told = "-"
    if row.error is not None:
        told = f"{row.error:.1e}"
    elif row.same is not None:
        told = "same token" if row.same else "another token"
    times: list[str] = []
    for name in networks:
        spent, theirs = row.seconds.get(name), base.seconds.get(name)
        times += [
            "-" if spent is None else f"{spent:.2f}",
            "-" if spent is None or theirs is None else f"{theirs / spent:.2f}x",
            f"{row.least[name]:.2f}",
        ]
    fewer = "-" if base.refused else f"{base.total_gb / row.total_gb:.2f}x"
    return (
        *named, f"{row.total_gb:.3f}", f"{row.client_bytes / 1e9:.4f}", fewer, f"{row.rounds:,}",
        told + " (1)" * bool(row.outside), *times, *more,
    )  # fmt: skip


def page(
    paper: str, command: str, rows: Sequence[CostRow], networks: Sequence[str], students: Sequence[Student]
) -> str:
    """The page as markdown."""
    secrets, factors = _READ[paper]
    lines = [
        f"# {_TITLES[paper]}", "", f"`{command}`. {machine_line(machine())}", "",
        f"{secrets}bytes (1e9) of the three parties and of the client's own link, certificate included, exact; "
        f"{factors}Rows run on the same engine and kernels: a paper's row shows its functions, types and casts, not "
        "its system. Error: relative L2 of the last hidden state against the same model, changed as the row says, in "
        "float, by the plan's arithmetic in the clear; models of the GPT type answer with the next token's id, argmax "
        "included. Ranges are from two other random inputs.", "",
        *([_ABOUT[paper], ""] if paper in _ABOUT else []),
        markdown_table(
            heads(paper, networks), [cells(paper, row, base_of(rows, row), networks) for row in rows]
        ), "",
        *_notes(rows),
    ]  # fmt: skip
    if networks:
        lines += [
            "Seconds are of one call and its certificate, three threads of one process on links with the network's "
            "latency and bandwidth; the parties share the machine's cores, so computing counts up to three times over "
            "what three hosts would take; what the client computes before it is not in them. Least: rounds times "
            "latency, or bytes over bandwidth, whichever is more.", "",
        ]  # fmt: skip
    printed: list[tuple[str, ...]] = [
        (f"{name}, {tokens}", p.label, f"{p.gib:.3f}", f"{p.gib * _GIB / 1e9:.2f}",
         "-" if p.seconds is None else f"{p.seconds:.1f}", p.how or "printed")
        for name, tokens in dict.fromkeys((row.model, row.tokens) for row in rows)
        for p in PUBLISHED.get((name, tokens), ())
        if paper != "marill"
    ]  # fmt: skip
    if printed:
        lines += ["## What the papers print", "", "On their machines and engines; GiB of all parties.", ""]
        lines += [markdown_table(("model", "system", "GiB", "GB", "s", ""), printed), ""]
    if students:
        lines += _utility(paper, students)
    return "\n".join(lines).rstrip() + "\n"


def _notes(rows: Sequence[CostRow]) -> list[str]:
    """What rows without numbers, or with those of a refused run, have to say."""
    lines: list[str] = []
    skipped: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.skipped:
            skipped.setdefault(row.skipped, {})[f"{row.model} {row.tokens}"] = None
    if skipped:
        why = "; ".join(f"{', '.join(models)} {reason}" for reason, models in skipped.items())
        lines += [
            "Rows without an error are counted on shapes alone, where the same code runs on tensors without data: "
            f"bytes and rounds are exact. They were not run: {why}. What would take over {100 * ROOM:.0f} % of the "
            "machine's memory, by estimate, never is.", "",
        ]  # fmt: skip
    if any(row.outside for row in rows):
        lines += ["(1) Values leave what calibration saw, and nothing would be opened; error and seconds are of a run "
                  "without the certificate, if there is one:", ""]  # fmt: skip
    lines += [f"- {r.model}, {r.tokens}, {r.label}: {_sentence(r.outside)}" for r in rows if r.outside]
    lines += [
        f"- {r.model}, {r.tokens}, {r.label} cannot be planned: {_sentence(r.refused)}" for r in rows if r.refused
    ]  # fmt: skip
    return [*lines, ""] if lines and lines[-1] else lines


def _sentence(text: str, most: int = 300) -> str:
    """A message as one line, cut where it lists too much."""
    line = " ".join(text.split())
    return f"{line[:most].rsplit(' ', 1)[0]} ..." if len(line) > most else f"{line}."


def _utility(paper: str, students: Sequence[Student]) -> list[str]:
    """The students' table, and the paper's own."""

    def interval(found: Range | None, form: str) -> str:
        return "-" if found is None else f"[{found[0]:{form}}, {found[1]:{form}}]"

    told = []
    for s in students:
        form, sign, unit = (",.2f", ",.3f", "") if s.language else (".1f", "+.1f", " %")
        told.append((
            s.task, ", ".join(part for part in (s.recipe, s.changes) if part), s.training, str(s.seeds),
            f"{s.score:{form}}{unit}", interval(s.interval, form), f"{s.teacher:{form}}{unit}",
            f"{s.difference:{sign}}", interval(s.difference_interval, sign), f"{s.agreement:.1f} %",
            "yes" if s.counts else "no",
        ))  # fmt: skip
    lines = [
        "## Utility", "",
        "Students and teachers of `python -m sfumato.zoo.train.text` on small real texts, in float with the student's "
        "own rounding: accuracy, and the difference to the teacher in points; of language models perplexity, and its "
        "ratio to the teacher's. Intervals of 95 %: Student's t over seeds, with one seed a bootstrap over sentences "
        "or blocks. A task counts where the teacher is at least 15 points above the larger class.", "",
        markdown_table(
            ("task", "recipe", "training", "seeds", "score", "95 %", "teacher", "difference", "95 %",
             "same answer", "counts"),
            told,
        ), "",
    ]  # fmt: skip
    if paper in PRINTED:
        about, columns, rows = PRINTED[paper]
        lines += [f"{about}", "", markdown_table(columns, rows), ""]
    return lines
