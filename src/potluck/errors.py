"""What can go wrong, and what the user should do about it?

    PotluckError                 1    500  internal
    ├── BadInput                 2    422  bad_input            a value, a file or a flag is wrong
    │   ├── UnknownSetting       2    422  unknown_setting      no such key; the nearest is named
    │   ├── RecipeError          2    422  bad_recipe           unknown recipe, or one without a step
    │   ├── DataError            2    422  bad_data             a data source that cannot be read
    │   └── BadUpdate            2    422  bad_update           an update with a wrong name, shape, dtype, size or value
    ├── NotFound                 3    404  not_found
    ├── NotAllowed               4    403  not_allowed          wrong role, revoked, wrong or expired link
    │   └── NotKnown             4    401  not_known            no credential, or one that this hub never gave
    ├── Conflict                 5    409  conflict
    │   └── Fenced               5    409  fenced               the lease is no longer yours; the hub has moved on
    ├── VersionMismatch          7    426  version_mismatch     hub and worker are too far apart
    ├── HubUnreachable          69    503  hub_unreachable
    │   └── NotAHub             69    502  not_a_hub            something answers there, but it is not Potluck
    ├── LedgerError             69    503  ledger               PostgreSQL unreachable, too old, or not ours
    ├── DiskFull                74    507  disk_full
    ├── TryLater                75    503  try_later
    └── TimedOut               124    504  timed_out            --timeout reached

Each class has the exit code of the command line, the HTTP status, and the `code` that is both the type of the
HTTP problem and the word in front of the CLI's message. A message says what is wrong, why, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class PotluckError(Exception):
    """Something that Potluck can explain. `str(error)` is for people."""

    exit_code: ClassVar[int] = 1
    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"


class BadInput(PotluckError):
    exit_code, status, code = 2, 422, "bad_input"


class UnknownSetting(BadInput):
    code = "unknown_setting"


class RecipeError(BadInput):
    code = "bad_recipe"


class DataError(BadInput):
    code = "bad_data"


class BadUpdate(BadInput):
    code = "bad_update"


class NotFound(PotluckError):
    exit_code, status, code = 3, 404, "not_found"


class NotAllowed(PotluckError):
    exit_code, status, code = 4, 403, "not_allowed"


class NotKnown(NotAllowed):
    status, code = 401, "not_known"


class Conflict(PotluckError):
    exit_code, status, code = 5, 409, "conflict"


class Fenced(Conflict):
    code = "fenced"


class VersionMismatch(PotluckError):
    exit_code, status, code = 7, 426, "version_mismatch"


class HubUnreachable(PotluckError):
    exit_code, status, code = 69, 503, "hub_unreachable"


class NotAHub(HubUnreachable):
    status, code = 502, "not_a_hub"


class LedgerError(PotluckError):
    exit_code, status, code = 69, 503, "ledger"


class DiskFull(PotluckError):
    exit_code, status, code = 74, 507, "disk_full"


class TryLater(PotluckError):
    exit_code, status, code = 75, 503, "try_later"


class TimedOut(PotluckError):
    exit_code, status, code = 124, 504, "timed_out"


def by_code(code: str) -> type[PotluckError]:
    """The class that a hub's problem answer names; `PotluckError` for a code from a newer hub."""
    return _CODES.get(code, PotluckError)


def _all(root: type[PotluckError]) -> list[type[PotluckError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _all(child))]


_CODES = {error.code: error for error in _all(PotluckError)}
