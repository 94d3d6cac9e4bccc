"""How does a secret stay out of a job's output, also when it comes in two pieces or encoded?

    masks = Masks(secrets.values())
    shown = masks.feed(piece) + … + masks.flush()

What could be the beginning of a secret is held back until more comes: at most the length of the longest pattern. Each
value is looked for as it is, line by line if it has several, as JSON and URLs write it, and in base64 at each of the
three places where it can begin in a longer text (as in `Authorization: Basic …`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from urllib.parse import quote, quote_plus

MASK = b"***"
SHORTEST = 4
"""Bytes. Something shorter is in every text: to mask it would destroy the output and tell what the secret is."""
_HEAD = 4  # so many bytes of a pattern are looked for at the end of a piece, by one fast search


class Masks:
    """A stream of bytes in which secrets become `***`. Not for several threads at once."""

    def __init__(self, values: Iterable[str]) -> None:
        self._patterns = patterns_of(values)
        self._held = b""
        self._masked = 0  # so many bytes at the front of `_held` belong to a secret whose mask is out already

    def feed(self, piece: bytes) -> bytes:
        """What may be shown now."""
        if not self._patterns:
            return piece
        text = self._held + piece
        return self._show(text, self._open_from(text))

    def flush(self) -> bytes:
        """The end: what was held back."""
        return self._show(self._held, len(self._held))

    def _show(self, text: bytes, upto: int) -> bytes:
        """The text before `upto` with its secrets masked; the rest is held."""
        shown, at = [], 0
        for start, end in self._secrets(text):
            if start >= upto:
                break
            shown.append(text[at:start])
            if start or not self._masked:
                shown.append(MASK)
            at = end
        shown.append(text[at:upto])
        self._held, self._masked = text[upto:], max(0, max(at, self._masked) - upto)
        return b"".join(shown)

    def _secrets(self, text: bytes) -> list[tuple[int, int]]:
        """Where secrets are, those that overlap as one."""
        found = [(0, self._masked)] if self._masked else []
        for pattern in self._patterns:
            at = text.find(pattern)
            while at >= 0:
                found.append((at, at + len(pattern)))
                at = text.find(pattern, at + 1)
        merged: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged

    def _open_from(self, text: bytes) -> int:
        """Where the first thing begins that may go on as a secret."""
        return min((_beginning(pattern, text) for pattern in self._patterns), default=len(text))


def _beginning(pattern: bytes, text: bytes) -> int:
    """Where the end of `text` begins to be `pattern`, without being all of it."""
    at = max(0, len(text) - len(pattern) + 1)
    while (at := text.find(pattern[:_HEAD], at)) >= 0:
        if pattern.startswith(text[at:]):
            return at
        at += 1
    last = range(max(0, len(text) - _HEAD + 1), len(text))
    return next((at for at in last if pattern.startswith(text[at:])), len(text))


def patterns_of(values: Iterable[str]) -> list[bytes]:
    """Every form in which one of the values might be printed, long enough to be looked for."""
    forms: set[bytes] = set()
    for value in values:
        whole = value.encode(errors="surrogateescape")
        lines = [line.strip() for line in whole.splitlines()]
        for plain in {whole, whole.strip(), *(line for line in lines if len(line) >= 2 * SHORTEST)}:
            forms.add(plain)
            forms.update(_in_base64(plain))
        text = value.strip()
        forms.update(
            form.encode(errors="replace")
            for form in (json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1])
        )
        forms.update(form(whole.strip()).encode() for form in (quote, quote_plus))
        forms.add(quote(whole.strip(), safe="").encode())
    return sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)


def _in_base64(plain: bytes) -> set[bytes]:
    """The letters that encode `plain` whatever stands before and after it."""
    if len(plain) < SHORTEST:
        return set()
    forms = {base64.b64encode(plain), base64.b64encode(plain).rstrip(b"=")}
    for shift in range(3):
        letters = base64.b64encode(bytes(shift) + plain)
        first = (8 * shift + 5) // 6  # letters that only hold bits of it
        last = 8 * (shift + len(plain)) // 6
        forms.add(letters[first:last])
    return {form for letters in forms if len(letters) >= SHORTEST for form in (letters, letters.translate(_URL))}


_URL = bytes.maketrans(b"+/", b"-_")
