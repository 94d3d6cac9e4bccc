"""Which files of a folder does a job take along, and where does the code come from?

    tree = pack(Path("."))                       hashes only; `Hub.upload_tree(folder, tree)` sends what is missing
    state, diff = git_state(Path("."))           the commit, and what was changed since

.gitignore and .potluckignore mean what they mean to git, in each folder for what is below it. .potluckignore has the
last word, so it can also take back (`!data/`) what git ignores.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import re
import shutil
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from potluck.blobs import BlobStore, hash_bytes
from potluck.client.places import Place, check
from potluck.client.trees import PARTS
from potluck.domain.tree import MAX_FILES, PROJECT_BYTES, check_path
from potluck.errors import BadInput
from potluck.protocol import Blob, GitState, Tree, TreeFile

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

MAX_DIFF_BYTES = 5_000_000
MAX_NOTES = 100
ALWAYS = frozenset({".git", "__pycache__", ".venv", PARTS})
"""Never part of a project, whatever the ignore files say."""
_GIT_PATIENCE_S = 20.0


def pack(folder: Path, *, limit_bytes: int = PROJECT_BYTES, more_ignores: Sequence[str] = ()) -> Tree:
    """The project in `folder` as a tree: every file that no rule leaves out, with its hash.

    Symbolic links and special files are left out and noted in `skipped`. Raises `BadInput` with the names of the largest
    files if all together is more than `limit_bytes`, and with the name of a file that cannot be read.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder: run this in the project's folder, or say which with --folder")
    search = _Search(folder, _above(folder), _spec(more_ignores, "the ignore rules given here"))
    found = sorted(search.walk(), key=lambda one: one.path)
    _check_size(found, limit_bytes)
    files = []
    with Place(folder, make=False) as place:
        for one in found:
            with place.open(one.path) as file:
                hash_ = hashlib.file_digest(file, "sha256").hexdigest()
                files.append(TreeFile(one.path, Blob(hash_, file.tell()), one.executable))
    return Tree(files, search.notes())


def unpack(tree: Tree, folder: Path, store: BlobStore) -> None:
    """Make `folder` hold the tree's files, whose blobs are all in `store`. As careful as `Hub.fetch_tree`."""
    check(tree)
    with Place(folder) as place:
        for file in tree.files:
            with store.touch(file.blob.hash).open("rb") as source:
                place.put(file, source)


def copy(tree: Tree, folder: Path, to: Path) -> None:
    """Copy the files of a packed `folder` to another, without a hub."""
    with Place(folder, make=False) as here, Place(to) as there:
        for file in tree.files:
            with here.open(file.path) as source:
                there.put(file, source)


# --- what belongs to it


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    size_bytes: int
    executable: bool


@dataclass(frozen=True, slots=True)
class _Rules:
    """An ignore file: what it says holds for everything below its folder."""

    spec: GitIgnoreSpec
    above: str = ""  # from its folder down to the project's, for a file that lies above the project
    below: str = ""  # from the project's folder down to its own

    def verdict(self, path: str) -> bool | None:
        """Is `path` left out (True), taken back (False), or not spoken of?"""
        return self.spec.check_file(self.above + path.removeprefix(self.below)).include


@dataclass
class _Search:
    folder: Path
    git: list[_Rules]  # the nearest last
    more: GitIgnoreSpec
    own: list[_Rules] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def walk(self, below: str = "") -> Iterator[_Found]:
        counts = len(self.git), len(self.own)
        for rules, name in ((self.git, ".gitignore"), (self.own, ".potluckignore")):
            if (spec := _read_spec(self.folder / below / name)) is not None:
                rules.append(_Rules(spec, below=below))
        for entry in sorted(self._entries(below), key=lambda entry: entry.name):
            yield from self._entry(entry, below + entry.name)
        del self.git[counts[0] :], self.own[counts[1] :]

    def _entries(self, below: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder / below) as entries:
                return [entry for entry in entries if entry.name not in ALWAYS]
        except OSError as error:
            raise BadInput(
                f"the folder {below or self.folder} cannot be read ({error.strerror}): change its permissions, "
                "or leave it out with .potluckignore"
            ) from None

    def _entry(self, entry: os.DirEntry[str], path: str) -> Iterator[_Found]:
        is_folder = entry.is_dir(follow_symlinks=False)
        if self._left_out(path + "/" if is_folder else path):
            return
        if why := check_path(path):
            self.skipped.append(f"{path!r} {why}")
            return
        if entry.is_symlink():
            self.skipped.append(f"{path}: a symbolic link")
        elif is_folder:
            yield from self.walk(path + "/")
        else:
            info = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode):
                self.skipped.append(f"{path}: not a plain file")
                return
            yield _Found(path, info.st_size, os.name != "nt" and bool(info.st_mode & stat.S_IXUSR))

    def _left_out(self, path: str) -> bool:
        verdict = self.more.check_file(path).include
        if verdict is not None:
            return verdict
        for rules in (*reversed(self.own), *reversed(self.git)):
            verdict = rules.verdict(path)
            if verdict is not None:
                return verdict
        return False

    def notes(self) -> list[str]:
        more = len(self.skipped) - MAX_NOTES
        return self.skipped[:MAX_NOTES] + ([f"and {more:,} more"] if more > 0 else [])


def _above(folder: Path) -> list[_Rules]:
    """The .gitignore files between the repository's root and the project, if the project is a part of a repository."""
    folder = folder.resolve()
    found: list[_Rules] = []
    at, way = folder, ""
    while not (at / ".git").exists():
        if at == at.parent:
            return []  # no repository: what lies above is nobody's business
        way = f"{at.name}/{way}"
        at = at.parent
        if (spec := _read_spec(at / ".gitignore")) is not None:
            found.append(_Rules(spec, above=way))
    for rules in found:
        steps = [i + 1 for i, c in enumerate(rules.above) if c == "/"]
        if any(rules.spec.check_file(rules.above[:end]).include for end in steps):
            return []  # the folder itself is one that git ignores: whoever submits it means it all the same
    return found[::-1]


def _read_spec(path: Path) -> GitIgnoreSpec | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return _spec(path.read_text("utf-8", errors="surrogateescape").splitlines(), str(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _spec(lines: Sequence[str], where: str) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # here, so that the agent starts without it

    try:
        return GitIgnoreSpec.from_lines(lines)
    except (ValueError, re.error) as error:
        raise BadInput(f"{where} holds a pattern that is none: {error}") from None


def _check_size(found: Sequence[_Found], limit_bytes: int) -> None:
    total = sum(one.size_bytes for one in found)
    if total > limit_bytes:
        largest = heapq.nlargest(3, found, key=lambda one: one.size_bytes)
        names = ", ".join(f"{one.path} ({one.size_bytes / 1e6:,.0f} MB)" for one in largest)
        raise BadInput(
            f"the project is {total / 1e9:.2f} GB large, and at most {limit_bytes / 1e9:.2f} GB are taken. "
            f"The largest: {names}. Leave out with .potluckignore what the job does not need"
        )
    if len(found) > MAX_FILES:
        folder, count = Counter(one.path.rpartition("/")[0] or "." for one in found).most_common(1)[0]
        raise BadInput(
            f"the project has {len(found):,} files, and at most {MAX_FILES:,} are taken: the most, {count:,}, are in "
            f"{folder}. Leave out with .potluckignore what the job does not need, or pack it into one archive"
        )


# --- where it comes from


def git_state(folder: Path) -> tuple[GitState | None, bytes]:
    """The commit that the folder is at and the diff of what was changed since, at most 5 MB of it.

    (None, b"") where there is no repository, no commit or no git. `GitState.diff` already names the diff's bytes.
    """
    git = shutil.which("git")
    commit = _git(git, folder, "rev-parse", "--verify", "HEAD").strip() if git else ""
    if not commit:
        return None, b""
    branch = _git(git, folder, "symbolic-ref", "--short", "-q", "HEAD").strip()
    dirty = bool(_git(git, folder, "status", "--porcelain", "--", ".").strip())
    diff = _git_bytes(
        git, folder, "diff", "--no-ext-diff", "--no-textconv", "--binary", "--relative", "HEAD", "--", "."
    )
    remote = without_credentials(_git(git, folder, "remote", "get-url", "origin").strip())
    return GitState(commit, branch, dirty, hash_bytes(diff) if diff else None, remote), diff


def without_credentials(url: str) -> str:
    """A repository's address without user, password and query; empty if it cannot be read."""
    try:
        parts = urlsplit(url)
        if not parts.scheme or "://" not in url:
            return url.rpartition("@")[2] if ":" in url else ""  # git@host:path; a path of this machine says nothing
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, (parts.hostname or "") + port, parts.path, "", ""))


def _git(git: str | None, folder: Path, *words: str) -> str:
    return _git_bytes(git, folder, *words).decode("utf-8", "replace")


def _git_bytes(git: str | None, folder: Path, *words: str) -> bytes:
    """What the command prints, at most 5 MB; nothing if it fails or takes too long."""
    if git is None:
        return b""
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    argv = [git, "-c", "core.fsmonitor=false", "-c", "core.quotepath=false", "-C", str(folder), *words]
    cut = b""
    try:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
            killer = _after(_GIT_PATIENCE_S, process)
            try:
                assert process.stdout is not None
                out = process.stdout.read(MAX_DIFF_BYTES + 1)
                if len(out) > MAX_DIFF_BYTES:
                    cut = b"\n# cut here: the diff is longer than 5 MB\n"
                    process.kill()
                failed = process.wait() != 0
            finally:
                killer.cancel()
    except OSError:
        return b""
    if cut:
        return out[: MAX_DIFF_BYTES - len(cut)] + cut
    return b"" if failed else out


def _after(seconds: float, process: subprocess.Popen[bytes]) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer
