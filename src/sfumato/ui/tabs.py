"""One tab of a browser: the settings that stand in it, what they would cost, and the error it shows.

A tab tells its settings whenever it asks for news, so nothing here depends on an event that is heard exactly once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from sfumato.errors import SfumatoError
from sfumato.ui import view
from sfumato.ui.jobs import Estimate, Run, Session, Studio
from sfumato.ui.settings import Problem, Settings, problem_of

__all__ = ["Counted", "Numbered", "Tab", "Tabs"]

_SETTLE_S, _TABS = 0.6, 256


class Counted(NamedTuple):
    """What settings cost, once it is known: ``cost`` is None when they cannot run."""

    settings: Settings | None
    cost: Estimate | None


class Numbered(NamedTuple):
    """The latest of its kind, and how many there were: the same error told twice is told twice."""

    number: int
    what: Any

    def next(self, what: Any) -> Numbered:
        """The one after it."""
        return Numbered(self.number + 1, what)


class Tab:
    """State of one tab. ``told``: the `Problem` it shows, or None; ``restored``: the `Drawn` whose settings it took
    over last; ``models``: what the parties of its cluster file hold."""

    def __init__(self, studio: Studio, session: Session) -> None:
        self.session = session
        self.told, self.restored = Numbered(0, None), Numbered(0, None)
        self.spoken = ""
        self.models: list[str] = []
        self._studio, self._guard = studio, threading.Lock()
        self._heard = self._state()
        self._asked: tuple[Any, ...] | None = None
        self._ticket = 0
        self._counted: Counted | None = None

    # ---- what a person does --------------------------------------------------------------------------------

    def generate(self, *values: Any) -> None:
        """Begin an image, unless this browser draws one already; why it cannot begin is told."""
        if self.session.busy:  # from another tab: this one follows
            return
        try:
            self._studio.start(Settings.of(*values), self.session)
        except SfumatoError as error:
            with self._guard:
                self.told = self.told.next(problem_of(error))

    def pick(self, name: Any) -> None:
        """Show an image of the history again, and take over its settings; unknown names change nothing."""
        found = next((drawn for drawn in self.session.history if drawn.name == name), None)
        if found is not None:
            self.session.show(found)
            with self._guard:
                self.restored = self.restored.next(found)

    # ---- what a tab hears ----------------------------------------------------------------------------------

    def follow(self, values: tuple[Any, ...]) -> Run | None:
        """Take in the settings that stand in the tab, and what happened to the run; the run, while it is active.

        New settings are counted in a thread of their own, once they have not changed for `_SETTLE_S`.
        """
        with self._guard:
            run, active = heard = self._state()
            news = heard != self._heard
            self._heard = heard
            if news and run is not None:
                problem: Problem | None = None if active else run.problem
                if problem is not None or self.told.what is not None:
                    self.told = self.told.next(problem)
                self.spoken = "" if active or problem else view.ended(run.cancelled)
            if values[1:] != self._asked:  # the prompt costs nothing
                self._ask(values[1:], again=False)
            elif news and not active and self._counted is not None and self._counted.cost is None:
                self._ask(values[1:], again=True)  # parties may have come up
            return run if active else None

    @property
    def counted(self) -> Counted | None:
        """What the newest settings cost, with the time as last measured; None while that is being counted."""
        known = self._counted
        if known is None or known.settings is None or known.cost is None:
            return known
        return Counted(known.settings, self._studio.timed(known.cost, known.settings))

    # ---- inside --------------------------------------------------------------------------------------------

    def _state(self) -> tuple[Run | None, bool]:
        run = self.session.run
        return run, run is not None and run.active

    def _ask(self, values: tuple[Any, ...], *, again: bool) -> None:
        self._asked, self._counted = values, None
        self._ticket += 1
        # Good settings take back what was told before they were made, and nothing that was told since.
        told = None if again else self.told.number
        timer = threading.Timer(_SETTLE_S, self._count, (self._ticket, values, told))
        timer.daemon, timer.name = True, "sfumato-estimate"
        timer.start()

    def _count(self, ticket: int, values: tuple[Any, ...], told: int | None) -> None:
        def stale() -> bool:
            return self._ticket != ticket

        settings, cost, models, problem = None, None, self.models, None
        if stale():
            return
        try:
            settings = Settings.of("", *values)
            models = self._studio.models(settings)
            cost = self._studio.estimate(settings, unless=stale)
        except Exception as error:
            problem = problem_of(error, "model")
        with self._guard:
            if stale():
                return
            self._counted, self.models = Counted(settings, cost), models
            known = self.told.what is None or told != self.told.number
            if told is not None and not (problem is None and known):
                self.told = self.told.next(problem)


class Tabs:
    """The tabs of all browsers; the ones unheard of for longest are forgotten, and begin anew when they ask again."""

    def __init__(self, studio: Studio) -> None:
        self._studio, self._guard = studio, threading.Lock()
        self._tabs: OrderedDict[str, Tab] = OrderedDict()

    def tab(self, name: str, browser: str) -> Tab:
        """The tab of this name, of the browser with this cookie."""
        session = self._studio.session(browser)
        with self._guard:
            found = self._tabs.get(name)
            if found is None or found.session is not session:
                found = self._tabs[name] = Tab(self._studio, session)
            self._tabs.move_to_end(name)
            while len(self._tabs) > _TABS:
                self._tabs.popitem(last=False)
            return found
