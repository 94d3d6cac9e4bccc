"""Packages that need no network, and a project that asks for them.

A wheel is a zip file and a source package is a tar file, so both are made here in a few lines.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from potluck.worker.jobs.builds import BuildStep, run_plainly
from potluck.worker.jobs.environments import Environment, prepare

CODE = "VALUE = 1\n\n\ndef main():\n    print('ran', VALUE)\n"


def wheel(folder: Path, name: str, version: str = "1.0", code: str = CODE, requires: str = "") -> Path:
    """A wheel of one module."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {requires}\n" * bool(requires)
    )
    files = {
        f"{name}.py": code,
        f"{name}-{version}.dist-info/METADATA": metadata,
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{version}.dist-info/entry_points.txt": f"[console_scripts]\n{name}-command = {name}:main\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    files[f"{name}-{version}.dist-info/RECORD"] = record + f"{name}-{version}.dist-info/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)  # without the time of day: the same bytes each time
    return made


def source(folder: Path, name: str, backend: str) -> Path:
    """A source package that is built by code of its own, with nothing from elsewhere."""
    top = f"{name}-1.0"
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{top}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            found = tarfile.TarInfo(f"{top}/{path}")
            found.size = len(text)
            archive.addfile(found, BytesIO(text.encode()))
    return folder / f"{top}.tar.gz"


class Machine:
    """A project and a cache, and what is said while an environment is made."""

    def __init__(self, top: Path) -> None:
        self.project, self.cache = top / "project", top / "cache"
        self.project.mkdir()
        self.said: list[str] = []
        self.steps: list[BuildStep] = []
        self.output: list[bytes] = []

    def run(self, step: BuildStep, log: Callable[[bytes], None]) -> int:
        self.steps.append(step)
        return run_plainly(step, log)

    def prepare(self, requirements: str | None = "requirements.txt", **more: Any) -> Environment:
        """Text for requirements.txt, or with `file=` the name of another file that is there."""
        file = more.pop("file", None)
        if file is None and requirements:
            (self.project / "requirements.txt").write_text(requirements)
            file = "requirements.txt"
        settings = {"requirements": file or "", "python": "", "run": self.run, **more}
        return prepare(self.project, cache=self.cache, say=self.said.append, on_output=self.output.append, **settings)

    def wheel(self, name: str = "tinyone", **more: str) -> str:
        return "./" + wheel(self.project / "wheels", name, **more).relative_to(self.project).as_posix()

    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.cache / "environments").glob("*-*"))
