"""A line of a list of models, and who may use one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["ModelEntry", "may_use"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A line of a list of models. ``clients``: identities that may use it, None for all; ``secret``: whether it has
    secret weights; ``offers``: the settings of each; ``problem``: why it cannot be used."""

    name: str
    owner: str = ""
    share_id: str = ""
    clients: tuple[str, ...] | None = ()
    secret: bool = True
    offers: tuple[dict[str, Any], ...] = ()
    plans: int = 0
    nbytes: int = 0
    shared_at: int = 0
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON fields."""
        return asdict(self)

    def concerns(self, identity: str) -> bool:
        """Whether ``identity`` owns the model or may use it; an operator (no identity) sees all."""
        if not identity or identity == self.owner:
            return True
        return may_use(self.clients, identity)

    def told_to(self, identity: str) -> ModelEntry:
        """Without the names of other clients, where a client asks."""
        if self.clients is None or identity in ("", self.owner):
            return self
        return replace(self, clients=(identity,))


def may_use(clients: Any, identity: str) -> bool:
    """Whether ``identity`` is a client, and one of ``clients``: a list of identities, or None for all."""
    named = isinstance(clients, list | tuple) and identity in clients
    return identity.startswith("sfumato://client/") and (clients is None or named)
