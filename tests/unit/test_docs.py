"""The documentation says what is there: links, snippets, names, commands, tables. `make docs` builds the site."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

import sfumato
from sfumato.shell.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = _load()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")) + sorted(SITE.FOLDED)
COMMAND: Any = get_command(app)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, language: str) -> Iterator[tuple[str, str]]:
    """(what follows the language, code) of each fence."""
    for found in re.finditer(rf"^```{language}(?=\s)([^\n]*)\n(.*?)^```$", text(page), re.M | re.S):
        yield found[1].strip(), found[2]


def entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from entries(value)


def test_every_page_of_the_navigation_is_there() -> None:
    config = yaml.safe_load(text("mkdocs.yml"))
    made = {SITE.page_of(page) for page in SITE.FOLDED} | {path.name for path in SITE.MADE}
    missing = [page for page in entries(config["nav"]) if page not in made and not (DOCS / page).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = {target: ROOT / SITE.resolved(page, target) for target in SITE.links(text(page))}
    lost = [target for target, path in targets.items() if not path.exists() and path not in SITE.MADE]
    assert lost == []


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/design/")])
def test_python_on_a_page_compiles_or_is_a_part_of_its_file(page: str) -> None:
    for head, code in fences(page, "python"):
        named = re.search(r'title="([^"]+)"', head)
        if named is None:
            compile(code, page, "exec", flags=0x2000)  # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            continue
        lines = iter([line.strip() for line in text(named[1]).splitlines()])
        for line in code.splitlines():
            wanted = line.strip()
            if wanted and wanted != "...":
                assert any(found == wanted for found in lines), f"{named[1]} has no such line here: {wanted}"


@pytest.mark.parametrize("page", ["operation", "approximation", "protocol"])
def test_walkthroughs_run(page: str) -> None:
    from sfumato.graph.handlers import HANDLERS
    from sfumato.ops.activation import FUNCTIONS

    before = dict(HANDLERS), dict(FUNCTIONS)  # what the page adds is gone afterwards
    name = f"docs/extend/{page}.md"
    code = "\n".join(code for head, code in fences(name, "python") if "title=" not in head)
    try:
        exec(compile(code, name, "exec"), {"__name__": "docs_example"})
    finally:
        for table, kept in zip((HANDLERS, FUNCTIONS), before, strict=True):
            table.clear()  # type: ignore[attr-defined]
            table.update(kept)  # type: ignore[attr-defined]


def test_names_exist() -> None:
    """Every dotted name of ours on a page, and everything the reference shows."""
    found = {name for page in PAGES for name in re.findall(r"(?:`|::: )(sfumato(?:\.\w+)+)", text(page))}
    lost = []
    for name in sorted(found):
        parts, value = name.split("."), None
        for end in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                continue
            for part in parts[end:]:
                value = getattr(value, part, None)
            break
        if value is None:
            lost.append(name)
    assert len(found) > 20
    assert lost == []


def test_the_reference_shows_every_public_name() -> None:
    shown = set(re.findall(r"^::: sfumato\.(\w+)$", text("docs/api/index.md"), re.M))
    errors = {name for name in sfumato.__all__ if getattr(sfumato, name).__module__ == "sfumato.errors"}
    assert set(sfumato.__all__) - errors == shown - {"errors"}


# ---- commands ------------------------------------------------------------------------------------------------------


def all_commands(command: Any = COMMAND, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield (*path, name)
        yield from all_commands(inner, (*path, name))


def test_the_command_reference_has_every_command_and_option() -> None:
    reference = SITE.command_reference()
    for path in all_commands():
        assert f"`sfumato {' '.join(path)}`" in reference
        inner = COMMAND
        for name in path:
            inner = inner.commands[name]
        options = [
            option for p in inner.params for option in p.opts if option.startswith("--") and not p.hidden
        ]
        assert [option for option in options if option not in reference] == []


def commands_of(page: str) -> list[str]:
    """Lines of shell fences (``bash``, or without a language) that call sfumato."""
    lines = [line for _, code in [*fences(page, "bash"), *fences(page, "")] for line in code.splitlines()]
    return [line.split("#")[0].strip() for line in lines if re.match(r"(?:\S*/)?sfumato\s", line.strip())]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.endswith("CHANGELOG.md")])
def test_commands_on_a_page_exist(page: str) -> None:
    for line in commands_of(page):
        words, command = shlex.split(line)[1:], COMMAND
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{line}: there is no command {words[0]}"
            command = command.commands[words.pop(0)]
        known = {option for param in command.params for option in param.opts} | {"--help"}
        unknown = [w for w in words if w.startswith("--") and w.partition("=")[0] not in known]
        assert unknown == [], line


def test_three_hosts_are_those_of_the_readme() -> None:
    """The tests run the README's block; the page shows the same."""
    block = re.search(r"^## On three hosts\n.*?^```\n(.*?)^```$", text("README.md"), re.M | re.S)
    assert block is not None
    assert f"```\n{block[1]}```" in text("docs/three-hosts.md")
    assert "sfumato model share" in block[1]


# ---- tables --------------------------------------------------------------------------------------------------------


def test_twenty_complaints_are_answered() -> None:
    rows = [
        line.split(" | ") for line in text("docs/complaints.md").splitlines() if re.match(r"\| \d+ \|", line)
    ]
    assert [int(row[0].strip("| ")) for row in rows] == list(range(1, 21))
    for row in rows:
        assert len(row) == 6
        assert row[3] in ("yes", "partly", "not yet")
        shown = [ROOT / SITE.resolved("docs/complaints.md", target) for target in SITE.links(row[5])]
        assert shown, f"complaint {row[0]} shows nothing"
        assert [path for path in shown if not path.is_file() and path not in SITE.MADE] == []
        assert row[3] == "not yet" or any(path.suffix == ".py" or DOCS in path.parents for path in shown), (
            row[0]
        )


def test_the_security_page_has_its_thirteen_points() -> None:
    page = text("docs/security/README.md")
    assert re.findall(r"^## (\d+)\.", page, re.M) == [str(n) for n in range(1, 14)]
    assert "**Status: not independently reviewed.**" in page
