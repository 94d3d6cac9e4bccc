"""What does somebody start from who has an empty folder?"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from potluck.cli import output
from potluck.errors import BadInput, Conflict, PotluckError

# What is written: where it lies in the package. Not as .py there: it is the user's code, not ours.
FILES = {"potluck.yaml": "potluck.yaml", "train.py": "train.py.txt", ".potluckignore": "potluckignore"}


@click.command("init")
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path())
def init_command(folder: str) -> None:
    """Begin a job: write potluck.yaml and a train.py that trains something real."""
    target = Path(folder)
    written = write_templates(target)
    for name in written:
        output.say(f"wrote {target / name}")
    go = "" if target == Path() else f"cd {target} && "
    output.say(f"Next: {go}potluck run --wait (on a machine of the hub), or {go}potluck run --local (on this one).")


def write_templates(target: Path) -> list[str]:
    """Write the files into `target`, all or none: nothing that is there is overwritten."""
    if target.exists() and not target.is_dir():
        raise BadInput(f"{target} is a file: name a folder")
    there = [name for name in FILES if (target / name).exists() or (target / name).is_symlink()]
    if there:
        raise Conflict(
            f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} already in {target.resolve()}: nothing was "
            "written. Take another folder, potluck init DIR, or move them away"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, source in FILES.items():
            with (target / name).open("x", encoding="utf-8", newline="\n") as file:
                file.write(text_of(source).replace(SCHEMA_LINE, schema_line()))
    except OSError as error:
        raise PotluckError(f"{target} cannot be written: {error}") from None
    return list(FILES)


def text_of(name: str) -> str:
    return (files("potluck") / "templates" / name).read_text(encoding="utf-8")


SCHEMA_LINE = "# (schema)\n"


def schema_line() -> str:
    """What tells an editor which keys there are, if a hub is known that serves the schema."""
    from potluck import settings

    try:
        address = settings.find_hub().address
    except PotluckError:
        return ""
    return f"# yaml-language-server: $schema={address}/api/v1/schemas/potluck.yaml.json\n"
