"""The page in a browser: a server on the loopback, and a page whose console and requests are watched."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).parent))

NO_BROWSER = "no browser"
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
]  # fmt: skip


def _missing() -> str | None:
    for module in ("gradio", "playwright"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None if any(map(shutil.which, _CHROMIUM)) else "Chromium is not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing()
    for item in items:
        if item.get_closest_marker("browser") and missing:
            item.add_marker(pytest.mark.skip(reason=f"{NO_BROWSER}: {missing}"))


@dataclass
class Watched:
    """A page of the browser, and what must not happen on it."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.strays.append(request.url)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, _CHROMIUM)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Any]:
    """``visit(url, width=..., **context)`` opens the page in a browser of its own; at the end its console must be clean
    and all its requests its server's."""
    opened: list[Watched] = []

    def open_page(url: str, *, width: int = 1280, height: int = 900, **context: Any) -> Page:
        made = chromium.new_context(viewport={"width": width, "height": height}, **context)
        made.set_default_timeout(180_000)
        watched = Watched(made.new_page(), url)
        watched.watch()
        opened.append(watched)
        watched.page.goto(url)
        watched.page.wait_for_selector("#sf-generate")
        return watched.page

    yield open_page
    complaints = [text for watched in opened for text in watched.complaints]
    strays = [url for watched in opened for url in watched.strays]
    for watched in opened:
        watched.page.context.close()
    assert complaints == []
    assert strays == []
