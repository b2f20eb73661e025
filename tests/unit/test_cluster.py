"""The cluster file and its private authority."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from sfumato.errors import JobError
from sfumato.runtime.authority import add_member, certificate_days, init_cluster, party_index, renew_cluster
from sfumato.runtime.cluster import Cluster, Limits

GOOD = """
format = 1
[[party]]
name = "hospital"
host = "10.0.0.1"
port = 8440
[[party]]
name = "university"
host = "mpc.example.org"
port = 8440
[[party]]
name = "cloud"
host = "::1"
port = 8440
[limits]
stall_s = 30
"""


def test_parse() -> None:
    cluster = Cluster.parse(GOOD)
    assert [m.name for m in cluster.parties] == ["hospital", "university", "cloud"]
    assert cluster.limits == Limits(stall_s=30.0)
    assert Cluster.parse(cluster.to_toml()) == cluster


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("format = 1", "format = 2", "Set format = 1."),
        ("format = 1", "format = 1\ncolour = 3", "Unknown key 'colour'."),
        ('host = "10.0.0.1"', 'host = "10.0.0.1"\nprot = 1', "Unknown key 'prot' in party 0."),
        ('host = "10.0.0.1"', 'host = "a b"', "The host of party 0 must be an IP address or a host name."),
        (
            'host = "::1"\nport = 8440',
            'host = "::1"\nport = 70000',
            "The port of party 2 must be a whole number",
        ),
        (
            'host = "::1"\nport = 8440',
            'host = "::1"\nport = true',
            "The port of party 2 must be a whole number",
        ),
        ('name = "cloud"', 'name = "hospital"', "different names"),
        ('name = "cloud"', 'name = ""', "The name of party 2"),
        ('host = "::1"', 'host = "10.0.0.1"', "different addresses"),
        ('host = "::1"', 'host = "::1"\nfingerprint = "abc"', "The fingerprint of party 2"),
        ("stall_s = 30", "stall_s = -1", "stall_s must be a number from"),
        ("stall_s = 30", "max_frame_bytes = 1e9", "max_frame_bytes must be a whole number"),
        ("stall_s = 30", "stal_s = 30", "Unknown key 'stal_s' in [limits]."),
        ("format = 1", "format = = 1", "not valid TOML"),
    ],
)
def test_every_problem_has_a_sentence(old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(JobError) as caught:
        Cluster.parse(GOOD.replace(old, new))
    assert sentence in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(JobError) as caught:
        Cluster.parse("shape = 1\n[limits]\nx = 1\n")
    for sentence in (
        "Unknown key 'shape'.",
        "Set format = 1.",
        "exactly three [[party]]",
        "Unknown key 'x' in [limits].",
    ):
        assert sentence in str(caught.value)


def test_init_gives_each_operator_only_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    cluster = init_cluster(folder, hosts=("10.0.0.1", "b.example", "::1"), clients=("alice", "bob"))
    shelves = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert shelves == ["alice", "authority", "bob", "owner", "party0", "party1", "party2"]
    keys = set()
    for shelf in shelves:
        files = {p.name: p for p in (folder / shelf).iterdir()}
        if shelf == "authority":
            assert sorted(files) == ["authority.key", "authority.pem"]
            assert stat.S_IMODE(files["authority.key"].stat().st_mode) == 0o600
            assert stat.S_IMODE((folder / shelf).stat().st_mode) == 0o700
            continue
        own = ["storage.key"] if shelf.startswith("party") else []
        assert sorted(files) == ["authority.pem", "certificate.pem", "cluster.toml", "key.pem", *own]
        for name in own:
            assert len(files[name].read_bytes()) == 32
            assert stat.S_IMODE(files[name].stat().st_mode) == 0o600
            keys.add(files[name].read_bytes())
        assert stat.S_IMODE(files["key.pem"].stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / shelf).stat().st_mode) == 0o700
        keys.add(files["key.pem"].read_bytes())
        assert Cluster.load(folder / shelf) == cluster
    assert len(keys) == 6 + 3
    certificate = x509.load_pem_x509_certificate((folder / "party1" / "certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["sfumato://party/1"]
    assert cluster.parties[1].fingerprint == "sha256:" + certificate.fingerprint(hashes.SHA256()).hex()
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 366


def test_init_refuses_to_overwrite(tmp_path: Path) -> None:
    init_cluster(tmp_path / "c")
    before = (tmp_path / "c" / "party0" / "key.pem").read_bytes()
    with pytest.raises(JobError, match="not empty"):
        init_cluster(tmp_path / "c")
    assert (tmp_path / "c" / "party0" / "key.pem").read_bytes() == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"hosts": ("a", "b")},
        {"hosts": ("a b", "b", "c")},
        {"ports": (1, 2, 99999)},
        {"clients": ()},
        {"clients": ("a", "a")},
        {"clients": ("../x",)},
        {"clients": ("party0",)},
        {"clients": ("Authority",)},
        {"clients": ("a",), "owners": ("A",)},
        {"owners": ("a b",)},
    ],
)
def test_init_refuses_before_writing(tmp_path: Path, wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(JobError):
        init_cluster(tmp_path / "c", **wrong)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def identity(folder: Path) -> tuple[str, bytes]:
    """(the identity in a folder's certificate, the certificate)."""
    certificate = x509.load_pem_x509_certificate((folder / "certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)[0], certificate.fingerprint(
        hashes.SHA256()
    )


@pytest.mark.parametrize("at", range(1, 40, 6))
def test_a_stop_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    calls, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        init_cluster(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_member_or_a_renewal_that_stops_half_way_leaves_no_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_cluster(tmp_path / "c")
    before = sorted(tmp_path.rglob("*"))
    real, calls = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for stops in (lambda: renew_cluster(tmp_path / "c"), lambda: add_member(tmp_path / "c", client="late")):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            stops()
        assert sorted(tmp_path.rglob("*")) == before


def test_keys_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, replace = set[int](), os.fsync, os.replace

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checked(source: Path, target: Path) -> None:
        assert all(path.stat().st_ino in synced for path in [source, *source.rglob("*")] if path.is_file())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    init_cluster(tmp_path / "c")
    assert {path.stat().st_ino for path in [tmp_path, *(tmp_path / "c").iterdir()] if path.is_dir()} <= synced


def test_renewal_keeps_who_is_who_and_what_is_stored(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    before = init_cluster(folder, clients=("alice",), owners=("olga",))
    (folder / "party1" / "party.toml").write_text("# mine\n")
    names = ["party0", "party1", "party2", "alice", "olga"]
    old = {name: identity(folder / name) for name in names}
    stored = (folder / "party1" / "storage.key").read_bytes()
    keys = {name: (folder / name / "key.pem").read_bytes() for name in names}
    shutil.rmtree(folder / "party2")  # its operator has it

    after = renew_cluster(folder)

    assert [m.host for m in after.parties] == [m.host for m in before.parties]
    for index, name in enumerate(names):
        who, certificate = identity(folder / name)
        assert who == old[name][0]
        assert certificate != old[name][1]
        assert (folder / name / "key.pem").read_bytes() != keys[name]
        assert stat.S_IMODE((folder / name / "key.pem").stat().st_mode) == 0o600
        assert Cluster.load(folder / name) == after
        if index < 3:
            assert after.parties[index].fingerprint == f"sha256:{certificate.hex()}"
            assert party_index(folder / name) == index
    assert (folder / "party1" / "storage.key").read_bytes() == stored
    assert (folder / "party1" / "party.toml").read_text() == "# mine\n"
    assert not (folder / "party2" / "storage.key").exists()  # a new one would not open what is stored
    assert 364 < certificate_days(folder / "alice") <= 365


def test_members_are_added_under_the_same_authority(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    cluster = init_cluster(folder)
    for given, who in (
        ({"client": "zoe"}, "sfumato://client/zoe"),
        ({"owner": "max"}, "sfumato://owner/max"),
    ):
        made = add_member(folder, **given)
        assert identity(made)[0] == who
        assert Cluster.load(made) == cluster
        assert (made / "authority.pem").read_bytes() == (folder / "authority" / "authority.pem").read_bytes()
    for wrong in ({"client": "zoe"}, {"owner": "zoe"}, {"client": "party1"}, {"client": "../x"}, {}):
        with pytest.raises(JobError):
            add_member(folder, **wrong)
    (folder / "authority" / "authority.key").unlink()
    for act in (renew_cluster, lambda f: add_member(f, client="ann")):
        with pytest.raises(JobError, match="there is no authority in"):
            act(folder)


def test_a_partys_folder_is_known_by_its_certificate(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    init_cluster(folder)
    assert [party_index(folder / f"party{i}") for i in range(3)] == [0, 1, 2]
    with pytest.raises(JobError, match="is that of no party"):
        party_index(folder / "client")
    old = (folder / "party1" / "certificate.pem").read_bytes()
    renew_cluster(folder)
    (folder / "party1" / "certificate.pem").write_bytes(old)
    with pytest.raises(JobError, match="is not the one in its cluster file"):
        party_index(folder / "party1")


def test_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot read the cluster file"):
        Cluster.load(tmp_path / "none.toml")
