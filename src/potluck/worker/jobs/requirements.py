"""What does a project ask for, in which files, and does any of it lead out of the project?

    requirements.txt                       lines for uv or pip; -r and -c lead to further files of the project
    pyproject.toml                         its [project] dependencies, resolved when the environment is built
    pyproject.toml with uv.lock beside it  exactly what the lock says

The digest covers every file that decides what gets installed, so that equal digests mean equal environments.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from potluck.telemetry import clean
from potluck.worker.jobs.interpreters import EnvironmentFailed

_MAX_FILES = 50
_MAX_FILE_BYTES = 16_000_000
_MAX_LOCAL_FILES = 20_000  # of a package that lies in the project
_ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_INCLUDES = ("-r", "--requirement", "-c", "--constraint")
_PLACES = ("-f", "--find-links", "-i", "--index-url", "--extra-index-url")
_EDITABLE = ("-e", "--editable")


@dataclass
class Asked:
    """What the environment is built from."""

    kind: str  # requirements | dependencies | lock
    file: Path  # requirements.txt, or pyproject.toml
    shown: str  # as the user named it
    lines: list[str] = field(default_factory=list)  # of kind "dependencies"
    digests: list[tuple[str, str]] = field(default_factory=list)  # file of the project → its SHA-256
    direct_sources: bool = False  # something is named by a path or an address, and is no wheel

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.kind, self.digests)).encode()).hexdigest()


def read(project: Path, requirements: str) -> Asked:
    """What `requirements`, a path in the project, asks for; `EnvironmentFailed` says in which line it cannot be done."""
    reading = _Reading(project.resolve())
    file = reading.inside(requirements, project, f"--requirements {requirements}")
    if file.name == "uv.lock":
        file = reading.inside("pyproject.toml", file.parent, "uv.lock needs its pyproject.toml beside it:")
    if file.name != "pyproject.toml":
        asked = Asked("requirements", file, requirements)
        reading.requirements(file)
    elif (file.parent / "uv.lock").is_file():
        asked = Asked("lock", file, "uv.lock")
        reading.add(file)
        reading.lock(file.parent / "uv.lock")
    else:
        asked = Asked("dependencies", file, requirements)
        asked.lines = reading.dependencies(file)
    asked.digests = sorted(reading.digests.items())
    asked.direct_sources = reading.direct_sources
    return asked


class _Reading:
    """The files of one project, read and hashed."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.digests: dict[str, str] = {}
        self.direct_sources = False

    def inside(self, name: str, folder: Path, where: str) -> Path:
        """The file or folder `name` as seen from `folder`, if it is in the project, links followed."""
        path = Path(os.path.realpath(folder / name))
        if not path.is_relative_to(self.project):
            raise EnvironmentFailed(
                f"{_line(where)}: `{_line(name)}` is outside of the project, and only the project is sent to the "
                "machine: put it into the project's folder and name it from there"
            )
        if not path.exists():
            raise EnvironmentFailed(
                f"{_line(where)}: there is no `{_line(name)}` in the project. If it is there at home, look whether "
                ".gitignore or .potluckignore leave it out"
            )
        return path

    def add(self, path: Path) -> bytes:
        """The bytes of a file, which now count."""
        shown = path.relative_to(self.project).as_posix()
        if len(self.digests) >= _MAX_LOCAL_FILES:
            raise EnvironmentFailed(f"the requirements reach more than {_MAX_LOCAL_FILES} files of the project")
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
            digest = hashlib.sha256(content)
            while piece := file.read(1 << 20):
                digest.update(piece)
        self.digests[shown] = digest.hexdigest()
        return content

    def requirements(self, file: Path, depth: int = 0) -> None:
        """Check the lines of a requirements file, and of those that it includes."""
        shown = file.relative_to(self.project).as_posix()
        if shown in self.digests:
            return
        if depth > 10 or len(self.digests) >= _MAX_FILES:
            raise EnvironmentFailed(f"{shown}: more than {_MAX_FILES} requirement files, or they include one another")
        if not file.is_file():
            raise EnvironmentFailed(f"{shown} is a folder, not a file with requirements")
        content = self.add(file)
        if len(content) > _MAX_FILE_BYTES:
            raise EnvironmentFailed(
                f"{shown} is larger than {_MAX_FILE_BYTES // 10**6} MB: that is no requirements file"
            )
        for number, line in logical_lines(text_of(content, shown)):
            where = f"{shown}, line {number}"
            for option, value in _options(line):
                if option in _INCLUDES:
                    self.requirements(self.inside(value, file.parent, where), depth + 1)
            self.line(line, where)

    def line(self, line: str, where: str) -> None:
        """Check one requirement or option that is no include."""
        if re.search(r"\$\{[A-Z0-9_]+\}", line):
            raise EnvironmentFailed(
                f"{where}: variables like ${{NAME}} are not filled in, so that no machine's secret gets into an "
                "address: write the address out"
            )
        options = _options(line)
        if any(option in _EDITABLE for option, _ in options):
            raise EnvironmentFailed(
                f"{where}: `{_line(line)}` installs a link to a folder, but an environment outlives the folder it was "
                "built from. Remove the line; for your own code in src/, set the variable PYTHONPATH=src instead"
            )
        for option, value in options:
            if option in _PLACES and value:
                self.place(value, where)
        location = "" if options else _location(line)
        if location:
            self.direct_sources |= not location.split("#")[0].split("?")[0].lower().endswith(".whl")
            self.place(location, where)

    def place(self, place: str, where: str) -> None:
        """Check a place that packages come from: an address on the net, or a path in the project."""
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://|(file):", place)
        if scheme:
            if scheme[0].lower().startswith("file") or "+file" in scheme[0].lower():
                raise EnvironmentFailed(
                    f"{where}: `{_line(place)}` is a place on your own machine: put the package into the project, and "
                    "write its path from there, like ./wheels/name-1.0-py3-none-any.whl"
                )
            return
        path = self.inside(place, self.project, where)
        for one in _files(path):
            self.add(one)

    def dependencies(self, file: Path) -> list[str]:
        """`[project] dependencies` of a pyproject.toml."""
        shown = file.relative_to(self.project).as_posix()
        project = parse_toml(self.add(file), shown).get("project")
        if not isinstance(project, dict):
            raise EnvironmentFailed(
                f"{shown} has no [project] table, so its dependencies are not written in the standard way (PEP 621). "
                "Export them with the tool that you use to a requirements.txt, and use --requirements requirements.txt"
            )
        if "dependencies" in (project.get("dynamic") or ()):
            raise EnvironmentFailed(
                f"{shown}: the dependencies are `dynamic`, only running the project's own build tells them. "
                "Write them into a requirements.txt, and use --requirements requirements.txt"
            )
        lines = project.get("dependencies", [])
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise EnvironmentFailed(f"{shown}: [project] dependencies must be a list of texts")
        for line in lines:
            if not line.strip() or line.strip().startswith("-") or "\n" in line:
                raise EnvironmentFailed(f"{shown}: `{_line(line)}` is no dependency")
            self.line(line.strip(), f"{shown}, [project] dependencies")
        return [line.strip() for line in lines]

    def lock(self, file: Path) -> None:
        """Check that a uv.lock needs nothing from outside of the project."""
        shown = file.relative_to(self.project).as_posix()
        packages = parse_toml(self.add(file), shown).get("package", [])
        for package in packages if isinstance(packages, list) else ():
            source = package.get("source") if isinstance(package, dict) else None
            for kind in ("directory", "path", "editable", "virtual"):
                place = source.get(kind) if isinstance(source, dict) else None
                if isinstance(place, str) and PurePosixPath(place) != PurePosixPath("."):
                    path = self.inside(place, file.parent, f"{shown}, {_line(str(package.get('name')))}")
                    for one in _files(path):
                        self.add(one)


# --- reading --------------------------------------------------------------------------------------------------------


def text_of(content: bytes, shown: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EnvironmentFailed(f"{shown} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def parse_toml(content: bytes, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text_of(content, shown))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise EnvironmentFailed(f"{shown} is not valid TOML: {error}") from None


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Each line with its number, continued lines joined, comments and empty lines left out, as pip reads them."""
    whole, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        first = first or number
        if line.endswith("\\") and not line.lstrip().startswith("#"):
            whole += line[:-1]
            continue
        line = re.sub(r"(^|\s)#.*$", "", whole + line).strip()
        if line:
            yield first, line
        whole, first = "", 0
    rest = re.sub(r"(^|\s)#.*$", "", whole).strip()
    if rest:
        yield first, rest


def _options(line: str) -> list[tuple[str, str]]:
    """`-r x`, `-rx`, `--requirement x`, `--requirement=x` → each option with its value; none for a requirement."""
    if not line.startswith("-"):
        return []
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that never closes; the tool will say so
        words = line.split()
    found = []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            known = [o for o in (*_INCLUDES, *_PLACES, *_EDITABLE) if len(option) > 3 and o.startswith(option)]
            found.append((known[0] if known else option, value if equals else after))  # pip takes beginnings of options
        elif word.startswith("-") and len(word) > 1:
            found.append((word[:2], word[2:].lstrip("=") or after))
    return found


def _location(line: str) -> str:
    """The address or path in a requirement; empty for one that an index answers (`numpy>=2`)."""
    bare = re.split(r"\s+--|\s+;", line)[0].strip()
    named = re.match(r"[\w.-]+\s*(?:\[[^\]]*\])?\s*@\s*(\S.*)", bare)
    if named:
        return named[1].strip()
    place = bare.split(";")[0].strip() if "://" not in bare else bare
    place = re.sub(r"\[[^\]]*\]$", "", place)
    is_path = place.startswith((".", "~", "file:")) or "/" in place or "\\" in place
    return place if is_path or place.lower().endswith(_ARCHIVES) else ""


def _files(path: Path) -> Iterator[Path]:
    """The file, or every plain file below the folder, in order."""
    if path.is_file():
        yield path
    for root, folders, files in os.walk(path, followlinks=False):
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__", ".venv"))
        for name in sorted(files):
            one = Path(root, name)
            if one.is_file() and not one.is_symlink():
                yield one


def _line(text: str) -> str:
    return clean(text, limit=200)
