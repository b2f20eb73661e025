"""Folders of local clusters: those of killed processes go, those of living ones never do."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.runtime.local import _new_folder, _remove_left_behind

HOLD = """
import sys
from pathlib import Path
from sfumato.runtime.local import _new_folder
folder, held = _new_folder(Path(sys.argv[1]))
print(folder, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_living_process_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    folder = Path(holder.stdout.readline().strip())
    (folder / "cluster").mkdir()
    (folder / "cluster" / "key.pem").write_text("x")
    _remove_left_behind(tmp_path)
    assert (folder / "cluster" / "key.pem").exists()
    holder.kill()
    holder.wait(10)
    holder.stdin.close()
    holder.stdout.close()
    _remove_left_behind(tmp_path)
    assert not folder.exists()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / ".lock").touch()
    (tmp_path / "sfumato-link").symlink_to(target)
    (tmp_path / "sfumato-file").write_text("x")
    (tmp_path / "sfumato-notes").mkdir()  # without a lock
    linked = tmp_path / "sfumato-linked"
    linked.mkdir()
    (linked / ".lock").symlink_to(target / ".lock")
    (tmp_path / "other").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    _remove_left_behind(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (target / ".lock").exists()


def test_a_folder_has_its_name_only_once_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = fcntl.flock, []

    def locking(descriptor: int, how: int) -> None:
        seen.append(list(tmp_path.glob("sfumato-*")))
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", locking)
    folder, held = _new_folder(tmp_path)
    assert seen == [[]]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == [folder]
    os.close(held)
