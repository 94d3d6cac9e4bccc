"""Who may do what? Every route of the hub names one of these; a route without one does not start."""

from __future__ import annotations

from typing import Final

Role = str
ROLES: Final = ("admin", "member", "worker", "viewer")

OPEN: Final = frozenset({"nobody", *ROLES})
ANYBODY: Final = frozenset(ROLES)  # anybody with a credential
PEOPLE: Final = frozenset({"admin", "member", "viewer"})
MEMBERS: Final = frozenset({"admin", "member"})
WORKERS: Final = frozenset({"worker"})
GIVERS: Final = frozenset({"admin", "member", "worker"})  # those who may upload blobs
ADMINS: Final = frozenset({"admin"})
