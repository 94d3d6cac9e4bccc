"""With which Python and packages does a job run, and how does that come to be on this machine?

    <cache>/environments/<key>.json           the environment exists: its record, and the name of its folder
    <cache>/environments/<key>-<random>/env   its virtual environment, never changed after the record is there
    <cache>/environments/<key>.lock           the system's lock: exclusive while it is built or removed, shared while used
    <cache>/job-api/<hash>/potluck/           what `import potluck` finds in a job: `potluck.log` and `potluck.gang`

The key is the hash of every file that decides what is installed, of the interpreter and of the platform. A build has a
folder of its own, with a random name, and the record is renamed into place after everything is there: a crash leaves a
folder that no record names, a builder that was left running writes where nobody looks, and no path in an environment
has to be rewritten. The locks are the kernel's (flock): they end with the process that held them.

How it is built, and what a build may do to this machine, is in builds.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import potluck
from potluck.blobs import disk_errors, sync_folder
from potluck.protocol import Json
from potluck.worker.jobs import interpreters
from potluck.worker.jobs.builds import Build, BuildStep, BuildStopped, Run, packages_in, python_of, run_plainly
from potluck.worker.jobs.interpreters import EnvironmentFailed, Interpreter
from potluck.worker.jobs.locks import try_lock
from potluck.worker.jobs.requirements import Asked, read
from potluck.worker.jobs.walking import remove_tree

__all__ = [
    "BuildStep",
    "BuildStopped",
    "Environment",
    "EnvironmentFailed",
    "Run",
    "evict",
    "job_path",
    "prepare",
    "run_plainly",
]

JOB_API = (
    *("__init__.py", "job.py", "errors.py"),
    *("domain/__init__.py", "domain/balance.py", "domain/gangs.py", "domain/order.py", "domain/tensorfile.py"),
    *("train/__init__.py", "train/tensorio.py"),
)
"""Of this package, what a job gets: all that train/gang imports. Standard library and torch, nothing else."""
_FORMAT = "2"  # part of the key: raise it when environments are built differently
_POLL_S = 0.1


@dataclass(frozen=True)
class Environment:
    """A Python that is ready. Until `release` (or the end of `with`) it is not evicted."""

    python: Path  # the interpreter
    prefix: Path | None  # the built environment, to be seen read-only at this very path; None: the machine's own Python
    read_only: tuple[Path, ...]  # what else must be seen at these very paths: the base Python, the job API
    record: dict[str, Json]  # python, tool, packages, hash: what really is in it
    fresh: bool  # it was built just now
    binaries: Path  # the folder with `python` and the packages' commands
    job_api: Path | None  # for PYTHONPATH; None: it has Potluck among its packages
    _hold: BinaryIO | None = field(default=None, repr=False, compare=False)

    def variables(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """What the job's environment variables need on top of `inherited` so that `python` is this one."""
        path = inherited.get("PATH", os.defpath)
        made = {"PATH": f"{self.binaries}{os.pathsep}{path}" if path else str(self.binaries)}
        if self.prefix is not None:
            made["VIRTUAL_ENV"] = str(self.prefix)
        if self.job_api is not None:
            # Last, so that a project's own module is found first.
            made["PYTHONPATH"] = os.pathsep.join(filter(None, [inherited.get("PYTHONPATH", ""), str(self.job_api)]))
        return made

    def release(self) -> None:
        if self._hold is not None:
            self._hold.close()

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def prepare(
    project: Path,
    *,
    requirements: str,
    python: str,
    cache: Path,
    say: Callable[[str], None],
    run: Run | None = None,
    on_output: Callable[[bytes], None] = lambda piece: None,
    stop: threading.Event | None = None,
) -> Environment:
    """The environment that a project asks for, built if no job on this machine has asked for it before.

    `requirements` is a path in the project (see requirements.py); empty: the agent's own Python, as it is, unless
    `python` asks for another one. `on_output` gets what the tools print. Raises `EnvironmentFailed` with the tool's own
    last lines, `BuildStopped` after `stop`, `DiskFull`.
    """
    stop = stop or threading.Event()
    with disk_errors(cache):
        interpreter = interpreters.find(python)
        if not requirements and interpreter == interpreters.own():
            return _own(cache)
        asked = read(project, requirements) if requirements else Asked("dependencies", project, "no requirements")
        root = cache / "environments"
        root.mkdir(parents=True, exist_ok=True)
        key = _key(asked, interpreter)
        plainly: Run = lambda step, log: run_plainly(step, log, stop=stop)  # noqa: E731
        build = Build(asked, interpreter, project.resolve(), cache, run=run or plainly, on_output=on_output, say=say)
        waits, fresh = False, False
        while True:
            hold = try_lock(root / f"{key}.lock", shared=True)
            found = _find(root, key) if hold is not None else None
            if hold is not None and found is not None:
                os.utime(root / f"{key}.json")
                return _built(*found, cache=cache, fresh=fresh, hold=hold)
            if hold is not None:
                hold.close()
            alone = try_lock(root / f"{key}.lock")
            if alone is not None:
                with alone:
                    if _find(root, key) is None:  # else somebody was quicker
                        _build(build, root, key, stop)
                        fresh = True
                        if _find(root, key) is None:  # else this would go on for ever
                            raise EnvironmentFailed(
                                f"{requirements}: the environment that it makes has no Python: a package removes it"
                            )
                continue
            if not waits:
                waits = True
                say(f"Another job builds the same environment {key[:8]}: waiting for it")
            if stop.wait(_POLL_S):
                raise BuildStopped("stopped while another job was building the environment")


def evict(cache: Path, keep_bytes: int) -> int:
    """Remove the environments that were not used for longest until `keep_bytes` are left; the bytes freed.

    One that is in use stays. What crashed builds left behind goes too.
    """
    root = cache / "environments"
    known = []
    for path in root.glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            known.append((path.stat().st_mtime, int(json.loads(path.read_bytes())["size_bytes"]), path.stem))
    excess, freed = sum(size for _, size, _ in known) - keep_bytes, 0
    for _, size, key in sorted(known):
        if freed >= excess:
            break
        alone = try_lock(root / f"{key}.lock")
        if alone is not None:
            with alone:
                (root / f"{key}.json").unlink(missing_ok=True)
                _remove_rest(root, key)
            freed += size
    for key in {path.name.split("-")[0] for path in root.glob("*-*") if path.is_dir()}:
        alone = try_lock(root / f"{key}.lock")
        if alone is not None:
            with alone:
                _remove_rest(root, key)
    return freed


def job_path(cache: Path) -> Path:
    """The folder that makes `import potluck` work in an environment without Potluck: `potluck.log` and `potluck.gang`.

    The latter finds torch in the environment, or says that it is missing.
    """
    package = Path(potluck.__file__).parent
    names = sorted({*JOB_API, *(f"train/gang/{path.name}" for path in (package / "train" / "gang").glob("*.py"))})
    files = {name: (package / name).read_bytes() for name in names}
    known = b"\0".join(part for name, content in files.items() for part in (name.encode(), content))
    folder = cache / "job-api" / hashlib.sha256(known).hexdigest()[:16]
    for name, content in files.items():
        path = folder / "potluck" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            part = folder / f"{secrets.token_hex(8)}.part"
            part.write_bytes(content)
            part.chmod(0o644)
            part.replace(path)
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        place.chmod(0o755)  # whatever the umask is: the job may be another user
    return folder


# --- the machine's own Python ---------------------------------------------------------------------------------------


def _own(cache: Path) -> Environment:
    """The agent's own Python, with everything that is installed there, Potluck itself too."""
    python = Path(sys.executable)
    record: dict[str, Json] = {
        "tool": "none",
        "python": interpreters.own().version,
        "packages": list(_own_packages(tuple((path, _changed(path)) for path in sys.path))),
    }
    visible = [Path(sys.prefix), Path(sys.base_prefix), Path(potluck.__file__).parent, *_homes(python)]
    return Environment(python, None, _outermost(visible), record, False, _binaries(python, cache), None)


@functools.lru_cache(maxsize=2)
def _own_packages(folders: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Reading them takes a tenth of a second, which no job should wait for twice: again only if a folder has changed."""
    return tuple(packages_in([path for path, _ in folders]))


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _binaries(python: Path, cache: Path) -> Path:
    """A folder in which `python` is this interpreter. Debian's /usr/bin has only a `python3`."""
    if os.name == "nt" or (python.parent / "python").exists():
        return python.parent
    folder = cache / "job-api" / f"python-{hashlib.sha256(str(python).encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("python", "python3"):
        with suppress(FileExistsError):
            (folder / name).symlink_to(python)
    return folder


def _homes(python: Path) -> list[Path]:
    """The trees that the links of an interpreter lead through."""
    homes, path = [], python
    for _ in range(10):
        homes.append(path.parent.parent)
        try:
            path = path.parent / os.readlink(path)
        except OSError:
            break
    return [*homes, path.resolve().parent.parent]


def _outermost(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Each folder once, those inside another one left out."""
    once = sorted({Path(os.path.abspath(path)) for path in paths if path.exists()})
    return tuple(path for path in once if not any(path != other and path.is_relative_to(other) for other in once))


# --- those that are there -------------------------------------------------------------------------------------------


def _key(asked: Asked, interpreter: Interpreter) -> str:
    parts = (_FORMAT, asked.digest, interpreter.version, str(interpreter.path), sysconfig.get_platform())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _find(root: Path, key: str) -> tuple[Path, dict[str, Json]] | None:
    """The prefix and the record of an environment that is there and whole. Call it with the lock held."""
    try:
        written = json.loads((root / f"{key}.json").read_bytes())
        prefix, record = root / str(written["folder"]) / "env", written["record"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Its interpreter may have been uninstalled since: then the link leads nowhere.
    known = isinstance(record, dict) and {"base", "interpreter"} <= record.keys()
    whole = known and prefix.parent.parent == root and python_of(prefix).exists()
    return (prefix, record) if whole else None


def _build(build: Build, root: Path, key: str, stop: threading.Event) -> None:
    """Build it in a new folder, and give it its name. Call it with the lock held alone."""
    _remove_rest(root, key)
    folder = root / f"{key}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        record, size = build.build(folder, key, stop)
        part = folder / "record.part"
        with part.open("xb") as file:
            file.write(json.dumps({"folder": folder.name, "size_bytes": size, "record": record}).encode())
            if hasattr(os, "sync"):
                os.sync()  # a power cut must not leave the record of files that never reached the disk
            os.fsync(file.fileno())
        part.replace(root / f"{key}.json")
        sync_folder(root)
    except BaseException:
        remove_tree(folder)
        raise


def _built(prefix: Path, record: dict[str, Json], *, cache: Path, fresh: bool, hold: BinaryIO | None) -> Environment:
    python = python_of(prefix)
    packages = record.get("packages")
    names = [str(one).split("==")[0] for one in packages] if isinstance(packages, list) else []
    has_potluck = "potluck-train" in (re.sub(r"[-_.]+", "-", name).lower() for name in names)
    api = None if has_potluck else job_path(cache)
    # Not where its own `python` leads: a package that was built from source may have led that into its owner's home.
    base = [Path(str(record["base"])), *_homes(Path(str(record["interpreter"]))), *([api] if api else [])]
    return Environment(python, prefix, _outermost(base), record, fresh, python.parent, api, hold)


def _remove_rest(root: Path, key: str) -> None:
    """Remove the folders that no record names. Call it with the lock held alone."""
    found = _find(root, key)
    for folder in root.glob(f"{key}-*"):
        if found is None or folder != found[0].parent:
            remove_tree(folder)
