"""What the documentation site adds to docs/ when mkdocs builds it: pages that live elsewhere in the repository,
source files that pages link to, the notebook, and the command reference.

Links in the repository's Markdown are relative to the file they stand in. Here they are turned into links between
pages, so that one text works in both places. ``python scripts/docs_site.py`` prints the command reference.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

#: Pages that live outside docs/: path in the repository -> path in the site.
FOLDED = {
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security-policy.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "benchmarks/peers/README.md": "project/peers.md",
    "src/sfumato/zoo/embedded/README.md": "project/embedded-model.md",
    "src/sfumato/zoo/glyphs/README.md": "project/glyphs-model.md",
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}"
        for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    },
}
NOTEBOOK = ("docs/quickstart.ipynb", "notebook.md")
_LANGUAGES = {
    ".py": "python", ".sh": "bash", ".json": "json", ".toml": "toml", ".yml": "yaml", ".yaml": "yaml", ".c": "c",
    ".h": "c",
}  # fmt: skip
_PICTURES = (".png", ".svg", ".jpg", ".jpeg")
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.M | re.S)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>)")


# ---- links ---------------------------------------------------------------------------------------------------------


def outside_fences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of what is no fenced code."""
    at = 0
    for fence in _FENCE.finditer(text):
        yield at, fence.start()
        at = fence.end()
    yield at, len(text)


def links(text: str) -> list[str]:
    """Relative targets of a page's links, without anchors."""
    found = [m["target"] for start, end in outside_fences(text) for m in _LINK.finditer(text, start, end)]
    return [target for target in found if target and "://" not in target and not target.startswith("mailto:")]


def resolved(source: str, target: str) -> str:
    """The path in the repository that ``target`` means in the file ``source``."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def page_of(path: str) -> str:
    """Where a file of the repository is found in the site."""
    if path == NOTEBOOK[0]:
        return NOTEBOOK[1]
    if path in FOLDED:
        return FOLDED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if path.endswith(_PICTURES) else f"files/{path}.md"


def rewritten(text: str, source: str, site: str) -> str:
    """The text of the file ``source`` for its page ``site``: every relative link leads to a page."""

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = resolved(source, target)
        if not (ROOT / path).exists() and (DOCS / path.removeprefix("docs/")) not in MADE:
            return match[0]  # mkdocs says that it leads nowhere
        return os.path.relpath(page_of(path), posixpath.dirname(site) or ".") + (match["anchor"] or "")

    out, at = [], 0
    for start, end in outside_fences(text):
        out += [text[at:start], _LINK.sub(moved, text[start:end])]
        at = end
    return "".join([*out, text[at:]])


#: Pages of docs/ that are made here and not kept in the repository.
MADE = {DOCS / "commands.md", DOCS / "notebook.md"}


# ---- pages that are made -------------------------------------------------------------------------------------------


def notebook_page() -> str:
    """The quickstart notebook as a page, without outputs."""
    cells = json.loads((ROOT / NOTEBOOK[0]).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def source_page(path: str) -> str:
    """A source file as a page; a folder as a list of its files."""
    file = ROOT / path
    head = f"---\ntitle: {file.name}\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    if file.is_dir():
        inside = sorted(entry.relative_to(file).as_posix() for entry in file.rglob("*") if entry.is_file())
        return head + "".join(f"* `{entry}`\n" for entry in inside)
    text = file.read_text(encoding="utf-8")
    return f"{head}````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"


def command_reference() -> str:
    """Every command and option, from the program itself."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from sfumato.shell.cli import app

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = get_command(app)
        text = get_docs_for_click(
            obj=command, ctx=command.make_context("sfumato", [], resilient_parsing=True), name="sfumato"
        )
    intro = (
        "# Commands\n\nMade from the program itself when the site is built; `sfumato COMMAND --help` says the same.\n"
        "An error is one sentence, with exit code 2.\n"
    )
    return intro + text.partition("\n")[2]


# ---- what mkdocs calls ---------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The folder of design notes stands for its pages."""
    notes = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "design").glob("*.md"))
    for section in config["nav"]:
        for entries in section.values():
            if isinstance(entries, list):
                entries[:] = [
                    {name: notes if page == "design" else page for name, page in entry.items()}
                    for entry in entries
                ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what does not lie in docs/, and what pages link to."""
    from mkdocs.structure.files import File

    def add(site: str, make: Callable[[], str]) -> None:
        if files.get_file_from_path(site) is None:
            files.append(File.generated(config, site, content=make()))

    notebook = files.get_file_from_path("quickstart.ipynb")
    if notebook is not None:
        files.remove(notebook)
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files.documentation_pages()} | FOLDED
    add(NOTEBOOK[1], lambda: rewritten(notebook_page(), NOTEBOOK[0], NOTEBOOK[1]))
    add("commands.md", command_reference)
    wanted = set()
    for source, site in pages.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        wanted |= {resolved(source, target) for target in links(text)}
        if source in FOLDED:
            add(site, lambda text=text, source=source, site=site: rewritten(text, source, site))  # type: ignore[misc]
    for path in sorted(wanted):
        if not (ROOT / path).exists() or path in FOLDED or path.startswith(("docs/", "..")):
            continue
        if path.endswith(_PICTURES):
            files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
        else:
            add(page_of(path), lambda path=path: source_page(path))  # type: ignore[misc]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Pages of docs/: links out of the folder lead to the pages that were added."""
    if not re.search(r"^##+ ", markdown, re.M):
        page.meta["hide"] = ["toc"]  # nothing to list: the text takes the room
    if page.file.generated_by is not None:
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings name things in Sphinx's way; the code font is enough."""
    return _ROLE.sub("", html)


if __name__ == "__main__":
    print(command_reference())
