"""Models that rest at a party: weight shares encrypted under the operator's storage key, everything else authenticated.

One folder per model: ``manifest.json`` (its first line authenticates the second), ``weights/`` (sealed shares, one file
per weight), ``client.bin`` and ``public.safetensors`` (plain, known by their digests). It is written as a draft and
renamed when the owner commits, so that a crash leaves a whole model or none. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self

from sfumato.errors import JobError
from sfumato.runtime.canonical import canonical
from sfumato.runtime.entries import ModelEntry, may_use
from sfumato.runtime.names import check_name, is_name
from sfumato.runtime.sealed import Buffer, Keys, is_held, on_disk, private, sync, written

__all__ = ["Draft", "ModelStore", "StoredModel", "digest_of_file"]

_log = logging.getLogger(__name__)
_KEY_BYTES = 32
_SHARE = re.compile(r"[0-9a-f]{32}\Z")
_MANIFEST, _LOCK, _DRAFT, _OLD, _GONE = "manifest.json", "lock", ".draft-", ".old-", ".gone-"
CLIENT_FILE, PUBLIC_FILE = "client.bin", "public.safetensors"


def digest_of_file(pieces: Iterator[Buffer]) -> str:
    """Hex BLAKE2b (32 bytes) of a plain file's content, piece by piece."""
    state = hashlib.blake2b(digest_size=32, person=b"sfumato-file")
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


class ModelStore:
    """The models of one party, in ``folder``, under the 32-byte key in ``key_path``. Many processes may use it."""

    def __init__(self, folder: Path | str, key_path: Path | str, party: int) -> None:
        self.folder, self.party = Path(folder), party
        self._key_path = Path(key_path)

    def models(self, identity: str = "") -> list[ModelEntry]:
        """What is here, by name: all for the operator, else what ``identity`` owns or may use. A client is not told of
        others."""
        entries = [self._entry(name) for name in self._names()]
        found = [entry for entry in entries if entry is not None and entry.concerns(identity)]
        return [entry.told_to(identity) for entry in found]

    def open(self, name: str, client: str) -> StoredModel:
        """A model with its manifest checked.

        Raises:
            JobError: there is none that this client may use, or it was changed, or written under another key or by
                another party.
        """
        none = f"there is no model {check_name(name)!r} at party {self.party} that this client may use"
        if not (self.folder / name).is_dir():
            raise JobError(none)
        try:
            manifest = self._settled(name)
        except JobError as error:
            # What is damaged is told to those alone who may use it, as far as the damaged manifest says who they are.
            if may_use(self._claimed(name).get("clients", ()), client):
                raise
            _log.warning(
                "party %d keeps a model that cannot be used: %s",
                self.party,
                error,
                extra={"facts": {"party": self.party, "error": error}},
            )
            raise JobError(none) from None
        if not may_use(manifest["clients"], client):
            raise JobError(none)
        return StoredModel(self.folder / name, manifest, Keys(self._key(), manifest))

    def draft(self, name: str, owner: str, share_id: str, *, replace: bool = False) -> Draft:
        """Begin a model. Use as a context manager: what is not committed is removed.

        Raises:
            JobError: the name belongs to another owner, or is taken and ``replace`` is not set; a model here has this
                share id; no key; no room.
        """
        check_name(name)
        if not _SHARE.match(share_id):
            raise JobError("a share of a model is named by 32 hex digits")
        self.sweep()
        self._check_free(name, owner, share_id, replace)
        return Draft(self, name, owner, share_id, replace, self._key())

    def remove(self, name: str, owner: str) -> None:
        """Forget a model. Sessions that have loaded it go on with what they hold.

        Raises:
            JobError: there is none of this owner.
        """
        with on_disk(self.party, name, "remove"), self._locked():
            if not (self.folder / check_name(name)).is_dir() or self._owner(name) != owner:
                raise JobError(f"there is no model {name!r} of this owner at party {self.party}")
            self._discard(name)

    def sweep(self) -> int:
        """Remove what crashes left behind: drafts that nobody writes any more, models half removed. How many."""
        if not self.folder.is_dir():
            return 0
        found = 0
        with on_disk(self.party, "", "sweep"), self._locked():
            for path in sorted(self.folder.iterdir()):
                kind = next((k for k in (_DRAFT, _OLD, _GONE) if path.name.startswith(k)), None)
                if kind is None or (kind == _DRAFT and is_held(path / _LOCK)):
                    continue
                if kind == _OLD and self._restored(path.name.removeprefix(_OLD)):
                    continue
                shutil.rmtree(path, ignore_errors=True)
                found += 1
        return found

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if is_name(path.name) and path.is_dir())

    def _entry(self, name: str) -> ModelEntry | None:
        folder = self.folder / name
        try:
            manifest = self._settled(name)
        except JobError as error:
            if not folder.is_dir():
                return None  # it was removed meanwhile
            owner = ""
            with contextlib.suppress(JobError):
                owner = self._owner(name)
            return ModelEntry(name=name, owner=owner, problem=str(error))
        clients, nbytes = manifest["clients"], 0
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # it was replaced meanwhile
                nbytes += path.stat().st_size if path.is_file() else 0
        return ModelEntry(
            name=name,
            owner=manifest["owner"],
            share_id=manifest["share"],
            clients=None if clients is None else tuple(clients),
            secret=bool(manifest["items"]),
            offers=tuple(offer["settings"] for offer in manifest["offers"]),
            plans=len(manifest["plans"]),
            nbytes=nbytes,
            shared_at=manifest["shared_at"],
        )

    def _restored(self, name: str) -> bool:
        """Under the lock: whether a replacement had not come to its end, and the old model is back."""
        old, target = self.folder / f"{_OLD}{name}", self.folder / name
        if target.exists() or not old.exists():
            return False
        old.rename(target)
        return True

    def _check_free(self, name: str, owner: str, share_id: str, replace: bool) -> None:
        taken = (self.folder / name).exists()
        if taken and self._owner(name) != owner:
            raise JobError(f"the name {name!r} is taken at party {self.party}; choose another name")
        if taken and not replace:
            raise JobError(
                f"the model {name!r} is already at party {self.party}; replace it (--replace) or choose another name"
            )
        if any(self._claimed(other).get("share") == share_id for other in self._names()):
            raise JobError(f"party {self.party} has a model with this share id; share yours again")

    def _owner(self, name: str) -> str:
        """Who shared a model, whether or not its manifest can be authenticated: enough to remove or replace it."""
        claimed = self._claimed(name)
        if "owner" not in claimed:
            raise JobError(
                f"the model {name!r} at party {self.party} has no readable manifest; its operator must delete its "
                "folder"
            )
        return str(claimed["owner"])

    def _claimed(self, name: str) -> dict[str, Any]:
        """A manifest as it stands there, authentic or not; empty where it cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, IndexError, RecursionError):
            return dict(json.loads((self.folder / name / _MANIFEST).read_bytes().split(b"\n", 1)[1]))
        return {}

    def _settled(self, name: str) -> dict[str, Any]:
        """The manifest, read again under the lock where a replacement may have been half way."""
        try:
            return self._manifest(name)
        except JobError:
            with on_disk(self.party, name, "read"), self._locked():
                return self._manifest(name)

    def _manifest(self, name: str) -> dict[str, Any]:
        broken = (
            f"the model {name!r} at party {self.party} cannot be read: its files were changed or written under another "
            "storage key; its owner must share it again and replace it"
        )
        key = self._key()
        try:
            tag, text = (self.folder / name / _MANIFEST).read_bytes().split(b"\n", 1)
            manifest = json.loads(text)
            expected = Keys(key, manifest).tag(text)
            known = (manifest["format"], manifest["name"], manifest["party"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise JobError(broken) from None
        if not hmac.compare_digest(tag, expected) or known != (1, name, self.party):
            raise JobError(broken)
        return dict(manifest)

    def _key(self) -> bytes:
        try:
            key = self._key_path.read_bytes()
        except OSError as error:
            raise JobError(
                f"party {self.party} cannot read its storage key {self._key_path.name} ({error.strerror}); its "
                "operator must put it back, or have every model shared again under a new one"
            ) from None
        if len(key) != _KEY_BYTES:
            raise JobError(
                f"the storage key of party {self.party} is not {_KEY_BYTES} bytes; its operator must put it back"
            )
        return key

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.folder / ".lock", "ab", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _discard(self, name: str) -> None:
        gone = self.folder / f"{_GONE}{secrets.token_hex(8)}"
        (self.folder / name).rename(gone)
        sync(self.folder)
        shutil.rmtree(gone, ignore_errors=True)

    def _commit(self, draft: Draft) -> None:
        with self._locked():
            self._restored(draft.name)
            self._check_free(draft.name, draft.owner, draft.share_id, draft.replace)
            target, old = self.folder / draft.name, self.folder / f"{_OLD}{draft.name}"
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
            draft.folder.rename(target)
            sync(self.folder)
            (target / _LOCK).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


class Draft:
    """A model that is being written. Every way out but `commit` removes it."""

    def __init__(
        self, store: ModelStore, name: str, owner: str, share_id: str, replace: bool, key: bytes
    ) -> None:
        self.name, self.owner, self.share_id, self.replace = name, owner, share_id, replace
        self._store = store
        self._sealed: dict[str, int] = {}
        self._head = {
            "format": 1,
            "name": name,
            "owner": owner,
            "share": share_id,
            "party": store.party,
            "salt": secrets.token_hex(32),
        }
        self._keys = Keys(key, self._head)
        self.folder = store.folder / f"{_DRAFT}{secrets.token_hex(8)}"
        self._lock: BinaryIO | None = None
        with self._disk(), store._locked():
            try:
                self.folder.mkdir(mode=0o700)
                (self.folder / "weights").mkdir(mode=0o700)
                self._lock = open(self.folder / _LOCK, "xb", opener=private)  # noqa: SIM115
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def seal(self, item: int, parts: Sequence[Buffer]) -> None:
        """Encrypt one weight's components, one after the other."""
        with self._disk(), written(self.folder / "weights" / _file_of(item)) as file:
            self._sealed[str(item)] = self._keys.seal(file, item, parts)

    @contextlib.contextmanager
    def plain(self, name: str) -> Iterator[BinaryIO]:
        """Write a file that is no secret: ``client.bin`` or ``public.safetensors``."""
        with self._disk(), written(self.folder / name) as file:
            yield file

    def commit(self, terms: Mapping[str, Any]) -> None:
        """Make it the model of its name. ``terms``: the rest of the manifest, the same at all parties."""
        text = canonical({**terms, **self._head, "sealed": self._sealed})
        with self._disk():
            with written(self.folder / _MANIFEST) as file:
                file.write(self._keys.tag(text) + b"\n" + text)
            for path in (self.folder / "weights", self.folder):
                sync(path)
            self._store._commit(self)
        self._let_go()

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        return on_disk(self._store.party, self.name, "write")

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._let_go()


class StoredModel:
    """A committed model whose manifest is authentic. Each file is checked when it is read."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], keys: Keys) -> None:
        self.manifest = manifest
        self._folder, self._keys = folder, keys

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def party(self) -> int:
        return int(self.manifest["party"])

    @property
    def public_path(self) -> Path:
        """The safetensors file of the public weights; its reader checks each by its digest."""
        return self._folder / PUBLIC_FILE

    def unsealed(self, item: int) -> bytearray:
        """The components of one weight, one after the other.

        Raises:
            JobError: any bit of the file is not what was written for this weight, model and party.
        """
        size = self.manifest["sealed"].get(str(item))
        if not isinstance(size, int):
            self.refuse()
        try:
            with open(self._folder / "weights" / _file_of(item), "rb") as file:
                found = self._keys.unseal(file, item, size)
        except OSError:
            self.refuse()
        if found is None:
            self.refuse()
        return found

    def client_file(self) -> bytearray:
        """What the party 0 hands to clients, checked."""
        try:
            data = bytearray((self._folder / CLIENT_FILE).read_bytes())
        except OSError:
            self.refuse()
        if digest_of_file(iter([data])) != self.manifest["files"]:
            self.refuse()
        return data

    def refuse(self) -> NoReturn:
        """Raise ``JobError``: a file is not what was written."""
        who = f"the model {self.name!r} at party {self.party}"
        try:
            text = (self._folder / _MANIFEST).read_bytes().split(b"\n", 1)[1]
        except (OSError, IndexError):
            text = b""
        if text != canonical(self.manifest):
            raise JobError(f"{who} was removed or replaced while it was read; describe it again")
        raise JobError(f"{who} has a damaged file; its owner must share it again and replace it")


def _file_of(item: int) -> str:
    return f"{item:06d}"
