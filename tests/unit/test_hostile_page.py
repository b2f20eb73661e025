"""docs/security/hostile.md names tests that exist, and tells something in every row."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security" / "hostile.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]


def test_every_row_is_whole_and_names_what_holds_it() -> None:
    attacks = [row for row in ROWS if row[2] != "deadline"]
    assert len(attacks) > 30
    for row in attacks:
        assert len(row) == 4, row
        assert re.search(r"`(tests|benchmarks)/[\w/]+\.py|the same two", row[3]), row


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)(?:::(\w+))?`", PAGE))
    assert len(named) > 40
    lost = []
    for path, test in sorted(named):
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        if not source or (test and not re.search(rf"^def {test}\(", source, re.M)):
            lost.append(f"{path}::{test}")
    assert lost == []


def test_every_test_of_the_hostile_world_is_on_the_page() -> None:
    source = (ROOT / "tests" / "parties" / "test_hostile.py").read_text(encoding="utf-8")
    assert [name for name in re.findall(r"^def (test_\w+)\(", source, re.M) if f"::{name}`" not in PAGE] == []
