"""Models at rest at a party: what the disk holds, what is noticed when it changes, and what a crash leaves."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_parties as shared

from sfumato.errors import JobError
from sfumato.graph.plan import load_side
from sfumato.ring.fixed import encode
from sfumato.runtime import sealed, weights
from sfumato.runtime.store import ModelStore
from sfumato.runtime.wire import tensor_bytes
from sfumato.types import Z64

SHARE = "ab" * 16
TERMS: dict[str, Any] = {
    "clients": None, "offers": [], "plans": {}, "items": [], "shared_at": 1, "files": "", "tensors": []
}  # fmt: skip
MODEL = shared.a_model()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return shared.stores(tmp_path)[1]


def kept(
    store: ModelStore, name: str = "m", parts: list[bytes] | None = None, owner: str = shared.OWNER
) -> None:
    with store.draft(name, owner, os.urandom(16).hex(), replace=True) as draft:
        for item, data in enumerate(parts or [b"x" * 100]):
            draft.seal(item, [data])
        draft.commit(TERMS)


def files(store: ModelStore) -> list[Path]:
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


# ---- names, rights, the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../m", "a/b", ".m", "a\\b/..", "-m", "m\n", "m\0", "ä", "m" * 64, 3, None]
)
def test_a_name_cannot_lead_anywhere(store: ModelStore, name: Any) -> None:
    for call in (
        lambda: store.draft(name, shared.OWNER, SHARE),
        lambda: store.open(name, shared.CLIENT_A),
        lambda: store.remove(name, shared.OWNER),
    ):
        with pytest.raises(JobError, match="a model's name must be"):
            call()


def test_everything_is_for_this_user_alone(store: ModelStore) -> None:
    kept(store)
    for path in [store.folder, *store.folder.rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 100, 1000])
def test_what_is_sealed_comes_back(store: ModelStore, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(sealed, "_CHUNK_BYTES", 32)
    data = os.urandom(size)
    with store.draft("m", shared.OWNER, SHARE) as draft:
        for cut in range(0, size + 1, max(1, size // 5)):
            draft.seal(cut, [data[:cut], data[cut:]])
        draft.commit(TERMS)
    model = store.open("m", shared.CLIENT_A)
    for cut in range(0, size + 1, max(1, size // 5)):
        assert model.unsealed(cut) == data


# ---- changes on the disk ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[ModelStore]:
    """Parties that hold a whole shared model."""
    at = shared.stores(tmp_path_factory.mktemp("three"))
    shared.share(at, MODEL)
    return at


def used(at: list[ModelStore]) -> None:
    """A client describes the model and loads all of it."""
    with shared.Parties(at) as session:
        description = session.describe("house")
        for digest in description.plans:
            session.load_shared(digest[:8], description, digest)


@pytest.mark.parametrize("party", range(3))
def test_any_changed_byte_is_noticed(three: list[ModelStore], party: int) -> None:
    used(three)
    # Of a manifest that is no JSON any more nobody knows for whom the model is.
    noticed = rf"'house' at party {party} (.*share it again|that this client may use)"
    source = random.Random(party)
    for path in files(three[party]):
        if path.name == ".lock":
            continue
        if party != 0 and path.name == "client.bin":
            continue  # party 0 alone hands it out
        data = path.read_bytes()
        head = {"public.safetensors": 8 + int.from_bytes(data[:8], "little")}.get(path.name, 0)
        places = {0, len(data) - 1, *(source.randrange(head, len(data)) for _ in range(5))}
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << source.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(JobError, match=noticed):
                used(three)
        for changed in (data[:-1], data + b"\0", b""):
            path.write_bytes(changed)
            if path.name == "public.safetensors" and changed == data + b"\0":
                continue  # a tail that no tensor reads
            with pytest.raises(JobError, match=noticed):
                used(three)
        path.unlink()
        with pytest.raises(JobError, match=noticed):
            used(three)
        path.write_bytes(data)
    used(three)


def test_chunks_files_models_and_parties_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "_CHUNK_BYTES", 32)
    chunk, key = 32 + 16, os.urandom(32)
    at = shared.stores(tmp_path, [key] * 3)  # even under one key
    for store in at:
        for name in ("m", "n"):
            kept(store, name, [b"a" * 96, b"b" * 96])

    def refused(store: ModelStore, item: int = 0, name: str = "m") -> None:
        with pytest.raises(JobError, match="share it again"):
            store.open(name, shared.CLIENT_A).unsealed(item)

    first, second = (at[0].folder / "m" / "weights" / f"00000{i}" for i in range(2))
    data, other = first.read_bytes(), second.read_bytes()
    for changed in (
        data[chunk : 2 * chunk] + data[:chunk] + data[2 * chunk :],  # reordered
        data[: 2 * chunk],  # shortened by a whole chunk
        data + data[-chunk:],  # lengthened by one
        data[:chunk] * 3,  # repeated
        other,  # another weight's
        other[:chunk] + data[chunk:],
        (at[0].folder / "n" / "weights" / "000000").read_bytes(),  # another model's
        (at[1].folder / "m" / "weights" / "000000").read_bytes(),  # another party's
    ):
        first.write_bytes(changed)
        refused(at[0])
    first.write_bytes(data)
    assert at[0].open("m", shared.CLIENT_A).unsealed(0) == b"a" * 96
    shutil.rmtree(at[0].folder / "m")  # whole folders of another model or party
    shutil.copytree(at[0].folder / "n", at[0].folder / "m")
    refused(at[0])
    shutil.rmtree(at[0].folder / "m")
    shutil.copytree(at[1].folder / "m", at[0].folder / "m")
    refused(at[0])


def test_a_missing_or_wrong_key_is_named(tmp_path: Path) -> None:
    store = shared.stores(tmp_path)[1]
    kept(store)
    key = tmp_path / "party1" / "storage.key"
    good = key.read_bytes()
    for data, match in [
        (os.urandom(32), "another storage key"),
        (good[:31], "is not 32 bytes"),
        (b"", "is not 32 bytes"),
        (None, r"cannot read its storage key storage.key \(No such file"),
    ]:
        key.unlink()
        if data is not None:
            key.write_bytes(data)
        with pytest.raises(JobError, match=match):
            store.open("m", shared.CLIENT_A)
        (entry,) = store.models()
        assert entry.name == "m"
        assert entry.problem
        assert store.models(shared.CLIENT_A) == []
        if data is None:
            with pytest.raises(JobError, match="cannot read its storage key"):
                store.draft("n", shared.OWNER, SHARE)
            key.write_bytes(b"")
    key.write_bytes(os.urandom(32))
    kept(store)  # the owner can replace what nobody can read any more
    store.open("m", shared.CLIENT_A)
    with pytest.raises(JobError, match="is taken"):
        kept(store, owner=shared.OTHER_OWNER)


# ---- what the disk says of the weights ----------------------------------------------------------------------------


def patterns(tensor: torch.Tensor) -> Iterator[bytes]:
    """How a weight could look in a file: as floats, half floats, and words, four values each."""
    four = tensor.reshape(-1)[:4]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        yield bytes(tensor_bytes(four.to(dtype)))
    yield bytes(tensor_bytes(encode(four, Z64, 18)))


def test_no_party_has_a_secret_weight_in_the_clear(three: list[ModelStore]) -> None:
    searched = 0
    contents = [path.read_bytes() for store in three for path in files(store)]
    for plan in MODEL.plans.values():
        values = load_side(plan)
        for tensor in values.publics.values():  # the search finds what is there
            if tensor.numel() >= 4 and tensor.is_floating_point():
                assert any(next(patterns(tensor)) in data for data in contents)
        for tensor in values.secrets.values():
            for pattern in patterns(tensor):
                searched += 1
                assert not any(pattern in data for data in contents)
    assert searched >= 20


def test_no_share_lies_in_the_clear(three: list[ModelStore]) -> None:
    for store in three:
        model = store.open("house", shared.CLIENT_A)
        contents = [path.read_bytes() for path in files(store)]
        for item in range(len(model.manifest["items"])):
            data = bytes(model.unsealed(item))
            for start in (0, len(data) - 32):
                assert not any(data[start : start + 32] in content for content in contents)


def bits_set(data: bytes) -> float:
    """Deviations of the number of set bits from half of them, in standard deviations."""
    count = sum(byte.bit_count() for byte in data)
    return abs(count - 4 * len(data)) / (2 * len(data)) ** 0.5


def test_what_a_party_holds_does_not_depend_on_the_weights(tmp_path: Path) -> None:
    """Of weights without any entropy, each party holds uniform words, other ones at each sharing, and so its files."""
    at = shared.stores(tmp_path)
    found: list[list[bytes]] = []
    sealed_files: list[list[bytes]] = []
    for value in (0.0, 0.0, 0.125):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Tanh()).eval()
        with torch.no_grad():
            module[0].weight.fill_(value)
        x = torch.ones(2, 64)
        plan = shared.planned(module, "inputs+weights", x)
        offers = [{"settings": {}, "parts": {"model": plan.digest()}, "reveal": []}]
        shared.share(at, shared.a_model(plans={plan.digest(): plan}, offers=offers, replace=True))
        models = [store.open("house", shared.CLIENT_A) for store in at]
        found.append([bytes(model.unsealed(0)) for model in models])
        sealed_files.append([(store.folder / "house" / "weights" / "000000").read_bytes() for store in at])
    for at_parties in (*found, *sealed_files):
        for party, data in enumerate(at_parties):
            assert len(data) >= (64 if party == 0 else 64 * 64 * 8)
            assert bits_set(data) < 5
    for group in (found, sealed_files):
        for party in range(3):
            for one, other in ((0, 1), (0, 2)):
                xored = bytes(a ^ b for a, b in zip(group[one][party], group[other][party], strict=True))
                assert bits_set(xored) < 5


# ---- crashes, full disks, other processes -------------------------------------------------------------------------


WRITER = """
import sys, time
from sfumato.runtime.store import ModelStore
store = ModelStore(sys.argv[1], sys.argv[2], 1)
with store.draft("m", "sfumato://owner/owner", "ab" * 16, replace=True) as draft:
    draft.seal(0, [b"half"])
    print("writing", flush=True)
    time.sleep(600)
"""


def test_a_crash_leaves_no_model_and_its_draft_is_swept(store: ModelStore) -> None:
    kept(store, parts=[b"old"])
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.folder), str(store.folder.parent / "storage.key")],
        stdout=subprocess.PIPE,
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        assert store.sweep() == 0  # it lives
        assert len(list(store.folder.glob(".draft-*"))) == 1
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(30)
        assert writer.stdout is not None
        writer.stdout.close()
    assert [entry.name for entry in store.models()] == ["m"]
    assert store.open("m", shared.CLIENT_A).unsealed(0) == b"old"
    assert store.sweep() == 1
    assert [path.name for path in store.folder.iterdir() if path.name != ".lock"] == ["m"]


def test_a_replacement_that_did_not_end_is_undone_or_finished(store: ModelStore) -> None:
    kept(store, parts=[b"old"])
    (store.folder / "m").rename(store.folder / ".old-m")
    assert store.models() == []
    store.sweep()
    assert store.open("m", shared.CLIENT_A).unsealed(0) == b"old"
    shutil.copytree(store.folder / "m", store.folder / ".old-m")
    store.sweep()
    assert [path.name for path in store.folder.iterdir() if path.name != ".lock"] == ["m"]


def test_a_name_stays_its_owners_while_its_replacement_has_not_come_to_its_end(store: ModelStore) -> None:
    kept(store, parts=[b"old"])
    with store.draft("n", shared.OTHER_OWNER, SHARE) as draft:
        draft.name = "m"
        (store.folder / "m").rename(
            store.folder / ".old-m"
        )  # another writer was killed between its two renames
        with pytest.raises(JobError, match="'m' is taken"):
            draft.commit(TERMS)
    assert store.open("m", shared.CLIENT_A).unsealed(0) == b"old"


def test_a_share_id_is_taken_once(store: ModelStore) -> None:
    with (
        store.draft("m", shared.OWNER, SHARE) as first,
        store.draft("n", shared.OTHER_OWNER, SHARE) as second,
    ):
        first.commit(TERMS)
        with pytest.raises(JobError, match="has a model with this share id; share yours again"):
            second.commit(TERMS)
    for name, owner in (("m", shared.OWNER), ("n", shared.OTHER_OWNER)):  # its own owner neither
        with pytest.raises(JobError, match="has a model with this share id"):
            store.draft(name, owner, SHARE, replace=True)
    assert [entry.name for entry in store.models()] == ["m"]


def test_a_list_is_whole_while_a_model_is_replaced(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(store)
    (store.folder / "m" / "gone").symlink_to(store.folder)
    real, tries = Path.read_bytes, list[Path]()

    def read_bytes(path: Path) -> bytes:
        tries.append(path)
        if path.name == "manifest.json" and len(tries) == 2:
            raise FileNotFoundError  # the old folder has gone, the new one is about to come
        return real(path)

    def stat(path: Path, **options: Any) -> Any:
        if path.name == "gone":
            raise FileNotFoundError
        return os.stat(path, **options)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "stat", stat)
    (entry,) = store.models()
    assert (entry.name, entry.problem) == ("m", "")
    assert entry.nbytes > 100


def test_a_damaged_model_is_named_to_those_alone_who_may_use_it(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    with store.draft("m", shared.OWNER, SHARE) as draft:
        draft.commit({**TERMS, "clients": [shared.CLIENT_A]})
    manifest = store.folder / "m" / "manifest.json"
    whole = manifest.read_bytes()
    for damaged, told in ((whole[:-1] + b" }", "share it again"), (b"", "there is no model")):
        manifest.write_bytes(damaged)
        with pytest.raises(JobError, match=told):
            store.open("m", shared.CLIENT_A)
        caplog.clear()
        with pytest.raises(JobError) as refused:
            store.open("m", shared.CLIENT_B)
        with pytest.raises(JobError) as absent:
            store.open("n", shared.CLIENT_B)
        assert str(refused.value) == str(absent.value).replace("'n'", "'m'")
        assert "cannot be used: the model 'm'" in caplog.text


def test_two_sessions_write_public_weights_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, real = threading.Barrier(2), weights.save_file

    def save(tensors: Any, path: Path) -> None:
        real(tensors, path)
        both.wait(10)  # each has written before either goes on

    monkeypatch.setattr(weights, "save_file", save)
    values = (1.0, 2.0)
    with ThreadPoolExecutor(2) as pool:
        names = list(pool.map(lambda value: weights.stored(tmp_path, {"w": torch.full((4,), value)}), values))
    for name, value in zip(names, values, strict=True):
        assert weights.opened(tmp_path, name, ["w"])["w"].tolist() == [value] * 4
    assert len(list(tmp_path.iterdir())) == 2


def test_files_are_on_the_disk_before_the_name_is(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, real_fsync, real_rename, moved = set[int](), os.fsync, Path.rename, list[str]()

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Any:
        for inside in [path, *path.rglob("*")]:
            assert inside.name == "lock" or inside.stat().st_ino in synced, inside
        moved.append(target.name)
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    kept(store)
    assert moved == ["m"]
    assert store.folder.stat().st_ino in synced


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_full_disk_is_one_error_and_leaves_no_draft(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, code: int, at: int
) -> None:
    kept(store, "old")
    calls, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    match = "party 1 has no room on its disk for the model 'm'" if code == errno.ENOSPC else "could not write"
    with pytest.raises(JobError, match=match):
        kept(store, parts=[b"x", b"y"])
    monkeypatch.undo()
    assert [path.name for path in store.folder.iterdir() if path.name != ".lock"] == ["old"]


def test_a_full_disk_at_one_party_ends_the_share_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = shared.stores(tmp_path)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "party2" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "full")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(JobError, match="party 2 has no room on its disk for the model 'house'"):
        shared.share(at, MODEL)
    assert all(store.models() == [] and not list(store.folder.glob(".draft-*")) for store in at)


def test_of_two_owners_of_a_name_the_first_to_commit_has_it(store: ModelStore) -> None:
    with store.draft("m", shared.OWNER, SHARE) as one, store.draft("m", shared.OTHER_OWNER, SHARE) as two:
        two.commit(TERMS)
        with pytest.raises(JobError, match="is taken at party 1"):
            one.commit(TERMS)
    assert [entry.owner for entry in store.models()] == [shared.OTHER_OWNER]
    assert not list(store.folder.glob(".draft-*"))


def test_a_session_keeps_a_model_that_is_removed(tmp_path: Path) -> None:
    at = shared.stores(tmp_path)
    shared.share(at, MODEL)
    with shared.Parties(at) as session:
        description = session.describe("house")
        for part in ("last", "known"):
            session.load_shared(part, description, shared.part_of(MODEL, part))
        for store in at:
            store.remove("house", shared.OWNER)
        x = shared.batch()
        session.put("x", x)
        (name,) = description.plans[shared.part_of(MODEL, "last")].client_inputs
        session.call("last", "run", {name: "x"}, {}, ["y"])
        assert float((session.reveal("y") - shared.chain(2)(x).detach()).abs().max()) < 1e-3
        with pytest.raises(JobError, match="removed or replaced"):
            session.load_shared("first", description, shared.part_of(MODEL, "first"))
    with shared.Parties(at) as session, pytest.raises(JobError, match="there is no model 'house'"):
        session.describe("house")


def test_the_store_needs_no_torch() -> None:
    code = "import sys, sfumato.runtime.store, sfumato.runtime.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
