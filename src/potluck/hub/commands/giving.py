"""How does somebody give a project without a command line: a folder chosen in a browser, or a .zip file?

    paths, ignore files ─ plan ─► which files are wanted
    bytes, many files at once ─ add_small ─►  blobs           a large one, or a zip ─ add_piece … ─► blob, or a part
    paths with their blobs ─ make_tree ─► the project         a part that is a zip ─ open_zip ─► the project

The browser names files and sends bytes; the hub hashes, because a page over plain http may not, and believes no path.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from potluck.domain.tree import MAX_FILES, MAX_TREE_BYTES, PROJECT_BYTES, check_path, check_tree
from potluck.errors import BadInput, Conflict, NotFound
from potluck.hub.commands import trees
from potluck.hub.commands.desk import Caller, Desk, as_json
from potluck.hub.commands.unzip import Archive
from potluck.protocol import Blob, Tree, TreeFile

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

MAX_BYTES = PROJECT_BYTES
MAX_BATCH_BYTES = 8 << 20
MAX_IN_BATCH = 1000
MAX_LISTED = 100_000
MAX_IGNORE_BYTES = 64 << 10
MAX_IGNORES_BYTES = 256 << 10
"""Of all ignore files together: each pattern becomes a program, some kilobytes long."""
MAX_STARS = 4
"""In one pattern. Each takes the time that a match may need to another power."""
MAX_NOTES = 100
ALWAYS = frozenset({".git", "__pycache__", ".venv", ".DS_Store", "__MACOSX"})


@dataclass(frozen=True)
class Plan:
    keep: list[int]  # which of the files that were listed
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Given:
    """A file whose bytes are here."""

    hash: str
    size_bytes: int
    executable: bool = False


@dataclass(frozen=True)
class GivenFile:
    path: str
    hash: str
    size_bytes: int
    executable: bool = False


@dataclass(frozen=True)
class Project:
    """A whole project: `project` names the blob of its tree, as the form carries it."""

    project: str
    says: str
    skipped: list[str]
    requirements: str = ""  # a file that names packages, if there is one


# --- which files ----------------------------------------------------------------------------------------------------


async def plan(files: Sequence[tuple[str, int]], ignores: Mapping[str, str]) -> Plan:
    """Which of these files (path, size) belong to the project. `ignores`: the texts of .gitignore and .potluckignore.

    They mean what they mean to `potluck run`: each speaks for what is below its folder, .potluckignore has the last word.
    """
    return await asyncio.to_thread(_plan, files, ignores)


def _plan(files: Sequence[tuple[str, int]], ignores: Mapping[str, str]) -> Plan:
    if len(files) > MAX_LISTED:
        raise BadInput(f"the folder has {len(files):,} files: choose the project's own folder, or use `potluck run`")
    notes: list[str] = []
    rules = _Rules(ignores, notes)
    keep, total = [], 0
    for index, (path, size) in enumerate(files):
        if ALWAYS & {*path.split("/")} or rules.leave_out(path):
            continue
        if why := check_path(path):
            notes.append(f"{path[:80]!r} {why}")
            continue
        keep.append(index)
        total += max(0, size)
    if total > MAX_BYTES:
        largest = sorted((files[index] for index in keep), key=lambda file: -file[1])[:3]
        names = ", ".join(f"{path} ({size / 1e6:,.0f} MB)" for path, size in largest)
        raise BadInput(
            f"the project is {total / 1e9:.2f} GB large, and at most {MAX_BYTES / 1e9:.0f} GB are taken. The largest: "
            f"{names}. Leave out with .potluckignore what the job does not need"
        )
    if len(keep) > MAX_FILES:
        raise BadInput(
            f"the project has {len(keep):,} files, and at most {MAX_FILES:,} are taken: leave out with "
            ".potluckignore what the job does not need"
        )
    more = len(notes) - MAX_NOTES
    return Plan(keep, notes[:MAX_NOTES] + ([f"and {more:,} more"] if more > 0 else []))


class _Rules:
    """What the ignore files of a folder leave out."""

    def __init__(self, ignores: Mapping[str, str], notes: list[str]) -> None:
        if sum(map(len, ignores.values())) > MAX_IGNORES_BYTES:
            raise BadInput(f"the folder's ignore files are longer than {MAX_IGNORES_BYTES >> 10} kB: use `potluck run`")
        self._own: dict[str, GitIgnoreSpec] = {}
        self._git: dict[str, GitIgnoreSpec] = {}
        for path, text in ignores.items():
            folder, _, name = path.rpartition("/")
            of = {".potluckignore": self._own, ".gitignore": self._git}.get(name)
            if of is not None:
                of[folder + "/" if folder else ""] = _spec(path, text, notes)
        self._folder_is_out = cache(self._folder)

    def leave_out(self, path: str) -> bool:
        folder = path.rpartition("/")[0]
        return bool(folder and self._folder_is_out(folder)) or self._says(path)

    def _folder(self, folder: str) -> bool:
        above = folder.rpartition("/")[0]
        return bool(above and self._folder_is_out(above)) or self._says(folder + "/")

    def _says(self, path: str) -> bool:
        above = path.rstrip("/").split("/")[:-1]
        folders = ["/".join(above[:depth]) + "/" if depth else "" for depth in range(len(above), -1, -1)]
        for rules in (self._own, self._git):
            for folder in folders:
                if (spec := rules.get(folder)) is not None:
                    verdict = spec.check_file(path[len(folder) :]).include
                    if verdict is not None:
                        return verdict
        return False


def _spec(path: str, text: str, notes: list[str]) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec

    if len(text) > MAX_IGNORE_BYTES:
        raise BadInput(f"{path[:200]} is longer than {MAX_IGNORE_BYTES >> 10} kB: that is no list of patterns")
    lines = []
    for line in text.splitlines():
        if len(line) > 300 or line.replace("**", "").count("*") > MAX_STARS or line.count("**") > MAX_STARS:
            notes.append(f"{path[:80]}: the pattern {line[:60]} is too wild and was not used")
        else:
            lines.append(line)
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise BadInput(f"{path[:200]} holds a pattern that is none: {error}") from None


# --- bytes ----------------------------------------------------------------------------------------------------------


async def add_small(desk: Desk, content: bytes) -> list[Given]:
    """Store many files at once: a line of JSON with their sizes, and their bytes one after the other."""
    if len(content) > MAX_BATCH_BYTES:
        raise BadInput(f"files may have at most {MAX_BATCH_BYTES:,} bytes at once: send several times")
    head, line_break, _ = content.partition(b"\n")
    try:
        sizes = msgspec.json.decode(head, type=list[int])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"this begins with a line of JSON, the sizes of the files: {error}") from None
    place = len(head) + len(line_break)
    if len(sizes) > MAX_IN_BATCH or any(size < 0 for size in sizes) or sum(sizes) != len(content) - place:
        raise BadInput("the sizes do not add up to what was sent: a file changed meanwhile; choose the folder again")

    def store() -> list[Given]:
        given, at = [], place
        for size in sizes:
            piece = content[at : at + size]
            blob = desk.blobs.add_bytes(piece)
            given.append(Given(blob.hash, blob.size_bytes, piece.startswith(b"#!")))
            at += size
        return given

    given = await asyncio.to_thread(store)
    await _record(desk, [Blob(each.hash, each.size_bytes) for each in given])
    return given


async def add_piece(
    desk: Desk, caller: Caller, upload: str, offset: int, size: int, piece: bytes, *, keep: bool = False
) -> Given | None:
    """Add a piece of a large file. The last makes it a blob, or with `keep` leaves it for `open_zip`."""
    if not 0 <= size <= MAX_BYTES:
        raise BadInput(f"a file of {size / 1e9:.2f} GB: at most {MAX_BYTES / 1e9:.0f} GB are taken")
    if offset + len(piece) > size:
        raise BadInput("the file became longer while it was read: choose it again")
    part = _part(caller, upload)
    have = await asyncio.to_thread(desk.blobs.append, part, offset, piece)
    if have != offset + len(piece):
        raise Conflict(f"go on at offset {have}")
    if have < size or keep:
        return None

    def publish() -> Given:
        path = desk.blobs.part(part)
        with path.open("rb") as file:
            executable = file.read(2) == b"#!"
        blob = desk.blobs.add_file(path)
        path.unlink(missing_ok=True)
        return Given(blob.hash, blob.size_bytes, executable)

    given = await asyncio.to_thread(publish)
    await _record(desk, [Blob(given.hash, given.size_bytes)])
    return given


def _part(caller: Caller, upload: str) -> str:
    """The name of an upload's part: nobody can name one of somebody else's."""
    return hashlib.sha256(f"{caller.subject}\0{upload}".encode(errors="replace")).hexdigest()


async def _record(desk: Desk, blobs: Sequence[Blob]) -> None:
    async with desk.ledger.transaction() as tx:
        await tx.run("put_blobs", blobs=as_json(list({blob.hash: blob for blob in blobs}.values())))


# --- the project ----------------------------------------------------------------------------------------------------


async def make_tree(desk: Desk, files: Sequence[GivenFile], skipped: Sequence[str] = ()) -> Project:
    """The project of these files, whose bytes were sent before."""
    if len(files) > MAX_FILES:
        raise BadInput(f"the project has {len(files):,} files: at most {MAX_FILES:,} are taken")
    if why := check_tree(file.path for file in files):
        raise BadInput(why)
    listed = [TreeFile(file.path, Blob(file.hash, file.size_bytes), file.executable) for file in files]
    tree = Tree(sorted(listed, key=lambda file: file.path), [str(note)[:300] for note in skipped[: MAX_NOTES + 1]])
    content = msgspec.json.encode(tree)
    if len(content) > MAX_TREE_BYTES:
        raise BadInput("the list of the project's files is too long: leave out what the job does not need")
    blob = await asyncio.to_thread(desk.blobs.add_bytes, content)
    await _record(desk, [blob])
    await trees.read_tree(desk, blob, limit_bytes=MAX_BYTES)
    return Project(
        f"{blob.hash}-{blob.size_bytes}",
        f"{len(listed):,} file{'' if len(listed) == 1 else 's'}, {_size(tree.size_bytes)}",
        tree.skipped,
        "requirements.txt" if any(file.path == "requirements.txt" for file in files) else "",
    )


async def open_zip(desk: Desk, caller: Caller, upload: str, size: int) -> Project:
    """The project in a zip whose pieces were all sent. The zip itself is not kept."""
    path = desk.blobs.part(_part(caller, upload))

    def read() -> tuple[list[GivenFile], list[str]]:
        try:
            if path.stat().st_size != size:
                raise BadInput("the archive did not arrive whole: choose it again")
        except FileNotFoundError:
            raise NotFound("this archive is not here: choose it again") from None
        try:
            return _unpack(desk, path)
        finally:
            path.unlink(missing_ok=True)

    async with desk.memory.unpacking:
        files, skipped = await asyncio.to_thread(read)
    if files:
        await _record(desk, [Blob(file.hash, file.size_bytes) for file in files])
    return await make_tree(desk, files, skipped)


def _unpack(desk: Desk, path: Path) -> tuple[list[GivenFile], list[str]]:
    with Archive(path, limit_bytes=MAX_BYTES) as archive:
        names = [".gitignore", ".potluckignore"]
        rules = [
            entry
            for entry in archive.entries
            if entry.path.rpartition("/")[2] in names and entry.size_bytes <= MAX_IGNORE_BYTES
        ]
        if sum(entry.size_bytes for entry in rules) > MAX_IGNORES_BYTES:
            raise BadInput(f"the archive's ignore files are longer than {MAX_IGNORES_BYTES >> 10} kB: leave some out")
        ignores = {entry.path: archive.text(entry) for entry in rules}
        found = _plan([(entry.path, entry.size_bytes) for entry in archive.entries], ignores)
        files = []
        for index in found.keep:
            entry = archive.entries[index]
            blob, executable = archive.store(entry, desk.blobs)
            files.append(GivenFile(entry.path, blob.hash, blob.size_bytes, executable))
        return files, found.skipped


async def empty(desk: Desk) -> Blob:
    """The project of a job that needs no files."""
    blob = await asyncio.to_thread(desk.blobs.add_bytes, msgspec.json.encode(Tree()))
    await _record(desk, [blob])
    return blob


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
