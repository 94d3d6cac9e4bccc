"""How is an environment built, by uv or pip, and what may that do to this machine?

Building runs strangers' code: the `setup.py` of a source package. So every command of a build goes through `run`, which
may put it into a sandbox; a `BuildStep` says what it has to write. Wheels are tried first: unpacking one runs nothing of
it. Only if that fails are sources built, and then without the download cache, which other builds trust. Installing is
`foreign` either way: pip builds a source that a wheel's own metadata names by address, and the project's own settings
tell uv where to install to.

What was built is a stranger's, too. No step is run by the new environment's own interpreter after packages are in it (a
package may run code at its start): the base interpreter compiles, in the sandbox, for a link could lead what it writes
elsewhere. This process reads nothing but the names of packages, follows no link and opens no pipe for it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from importlib.metadata import distributions
from pathlib import Path

from potluck.errors import DiskFull
from potluck.protocol import Json
from potluck.telemetry import clean
from potluck.worker.jobs import outputs
from potluck.worker.jobs.interpreters import EnvironmentFailed, Interpreter
from potluck.worker.jobs.requirements import Asked
from potluck.worker.jobs.walking import remove_tree, size_of, walk

_TAIL_LINES = 15
_TAIL_BYTES = 20_000
_MAX_PACKAGES = 5000
_METADATA = ((".dist-info", "METADATA"), (".egg-info", "PKG-INFO"))
_METADATA_BYTES = 1_000_000
_POLL_S = 0.1
_GRACE_S = 3.0
_FULL = ("no space left on device", "os error 28", "disk quota exceeded")
# What a build may know of this machine: where its packages come from and how to get there.
_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "SYSTEMROOT", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NETRC")
_PASSED_FRONTS = ("PIP_", "UV_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_MISPLACING = {  # would put the packages, or the tools' own files, somewhere else
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON", "PIP_REQUIRE_VIRTUALENV", "PIP_LOG"),
    *("UV_PROJECT_ENVIRONMENT", "UV_PROJECT", "UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_TARGET", "UV_WORKING_DIR"),
    *("UV_CACHE_DIR", "PIP_CACHE_DIR", "UV_NO_CACHE", "PIP_NO_CACHE_DIR"),
}


class BuildStopped(EnvironmentFailed):
    """Somebody wanted the job to end while its environment was built."""


@dataclass(frozen=True)
class BuildStep:
    """One command of a build, and what a sandbox has to let it do. It needs the network, and no terminal."""

    argv: list[str]
    env: dict[str, str]  # all of it
    cwd: Path
    writable: tuple[Path, ...]  # nothing else: other jobs trust what lies beside them
    readable: tuple[Path, ...]
    foreign: bool  # may run code of the packages


Run = Callable[[BuildStep, Callable[[bytes], None]], int]
"""Runs a step, hands on its output as it comes, and returns the exit code."""


def run_plainly(step: BuildStep, log: Callable[[bytes], None], *, stop: threading.Event | None = None) -> int:
    """Run a step as a process of this machine, in no sandbox. When `stop` is set, it and what it started are ended."""
    try:
        process = subprocess.Popen(
            step.argv,
            env=step.env,
            cwd=step.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise EnvironmentFailed(f"`{step.argv[0]}` cannot be started: {error}") from error
    reader = threading.Thread(target=_hand_on, args=(process, log), name="build-output", daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            if stop is None:
                process.wait()
            elif stop.wait(_POLL_S):
                _end_group(process)
    finally:
        _signal_group(process, "SIGKILL")  # what it left behind in its group
        process.wait()
        reader.join(_GRACE_S)
    return process.returncode


def _hand_on(process: subprocess.Popen[bytes], log: Callable[[bytes], None]) -> None:
    assert process.stdout is not None
    with process.stdout as output:
        while piece := os.read(output.fileno(), 65536):
            log(piece)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, "SIGTERM")
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_S)
    _signal_group(process, "SIGKILL")


def _signal_group(process: subprocess.Popen[bytes], name: str) -> None:
    with suppress(ProcessLookupError, PermissionError):
        if os.name == "nt":
            process.kill()
        else:
            os.killpg(process.pid, getattr(signal, name))


class Build:
    """The steps to one environment, with uv if it is there, else with pip."""

    def __init__(
        self,
        asked: Asked,
        interpreter: Interpreter,
        project: Path,
        cache: Path,
        *,
        run: Run,
        on_output: Callable[[bytes], None],
        say: Callable[[str], None],
    ) -> None:
        self._asked = asked
        self._interpreter = interpreter
        self._project = project
        self._cache = cache
        self._run = run
        self._on_output = on_output
        self._say = say

    def build(self, folder: Path, key: str, stop: threading.Event) -> tuple[dict[str, Json], int]:
        """Build it as `folder`/env; its record, and its size in bytes."""
        uv = find_uv()
        if self._asked.kind == "lock" and not uv:
            raise EnvironmentFailed(
                "pyproject.toml has a uv.lock beside it, and this machine has no uv to follow it exactly. Install uv "
                "on the machine (pip install uv), or send the locked set in a form that pip reads, too: "
                "uv export --format requirements-txt --output-file requirements.txt, then --requirements requirements.txt"
            )
        tool = "uv" if uv else "pip"
        self._say(f"Building the environment {key[:8]} from {self._asked.shown} with {tool}, Python {self._version}")
        steps = _Steps(self._run, self._on_output, stop, folder, self._cache, self._project, self._interpreter)
        steps.make_rooms()
        if uv:
            self._with_uv(uv, steps)
        else:
            self._with_pip(steps)
        site = site_packages(steps.prefix, self._interpreter)
        # -S: packages must not run at its start. What does not compile is a package's old example: no failure.
        compile_all = [str(self._interpreter.path), "-I", "-S", "-m", "compileall", "-q", str(site)]
        steps.run("compiling", compile_all, must=False, quiet=True, foreign=True)
        remove_tree(steps.tmp)
        packages = packages_below(steps.prefix, site)
        show_to_all(steps.prefix)
        self._say(f"The environment {key[:8]} is ready: {len(packages)} packages")
        record: dict[str, Json] = {
            "hash": key,
            "tool": tool,
            "from": self._asked.shown,
            "python": self._version,
            "base": str(self._interpreter.prefix),
            "interpreter": str(self._interpreter.path),
            "packages": list(packages),
        }
        return record, size_of(folder)

    @property
    def _version(self) -> str:
        return self._interpreter.version

    def _with_uv(self, uv: str, steps: _Steps) -> None:
        base = [uv, "--no-progress", "--color", "never"]
        exe = str(self._interpreter.path)
        steps.run("making an empty environment", [*base, "venv", "--no-project", "--python", exe, str(steps.prefix)])
        if self._asked.kind == "lock":
            # The project itself is not installed: its code is where the job runs.
            install = [*base, "sync", "--frozen", "--no-install-project", "--no-editable", "--python", exe]
            install += ["--project", str(self._asked.file.parent)]
        else:
            install = [*base, "pip", "install", "--python", str(python_of(steps.prefix))]
            install += ["-r", str(self._list(steps))]
        steps.install(self._asked, install, ["--no-build"], may_build=False)

    def _with_pip(self, steps: _Steps) -> None:
        exe = str(self._interpreter.path)
        own = importlib.util.find_spec("pip") is not None
        # Without a pip inside, an environment is ready seconds earlier and has nothing that nobody asked for.
        empty = [exe, "-I", "-m", "venv", *(["--without-pip"] if own else []), str(steps.prefix)]
        steps.run(
            "making an empty environment",
            empty,
            hint="This machine's Python cannot make environments: install uv, or the package python3-venv",
        )
        inside = str(python_of(steps.prefix))
        pip = [sys.executable, "-I", "-m", "pip", "--python", inside] if own else [inside, "-I", "-m", "pip"]
        install = [*pip, "install", "--no-input", "--no-compile", "--progress-bar", "off", "--no-warn-script-location"]
        install += ["-r", str(self._list(steps))]
        steps.install(self._asked, install, ["--only-binary", ":all:"], may_build=True)

    def _list(self, steps: _Steps) -> Path:
        """The file to install from."""
        if self._asked.kind == "requirements":
            return self._asked.file
        path = steps.tmp / "dependencies.txt"
        path.write_text("".join(f"{line}\n" for line in self._asked.lines), encoding="utf-8")
        return path


class _Steps:
    """The commands of one build, with what they share."""

    def __init__(
        self,
        run: Run,
        on_output: Callable[[bytes], None],
        stop: threading.Event,
        folder: Path,
        cache: Path,
        project: Path,
        interpreter: Interpreter,
    ) -> None:
        self._run = run
        self._on_output = on_output
        self._stop = stop
        self._folder = folder
        self._downloads = cache / "downloads"
        self._project = project
        self._interpreter = interpreter
        self._tail: deque[str] = deque(maxlen=200)
        self.prefix = folder / "env"
        self.tmp = folder / "tmp"

    def make_rooms(self) -> None:
        """All folders that steps write to, now: later a stranger's code could have put a link in the way."""
        for kept in (self._downloads, self.tmp / "downloads"):
            for name in ("uv", "pip"):
                (kept / name).mkdir(parents=True, exist_ok=True)

    def install(self, asked: Asked, argv: list[str], wheels_only: list[str], *, may_build: bool) -> None:
        """Install from wheels; if that cannot be done, build the sources among them, too.

        `may_build`: told to take wheels only, the tool still builds what is named by an address. So does pip.
        """
        if not (may_build and asked.direct_sources):
            if self.run("installing", [*argv, *wheels_only], must=False, downloads=True, foreign=True):
                return
            self._on_output(b"Not everything is there as a wheel: building from source.\n")
        self.run(f"{asked.shown} cannot be installed with Python {self._interpreter.version}", argv, foreign=True)

    def run(
        self,
        doing: str,
        argv: list[str],
        *,
        must: bool = True,
        downloads: bool = False,
        foreign: bool = False,
        quiet: bool = False,
        hint: str = "",
    ) -> bool:
        """Did it succeed? If it `must` and did not, `EnvironmentFailed` says what the command said."""
        if self._stop.is_set():
            raise BuildStopped(f"stopped while {doing}")
        self._tail.clear()
        rest = b""

        def log(piece: bytes) -> None:
            nonlocal rest
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-_TAIL_BYTES:]
            self._tail.extend(line.decode(errors="replace") for line in lines)
            if not quiet:
                self._on_output(piece)

        code = self._run(self._step(argv, downloads=downloads, foreign=foreign), log)
        self._tail.append(rest.decode(errors="replace"))
        if code == 0:
            return True
        if self._stop.is_set():
            raise BuildStopped(f"stopped while {doing}")
        said = last_lines(self._tail)
        if any(word in said.lower() for word in _FULL):
            raise DiskFull(f"the disk of this machine is full: an environment could not be built. It said:\n{said}")
        if must:
            raise EnvironmentFailed(f"{hint or doing} (exit code {code}). The last lines were:\n{said}")
        return False

    def _step(self, argv: list[str], *, downloads: bool, foreign: bool) -> BuildStep:
        kept = self._downloads if downloads else self.tmp / "downloads"
        writable = [self._folder]
        if downloads:
            writable.append(kept)
        if foreign:
            writable.append(
                self._project
            )  # setuptools builds a folder of the project in place; it is the job's own copy
        env = {
            **build_environment(os.environ),
            "TMPDIR": str(self.tmp),
            "UV_CACHE_DIR": str(kept / "uv"),
            "PIP_CACHE_DIR": str(kept / "pip"),
            "UV_PROJECT_ENVIRONMENT": str(self.prefix),
            "UV_PYTHON_DOWNLOADS": "never",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        readable = (
            self._project,
            self._interpreter.prefix,
            Path(sys.prefix),
            Path(sys.base_prefix),
            Path(argv[0]).parent,
        )
        return BuildStep(argv, env, self._project, tuple(writable), readable, foreign)


def build_environment(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """What of `environment` a build gets: how to reach the package index, and none of the machine's secrets."""
    return {
        name: value
        for name, value in environment.items()
        if (name in _PASSED or name.upper().startswith(_PASSED_FRONTS)) and name not in _MISPLACING
    }


def find_uv() -> str:
    """The path of uv, beside the agent's Python or on the PATH; empty if there is none."""
    beside = shutil.which("uv", path=os.path.dirname(sys.executable))
    return beside or shutil.which("uv") or ""


def python_of(prefix: Path) -> Path:
    """The interpreter of a virtual environment."""
    return prefix / "Scripts" / "python.exe" if os.name == "nt" else prefix / "bin" / "python"


def site_packages(prefix: Path, interpreter: Interpreter) -> Path:
    if os.name == "nt":
        return prefix / "Lib" / "site-packages"
    return prefix / "lib" / f"python{interpreter.minor}" / "site-packages"


def packages_in(path: Sequence[str]) -> list[str]:
    """`name==version` of each installed package, sorted. Their files are read; none of their code runs."""
    found = set()
    for distribution in distributions(path=list(path)):
        with suppress(Exception):  # a stranger's metadata may be anything, and this is a list for people
            found.add(f"{clean(distribution.metadata['Name'], limit=100)}=={clean(distribution.version, limit=60)}")
    return sorted(found, key=str.lower)[:_MAX_PACKAGES]


def packages_below(prefix: Path, site: Path) -> list[str]:
    """As `packages_in`, of an environment in which a stranger's code may have left anything: links, pipes, giants."""
    found = set()
    place = site.relative_to(prefix).as_posix() + "/"
    for entry in outputs.files_below(prefix, outputs.Notes()):
        folder, _, name = entry.path.removeprefix(place).partition("/")
        if not entry.path.startswith(place) or (Path(folder).suffix, name) not in _METADATA:
            continue
        with suppress(OSError), os.fdopen(entry.open(), "rb") as file:
            said = BytesHeaderParser().parsebytes(file.read(_METADATA_BYTES))
            if said["Name"] and said["Version"]:
                found.add(f"{clean(str(said['Name']), limit=100)}=={clean(str(said['Version']), limit=60)}")
    return sorted(found, key=str.lower)[:_MAX_PACKAGES]


def show_to_all(folder: Path) -> None:
    """An agent that is root has its jobs run as another user, who must be able to read this whatever root's umask is."""
    for _, _, names, at in walk(folder):
        if at is None:
            return
        _show(at)
        for name in names:
            with suppress(OSError):
                file = os.open(name, outputs.OPEN, dir_fd=at)
                try:
                    _show(file)
                finally:
                    os.close(file)


def _show(handle: int) -> None:
    mode = os.fstat(handle).st_mode
    wanted = 0o055 if stat.S_ISDIR(mode) else 0o044 | (0o011 if mode & 0o100 else 0)
    if mode & wanted != wanted and (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        os.fchmod(handle, stat.S_IMODE(mode) | wanted)


def last_lines(lines: Sequence[str] | deque[str]) -> str:
    """What a tool said in the end, fit for a message: no empty lines, no escape sequences, not much."""
    said = [clean(line, limit=400).rstrip() for line in lines]
    return "\n".join([line for line in said if line and not line.startswith("[notice]")][-_TAIL_LINES:])
