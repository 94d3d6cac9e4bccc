"""How does what a job left behind come here?"""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from potluck.blobs import hash_file
from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import find_work, hub_options, json_option
from potluck.errors import BadInput, Conflict, NotFound
from potluck.telemetry import clean

if TYPE_CHECKING:
    from potluck.client import Hub
    from potluck.protocol import GangView, Tree

MOST_NAMES = 5


@click.command(
    "pull",
    epilog="JOB is a job or a gang: an id or its beginning, a name, or `last`. PATH is a file, a folder or like '*.pt'.",
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
@click.option("--member", type=click.IntRange(min=1), metavar="K", help="Of a gang only the Kth member.")
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
    member: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Bring a job's artefacts here. Called again, it goes on where it stopped."""
    from potluck.protocol import GangView

    with connect() as hub:
        work = find_work(hub, ref)
        target = Path(folder) if folder else Path("outputs") / safe_name(work.id)
        if isinstance(work, GangView):
            if attempt is not None and member is None:
                raise BadInput(f"{work.id} is a gang: whose attempt {attempt}? Say --member 1")
            parts = of_members(hub, work, path, target, what=what, attempt=attempt or 0, member=member)
        elif member is not None:
            raise BadInput(f"--member is for gangs, and {work.id} is a job")
        else:
            parts = [Part(work.id, chosen(hub.tree(work.id, what, attempt or 0), path, work.id), target)]
        for part in parts if not force else ():
            refuse_changed(part.tree, part.folder)
        for part in parts:
            shown = _progress if sys.stderr.isatty() and not as_json else _silent
            hub.fetch_tree(part.tree, part.folder, progress=shown)
    if as_json:
        told = [part_json(part) for part in parts]
        output.print_json({"gang": work.id, "members": told} if isinstance(work, GangView) else told[0])
        return
    for part in parts:
        files = f"{len(part.tree.files)} file(s), {output.size(part.tree.size_bytes)}"
        output.say(f"{clean(part.job)}: {files}, in {part.folder}")
        for skipped in part.tree.skipped:
            output.note(f"left out: {clean(skipped)}")


@dataclass(frozen=True)
class Part:
    """What one job left, and where it goes."""

    job: str
    tree: Tree
    folder: Path


def part_json(part: Part) -> dict[str, Any]:
    files = [{"path": f.path, "size_bytes": f.blob.size_bytes, "hash": f.blob.hash} for f in part.tree.files]
    return {"job": part.job, "folder": str(part.folder), "files": files, "skipped": part.tree.skipped}


def of_members(
    hub: Hub, gang: GangView, path: str, target: Path, *, what: str, attempt: int, member: int | None
) -> list[Part]:
    """What the members left, each in a folder of its own; of one member, or the project that all have, without it."""
    one = 1 if what == "project" else member
    parts, none = [], ""
    for view in gang.members:
        if one is not None and view.member != one:
            continue
        try:
            tree = chosen(hub.tree(view.job, what, attempt), path, view.job)
        except NotFound as error:  # this one left nothing, or nothing of that name
            none = none or str(error)
            continue
        name = safe_name(f"{view.member}-{view.worker}" if view.worker else str(view.member))
        parts.append(Part(view.job, tree, target if one is not None else target / name))
    if not parts:
        raise NotFound(none or f"{gang.id} has the members 1 to {len(gang.members)}, and no member {member}")
    return parts


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
