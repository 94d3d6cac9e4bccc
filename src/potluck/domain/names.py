"""What may a name look like that strangers typed and everybody reads?"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

MAX_NAME = 40


def clean_name(text: str, fallback: str) -> str:
    """`text` without control, format and bidi characters, in one line, at most 40 characters; else `fallback`."""
    kept = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in unicodedata.normalize("NFC", text))
    return " ".join(kept.split())[:MAX_NAME].strip() or fallback


def unique_name(name: str, taken: Collection[str]) -> str:
    """`name`, or `name-2`, `name-3`, … whichever is free."""
    if name not in taken:
        return name
    number = 2
    while f"{name}-{number}" in taken:
        number += 1
    return f"{name}-{number}"
