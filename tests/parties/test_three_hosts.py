"""The README's section "On three hosts", word for word, in network namespaces: three parties, an owner, two clients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "three_hosts.py"


def _may_make_networks() -> bool:
    if os.geteuid() or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"sfprobe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="not on this platform: needs the source tree")
@pytest.mark.skipif(
    not _may_make_networks(), reason="not on this platform: network namespaces need root and iproute2"
)
def test_the_readme_as_it_stands(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--keep", str(tmp_path)], capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for client, name in (("alice", "seven"), ("bob", "sneaker")):
        image = PIL.Image.open(tmp_path / f"{client}.example" / f"{name}.png")
        assert image.size == (32, 32)
        assert len(set(image.convert("L").tobytes())) > 10, "a picture, not one grey"
        assert not list((tmp_path / f"{client}.example").rglob("*.safetensors")), "no weights at a client"
    for name, host in (("party0", "a"), ("party1", "b"), ("party2", "c")):
        keys = sorted(p.name for p in (tmp_path / f"{host}.example" / "ours").iterdir())
        assert keys == [name], "a party has its own folder alone"
