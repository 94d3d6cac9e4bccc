"""What can the code of a package do that is built from source for somebody else's job? Nothing to the machine's owner."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

import pytest
from package_kit import source

from potluck.domain.job import JobSpec
from potluck.protocol import Blob, JobLease
from potluck.worker.jobs import builds, environments, executors
from potluck.worker.jobs.attempt import Builder, Folders
from potluck.worker.jobs.environments import Environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are Linux's")

SETUP = """
import json, os, pathlib, sys, time, zipfile

def attempt(what):
    try:
        return str(what())
    except Exception as error:
        return type(error).__name__

env = pathlib.Path(os.environ["TMPDIR"]).parent / "env"

def when_installed(what):
    "As late as can be: pip is nearly done, and the sandbox still there."
    if os.fork():
        return
    os.setsid()
    os.closerange(0, 1000)
    while not list(env.glob("lib/*/site-packages/strange-1.0.dist-info/RECORD")):
        time.sleep(0.001)
    what()
    os._exit(0)

def build_wheel(folder, config_settings=None, metadata_directory=None):
    tried = {tried}
    found = json.dumps({{name: attempt(what) for name, what in tried.items()}})
    metadata = "Metadata-Version: 2.1\\nName: strange\\nVersion: 1.0\\n"
    with zipfile.ZipFile(os.path.join(folder, "strange-1.0-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("strange.py", "FOUND = " + repr(found) + chr(10))
        wheel.writestr("strange-1.0.dist-info/METADATA", metadata)
        wheel.writestr("strange-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("strange-1.0.dist-info/RECORD", "")
    return "strange-1.0-py3-none-any.whl"
"""


class Machine:
    """An agent's home with its credential, and a job of somebody else that is being prepared there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.credential = home / "worker" / "credential.json"
        self.credential.parent.mkdir(parents=True)
        self.credential.write_text('{"token": "plw_secret"}')
        self.folders = Folders.below(home / "worker" / "jobs" / "0123456789abcdef")
        self.folders.make()
        self.cache = home / "worker" / "shared" / "somebody"
        self.stop = threading.Event()

    def prepare(self, setup: str) -> Environment:
        source(self.folders.work / "src", "strange", setup)
        (self.folders.work / "requirements.txt").write_text("--no-index\n./src/strange-1.0.tar.gz\n")
        spec = JobSpec(["true"], requirements="requirements.txt")
        lease = JobLease(
            *("0123456789abcdef", 1, "run", "job", 1, "p2", "bob"),
            owns_worker=False,
            ttl_s=600.0,
            spec=spec,
            project=Blob("", 0),
        )
        builder = Builder(lease, executors.ALL["bubblewrap"], self.folders, self.stop)
        self.output: list[bytes] = []
        return environments.prepare(
            self.folders.work,
            requirements="requirements.txt",
            python="",
            cache=self.cache,
            run=builder.run,
            on_output=self.output.append,
            say=lambda text: None,
            stop=self.stop,
        )


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = {one.name: one for one in executors.found()}["bubblewrap"]
    if not found.works:
        pytest.skip(found.reason)
    monkeypatch.setattr(builds, "find_uv", lambda: "")
    monkeypatch.setenv("POTLUCK_TOKEN", "plw_secret")
    return Machine(tmp_path)


def found_by(environment: Environment) -> dict[str, str]:
    assert environment.prefix is not None
    (module,) = environment.prefix.glob("lib/*/site-packages/strange.py")
    scope: dict[str, str] = {}
    exec(module.read_text(), scope)  # noqa: S102 - a string that the test itself had written
    return dict(json.loads(scope["FOUND"]))


def test_its_setup_runs_in_the_sandbox_and_finds_no_credential(machine: Machine) -> None:
    tried = f"""{{
        "credential": lambda: open({str(machine.credential)!r}).read(),
        "home": lambda: os.listdir({str(machine.home)!r}),
        "variables": lambda: [value for value in os.environ.values() if "secret" in value],
        "agent": lambda: open("/proc/{os.getpid()}/cmdline").read(),
        "others": lambda: len([name for name in os.listdir("/proc") if name.isdecimal()]) > 20,
        "root": lambda: os.getuid() == 0 or os.setuid(0),
        "usr": lambda: open("/usr/strange", "w"),
    }}"""

    with machine.prepare(SETUP.format(tried=tried)) as environment:
        found = found_by(environment)

    assert found["credential"] in ("FileNotFoundError", "PermissionError")
    assert "credential.json" not in found["home"]
    assert found["variables"] == "[]"
    assert found["agent"] == "FileNotFoundError"
    assert found["others"] == "False"
    assert found["usr"] in ("OSError", "PermissionError")
    assert os.geteuid() != 0 or found["root"] == "PermissionError"
    assert environment.record["packages"] == ["strange==1.0"]


def test_a_link_in_place_of_its_python_shows_the_job_nothing_of_the_owners(machine: Machine) -> None:
    """The environment's own link decides nothing about what a sandbox shows."""
    lead = f"""{{"link": lambda: when_installed(lambda: (
        (env / "bin/python").unlink(), (env / "bin/python").symlink_to({str(machine.credential)!r})
    ))}}"""

    with machine.prepare(SETUP.format(tried=lead)) as environment:
        shown = environment.read_only

    assert environment.python.readlink() == machine.credential
    assert not any(machine.home in (path, *path.parents) and machine.cache not in path.parents for path in shown)
    assert not any(path in machine.credential.parents for path in shown)


def test_pipes_and_links_that_it_leaves_keep_nobody_waiting_and_are_not_written_through(machine: Machine) -> None:
    target = machine.home / "owners"
    target.mkdir(mode=0o777)
    target.chmod(0o777)
    leave = f"""{{"leave": lambda: [
        (
            os.mkfifo(site / "waits.py"),
            (site / "pack").mkdir(), (site / "pack" / "code.py").write_text("x = 1"),
            (site / "pack" / "__pycache__").symlink_to({str(target)!r}),
            (site / "endless-1.0.dist-info").mkdir(), os.mkfifo(site / "endless-1.0.dist-info" / "METADATA"),
            (site / "leak-1.0.dist-info").mkdir(),
            (site / "leak-1.0.dist-info" / "METADATA").symlink_to({str(machine.credential)!r}),
        )
        for site in env.glob("lib/*/site-packages")
    ]}}"""
    # What the FIFO keeps waiting is the sandboxed compiler, so the job's own preparation: until somebody ends it.
    ended = threading.Timer(3.0, machine.stop.set)
    ended.start()

    with contextlib.suppress(environments.BuildStopped):
        machine.prepare(SETUP.format(tried=leave)).release()
    ended.cancel()

    assert list(target.iterdir()) == []


def test_a_build_that_leaves_no_python_fails_instead_of_beginning_anew_for_ever(machine: Machine) -> None:
    gone = """{"gone": lambda: when_installed(lambda: [path.unlink() for path in (env / "bin").glob("python*")])}"""

    with pytest.raises(environments.EnvironmentFailed, match="has no Python"):
        machine.prepare(SETUP.format(tried=gone))


def test_the_list_of_packages_opens_no_pipe_and_follows_no_link(tmp_path: Path) -> None:
    site = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    for name, text in (("good", "Name: good\nVersion: 1\n\n"), ("bare", "\n"), ("pipe", ""), ("link", "")):
        (site / f"{name}-1.dist-info").mkdir(parents=True)
        metadata = site / f"{name}-1.dist-info" / "METADATA"
        if name == "pipe":
            os.mkfifo(metadata)
        elif name == "link":
            (tmp_path / "elsewhere").write_text("Name: secret\nVersion: 2\n\n")
            metadata.symlink_to(tmp_path / "elsewhere")
        else:
            metadata.write_text(text)

    assert builds.packages_below(tmp_path / "env", site) == ["good==1"]
