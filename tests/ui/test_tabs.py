"""What a tab is told, without a browser: the newest estimate alone, each error until it is taken back, every run."""

from __future__ import annotations

import threading
import time
from typing import Any

from stand_in import StandInStudio

from sfumato.ui.tabs import Tab, Tabs

#: prompt, model, steps, guidance, weights, seed, size, cluster
GOOD = ("a seven", "embedded", 4, 4.0, "public", 0, "", "")


def until(tab: Tab, values: tuple[Any, ...], reached: Any) -> None:
    """Tick until this is so."""
    deadline = time.monotonic() + 30
    while not reached(tab.follow(values)):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)  # as a browser's timer does


def steps(count: Any) -> tuple[Any, ...]:
    return (*GOOD[:2], count, *GOOD[3:])


def test_only_the_newest_settings_are_counted() -> None:
    studio = StandInStudio()
    tab = Tabs(studio).tab("tab", "browser")
    for count in (5, 6, 7):
        assert tab.follow(steps(count)) is None
        assert tab.counted is None
    until(tab, steps(7), lambda _: tab.counted)
    assert tab.counted is not None
    assert tab.counted.cost is not None
    assert tab.counted.cost.rounds == 49
    assert len(studio.pipes) == 1


def test_settings_that_cannot_run_are_told_until_they_can() -> None:
    tab = Tabs(StandInStudio()).tab("tab", "browser")
    until(tab, steps(0), lambda _: tab.counted)
    assert tab.counted is not None
    assert tab.counted.cost is None
    assert "steps" in tab.told.what.text
    until(tab, steps(4), lambda _: tab.counted)
    assert tab.told.what is None


def test_what_a_run_told_outlives_the_estimate_of_settings_made_before() -> None:
    studio = StandInStudio()
    tabs = Tabs(studio)
    tab, same, other = tabs.tab("tab", "browser"), tabs.tab("same", "browser"), tabs.tab("other", "elsewhere")
    lost = ("lost", *GOOD[1:])
    tab.follow(lost)
    tab.generate(*lost)
    until(tab, lost, lambda run: run is None and tab.counted)
    assert tab.told.what == ("parties", "Party 1 is silent.")
    assert tab.spoken == ""
    same.follow(GOOD)
    assert same.told.what == tab.told.what  # both follow this browser's run
    other.follow(GOOD)
    assert other.told.what is None
    tab.generate(*GOOD)
    until(tab, GOOD, lambda run: run is None)
    assert tab.told.what is None
    assert tab.spoken == "Done: the picture is ready"


def test_an_error_that_is_told_again_is_a_new_one() -> None:
    tab = Tabs(StandInStudio()).tab("tab", "browser")
    numbers = []
    for _ in range(2):
        tab.generate("", *GOOD[1:])
        assert tab.told.what.field == "prompt"
        numbers.append(tab.told.number)
    assert numbers == [1, 2]


def test_the_time_of_an_estimate_is_known_after_a_run_without_counting_again() -> None:
    tab = Tabs(StandInStudio()).tab("tab", "browser")
    until(tab, GOOD, lambda _: tab.counted)
    assert tab.counted is not None
    assert tab.counted.cost is not None
    assert tab.counted.cost.seconds is None
    tab.generate(*GOOD)
    until(tab, GOOD, lambda run: run is None)
    assert tab.counted.cost is not None
    assert tab.counted.cost.seconds == 1.2


def test_tabs_are_bounded_and_a_picked_image_is_one_of_the_history() -> None:
    tabs = Tabs(StandInStudio())
    tab = tabs.tab("tab", "browser")
    tab.generate(*GOOD)
    until(tab, GOOD, lambda run: run is None)
    (drawn,) = tab.session.history
    tab.pick("no such image")
    assert tab.restored.what is None
    tab.pick(drawn.name)
    assert tab.restored == (1, drawn)
    for k in range(300):
        tabs.tab(f"{k}", "browser")
    assert tabs.tab("tab", "browser") is not tab
