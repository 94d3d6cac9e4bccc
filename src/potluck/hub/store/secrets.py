"""How are people's secrets kept, so that a copy of the ledger alone gives nothing away?

AES-256-GCM. The key is a file beside the blobs, 0600, never in the ledger. Owner and name are authenticated with each
value, so a row that is copied to another owner or name does not open.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from potluck.errors import Conflict, LedgerError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12
_KEY_BYTES = 32


class SecretBox:
    """Seals and opens with the key in the file `path`, which is made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def seal(self, owner: str, name: str, value: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher(make=True).encrypt(nonce, value.encode(), _bound(owner, name))

    def open(self, owner: str, name: str, sealed: bytes) -> str:
        """The value; `Conflict` if this key did not seal it for this owner and name."""
        from cryptography.exceptions import InvalidTag

        try:
            plain = self._cipher(make=False).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _bound(owner, name))
        except (InvalidTag, ValueError):
            raise Conflict(
                f"the secret {name} cannot be opened with this hub's key ({self.path}): the ledger and the key are not "
                f"from the same hub, or the row was changed. Set it again: potluck secret set {name}"
            ) from None
        return plain.decode()

    def _cipher(self, *, make: bool) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._key(make=make))

    def _key(self, *, make: bool) -> bytes:
        """Read anew each time: seldom needed, and so never stale when another hub copy makes it."""
        try:
            text = self.path.read_text("ascii").strip()
            if os.name != "nt" and self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
        except FileNotFoundError:
            if not make:
                raise LedgerError(
                    f"the key of the secrets is gone: {self.path} is not there. Bring it back from a backup, or let "
                    "everybody set their secrets again"
                ) from None
            self._make()
            text = self.path.read_text("ascii").strip()
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise LedgerError(f"{self.path} is not a key: it holds {2 * _KEY_BYTES} hexadecimal digits. Bring it back")
        return key

    def _make(self) -> None:
        """A new key, unless somebody else is quicker: the name appears once, with all its bytes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_bytes(_KEY_BYTES).hex() + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(part, self.path)
            except FileExistsError:
                return
        finally:
            part.unlink(missing_ok=True)


def _bound(owner: str, name: str) -> bytes:
    return f"{owner}\0{name}".encode()
