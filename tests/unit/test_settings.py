"""A party's own settings: defaults, every key, and one sentence for each problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.errors import JobError
from sfumato.runtime.settings import PartySettings

PRINT = "sha256:" + "ab" * 32
ALL = f"""
[sessions]
at_once = 3
queued = 10
per_client = 4
wait_s = 60
longest_s = 90.5
session_mb = 4096
[accept]
programs = "approved"
revoked = ["{PRINT}"]
[operations]
host = "0.0.0.0"
port = 9464
[storage]
folder = "/var/lib/sfumato"
key = "keys/storage.key"
"""


def test_defaults_without_a_file(tmp_path: Path) -> None:
    settings = PartySettings.load(tmp_path)
    assert (settings.at_once, settings.queued, settings.per_client, settings.wait_s) == (2, 64, 16, 3600.0)
    assert (settings.longest_s, settings.session_mb) == (21600.0, 0)
    assert (settings.programs, settings.revoked) == ("any", frozenset())
    assert (settings.operations_host, settings.operations_port) == ("127.0.0.1", 0)
    assert (settings.storage_folder, settings.storage_key) == (tmp_path / "store", tmp_path / "storage.key")


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "party.toml").write_text(ALL)
    assert PartySettings.load(tmp_path) == PartySettings(
        at_once=3,
        queued=10,
        per_client=4,
        wait_s=60.0,
        longest_s=90.5,
        session_mb=4096,
        programs="approved",
        revoked=frozenset({PRINT}),
        operations_host="0.0.0.0",
        operations_port=9464,
        storage_folder=Path("/var/lib/sfumato"),
        storage_key=tmp_path / "keys" / "storage.key",
    )


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("at_once = 3", "at_once = 0", "at_once must be a whole number from 1 to 64."),
        ("at_once = 3", "at_once = true", "at_once must be a whole number from 1 to 64."),
        ("longest_s = 90.5", "longest_s = -1", "longest_s must be a number from 0 to 604800."),
        ("session_mb = 4096", "session_mb = 1.5", "session_mb must be a whole number from 0 to 999999."),
        ("at_once = 3", "at_onec = 3", "Unknown key 'at_onec' in [sessions]."),
        ("queued = 10", "queued = -1", "queued must be a whole number from 0"),
        ("wait_s = 60", 'wait_s = "60"', "wait_s must be a number from 0"),
        ('programs = "approved"', 'programs = "none"', 'programs must be "any" or "approved".'),
        ('programs = "approved"', "programs = []", 'programs must be "any" or "approved".'),
        (PRINT, "sha256:ab", "revoked must be a list of fingerprints"),
        (f'["{PRINT}"]', "3", "revoked must be a list of fingerprints"),
        ("port = 9464", "port = 70000", "The port in [operations] must be a whole number"),
        ('host = "0.0.0.0"', "host = 4", "The host in [operations] must be an address"),
        ('folder = "/var/lib/sfumato"', "folder = 1", "The folder in [storage] must be a path."),
        ("[storage]", "[stores]", "Unknown key 'stores'."),
        ("[storage]", "[[storage]]", "[storage] must be a table."),
        ("[sessions]", "[sessions", "not valid TOML"),
    ],
)
def test_every_problem_has_a_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in ALL
    (tmp_path / "party.toml").write_text(ALL.replace(old, new))
    with pytest.raises(JobError) as caught:
        PartySettings.load(tmp_path)
    assert sentence in str(caught.value)
    assert "party.toml" in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(JobError) as caught:
        PartySettings.parse(
            "shape = 1\n[sessions]\nat_once = 0\n[accept]\nprograms = 1\n[operations]\nport = -1\n"
        )
    for sentence in ("'shape'", "at_once must", "programs must", "The port in [operations]"):
        assert sentence in str(caught.value)
