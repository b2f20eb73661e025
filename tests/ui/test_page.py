"""The page in a real browser: by clicks, by keyboard, on a narrow screen, and when things go wrong.

Most tests have a pipeline that costs nothing behind the real studio; the first two draw for real.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from stand_in import StandInStudio

from sfumato.ui.jobs import Studio
from sfumato.ui.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*")]

DONE = '.sf-stage[data-state="done"]'
RUNNING = '.sf-stage[data-state="running"]'
READY = '.sf-estimate[data-state="ready"]'


@pytest.fixture(scope="module")
def stand_in() -> Iterator[tuple[StandInStudio, str]]:
    from sfumato.ui.server import running

    studio = StandInStudio()
    with running(studio) as url:
        yield studio, url


def banner(page: Page) -> Locator:
    return page.get_by_role("alert").filter(has_text=re.compile("."))


def noise(page: Page) -> set[str]:
    """The pictures of what the parties sent."""
    return {str(image.get_attribute("src")) for image in page.get_by_alt_text("Noise: what party").all()}


def draw(page: Page, prompt: str = "a boat") -> None:
    page.get_by_label("What to draw").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(f"{DONE} img[alt={json.dumps(prompt)}]")


# ---- for real ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["simulate", pytest.param("local", marks=pytest.mark.processes)])
def test_from_opening_to_the_image_by_clicks_alone(visit: Any, backend: str, tmp_path: Path) -> None:
    from sfumato.ui.server import running

    studio = Studio(start=Settings(steps=2), backend=backend)
    with running(studio) as url:
        page = visit(url)
        page.get_by_role("button", name="a sneaker").click()
        assert page.wait_for_selector(READY).inner_text().startswith("Rounds")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(RUNNING)
        page.wait_for_selector(DONE)
        assert page.get_by_alt_text("a sneaker", exact=True).is_visible()
        assert len(noise(page)) == 3
        with page.expect_download() as download:
            page.get_by_role("link", name="Save report").click()
        download.value.save_as(tmp_path / "report.json")
        report = json.loads((tmp_path / "report.json").read_text())
        shown = page.locator(".sf-facts").inner_text()
        assert f"{report['rounds']:,}" in shown
        assert page.locator(".sf-chart tbody tr").count() > 5
        page.wait_for_selector(".sf-estimate:has-text('as last measured')")
        (session,) = studio._sessions.values()
        assert session.history[0].report.total_bytes == report["total_bytes"]
        (pipe,) = studio._pipes.values()
        processes = pipe._parties.process_ids
        assert len(processes) == (3 if backend == "local" else 0)
    assert studio._pipes == {}
    assert not any(map(alive, processes))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# ---- with a stand-in ---------------------------------------------------------------------------------------


def test_from_opening_to_the_image_by_keyboard_alone(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    page.keyboard.type("a boat")  # the prompt has the focus from the start
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    seen: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        told = page.evaluate(
            """() => {
              const e = document.activeElement, s = getComputedStyle(e);
              const named = e.getAttribute('aria-label') || e.innerText || e.labels?.[0]?.innerText || e.value;
              return [named || e.tagName, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2];
            }"""
        )
        if told[0].startswith("sfumato"):  # round once
            break
        assert told[1], f"no visible focus on {told[0]}"
        seen.append(told[0].split("\n")[0])
    expected = [
        "a handwritten seven", "a sneaker", "the number 3", "Model", "number input for Steps", "range slider for Steps",
        "number input for Guidance", "range slider for Guidance", "Public", "Secret", "More", "Generate",
        "Save picture", "Save report", "Show again: a boat",
    ]  # fmt: skip
    assert [found[: len(name)] for found, name in zip(seen, expected, strict=False)] == expected
    page.get_by_label("What to draw").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("another")
    page.get_by_label("number input for Steps").focus()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(f'{DONE} img[alt="another"]')


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling(visit: Any, stand_in: Any, scheme: str) -> None:
    page = visit(stand_in[1], width=360, height=740, color_scheme=scheme)
    page.get_by_role("button", name="More").click()
    page.get_by_label("Cluster file").wait_for()
    for _ in ("idle", "done"):
        beyond = page.evaluate(
            """() => [document.documentElement.scrollWidth, ...[...document.querySelectorAll(
              'button, input, textarea, img, table, .sf-estimate, .sf-frame')].filter((e) => e.checkVisibility())
              .map((e) => Math.round(e.getBoundingClientRect().right))].filter((x) => x > 360)"""
        )
        assert beyond == []
        draw(page, "a word that is very long " + "m" * 60)
    # What was drawn below the form is brought into view, by a smooth scroll.
    page.wait_for_function(
        "document.querySelector('.sf-stage').getBoundingClientRect().top < innerHeight - 100"
    )
    dark = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert (int(dark.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")


def test_the_page_does_not_jump(visit: Any, stand_in: Any) -> None:
    studio, url = stand_in
    page = visit(url)

    def places() -> list[Any]:
        return [
            page.locator(name).bounding_box()
            for name in ("#sf-prompt", "#sf-estimate", "#sf-buttons", "#sf-stage")
        ]

    before = places()
    page.wait_for_selector(READY)
    assert places() == before
    page.get_by_label("What to draw").fill("a boat")
    studio.hold()
    try:
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(RUNNING)
        assert places() == before
    finally:
        studio.release()
    page.wait_for_selector(DONE)
    assert [box["y"] for box in places()] == [box["y"] for box in before]


def test_an_empty_prompt_is_told_beside_it_and_goes_when_one_types(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    page.get_by_role("button", name="Generate").click()
    banner(page).wait_for()
    assert "Write what to draw" in banner(page).inner_text()
    below, field = banner(page).bounding_box(), page.locator("#sf-prompt").bounding_box()
    assert below is not None
    assert field is not None
    assert 0 <= below["y"] - field["y"] - field["height"] < 30
    page.get_by_label("What to draw").click()
    page.keyboard.type("a boat")
    banner(page).wait_for(state="detached")


@pytest.mark.parametrize(
    ("prompt", "sentence", "place"),
    [
        ("lost", "Party 1 is silent.", "parties"),
        ("refused", "This model takes no such size.", "run"),
        ("broken", "Something unexpected went wrong (RuntimeError)", "run"),
    ],
)
def test_a_failure_is_one_sentence(visit: Any, stand_in: Any, prompt: str, sentence: str, place: str) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    page.get_by_label("What to draw").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    banner(page).wait_for()
    assert sentence in banner(page).inner_text()
    assert page.get_by_label("Cluster file").is_visible() == (place == "parties")
    assert "Traceback" not in page.content()
    assert page.get_by_role("button", name="Generate").is_enabled()
    draw(page)
    assert banner(page).count() == 0


def test_a_model_and_steps_that_are_not_there_are_told_with_the_estimate(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    model = page.get_by_role("combobox", name="Model")
    model.fill("nowhere")
    model.press("Enter")
    banner(page).wait_for()
    assert banner(page).inner_text() == "There is no pipeline folder nowhere."
    page.wait_for_selector('.sf-estimate[data-state="unknown"]')
    model.fill("embedded")
    model.press("Enter")
    page.wait_for_selector(READY)
    assert banner(page).count() == 0


def test_parties_that_cannot_be_reached(visit: Any, tmp_path: Path) -> None:
    from sfumato.runtime import authority
    from sfumato.ui.server import listen, running

    with listen(0) as unused:
        port = unused.getsockname()[1]  # nothing will listen there
    authority.init_cluster(tmp_path / "ours", ports=(port, port + 1, port + 2))
    start = Settings(steps=2, cluster=str(tmp_path / "ours" / "client" / "cluster.toml"))
    with running(Studio(start=start)) as url:
        page = visit(url)
        banner(page).wait_for()  # before anything is asked for
        assert "arty 0" in banner(page).inner_text()
        assert page.get_by_label("Cluster file").is_visible()
        page.get_by_label("What to draw").fill("a boat")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector('.sf-stage[data-state="idle"]')
        assert "arty 0" in banner(page).inner_text()
        page.get_by_label("Cluster file").fill("/no/such/cluster.toml")
        page.get_by_label("Cluster file").blur()
        page.locator(".sf-error", has_text="There is no cluster file").wait_for()


def test_cancel(visit: Any, stand_in: Any) -> None:
    studio, url = stand_in
    page = visit(url)
    page.wait_for_selector(READY)
    cancel = page.get_by_role("button", name="Cancel")
    assert cancel.is_disabled()
    studio.hold()
    try:
        page.get_by_label("What to draw").fill("a boat")
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector(RUNNING)
        cancel.click()
        page.wait_for_selector(f"{RUNNING}:has-text('Cancelling')")
    finally:
        studio.release()
    page.wait_for_selector('.sf-stage[data-state="idle"]:has-text("Cancelled")')
    assert page.locator(".sf-history button").count() == 0
    draw(page)


def test_history_restores_an_image_with_its_settings(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    draw(page, "a boat")
    page.get_by_label("number input for Steps").fill("6")
    page.get_by_role("radio", name="Secret").check()
    draw(page, "a house")
    buttons = page.locator(".sf-history button")
    assert buttons.count() == 2
    buttons.nth(1).click()
    page.wait_for_selector(f'{DONE} img[alt="a boat"]')
    assert page.get_by_label("What to draw").input_value() == "a boat"
    page.wait_for_function("document.querySelector('#sf-steps input[type=number]').value === '4'")
    page.wait_for_selector('input[value="public"]:checked')
    assert buttons.nth(1).get_attribute("aria-current") == "true"
    page.wait_for_selector(READY)
    again = page.context.new_page()
    again.goto(stand_in[1])
    again.wait_for_selector(f'{DONE} img[alt="a boat"]')  # this browser's, in a new tab too
    assert again.locator(".sf-history button").count() == 2
    again.wait_for_selector(READY)
    other = visit(stand_in[1])
    other.wait_for_selector(READY)
    assert other.locator(".sf-history button").count() == 0  # and nobody else's


def test_an_answer_that_is_lost_is_told_again(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    lost: list[str] = []

    def lose(route: Any) -> None:
        """The server has told it; the page gets an empty answer."""
        answer = route.fetch()
        told = answer.json()
        if len(lost) < 4 and any("</" in str(part) for part in told["data"]):
            lost.append(route.request.url)
            told["data"] = [{"__type__": "update"}] * len(told["data"])
        route.fulfill(response=answer, json=told)

    page.route("**/run/**", lose)
    draw(page)
    page.get_by_label("number input for Steps").fill("6")
    page.wait_for_selector(".sf-estimate:has-text('42')")
    assert len(lost) == 4
    page.unroute_all(behavior="wait")


def test_the_estimate_is_that_of_the_newest_settings(visit: Any, stand_in: Any) -> None:
    studio, url = stand_in
    page, other = visit(url), visit(url)
    for each in (page, other):
        each.wait_for_selector(READY)
    studio.hold()
    try:
        other.get_by_label("What to draw").fill("a boat")
        other.get_by_role("button", name="Generate").click()
        other.wait_for_selector(RUNNING)
        for count in ("9", "5", "3"):  # counted once the run is over
            page.get_by_label("number input for Steps").fill(count)
            page.wait_for_selector(".sf-estimate[data-state='counting']:has-text('when the current')")
    finally:
        studio.release()
    page.wait_for_selector(f"{READY}:has(dd:text-is('21'))")


def test_another_tab_follows_a_run_and_a_reload_goes_on(visit: Any, stand_in: Any) -> None:
    studio, url = stand_in
    page = visit(url)
    page.wait_for_selector(READY)
    same = page.context.new_page()
    same.goto(url)
    same.wait_for_selector(READY)  # open before the run begins
    studio.hold()
    try:
        page.get_by_label("What to draw").fill("a boat")
        page.get_by_role("button", name="Generate").click()
        same.wait_for_selector(RUNNING)
        assert same.get_by_role("button", name="Generate").is_disabled()
        assert same.get_by_role("button", name="Cancel").is_enabled()
        same.get_by_label("What to draw").fill("a house")
        same.get_by_label("What to draw").press("Enter")  # no second run
        page.reload()
        page.wait_for_selector(RUNNING)
    finally:
        studio.release()
    for tab in (page, same):
        tab.wait_for_selector(f'{DONE} img[alt="a boat"]')
        assert tab.locator(".sf-history button").count() == 1


def test_the_server_answers_only_its_own_page(visit: Any, stand_in: Any) -> None:
    page = visit(stand_in[1])
    page.wait_for_selector(READY)
    answer = page.request.get(stand_in[1])
    headers = answer.headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert page.request.get(stand_in[1], headers={"Host": "evil.example"}).status == 400
    (cookie,) = [c for c in page.context.cookies() if c["name"] == "sfumato-session"]
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0


def test_the_picture_that_is_saved_is_the_one_that_is_shown(
    visit: Any, stand_in: Any, tmp_path: Path
) -> None:
    page = visit(stand_in[1])
    draw(page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save picture").click()
    download.value.save_as(tmp_path / "saved.png")
    shown = str(page.get_by_alt_text("a boat", exact=True).first.get_attribute("src"))
    assert (tmp_path / "saved.png").read_bytes() == base64.b64decode(shown.split(",")[1])
