"""The page's own HTML: estimate, stage, history and error, each from plain values. Everything from outside is escaped.

Pictures and downloads are inside the HTML, so that none is ever a file on this machine.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from sfumato.runtime.report import readable
from sfumato.ui.figures import Bar
from sfumato.ui.jobs import Drawn, Estimate, Progress

__all__ = [
    "HEADER", "counting", "ended", "error", "estimate", "history", "idle", "running", "spoken", "stage", "unknown",
]  # fmt: skip

HEADER = """
<header class="sf-header"><div class="sf-smoke" aria-hidden="true"></div>
<h1>sfumato</h1>
<p>Describe a picture. Three computers draw it together, and none of them sees the words or the picture.</p></header>
"""

_PHASES = {
    "waiting": "Waiting for its turn",
    "loading": "Loading the model",
    "planning": "Preparing the model; the first run with new settings measures it once",
    "starting": "Sharing your secrets among the three parties",
    "drawing": "Drawing",
    "opening": "Opening the picture, to you alone",
    "cancelling": "Cancelling after this step",
}


def escaped(value: Any) -> str:
    """Text for HTML; braces and dollars too, which mean something to Gradio's templates."""
    text = html.escape(str(value))
    for sign in "{}$`":
        text = text.replace(sign, f"&#{ord(sign)};")
    return text


def error(text: str | None) -> str:
    """The banner beside a field, or nothing."""
    return f'<p class="sf-error" role="alert">{escaped(text)}</p>' if text else ""


# ---- before a run ------------------------------------------------------------------------------------------


def _figures(rows: Sequence[tuple[str, str]], state: str, note: str = "") -> str:
    cells = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in rows)
    return f'<div class="sf-estimate" data-state="{state}"><dl>{cells}</dl><p>{escaped(note)}</p></div>'


def counting(waits: bool) -> str:
    """The estimate while it is being computed, or while it waits for a run."""
    note = "Counted when the current image is done." if waits else "Counting what this run will cost…"
    return _figures([("Rounds", "…"), ("Bytes sent", "…"), ("Time", "…")], "counting", note)


def unknown() -> str:
    """The estimate of settings that cannot run."""
    return _figures([("Rounds", "–"), ("Bytes sent", "–"), ("Time", "–")], "unknown", "No estimate yet.")


def estimate(found: Estimate) -> str:
    """The estimate."""
    time = "not known" if found.seconds is None else f"about {_seconds(found.seconds)}"
    rows = [("Rounds", f"{found.rounds:,}"), ("Bytes sent", readable(found.total_bytes)), ("Time", time)]
    time_note = (
        "The first run measures the time." if found.seconds is None else "The time is as last measured."
    )
    note = f"Exact before it runs. {time_note}"
    return _figures(rows, "ready", note)


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---- the stage ---------------------------------------------------------------------------------------------


def idle(cancelled: bool = False) -> str:
    """Nothing drawn yet."""
    title = "Cancelled" if cancelled else "Your picture appears here"
    text = (
        "Nothing was opened, and the parties dropped their shares."
        if cancelled
        else "Beside it: what each of the three parties sent of it, and what it cost."
    )
    return _stage("idle", _frame(f"<strong>{title}</strong><span>{text}</span>"))


def running(progress: Progress) -> str:
    """A run, with its step and time left."""
    k, n = progress.step, progress.steps
    drawing = progress.phase in ("drawing", "opening", "cancelling") and k > 0
    line = [f"Step {min(k + 1, n)} of {n}"] if drawing and progress.phase == "drawing" else []
    if progress.left_s is not None:
        line.append(f"about {_seconds(progress.left_s)} left" if progress.left_s >= 1 else "almost done")
    share = k / n
    bar = (
        f'<div class="sf-bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="{n}" '
        f'aria-valuenow="{k}"><i style="width:{100 * share:.1f}%"></i></div>'
    )
    text = f"<strong>{_PHASES[progress.phase]}</strong>{bar}<span>{' · '.join(line) or '&nbsp;'}</span>"
    return _stage("running", _frame(text))


def spoken(progress: Progress) -> str:
    """The same for a screen reader, which hears it once for each change."""
    step = f", step {progress.step} of {progress.steps} done" if progress.step else ""
    return f"{_PHASES[progress.phase]}{step}"


def ended(cancelled: bool) -> str:
    """The same at the end of a run that did not fail."""
    return "Cancelled" if cancelled else "Done: the picture is ready"


def stage(drawn: Drawn) -> str:
    """The image beside what the parties sent of it, and its cost."""
    settings, report = drawn.settings, drawn.report
    shares = "".join(
        f'<figure><img src="{_uri(share)}" alt="Noise: what party {i} sent of the picture">'
        f"<figcaption>Party {i}</figcaption></figure>"
        for i, share in enumerate(drawn.shares)
    )
    facts = [
        ("Time", _seconds(report.seconds or 0.0)),
        ("Rounds", f"{report.rounds:,}"),
        ("Between the parties", readable(report.total_bytes)),
        ("To and from you", readable(report.client_bytes)),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    body = f"""<div class="sf-result">
<figure class="sf-image"><img src="{_uri(drawn.image)}" alt="{escaped(settings.prompt)}">
<figcaption>{escaped(settings.prompt)}</figcaption></figure>
<div class="sf-seen"><h3>What each party sent</h3><div class="sf-shares">{shares}</div>
<p>Each is random by itself. Only the sum of all three, made on your machine, becomes the picture.</p></div></div>
<dl class="sf-facts">{cells}</dl>
<p class="sf-actions">{_save("Save picture", "sfumato.png", "image/png", drawn.image)}
{_save("Save report", "sfumato-report.json", "application/json", report.to_json().encode())}</p>
{_chart(drawn.bars)}"""
    return _stage("done", body)


def _chart(bars: Sequence[Bar]) -> str:
    most = max((bar.share for bar in bars), default=1.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escaped(bar.label)}</th>'
        f'<td class="sf-track"><i style="width:{100 * bar.share / most:.1f}%"></i></td>'
        f"<td>{readable(bar.total_bytes)}</td><td>{bar.messages:,}</td></tr>"
        for bar in bars
    )
    return f"""<table class="sf-chart"><caption>Where the bytes and rounds went, by layer</caption>
<thead><tr><th scope="col">Layers</th><td></td><th scope="col">Sent</th>
<th scope="col"><abbr title="Messages of the busiest party; each takes part in at most one round">Messages</abbr></th>
</tr></thead><tbody>{rows}</tbody></table>"""


def _stage(state: str, body: str) -> str:
    return f'<section class="sf-stage" data-state="{state}" aria-label="Picture">{body}</section>'


def _frame(body: str) -> str:
    smoke = '<div class="sf-smoke" aria-hidden="true"></div>'
    return f'<div class="sf-frame">{smoke}<div class="sf-note">{body}</div></div>'


def _save(label: str, name: str, kind: str, content: bytes) -> str:
    return f'<a class="sf-save" download="{name}" href="{_uri(content, kind)}">{label}</a>'


def _uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- history -----------------------------------------------------------------------------------------------


def history(images: Sequence[Drawn], shown: Drawn | None) -> str:
    """This browser's images, newest first; a click restores one with its settings."""
    if not images:
        return ""
    items = "".join(
        f'<li><button type="button" data-name="{drawn.name}" title="{_told(drawn)}" '
        f'aria-label="Show again: {_told(drawn)}"{" aria-current=true" if drawn is shown else ""}>'
        f'<img src="{_uri(drawn.image)}" alt=""></button></li>'
        for drawn in images
    )
    title = "<h2>Earlier in this session</h2>"
    return f'<section class="sf-history" aria-label="History">{title}<ul>{items}</ul></section>'


def _told(drawn: Drawn) -> str:
    settings = drawn.settings
    weights = (
        settings.model if settings.shared else f"{'secret' if settings.secret_weights else 'public'} weights"
    )
    return escaped(f"{settings.prompt}, {settings.steps} steps, seed {settings.seed}, {weights}")
