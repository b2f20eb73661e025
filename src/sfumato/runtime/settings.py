"""What an operator decides for its party: ``party.toml`` in the party's folder. Without it, the defaults below hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import JobError
from sfumato.runtime.canonical import parse_toml
from sfumato.runtime.names import is_fingerprint

__all__ = ["PartySettings"]

_PROGRAMS = ("any", "approved")
#: key -> (lowest, highest) of the numbers in [sessions].
_SESSIONS: dict[str, tuple[float, float]] = {
    "at_once": (1, 64),
    "queued": (0, 100_000),
    "per_client": (0, 100_000),
    "wait_s": (0.0, 7 * 86400.0),
    "longest_s": (0.0, 7 * 86400.0),
    "session_mb": (0, 999_999),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartySettings:
    """How many sessions run and wait, what programs and certificates are taken, where models and numbers are kept.

    ``wait_s``: how long a session may wait for its turn; ``longest_s``: how long it may run, and ``session_mb``: the
    memory in MiB that its process may take; 0 for no bound. ``programs``: "any", or "approved" for those of shared
    models alone. ``revoked``: fingerprints of certificates that are refused. ``port``: of health and metrics, 0 for
    none. ``storage_folder`` and ``storage_key`` are absolute, or lie in the party's folder.
    """

    at_once: int = 2
    queued: int = 64
    per_client: int = 16
    wait_s: float = 3600.0
    longest_s: float = 21600.0
    session_mb: int = 0
    programs: str = "any"
    revoked: frozenset[str] = frozenset()
    operations_host: str = "127.0.0.1"
    operations_port: int = 0
    storage_folder: Path = Path("store")
    storage_key: Path = Path("storage.key")

    @staticmethod
    def load(folder: Path | str) -> PartySettings:
        """Of the party with this folder; the defaults where it has no ``party.toml``.

        Raises ``JobError`` listing every problem, one sentence each.
        """
        path = Path(folder) / "party.toml"
        try:
            return PartySettings.parse(path.read_text(encoding="utf-8"), path.parent)
        except FileNotFoundError:
            return PartySettings.parse("", path.parent)
        except OSError as error:
            raise JobError(f"cannot read the party's settings {path} ({error.strerror})") from None
        except UnicodeDecodeError:
            raise JobError(f"the party's settings {path} are not UTF-8 text") from None
        except JobError as error:
            raise JobError(f"the party's settings {path} cannot be used: {error}") from None

    @staticmethod
    def parse(text: str, folder: Path = Path()) -> PartySettings:
        """The settings in TOML ``text``; ``JobError`` listing every problem. Paths are taken from ``folder``."""
        found = _Tables(parse_toml(text))
        values: dict[str, Any] = {}
        for key, value in found.table("sessions", *_SESSIONS).items():
            low, high = _SESSIONS[key]
            whole = not key.endswith("_s")
            fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if fits and low <= value <= high:
                values[key] = value if whole else float(value)
            else:
                found.problem(f"{key} must be a {'whole ' if whole else ''}number from {low:g} to {high:g}.")
        accept = found.table("accept", "programs", "revoked")
        if accept.get("programs", "any") in _PROGRAMS:
            values["programs"] = accept.get("programs", "any")
        else:
            found.problem('programs must be "any" or "approved".')
        revoked = accept.get("revoked", [])
        if isinstance(revoked, list) and all(is_fingerprint(f) for f in revoked):
            values["revoked"] = frozenset(revoked)
        else:
            found.problem("revoked must be a list of fingerprints, each 'sha256:' and 64 hex digits.")
        operations = found.table("operations", "host", "port")
        host, port = operations.get("host", "127.0.0.1"), operations.get("port", 0)
        if not isinstance(host, str) or not host or not host.isprintable():
            found.problem("The host in [operations] must be an address to listen on.")
        if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
            found.problem("The port in [operations] must be a whole number from 0 to 65535.")
        storage = found.table("storage", "folder", "key")
        for key, default in (("folder", "store"), ("key", "storage.key")):
            value = storage.get(key, default)
            if isinstance(value, str) and value and "\0" not in value:
                values[f"storage_{key}"] = folder / value
            else:
                found.problem(f"The {key} in [storage] must be a path.")
        if found.problems:
            raise JobError(" ".join(found.problems))
        return PartySettings(operations_host=host, operations_port=port, **values)


class _Tables:
    """A TOML document's tables, and what is wrong with it."""

    def __init__(self, data: dict[str, Any]) -> None:
        known = ("sessions", "accept", "operations", "storage")
        self._data = data
        self.problems = [f"Unknown key '{key}'." for key in data if key not in known]

    def problem(self, sentence: str) -> None:
        self.problems.append(sentence)

    def table(self, name: str, *keys: str) -> dict[str, Any]:
        """The known keys of a table."""
        given = self._data.get(name, {})
        if not isinstance(given, dict):
            self.problem(f"[{name}] must be a table.")
            return {}
        self.problems += [f"Unknown key '{key}' in [{name}]." for key in given if key not in keys]
        return {key: value for key, value in given.items() if key in keys}
