"""The page's own HTML and colours: escaped, readable by a screen reader, and of enough contrast."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from stand_in import StandInStudio

import sfumato.ui
from sfumato.ui import view
from sfumato.ui.jobs import Drawn, Estimate, Progress, Session
from sfumato.ui.settings import Settings

STYLE = (Path(sfumato.ui.__file__).parent / "style.css").read_text(encoding="utf-8")
HOSTILE = "<script>alert(1)</script> {{value}} ${1+1} `x` \"quoted\" 'too'"


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    run = StandInStudio().start(Settings(prompt=HOSTILE, steps=4), Session())
    assert run.wait(30)
    assert run.drawn is not None
    return run.drawn


class Elements(HTMLParser):
    """Tags with attributes, and all text; complains about tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_words_from_outside_stay_words(drawn: Drawn) -> None:
    for text in (view.stage(drawn), view.history([drawn], drawn), view.error(HOSTILE)):
        assert "<script" not in text
        assert not re.search(r"[{}$`]", re.sub(r'href="data:[^"]*"', "", text))
    assert HOSTILE in Elements(view.stage(drawn)).text


def test_the_result_is_told_to_a_screen_reader(drawn: Drawn) -> None:
    page = Elements(view.stage(drawn))
    alternatives = [image["alt"] for image in page.all("img")]
    assert alternatives[0] == HOSTILE
    assert [text for text in alternatives if text and text.startswith("Noise: what party")] == alternatives[
        1:
    ]
    assert len(alternatives) == 4
    assert len(page.all("tr")) == 1 + len(drawn.bars)
    assert all(str(link["href"]).startswith("data:") for link in page.all("a"))
    assert [link["download"] for link in page.all("a")] == ["sfumato.png", "sfumato-report.json"]


def test_the_history_has_a_button_for_each_image(drawn: Drawn) -> None:
    assert view.history([], None) == ""
    buttons = Elements(view.history([drawn, drawn], None)).all("button")
    assert [button["data-name"] for button in buttons] == [drawn.name, drawn.name]
    assert all("4 steps" in str(button["aria-label"]) for button in buttons)


def test_progress_is_a_bar_with_a_value() -> None:
    page = Elements(view.running(Progress(phase="drawing", step=3, steps=10, left_s=21.4)))
    (bar,) = [a for _, a in page.found if a.get("role") == "progressbar"]
    assert (bar["aria-valuenow"], bar["aria-valuemax"]) == ("3", "10")
    assert "Step 4 of 10 · about 21 s left" in page.text
    assert (
        view.spoken(Progress(phase="drawing", step=3, steps=10, left_s=21.4)) == "Drawing, step 3 of 10 done"
    )


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(None, "not known"), (0.2, "about 1 s"), (75, "about 75 s"), (600, "about 10 min"), (9000, "2.5 h")],
)
def test_an_estimate_tells_its_time(seconds: float | None, told: str) -> None:
    text = Elements(view.estimate(Estimate(rounds=6985, total_bytes=229_829_050, seconds=seconds))).text
    assert told in text
    assert "6,985" in text
    assert "229.83 MB" in text


# ---- colours -----------------------------------------------------------------------------------------------


def colours(block: str) -> dict[str, str]:
    """The --sf- colours of one rule of the style sheet."""
    found = re.search(rf"^{re.escape(block)} \{{(.*?)^\}}", STYLE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dict(re.findall(r"--sf-([a-z-]+): (#[0-9a-f]{6})", found.group(1)))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [":root", ".dark"])
def test_contrast_is_aa(theme: str) -> None:
    known = colours(theme)
    text = [("ink", ground) for ground in ("paper", "card", "field", "tint", "smoke-a", "smoke-b", "smoke-c")]
    text += [("soft", ground) for ground in ("paper", "card", "field", "tint")]
    text += [("on-accent", "accent"), ("on-accent", "accent-hover"), ("bad", "bad-tint")]
    edges = [
        ("edge", "card"),
        ("edge", "paper"),
        ("accent", "paper"),
        ("accent", "card"),
    ]  # controls, focus, bars
    low = {
        f"{a} on {b}": round(contrast(known[a], known[b]), 2)
        for pairs, least in ((text, 4.5), (edges, 3.0))
        for a, b in pairs
        if contrast(known[a], known[b]) < least
    }
    assert low == {}
