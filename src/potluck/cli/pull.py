"""How does what a job left behind come here?"""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from potluck.blobs import hash_file
from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import find_job, hub_options, json_option
from potluck.errors import BadInput, Conflict, NotFound
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.protocol import Tree

MOST_NAMES = 5


@click.command(
    "pull", epilog="JOB is an id or its beginning, a name, or `last`. PATH is a file, a folder or like '*.pt'."
)
@click.argument("ref", metavar="JOB")
@click.argument("path", metavar="[PATH]", required=False, default="")
@click.option("--to", "folder", type=click.Path(file_okay=False), metavar="DIR", help="Else: outputs/JOB.")
@click.option(
    "--what",
    type=click.Choice(["outputs", "project", "checkpoint"]),
    default="outputs",
    show_default=True,
    help="The artefacts, the code as it was sent, or the newest checkpoint.",
)
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Of the Nth attempt, not of the newest.")
@click.option("--force", is_flag=True, help="Overwrite files that are different here.")
@json_option
@hub_options
def pull_command(
    connect: Connect,
    ref: str,
    path: str,
    folder: str | None,
    what: str,
    attempt: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Bring a job's artefacts here. Called again, it goes on where it stopped."""
    with connect() as hub:
        job = find_job(hub, ref)
        tree = chosen(hub.tree(job.id, what, attempt or 0), path, job.id)
        target = Path(folder) if folder else Path("outputs") / safe_name(job.id)
        if not force:
            refuse_changed(tree, target)
        hub.fetch_tree(tree, target, progress=_progress if sys.stderr.isatty() and not as_json else _silent)
    if as_json:
        files = [{"path": f.path, "size_bytes": f.blob.size_bytes, "hash": f.blob.hash} for f in tree.files]
        output.print_json({"job": job.id, "folder": str(target), "files": files, "skipped": tree.skipped})
        return
    output.say(f"{clean(job.id)}: {len(tree.files)} file(s), {output.size(tree.size_bytes)}, in {target}")
    for skipped in tree.skipped:
        output.note(f"left out: {clean(skipped)}")


def chosen(tree: Tree, path: str, job: str) -> Tree:
    """The part of the tree that `path` names: a file, a folder, or a pattern."""
    import difflib

    wanted = path.strip("/")
    if not wanted:
        return tree
    found = [
        file
        for file in tree.files
        if file.path == wanted or file.path.startswith(f"{wanted}/") or fnmatch.fnmatchcase(file.path, wanted)
    ]
    if not found:
        names = [file.path for file in tree.files]
        near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
        listed = ", ".join(names[:MOST_NAMES]) + (" …" if len(names) > MOST_NAMES else "")
        hint = f"did you mean `{near[0]}`?" if near else f"it left {listed or 'nothing'}"
        raise NotFound(f"{job} left no `{path}`: {hint}")
    return replace(tree, files=found, skipped=[])


def safe_name(name: str) -> str:
    """A job's name as one part of a path."""
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")
    if not kept:
        raise BadInput(f"no folder can be called `{clean(name)}`: say where with --to DIR")
    return kept


def refuse_changed(tree: Tree, folder: Path) -> None:
    """Nothing that differs here is overwritten unasked."""
    from potluck.domain.tree import check_tree

    if why := check_tree(file.path for file in tree.files):  # a hub is not believed: nothing outside is looked at
        raise BadInput(f"what the hub sends is no folder: {why}")
    changed = []
    for file in tree.files:
        here = folder / file.path
        if here.is_file() and (here.stat().st_size != file.blob.size_bytes or hash_file(here).hash != file.blob.hash):
            changed.append(file.path)
    if changed:
        names = ", ".join(changed[:MOST_NAMES]) + (" …" if len(changed) > MOST_NAMES else "")
        raise Conflict(
            f"{len(changed)} file(s) in {folder} are different from the job's: {names}. "
            "Overwrite them with --force, or go elsewhere with --to DIR"
        )


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    click.echo(f"\rFetching: {output.size(done)} of {output.size(total)}\x1b[K{end}", nl=False, err=True)


def _silent(done: int, total: int) -> None:
    """For pipes and programs."""
