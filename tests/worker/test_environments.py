"""Does a job get the Python and the packages that it asks for, built once, and nothing that it may not reach?

The packages are made by package_kit, as files of the project: no network is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from package_kit import Machine, source, wheel

from potluck.errors import DiskFull, PotluckError
from potluck.worker.jobs import builds
from potluck.worker.jobs.builds import BuildStep, BuildStopped, build_environment, last_lines, run_plainly
from potluck.worker.jobs.environments import Environment, EnvironmentFailed, evict
from potluck.worker.jobs.locks import try_lock
from potluck.worker.jobs.requirements import read

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX shells and links")
UV = builds.find_uv()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(params=["pip", pytest.param("uv", marks=pytest.mark.skipif(not UV, reason="uv is not installed"))])
def tool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each tool that builds environments."""
    if request.param == "pip":
        monkeypatch.setattr(builds, "find_uv", lambda: "")
    return str(request.param)


@pytest.fixture
def only_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "find_uv", lambda: "")


def ask(environment: Environment, code: str, **variables: str) -> str:
    """What a job's `python -c` prints."""
    inherited = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        ["python" if os.name != "nt" else str(environment.python), "-c", code],
        env={**inherited, **environment.variables(inherited)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


# --- built once


def test_a_job_gets_the_packages_and_the_job_api_and_nothing_else(machine: Machine, tool: str) -> None:
    text = f"{machine.wheel()}  # a comment\n{machine.wheel('tinytwo', version='2.5')}\n"

    with machine.prepare(text) as environment:
        said = ask(environment, "import sys, tinyone, tinytwo, potluck; print(tinyone.VALUE, sys.prefix, potluck.log)")
        missing = ask(environment, "import importlib.util as u; print(u.find_spec('msgspec'), u.find_spec('pip'))")

    assert said.startswith(f"1 {environment.prefix} <function log")
    assert missing == "None None"
    assert environment.fresh
    assert environment.record["packages"] == ["tinyone==1.0", "tinytwo==2.5"]
    assert environment.record["tool"] == tool
    assert environment.record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine.said[0].endswith(f"from requirements.txt with {tool}, Python {environment.record['python']}")
    json.dumps(environment.record)


def test_the_same_requirements_are_built_once_and_changed_ones_again(machine: Machine, only_pip: None) -> None:
    text = machine.wheel()
    with machine.prepare(text) as first:
        steps = len(machine.steps)
    with machine.prepare(text) as second:
        assert (second.fresh, second.prefix, second.record) == (False, first.prefix, first.record)
        assert len(machine.steps) == steps

    wheel(machine.project / "wheels", "tinyone", code="VALUE = 2\n")  # the same name with other bytes
    with machine.prepare(text) as third:
        assert third.prefix != first.prefix
        assert ask(third, "import tinyone; print(tinyone.VALUE)") == "2"


TWO_PROCESSES = """
import sys
from pathlib import Path
from potluck.worker.jobs import builds
from potluck.worker.jobs.environments import prepare
builds.find_uv = lambda: ""
top = Path(sys.argv[1])
with prepare(top / "project", requirements="requirements.txt", python="", cache=top / "cache", say=lambda s: None) as e:
    print(e.fresh, e.prefix)
"""


def test_two_processes_and_two_threads_at_the_same_moment_build_once(machine: Machine, tmp_path: Path) -> None:
    (machine.project / "requirements.txt").write_text(machine.wheel())
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)]

    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]

    assert sorted(fresh for fresh, _ in said) == ["False", "False", "True"]
    assert len({prefix for _, prefix in said}) == 1

    found: list[bool] = []
    (machine.project / "requirements.txt").write_text("# another file\n" + machine.wheel())

    def job() -> None:
        with machine.prepare(None, file="requirements.txt") as environment:
            found.append(environment.fresh)

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == [False, False, True]


@POSIX
def test_an_environment_works_when_nothing_in_it_can_be_written(machine: Machine, only_pip: None) -> None:
    with machine.prepare(machine.wheel()) as environment:
        assert environment.prefix is not None
        for root, folders, files in os.walk(environment.prefix):
            for name in [*folders, *files]:
                path = Path(root, name)
                if not path.is_symlink():
                    path.chmod(path.stat().st_mode & ~0o222)

        code = "import tinyone, os; print(os.path.exists(tinyone.__cached__))"
        command = [str(environment.binaries / "tinyone-command")]

        assert ask(environment, code) == "True"
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "ran 1\n"


@POSIX
def test_everything_that_the_interpreter_needs_is_on_the_list_of_what_must_be_visible(
    machine: Machine, tool: str
) -> None:
    with machine.prepare(machine.wheel()) as environment:
        code = "import sys, os; print('\\n'.join([sys.executable, os.path.realpath(sys.executable), *sys.path[1:]]))"
        places = [Path(line) for line in ask(environment, code).splitlines() if os.path.exists(line)]

    visible = [*environment.read_only, *filter(None, [environment.prefix])]
    assert [place for place in places if not any(place.is_relative_to(top) for top in visible)] == []


# --- broken and interrupted builds


def test_what_does_not_resolve_is_said_in_the_tools_own_words_and_never_used(machine: Machine, tool: str) -> None:
    text = f"{machine.wheel('needs', requires='surely-not-there>=3')}\n--no-index\n"

    for _ in range(2):
        with pytest.raises(EnvironmentFailed) as failed:
            machine.prepare(text)

        assert failed.value.code == "environment"
        assert "surely-not-there" in str(failed.value)
        assert str(failed.value).startswith("requirements.txt cannot be installed with Python 3.")
        assert len(str(failed.value).splitlines()) <= 17
    assert machine.folders() == []
    assert len([step for step in machine.steps if "install" in step.argv]) == 4  # each time wheels, then sources


def test_the_half_of_a_crashed_build_is_cleared_away_and_not_used(machine: Machine, only_pip: None) -> None:
    with machine.prepare(machine.wheel()) as environment:
        pass
    [name] = machine.folders()
    key = name.split("-")[0]
    (machine.cache / "environments" / f"{key}.json").unlink()  # as if the builder had died just before its last step
    (machine.cache / "environments" / f"{key}-deadbeef" / "env").mkdir(parents=True)

    with machine.prepare(machine.wheel()) as again:
        assert again.fresh
    assert len(machine.folders()) == 1
    assert again.prefix != environment.prefix


@pytest.mark.parametrize(
    "written", ["", "{", "[]", '{"folder": "../../etc", "record": {}}', '{"folder": 1, "record": 2}']
)
def test_a_record_that_is_broken_counts_as_none(machine: Machine, only_pip: None, written: str) -> None:
    machine.prepare(machine.wheel()).release()
    [record] = (machine.cache / "environments").glob("*.json")
    record.write_text(written)

    with machine.prepare(machine.wheel()) as again:
        assert again.fresh


def test_an_environment_whose_python_was_uninstalled_is_built_anew(machine: Machine, only_pip: None) -> None:
    with machine.prepare(machine.wheel()) as environment:
        environment.python.unlink()

    with machine.prepare(machine.wheel()) as again:
        assert again.fresh and again.python.exists()


def test_a_build_is_stopped_with_everything_that_it_started(machine: Machine, only_pip: None, tmp_path: Path) -> None:
    started = tmp_path / "started"
    backend = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(started)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    place = "./" + source(machine.project / "src", "slow", backend).relative_to(machine.project).as_posix()
    stop = threading.Event()

    def stop_when_started() -> None:
        while not (started.exists() and started.read_text()):
            if stop.wait(0.05):
                return
        stop.set()

    watcher = threading.Thread(target=stop_when_started)
    watcher.start()
    try:
        with pytest.raises(BuildStopped):
            machine.prepare(f"--no-index\n{place}", stop=stop, run=None)
    finally:
        stop.set()
        watcher.join()

    child = int(started.read_text())
    assert machine.folders() == []
    for _ in range(200):
        if not Path(f"/proc/{child}/stat").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        threading.Event().wait(0.02)
    else:
        pytest.fail("what the build had started is still there")


def test_waiting_for_another_builder_ends_when_the_job_shall_end(machine: Machine, only_pip: None) -> None:
    machine.prepare(machine.wheel()).release()
    [record] = (machine.cache / "environments").glob("*.json")
    record.unlink()
    other = try_lock(record.with_suffix(".lock"))
    assert other is not None
    stop = threading.Event()
    stop.set()

    with other, pytest.raises(BuildStopped, match="another job was building"):
        machine.prepare(machine.wheel(), stop=stop)
    assert machine.said[-1].startswith("Another job builds the same environment")


def test_a_full_disk_is_said_as_that(machine: Machine, only_pip: None) -> None:
    def run(step: BuildStep, log: Callable[[bytes], None]) -> int:
        log(b"ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
        return 1

    with pytest.raises(DiskFull, match="No space left on device"):
        machine.prepare(machine.wheel(), run=run)
    assert machine.folders() == []


# --- foreign code

BACKEND = """
import os, shutil, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "built-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        archive.writestr("built.py", "SECRETS = " + repr(sorted(k for k in os.environ if "SECRET" in k)))
        archive.writestr("built-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: built\\nVersion: 1.0\\n")
        archive.writestr("built-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("built-1.0.dist-info/RECORD", "")
    return name
"""


def test_a_source_package_is_built_in_a_step_that_says_so_without_secrets_or_the_shared_cache(
    machine: Machine, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "hidden")
    place = "./" + source(machine.project / "src", "built", BACKEND).relative_to(machine.project).as_posix()

    with machine.prepare(f"--no-index\n{place}") as environment:
        secrets = ask(environment, "import built; print(built.SECRETS)")

    assert secrets == "[]"
    assert environment.record["packages"] == ["built==1.0"]
    *wheels_only, foreign = (step for step in machine.steps if "install" in step.argv)
    shared = machine.cache / "downloads"
    assert foreign.foreign and shared not in foreign.writable
    assert not Path(foreign.env["UV_CACHE_DIR"]).is_relative_to(shared)
    assert not Path(foreign.env["PIP_CACHE_DIR"]).is_relative_to(shared)
    if tool == "uv":
        assert [step.foreign for step in wheels_only] == [False]
        assert b"building from source" in b"".join(machine.output)
    else:
        assert wheels_only == []  # pip builds what is named by a path even when told not to
    for step in machine.steps:  # what other jobs trust cannot be written by any step
        assert not {machine.cache, machine.cache / "environments"} & set(step.writable)


def test_no_step_runs_code_of_a_package_that_is_only_unpacked(machine: Machine, tool: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    made = wheel(machine.project / "wheels", "trap")
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr("trap.pth", f"import os; open({str(trap)!r}, 'w')\n")
        archive.writestr("sitecustomize.py", f"open({str(trap)!r}, 'w')\n")
    with zipfile.ZipFile(made) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["trap-1.0.dist-info/RECORD"] += b"trap.pth,,\nsitecustomize.py,,\n"
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)

    with machine.prepare("./wheels/trap-1.0-py3-none-any.whl") as environment:
        assert not trap.exists()
        ask(environment, "pass")
    assert trap.exists()  # the trap does work, in the job


def test_a_build_sees_only_what_it_needs_of_the_machines_variables() -> None:
    machine_has = {
        "PATH": "/bin",
        "HOME": "/root",
        "PIP_INDEX_URL": "https://i",
        "UV_INDEX_URL": "https://i",
        "https_proxy": "p",
        "AWS_SECRET_ACCESS_KEY": "x",
        "POTLUCK_TOKEN": "x",
        "PYTHONPATH": "/x",
        "PIP_TARGET": "/x",
        "VIRTUAL_ENV": "/x",
    }

    assert set(build_environment(machine_has)) == {"PATH", "HOME", "PIP_INDEX_URL", "UV_INDEX_URL", "https_proxy"}


# --- requirement files and pyproject.toml


def test_includes_and_hashes_work_and_included_files_count(machine: Machine, tool: str) -> None:
    place = machine.wheel()
    digest = hashlib.sha256((machine.project / place).read_bytes()).hexdigest()
    (machine.project / "more").mkdir()
    (machine.project / "more" / "base.txt").write_text("-r deeper.txt\n")
    (machine.project / "more" / "deeper.txt").write_text(f"{place} --hash=sha256:{digest}\n")

    with machine.prepare("-r more/base.txt") as environment:
        assert environment.record["packages"] == ["tinyone==1.0"]
    (machine.project / "more" / "deeper.txt").write_text(f"{place} --hash=sha256:{'0' * 64}\n")
    with pytest.raises(EnvironmentFailed, match=r"(?i)hash"):
        machine.prepare("-r more/base.txt")

    counted = {name for name, _ in read(machine.project, "requirements.txt").digests}
    assert counted == {"requirements.txt", "more/base.txt", "more/deeper.txt", place[2:]}


def test_the_dependencies_of_a_pyproject_are_installed_and_the_resolved_set_recorded(
    machine: Machine, tool: str
) -> None:
    wheel(machine.project / "wheels", "dep", version="3.1")
    place = machine.project / machine.wheel(
        "tinyone", requires="dep @ file://" + str(machine.project / "wheels/dep-3.1-py3-none-any.whl")
    )
    (machine.project / "pyproject.toml").write_text(
        f'[project]\nname = "mine"\nversion = "1"\ndependencies = ["./{place.relative_to(machine.project)}"]\n'
    )

    with machine.prepare(None, file="pyproject.toml") as environment:
        assert environment.record["packages"] == ["dep==3.1", "tinyone==1.0"]
        assert environment.record["from"] == "pyproject.toml"


LOCKED = '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["tinyone"]\n'
LOCKED += '[tool.uv.sources]\ntinyone = { path = "wheels/tinyone-1.0-py3-none-any.whl" }\n'


def test_a_lock_without_uv_is_an_error_that_names_the_way_out(machine: Machine, only_pip: None) -> None:
    (machine.project / "pyproject.toml").write_text(LOCKED)
    (machine.project / "uv.lock").write_text("version = 1\n")

    with pytest.raises(EnvironmentFailed, match=r"pip install uv.*uv export"):
        machine.prepare(None, file="pyproject.toml")


@pytest.mark.skipif(not UV, reason="uv is not installed")
def test_a_lock_is_followed_exactly(machine: Machine) -> None:
    machine.wheel()
    (machine.project / "pyproject.toml").write_text(LOCKED)
    lock = [UV, "lock", "--offline", "--project", str(machine.project), "--python", sys.executable]
    subprocess.run(lock, check=True, capture_output=True)

    with machine.prepare(None, file="pyproject.toml") as environment:
        assert environment.record["packages"] == ["tinyone==1.0"]
        assert ask(environment, "import tinyone; print(tinyone.VALUE)") == "1"
        assert environment.record["from"] == "uv.lock"
    with machine.prepare(None, file="uv.lock") as same:
        assert not same.fresh


# --- interpreters


def test_without_requirements_a_job_gets_the_agents_own_python_with_potluck_in_it(machine: Machine) -> None:
    with machine.prepare(None) as environment:
        said = ask(environment, "import sys, potluck, potluck.worker; print(sys.prefix)")

    assert environment.prefix is None and not environment.fresh
    assert said == sys.prefix
    packages = environment.record["packages"]
    assert isinstance(packages, list) and any(str(one).startswith("msgspec==") for one in packages)


# --- the cache


def test_eviction_takes_the_one_not_used_for_longest_and_none_in_use(machine: Machine, only_pip: None) -> None:
    machine.prepare(f"{machine.wheel()}\n# old").release()
    [old] = machine.folders()
    newer = machine.prepare(f"{machine.wheel()}\n# newer")
    machine.prepare(f"{machine.wheel()}\n# newest").release()
    for age, path in enumerate(
        sorted((machine.cache / "environments").glob("*.json"), key=lambda p: p.stat().st_mtime)
    ):
        os.utime(path, (1000 + age, 1000 + age))
    (machine.cache / "environments" / "0123-deadbeef").mkdir()
    size = sum(json.loads(path.read_text())["size_bytes"] for path in (machine.cache / "environments").glob("*.json"))

    assert evict(machine.cache, size) == 0
    assert evict(machine.cache, size - 1) > 0
    assert old not in machine.folders() and len(machine.folders()) == 2
    evict(machine.cache, 0)

    assert newer.prefix is not None and machine.folders() == [newer.prefix.parent.name]
    assert ask(newer, "import tinyone; print(tinyone.VALUE)") == "1"
    newer.release()
    evict(machine.cache, 0)
    assert machine.folders() == []


def test_a_project_that_brings_potluck_itself_gets_that_one(machine: Machine, only_pip: None) -> None:
    made = wheel(machine.project / "wheels", "potluck_train")
    with machine.prepare("./" + made.relative_to(machine.project).as_posix()) as environment:
        assert "PYTHONPATH" not in environment.variables({})


def test_the_jobs_own_pythonpath_comes_first(machine: Machine, only_pip: None) -> None:
    with machine.prepare(machine.wheel()) as environment:
        made = environment.variables({"PYTHONPATH": "src", "PATH": "/bin"})

    assert made["PYTHONPATH"].split(os.pathsep) == ["src", str(environment.job_api)]
    assert made["PATH"].split(os.pathsep) == [str(environment.binaries), "/bin"]
    assert made["VIRTUAL_ENV"] == str(environment.prefix)


def test_the_tools_last_lines_are_safe_to_show() -> None:
    lines = ["\x1b[31mred\x1b[0m", "", "[notice] new pip", *(f"line {number}" for number in range(40)), "x" * 1000]

    said = last_lines(lines).splitlines()

    assert len(said) == 15
    assert said[0] == "line 26" and len(said[-1]) == 400


def test_a_command_that_is_not_there_is_said(tmp_path: Path) -> None:
    step = BuildStep([str(tmp_path / "nothing")], {}, tmp_path, (), (), foreign=False)

    with pytest.raises(PotluckError, match="cannot be started"):
        run_plainly(step, lambda piece: None)


def test_pip_is_there_for_these_tests() -> None:
    assert importlib.util.find_spec("pip") is not None
