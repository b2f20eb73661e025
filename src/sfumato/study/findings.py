"""Plain sentences on what of a paper's claims holds in the numbers of a study, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.quality import Interval
from sfumato.study.merit import Merit
from sfumato.study.tables import CONTROL_4

__all__ = ["Finding", "findings"]

#: What "no worse" means for our own setting: upper 95 % bounds of the differences.
_FRECHET, _POINTS = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, whether it holds here (None: this study cannot say), and the numbers."""

    claim: str
    holds: bool | None
    numbers: str


def findings(paper: str, rows: Mapping[str, Merit]) -> list[Finding]:
    """Of the rows of a study, by name; of the paper ``"ours"`` what is said of our settings alone."""
    special = {"sdu": _sdu, "usg": _usg, "cipherdm": _cipherdm}.get(paper)
    theirs = [] if special is None else [*special(rows), *_tuned(paper, rows)]
    return [*theirs, *_ours(rows)]


def _sdu(rows: Mapping[str, Merit]) -> list[Finding]:
    found = []
    original, fifty = rows["original, 50 steps"], rows["approximated, 50 steps"]
    ten, corrected = rows["approximated, 10 steps"], rows["SDU, 10 steps"]
    if corrected.against is not None and original.frechet is not None:
        found.append(
            Finding(
                "SDU with 10 steps is at least as near to real images as the original with 50",
                corrected.against.value <= 0.0,
                f"Fréchet {corrected.frechet:.3f} against {original.frechet:.3f}, difference "
                f"{_percent(corrected)}; without the correction {ten.frechet:.3f} ({_percent(ten)})",
            )
        )
    found.append(_free(corrected, ten))
    if corrected.megabytes and fifty.megabytes:
        found.append(
            Finding(
                "50 approximated steps cost nearly five times what SDU with 10 does",
                4.5 <= fifty.megabytes / corrected.megabytes <= 5.5,
                f"{fifty.megabytes / corrected.megabytes:.2f} times the bytes, {_times(fifty, corrected)} the "
                "processor time of the simulation",
            )
        )
    lowered = rows.get("control 1: guidance w - g_t, no record")
    if lowered is not None and lowered.frechet is not None and corrected.frechet is not None:
        found.append(
            Finding(
                "The records explain the gain: lowering guidance alone does not reach it",
                lowered.frechet > corrected.frechet,
                f"lower guidance without a record {lowered.frechet:.3f}, SDU {corrected.frechet:.3f}",
            )
        )
    return found


def _usg(rows: Mapping[str, Merit]) -> list[Finding]:
    found = []
    precise, loose = rows["usg-precise"], rows["usg-loose"]
    mended = rows["usg-loose + USG, eta 0.1"]
    if precise.frechet is not None and loose.frechet is not None and mended.frechet is not None:
        gap = loose.frechet - precise.frechet
        found.append(
            Finding(
                "Loose approximations cost quality",
                _apart(loose, precise),
                f"Fréchet {loose.frechet:.3f} ({_percent(loose)}) against {precise.frechet:.3f} ({_percent(precise)}) "
                "of the precise ones",
            )
        )
        found.append(
            Finding(
                "The correction about halves what they cost",
                _apart(loose, precise) and mended.frechet <= loose.frechet - 0.4 * gap,
                f"{mended.frechet:.3f} ({_percent(mended)}) with the correction",
            )
        )
    if precise.megabytes and loose.megabytes:
        saved = 100.0 * (1.0 - loose.megabytes / precise.megabytes)
        found.append(
            Finding(
                "Loose approximations save about 17 % of the bytes",
                10.0 <= saved <= 25.0,
                f"{saved:.1f} % at our prices",
            )
        )
    found.append(_free(mended, loose))
    etas = [rows[n].frechet for n in (f"usg-loose + USG, eta {e:g}" for e in (0.05, 0.1, 0.2)) if n in rows]
    if len(etas) == 3 and None not in etas:
        falling = [x for x in etas if x is not None]
        found.append(
            Finding(
                "A larger eta (0.05, 0.1, 0.2) is better",
                falling == sorted(falling, reverse=True),
                ", ".join(f"{x:.3f}" for x in falling),
            )
        )
    return found


def _cipherdm(rows: Mapping[str, Merit]) -> list[Finding]:
    found = []
    exact, theirs = rows["original, 50 steps"], rows["CipherDM (softmax and SiLU)"]
    ours, spu = rows["ours, 50 steps"], rows["SPU's functions"]
    if exact.f1 is not None and theirs.f1 is not None and ours.f1 is not None:
        found.append(
            Finding(
                "CipherDM's approximations ruin the images (F1 0.86 to 0.08 in USG's measurement)",
                theirs.f1 < exact.f1 - 0.2,
                f"F1 {exact.f1:.3f} exact, {theirs.f1:.3f} CipherDM, {ours.f1:.3f} ours",
            )
        )
    clamped, published = (
        rows.get("softmax clamped at 0, SiLU exact"),
        rows.get("softmax as published, SiLU exact"),
    )
    if clamped is not None and published is not None and clamped.psnr_db and published.psnr_db:
        found.append(
            Finding(
                "Negative exponentials are the cause: clamped at 0 they do no harm",
                clamped.psnr_db > published.psnr_db + 6.0,
                f"median PSNR to the exact image {published.psnr_db:.1f} dB as published, "
                f"{clamped.psnr_db:.1f} dB clamped",
            )
        )
    if spu.megabytes and ours.megabytes:
        found.append(
            Finding(
                "Ours moves at least five times fewer bytes than SPU's functions on the same protocol",
                spu.megabytes >= 5.0 * ours.megabytes,
                f"{spu.megabytes / ours.megabytes:.1f} times; SPU itself is measured by benchmarks/cipherdm.py",
            )
        )
    return found


def _tuned(paper: str, rows: Mapping[str, Merit]) -> list[Finding]:
    """Control 4 beside the row whose functions it was tuned to."""
    without = rows.get(
        {"sdu": "approximated, 10 steps", "cipherdm": "CipherDM (softmax and SiLU)"}.get(paper, "")
    )
    tuned = next((merit for name, merit in rows.items() if name.startswith(CONTROL_4)), None)
    if without is None or tuned is None or tuned.frechet is None or without.frechet is None:
        return []
    spent = "" if tuned.tuning_cpu_s is None else f", for {tuned.tuning_cpu_s / 3600:.3f} processor hours"
    return [
        Finding(
            "Tuned on the approximations, the network draws better under them (control 4)",
            tuned.frechet < without.frechet,
            f"Fréchet {tuned.frechet:.3f} against {without.frechet:.3f}, {_classes(tuned)} against "
            f"{_classes(without)}{spent}",
        )
    ]


def _classes(merit: Merit) -> str:
    """Class accuracy, and F1 where there is one."""
    accuracy = "-" if merit.accuracy is None else f"{100 * merit.accuracy.value:.1f} % right"
    return accuracy if merit.f1 is None else f"{accuracy} (F1 {merit.f1:.3f})"


def _ours(rows: Mapping[str, Merit]) -> list[Finding]:
    return [
        Finding(
            f"{row.name}: no worse than the original with 50 (bounds: {100 * _FRECHET:g} % in Fréchet distance, "
            f"{_POINTS:g} point in class accuracy)",
            _no_worse(row.against, row.points),
            f"Fréchet {_percent(row)}, accuracy {row.points.value:+.2f} points "
            f"[{row.points.low:+.2f}, {row.points.high:+.2f}], {row.images:,} images",
        )
        for name, row in rows.items()
        if name.startswith("ours") and row.against is not None and row.points is not None
    ]


def _no_worse(against: Interval, points: Interval) -> bool | None:
    """None where there are too few images to say."""
    if against.low > _FRECHET or points.high < -_POINTS:
        return False
    return True if against.high <= _FRECHET and points.low >= -_POINTS else None


#: Bytes may differ by so much by the ranges of the corrected trajectory, which is another one: comparisons of wider
#: ranges look at more bits.
_BY_RANGES = 1e-4


def _free(corrected: Merit, without: Merit) -> Finding:
    if corrected.megabytes is None or without.megabytes is None:
        return Finding("The correction costs no byte and no round between the parties", None, "not counted")
    more = corrected.megabytes / without.megabytes - 1.0
    why = "" if more == 0.0 else f" ({more:+.4%}: the ranges of another trajectory, no message of its own)"
    return Finding(
        "The correction costs no byte and no round between the parties",
        abs(more) <= _BY_RANGES and corrected.rounds == without.rounds,
        f"{corrected.megabytes:,.2f} MB and {corrected.rounds:,} rounds with it, {without.megabytes:,.2f} MB and "
        f"{without.rounds:,} without{why}",
    )


def _apart(worse: Merit, better: Merit) -> bool:
    """Whether the intervals of both say so."""
    return (
        worse.against is not None and better.against is not None and worse.against.low > better.against.high
    )


def _percent(merit: Merit) -> str:
    """Relative difference to the original with its interval."""
    if merit.against is None:
        return "-"
    value, low, high = (100.0 * x for x in (merit.against.value, merit.against.low, merit.against.high))
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _times(a: Merit, b: Merit) -> str:
    return f"{a.cpu_s / b.cpu_s:.2f} times" if b.cpu_s else "-"
