"""How does a folder and a command become a job, here or on a machine of the hub?"""

from __future__ import annotations

import secrets as random
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.jobfile import JobFile, name_of, read_flags, read_job_file
from potluck.cli.jobs import job_json, shell_line
from potluck.cli.options import DURATION, hub_options, json_option
from potluck.cli.watch import (
    PLACED_WITHIN_S,
    Printer,
    Watch,
    come_back,
    exit_code,
    left,
    progress_sentence,
    signal_named,
    waiting_sentence,
)
from potluck.errors import BadInput
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.domain.job import JobSpec
    from potluck.protocol import Blob, GitState, JobRequest, JobView, Outlook, Tree

FILE = "potluck.yaml"
WOULD_WAIT = 75  # exit code of --dry-run: try again later


@click.command(
    "run",
    context_settings={"allow_interspersed_args": False},
    epilog="All behind `--` is the command, word by word, without a shell. Flags win over potluck.yaml (docs/jobs.md).",
)
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@click.option("-f", "--file", "file", type=click.Path(), metavar="FILE", help="Another file than potluck.yaml.")
@click.option("--folder", type=click.Path(), metavar="DIR", help="The project; else the one you are in.")
@click.option("--gpu", metavar="WHAT", help="1, 24GB..:2 (two with 24 GB or more), A100, A100:40GB..:1")
@click.option("--cpu", metavar="N", help="Cores: 4, 0.5, 2..8")
@click.option("--memory", metavar="SIZE", help="8GB; also the limit.")
@click.option("--disk", metavar="SIZE", help="How much the job may write: 20GB")
@click.option("--image", metavar="IMAGE", help="Run in this container image.")
@click.option("--requirements", metavar="FILE", help="requirements.txt or pyproject.toml, installed once and kept.")
@click.option("--python", metavar="VERSION", help="Of the environment that is built: 3.11")
@click.option("--name", metavar="NAME", help="What the job is called; else as the folder.")
@click.option("--priority", type=int, metavar="P", help="-100 to 100, higher goes first.")
@click.option("--retries", type=int, metavar="N", help="How often it may be placed again.")
@click.option("--retry-on", metavar="WHEN", help="lost: when its machine was lost; any: also when it failed.")
@click.option("--timeout", metavar="TIME", help="End an attempt after so long: 2h")
@click.option("--grace", metavar="TIME", help="Between SIGTERM and SIGKILL: 30s")
@click.option("--env", "env", multiple=True, metavar="K=V", help="A variable; K alone takes its value from here.")
@click.option("--secret", "secrets", multiple=True, metavar="NAME", help="A secret as a variable (potluck secret set).")
@click.option("--on", "labels", multiple=True, metavar="K=V", help="Only on a machine with this label.")
@click.option("--procs", type=int, metavar="N", help="Processes on the machine, by torchrun.")
@click.option("--gang", metavar="N..M", help="Train on so many machines together: 2..8, or 4 (docs/gangs.md).")
@click.option("--batch", "gang_batch", metavar="N", help="With --gang: samples in a step of the whole gang.")
@click.option("--gang-policy", metavar="P", help="How it is shared out: dynamic, proportional or uniform.")
@click.option("--gang-engine", metavar="E", help="What carries the gang: auto, torchft or plain.")
@click.option("--gang-compat", is_flag=True, default=None, help="For an unmodified torchrun script; a fixed number.")
@click.option("--wait", is_flag=True, help="Stream what it prints; leave with its own exit code. A gang: as it is.")
@click.option("--detach", is_flag=True, help="With --gang: only submit it, do not watch it.")
@click.option(
    "--wait-at-most", "wait_s", type=DURATION, metavar="TIME", help="With --wait: leave it after so long, 124."
)
@click.option("--local", is_flag=True, help="Run it on this machine, in the same way, without a hub.")
@click.option("--to", type=click.Path(file_okay=False), metavar="DIR", help="With --local: results; else outputs.")
@click.option("--dry-run", is_flag=True, help="Only say where it would run (exit code 0) or why not (75).")
@json_option
@hub_options
def run_command(connect: Connect, command: tuple[str, ...], as_json: bool, **given: Any) -> int:
    """Run a command with this folder's files on a machine where it fits."""
    _refuse_nonsense(given, command)
    spec, folder = read_wish(command, given)
    if spec.gang is None and given["detach"]:
        raise BadInput("--detach is for a gang, which is watched otherwise: a job is only watched with --wait")
    if spec.gang is None and given["wait_s"] is not None and not given["wait"]:
        raise BadInput("--wait-at-most is for --wait, or for a gang, which is watched anyway")
    if given["local"]:
        return run_here(spec, folder, Path(given["to"] or folder / "outputs"), as_json=as_json)
    say = _nothing if as_json else output.note
    with connect() as hub:
        hub.info()  # before anything is packed: is it there, and does it know us?
        if given["dry_run"]:
            return look_out(hub, spec, folder, as_json=as_json)
        if spec.gang is not None:
            from potluck.cli.gangrun import submit_gang

            project, _ = send_project(hub, spec, folder, say)
            follows = not given["detach"]
            return submit_gang(hub, spec, project, follows=follows, timeout_s=given["wait_s"], as_json=as_json)
        job = submit(hub, spec, folder, say)
        if given["wait"]:
            return wait_for(hub, job, timeout_s=given["wait_s"], as_json=as_json)
        if job.state == "queued":
            job = hub.wait_job(job.id, "queued", PLACED_WITHIN_S)
        standing = waiting_sentence(hub, job) if job.state == "queued" else progress_sentence(job)
    if as_json:
        output.print_json(job_json(job))
    else:
        output.say(standing)
        output.note(come_back(job))
    return 0


def _refuse_nonsense(given: Mapping[str, Any], command: tuple[str, ...]) -> None:
    if given["local"] and (given["dry_run"] or given["wait"]):
        other = "--dry-run" if given["dry_run"] else "--wait"
        raise BadInput(f"{other} is about a hub's machines, and --local runs here: take one of them")
    if given["to"] and not given["local"]:
        raise BadInput("--to is for --local: `potluck pull JOB --to DIR` brings a job's results here")
    if given["dry_run"] and given["wait"]:
        raise BadInput("--dry-run starts nothing that --wait could wait for: take one of them")
    if given["detach"] and (given["wait"] or given["dry_run"] or given["local"]):
        raise BadInput("--detach only submits: it does not go together with --wait, --dry-run or --local")
    if given["detach"] and given["wait_s"] is not None:
        raise BadInput("--wait-at-most is for watching, and --detach does not watch: take one of them")
    if len(command) == 1 and any(c.isspace() for c in command[0]):
        raise BadInput(
            f"there is no program `{clean(command[0])}`: write the command without quotes, `-- {clean(command[0])}`, "
            f"or give the line to a shell, `-- sh -c '…'`"
        )


def read_wish(command: tuple[str, ...], given: Mapping[str, Any]) -> tuple[JobSpec, Path]:
    """What shall run, from potluck.yaml and the flags, and the folder that it needs."""
    path, folder = find_file(given["file"], given["folder"])
    written = read_job_file(path) if path else JobFile(None, {}, {})
    asked = written.with_flags(read_flags(given, command))
    if "command" not in asked.values:
        raise BadInput(
            "which command? `potluck run -- python train.py`, or `command:` in potluck.yaml, which `potluck init` writes"
        )
    if asked.values.get("gang") and "members" not in asked.values["gang"]:
        alone = next((origin for where, origin in asked.origins.items() if where[0] == "gang"), "this")
        raise BadInput(f"{alone} is for a gang: say how many machines, --gang 2..8")
    spec = asked.spec()
    refuse_home(folder)
    return replace(spec, name=spec.name or name_of(folder)), folder


def find_file(file: str | None, folder: str | None) -> tuple[Path | None, Path]:
    """The job file, if there is one, and the project.

    That is --folder; else the folder that we are in, unless the file lies elsewhere: then the file's folder.
    """
    base = Path(folder) if folder else Path()
    if not base.is_dir():
        raise BadInput(f"--folder {folder}: there is no such folder")
    if file is None:
        found = base / FILE
        return (found if found.is_file() else None), base
    path = Path(file)
    if not path.is_file():
        raise BadInput(f"-f {file}: there is no such file")
    inside = path.resolve().is_relative_to(base.resolve())
    return path, base if folder or inside else path.parent


def refuse_home(folder: Path) -> None:
    """Sending a whole home would be slow at best, and its keys and passwords at worst."""
    real = folder.resolve()
    if real in (Path.home().resolve(), Path(real.anchor)):
        raise BadInput(f"the project would be all of {real}: go into the project's folder, or name it with --folder")


# --- to a hub -------------------------------------------------------------------------------------------------------


def submit(hub: Hub, spec: JobSpec, folder: Path, say: Any) -> JobView:
    """Send what the hub does not have yet, and queue the job."""
    project, state = send_project(hub, spec, folder, say)
    return hub.submit(_request(spec, project, state), random.token_hex(16))


def send_project(hub: Hub, spec: JobSpec, folder: Path, say: Any) -> tuple[Blob, GitState | None]:
    """Send what the hub does not have yet of the folder, and say what that was."""
    from potluck.client.project import git_state, pack

    tree = pack(folder)
    _check_files(spec, tree, folder)
    state, diff = git_state(folder)
    blobs = {file.blob.hash: file.blob for file in tree.files}
    new = [blobs[hash_] for hash_ in hub.missing(list(blobs.values()))]
    project = hub.upload_tree(
        folder, tree, progress=_progress if say is output.note and sys.stderr.isatty() else _silent
    )
    if state is not None and state.diff is not None:
        hub.upload(diff)
    say(project_sentence(tree, new, state))
    for skipped in tree.skipped:
        say(f"left out: {clean(skipped)}")
    return project, state


def _request(spec: JobSpec, project: Blob, state: GitState | None) -> JobRequest:
    from potluck.protocol import JobRequest

    return JobRequest(spec, project, state)


def project_sentence(tree: Tree, new: list[Blob], state: GitState | None) -> str:
    """`project: 14 files, 120 kB; 2 new, 3.1 kB; git main 1a2b3c4d with changes`."""
    files = f"{len(tree.files):,} file" + ("" if len(tree.files) == 1 else "s")
    sent = f"{len(new):,} new, {output.size(sum(blob.size_bytes for blob in new))}" if new else "nothing new to send"
    where = ""
    if state is not None:
        changed = " with changes" if state.dirty else ""
        where = f"; git {clean(state.branch)} {state.commit[:8]}{changed}".replace("  ", " ")
    return f"project: {files}, {output.size(tree.size_bytes)}; {sent}{where}"


def _check_files(spec: JobSpec, tree: Tree, folder: Path) -> None:
    """A slip that would otherwise show on the machine only, after the wait for it."""
    import difflib

    paths = {file.path for file in tree.files}
    for what, name in (("requirements", spec.requirements), ("command", script_of(spec.command))):
        if not name or name.startswith(("/", "..")) or (name := name.removeprefix("./")) in paths:
            continue
        if (folder / name).exists():
            raise BadInput(f"{what}: {name} is here, but .gitignore or .potluckignore keeps it from the job")
        near = difflib.get_close_matches(name, sorted(paths), n=1, cutoff=0.6)
        hint = f"did you mean `{near[0]}`?" if near else f"the project is {folder.resolve()}"
        raise BadInput(f"{what}: there is no file {clean(name)} in the project: {hint}")


def script_of(command: list[str]) -> str:
    """`train.py` in `python train.py --epochs 3`; nothing where it is not that plain."""
    words = command[2].split() if command[:2] == ["/bin/sh", "-c"] and len(command) == 3 else command
    plain = len(words) >= 2 and Path(words[0]).name.startswith("python") and words[1].endswith(".py")
    return words[1] if plain and not set(words[1]) & set("$`'\"*;&|") else ""


def look_out(hub: Hub, spec: JobSpec, folder: Path, *, as_json: bool) -> int:
    """--dry-run: what the placement would say. Nothing is sent but the question."""
    import msgspec

    from potluck.blobs import hash_bytes
    from potluck.client.project import git_state, pack

    tree = pack(folder)
    _check_files(spec, tree, folder)
    request = _request(spec, hash_bytes(msgspec.json.encode(tree)), git_state(folder)[0])
    if spec.gang is not None:
        from potluck.cli.gangrun import dry_run

        return dry_run(hub, request, as_json=as_json)
    outlook = hub.outlook(request)
    if as_json:
        output.print_json(outlook)
    else:
        output.note(f"project: {len(tree.files):,} files, {output.size(tree.size_bytes)}; nothing was sent")
        for line in outlook_lines(outlook):
            output.say(clean(line))
    return 0 if outlook.would_run_on else WOULD_WAIT


def outlook_lines(outlook: Outlook) -> Iterator[str]:
    if outlook.would_run_on:
        yield f"would run now on {outlook.would_run_on}" + (f": {outlook.reason}" if outlook.reason else "")
        return
    yield f"would wait: {outlook.reason}"
    for near in outlook.near:
        yield f"  {near.worker} {near.lacks}"
    if outlook.advice:
        yield outlook.advice


def wait_for(hub: Hub, job: JobView, *, timeout_s: float | None, as_json: bool) -> int:
    """--wait: its output on stdout, what becomes of it on stderr, its own exit code."""
    if as_json:
        watch = Watch(hub, job, show=None, say=_nothing, timeout_s=timeout_s)
        output.print_json(job_json(job := watch.until_the_end()))
        return exit_code(job)
    printer = Printer()
    watch = Watch(hub, job, show=printer.output, say=printer.note, timeout_s=timeout_s)
    try:
        job = watch.until_the_end()
    except KeyboardInterrupt:
        if sentence := left(watch.job):
            printer.note(f"\n{sentence}")
        raise
    finally:
        printer.output("", last=True)
        printer.end_line()
    if any(attempt.outputs for attempt in job.attempts):
        output.note(f"Its artefacts: potluck pull {clean(job.id)}")
    return exit_code(job)


# --- here -----------------------------------------------------------------------------------------------------------


def run_here(spec: JobSpec, folder: Path, out: Path, *, as_json: bool) -> int:
    """--local: the same executor and the same variables as on a worker, and no hub."""
    from potluck.worker.jobs.local import run_local

    values = local_secrets(spec)
    if spec.gang is not None:
        from potluck.cli.gangrun import free_port, gang_of_one

        spec = gang_of_one(spec, free_port)
    printer = Printer()
    decoder = _Decoder(printer)
    output.note(f"{clean(spec.name)}: {clean(shell_line(spec.command))}")
    with _ctrl_c() as stop:
        report = run_local(
            spec,
            folder,
            out,
            secrets=values,
            say=printer.note,
            on_output=_drop if as_json else decoder.feed,
            stop=stop,
        )
    decoder.end()
    if as_json:
        output.print_json(report)
    else:
        ended = report.reason or (f"exit code {report.exit_code}" if report.exit_code is not None else report.outcome)
        output.note(f"{clean(spec.name)}: {clean(ended)}. Its results are in {out}")
    if stop.is_set():
        return 130
    if report.outcome == "exited" and report.exit_code == 0:
        return 0
    number = signal_named(report.signal)
    return 128 + number if number else report.exit_code or 1


def local_secrets(spec: JobSpec) -> dict[str, str]:
    """The hub never shows a secret, so here they come from the environment."""
    import os

    absent = [name for name in spec.secrets if name not in os.environ]
    if absent:
        raise BadInput(
            f"the secret {clean(absent[0])} is not in the environment: with --local it comes from there "
            f"(read -rs {clean(absent[0])}; export {clean(absent[0])})"
        )
    return {name: os.environ[name] for name in spec.secrets}


class _Decoder:
    """Bytes to text across the borders of pieces."""

    def __init__(self, printer: Printer) -> None:
        import codecs

        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._printer = printer
        self._lock = threading.Lock()  # output may come from a thread of the executor's

    def feed(self, piece: bytes) -> None:
        with self._lock:
            self._printer.output(self._decoder.decode(piece))

    def end(self) -> None:
        with self._lock:
            self._printer.output(self._decoder.decode(b"", True), last=True)
            self._printer.end_line()


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the job gets its SIGTERM; the second one interrupts us."""
    stop = threading.Event()

    def interrupted(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        output.note("\nEnding it; once more ends it at once.")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    click.echo(f"\rSending: {output.size(done)} of {output.size(total)}\x1b[K{end}", nl=False, err=True)


def _silent(done: int, total: int) -> None:
    """For pipes and programs."""


def _nothing(text: str) -> None:
    """With --json nothing is told on the way."""


def _drop(piece: bytes) -> None:
    """With --json the output is not shown."""
