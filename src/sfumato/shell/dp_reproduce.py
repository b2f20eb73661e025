"""``sfumato reproduce dp-ldm``: rows, their JSON, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sfumato.errors import JobError
from sfumato.shell.dp import needs_dp
from sfumato.shell.dp_page import accuracy_of, page, picture
from sfumato.shell.reproduce import bars
from sfumato.study.inception import Inception

if TYPE_CHECKING:
    from sfumato.dp.reproduce import Setting

__all__ = ["run_dp_ldm", "setting_of"]


@needs_dp
def run_dp_ldm(console: Console, setting: Setting, rows: Sequence[str], guidance: float = 1.0) -> None:
    """Measure the rows that were asked for and are not finished, then write ``dp-ldm-SUBJECT.json``, ``.md``, ``.png``
    of all that are.

    Raises:
        JobError: an unknown row; data or model that are missing; a row that was measured with other settings.
    """
    from sfumato.dp.reproduce import finished_rows, run_row
    from sfumato.dp.rows import chosen_rows, rows_of

    known = rows_of(setting.subject, guidance)
    for row in chosen_rows(known, tuple(rows)):
        with bars(console) as progress:
            found = run_row(row, setting, progress)
        accuracy = accuracy_of(found)
        console.print(f"{row.title}: {'-' if accuracy is None else f'{100 * accuracy:.2f} %'}", markup=False)
    done = finished_rows(setting)
    held = {name: done[name] for name in known if name in done}
    stem = setting.out / f"dp-ldm-{setting.subject.name}"
    audit = stem.with_name(f"{stem.name}-audit.json")
    told = json.loads(audit.read_text("utf-8")) if audit.is_file() else None
    stem.with_suffix(".json").write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", "utf-8")
    picture(setting.rows, stem.with_suffix(".png"))
    stem.with_suffix(".md").write_text(page(held, setting.subject.name, told), "utf-8")
    console.print(f"page: {stem.with_suffix('.md')}", style="bold")


@needs_dp
def setting_of(
    *,
    subject: str,
    data: Path,
    public: Path,
    out: Path,
    images: int,
    kinds: tuple[str, ...],
    device: str = "cpu",
    inception: Path | None = None,
) -> Setting:
    """The setting that the command line names.

    Raises:
        JobError: an unknown subject; a device or weights of Inception that are not there.
    """
    from sfumato.dp.parts import check_device
    from sfumato.dp.reproduce import Setting
    from sfumato.dp.subjects import SUBJECTS

    check_device(device)
    if subject not in SUBJECTS:
        raise JobError(f"there is no data set {subject!r}; use one of {', '.join(SUBJECTS)}")
    return Setting(
        subject=SUBJECTS[subject],
        data=data,
        public=public,
        out=out,
        images=images,
        kinds=kinds,
        device=device,
        features=None if inception is None else ("Inception", Inception(inception).features),
    )
