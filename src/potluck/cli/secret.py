"""How does a password get to a job, without ever standing on a command line or coming back?"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import hub_options, json_option
from potluck.errors import BadInput
from potluck.telemetry import clean


@click.group("secret")
def secret_command() -> None:
    """Keep passwords and tokens for jobs: set, list, rm. Nothing shows them again."""


@secret_command.command("set")
@click.argument("name", metavar="NAME")
@click.option("--file", "path", type=click.Path(dir_okay=False), metavar="FILE", help="Take the value from a file.")
@hub_options
def set_secret(connect: Connect, name: str, path: str | None) -> None:
    """Keep a secret: asked for without echo, or read from standard input or --file."""
    value = read_value(name, path)
    with connect() as hub:
        kept = hub.set_secret(name, value)
    output.say(f"{clean(kept.name)} is kept, encrypted. Give it to a job with `--secret {clean(kept.name)}`.")


def read_value(name: str, path: str | None) -> str:
    """The secret, without the line break that an editor or `echo` put behind it."""
    where = f"--file {path}" if path else "standard input"
    try:
        if path:
            value = Path(path).read_bytes().decode("utf-8")
        elif sys.stdin.isatty():
            return str(click.prompt(f"Value of {name} (it is not shown)", hide_input=True, err=True))
        else:
            value = sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise BadInput(f"{where} cannot be read: {error}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{where} is not text in UTF-8: encode it first, for example with base64") from None
    value = value.removesuffix("\n").removesuffix("\r")
    if not value:
        raise BadInput(f"{where} is empty, so there is no secret to keep: `echo -n … | potluck secret set {name}`")
    return value


@secret_command.command("list")
@json_option
@hub_options
def list_secrets(connect: Connect, as_json: bool) -> None:
    """List your secrets by name."""
    with connect() as hub:
        kept = hub.secrets()
    if as_json:
        output.print_json(kept)
    elif not kept:
        output.say("No secrets yet. Keep one: potluck secret set NAME")
    else:
        now = output.utc_now()
        output.print_table(("NAME", "CHANGED"), [(secret.name, output.ago(secret.changed_at, now)) for secret in kept])


@secret_command.command("rm")
@click.argument("name", metavar="NAME")
@hub_options
def remove(connect: Connect, name: str) -> None:
    """Forget a secret. Jobs that run have it still."""
    with connect() as hub:
        hub.remove_secret(name)
    output.say(f"{clean(name)} is forgotten.")
