"""``sfumato reproduce dp-ldm``: rows, their JSON, and the page."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from sfumato.errors import JobError
from sfumato.shell.dp import needs_dp
from sfumato.shell.dp_page import accuracy_of, page, picture
from sfumato.shell.reproduce import bars

__all__ = ["run_dp_ldm"]


@needs_dp
def run_dp_ldm(
    console: Console,
    *,
    subject: str,
    data: Path,
    public: Path,
    rows: tuple[str, ...],
    out: Path,
    images: int,
    guidance: float,
    kinds: tuple[str, ...],
) -> None:
    """Measure the rows that were asked for and are not finished, then write ``dp-ldm-SUBJECT.json``, ``.md``, ``.png``
    of all that are.

    Raises:
        JobError: an unknown subject or row; data or model that are missing.
    """
    from sfumato.dp.reproduce import Setting, finished_rows, run_row
    from sfumato.dp.rows import chosen_rows, rows_of
    from sfumato.dp.subjects import SUBJECTS

    if subject not in SUBJECTS:
        raise JobError(f"there is no data set {subject!r}; use one of {', '.join(SUBJECTS)}")
    setting = Setting(
        subject=SUBJECTS[subject], data=data, public=public, out=out, images=images, kinds=kinds
    )
    known = rows_of(setting.subject, guidance)
    for row in chosen_rows(known, rows):
        with bars(console) as progress:
            found = run_row(row, setting, progress)
        accuracy = accuracy_of(found)
        console.print(f"{row.title}: {'-' if accuracy is None else f'{100 * accuracy:.2f} %'}", markup=False)
    done = finished_rows(setting)
    held = {name: done[name] for name in known if name in done}
    audit = out / f"dp-ldm-{subject}-audit.json"
    told = json.loads(audit.read_text("utf-8")) if audit.is_file() else None
    stem = out / f"dp-ldm-{subject}"
    stem.with_suffix(".json").write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", "utf-8")
    picture(setting.rows, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(page(held, subject, told), "utf-8")
    console.print(f"page: {stem.with_suffix('.md')}", style="bold")
