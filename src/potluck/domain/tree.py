"""Which paths may a folder have that strangers send: a project, artefacts, a checkpoint?

One rule for the hub, the worker and the person who pulls: relative, downwards, and something that every system can hold.
Paths are compared and kept as they are written, byte for byte: `é` in one or in two characters are two names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

PROJECT_BYTES: Final = 2_000_000_000
MAX_FILES: Final = 20_000
MAX_TREE_BYTES: Final = 16 << 20
"""Of the list of files itself."""
MOST_PATH: Final = 1000  # bytes: every system takes them, below a folder of its own
MOST_PART: Final = 255  # bytes

_DRIVE: Final = re.compile(r"[A-Za-z]:")
_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)
"""Windows opens a device for these, in any folder and with any ending."""


def check_path(path: str) -> str:
    """What is wrong with `path` as that of a file in a folder, to go on after "it …"; "" if nothing is."""
    if not path:
        return "is empty"
    if path.startswith(("/", "\\")) or _DRIVE.match(path):
        return "is absolute"
    if "\\" in path:
        return "has a backslash, which is a separator on other systems"
    if any(c < " " or "\x7f" <= c <= "\x9f" for c in path):
        return "has control characters"
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        return "is not valid text"
    if size_bytes > MOST_PATH:
        return f"is longer than {MOST_PATH} bytes"
    for part in path.split("/"):
        if not part:
            return "has an empty part"
        if part == "..":
            return "leads out of the folder"
        if part == ".":
            return "has a part that is only a dot"
        if len(part.encode()) > MOST_PART:
            return f"has a part that is longer than {MOST_PART} bytes"
        if _DEVICE.fullmatch(part.rstrip(" .")):
            return f"has a part, `{part}`, that is a device on Windows"
    return ""


def check_tree(paths: Iterable[str]) -> str:
    """What is wrong with these paths of files in one folder, as a sentence; "" if nothing is."""
    files: set[str] = set()
    folders: dict[str, str] = {}  # each folder, and a file below it
    for path in paths:
        if why := check_path(path):
            return f"the path {path[:200]!r} {why}"
        if path in files:
            return f"the path `{path}` is there twice"
        files.add(path)
        at = path.rfind("/")
        while at > 0 and path[:at] not in folders:
            folders[path[:at]] = path
            at = path.rfind("/", 0, at)
    for path in files & folders.keys():
        return f"`{path}` is a file, and `{folders[path]}` is below it"
    return ""


def clashes(paths: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different paths that are one file on macOS and Windows, which ignore case and ways to write `é`."""
    first: dict[str, str] = {}
    found = []
    for path in paths:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        other = first.setdefault(key, path)
        if other != path:
            found.append((other, path))
    return found
