"""What does a credential look like, and was this one copied whole?"""

from __future__ import annotations

import base64
import hashlib
import secrets
import zlib

from potluck.errors import NotKnown

_LETTERS = {"worker": "w", "member": "m", "viewer": "v", "admin": "a"}
_ROLES = {letter: role for role, letter in _LETTERS.items()}
_SECRET_CHARS = 43  # of 32 random bytes in url-safe base64
_SUM_CHARS = 6


def make_token(role: str) -> str:
    """A new credential: `pl`, the role's letter, `_`, 256 random bits, and a checksum that shows a slip."""
    body = f"pl{_LETTERS[role]}_{secrets.token_urlsafe(32)}"
    return body + _checksum(body)


def check_token(token: str) -> str:
    """The role in a credential's letter; `NotKnown` if it was mangled."""
    shape = f"pl?_ and {_SECRET_CHARS + _SUM_CHARS} letters"
    if len(token) < 4 or token[:2] != "pl" or token[3] != "_" or token[2] not in _ROLES:
        raise NotKnown(f"this is not a Potluck token (it would look like {shape}): copy it again, all of it")
    if len(token) != 4 + _SECRET_CHARS + _SUM_CHARS:
        long = "long" if len(token) > 4 + _SECRET_CHARS + _SUM_CHARS else "short"
        raise NotKnown(f"this token is too {long}: copy it again, all of it")
    if token[-_SUM_CHARS:] != _checksum(token[:-_SUM_CHARS]):
        raise NotKnown("this token was changed on the way (its checksum is wrong): copy it again, all of it")
    return _ROLES[token[2]]


def hash_token(token: str) -> str:
    """What the hub keeps of a token. It has 256 random bits: a slow hash would add nothing."""
    return hashlib.sha256(token.encode()).hexdigest()


def _checksum(body: str) -> str:
    return base64.b32encode(zlib.crc32(body.encode()).to_bytes(4, "big")).decode().lower()[:_SUM_CHARS]
