"""What can be typed after `potluck`, and what becomes of an error?

Each command is a module beside this one, imported only when it is called: `potluck --help` imports click and
nothing else. Every error of ours is caught here, once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

import click

from potluck import __version__
from potluck.errors import PotluckError

# command: (module, what `potluck --help` says; a test keeps it equal to the command's own help)
COMMANDS: dict[str, tuple[str, str]] = {
    "host": ("host", "Start a hub on this machine."),
    "invite": ("invite", "Print one line that lets machines or people join."),
    "invites": ("invite", "List the invitations that are open, or revoke one."),
    "join": ("join", "Join a hub with the link from `potluck invite`."),
    "train": ("train", "Train a recipe on data, with every machine that joined."),
    "init": ("init", "Begin a job: write potluck.yaml and a train.py that trains something real."),
    "run": ("submit", "Run a command with this folder's files on a machine where it fits."),
    "gang": ("gang", "Train one model on several machines at once: list, watch, stop and profile gangs."),
    "ps": ("runs", "List the runs of the pool, the jobs and the gangs."),
    "show": ("runs", "Show one run, job or gang: how far it is, where, and what came of it."),
    "why": ("runs", "Explain why a run, job, gang, task or worker is in the state it is in."),
    "logs": ("logs", "Print what a job printed; with -f as it happens."),
    "top": ("top", "Watch the machines: what they have, what is free, which jobs run there."),
    "set": ("runs", "Change settings of a run while it trains."),
    "pause": ("runs", "Pause a run: no new units, nothing is lost."),
    "resume": ("runs", "Go on with a paused run."),
    "stop": ("runs", "End a run, a job or a gang: what was handed in is merged, a job gets time for a checkpoint."),
    "retry": ("jobs", "Queue a job again that has ended; it goes on from its newest checkpoint."),
    "pull": ("pull", "Bring a job's artefacts here."),
    "queue": ("jobs", "List the jobs that wait and why, or move one."),
    "secret": ("secret", "Keep passwords and tokens for jobs: set, list, rm."),
    "events": ("events", "List what happened, newest last."),
    "workers": ("workers", "List the workers; drain, label or revoke one."),
    "export": ("export", "Write a run's weights, samples and contributions into a folder."),
    "generate": ("generate", "Draw a grid of samples with a run's or an exported model."),
    "doctor": ("doctor", "Check this machine and its way to the hub."),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module = import_module(f"potluck.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            if args[0].startswith("-") or args[0] in COMMANDS:
                raise
            near = _nearest(args[0], COMMANDS)
            raise click.UsageError(f"no command `{args[0]}`{near}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, sentence) for name, (_, sentence) in COMMANDS.items()])


def _nearest(word: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else ": `potluck --help` lists them"


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="First steps: `potluck host`, then `potluck invite`, and on each machine the line that it prints.",
)
@click.version_option(__version__, prog_name="potluck", message="%(prog)s %(version)s")
def app() -> None:
    """Train models on the machines people bring."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """The exit code of one command. Prints every error to stderr, as `code: message`."""
    try:
        words = None if args is None else list(args)
        result = app.main(args=words, prog_name="potluck", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except PotluckError as error:
        _complain(error.code, str(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:  # `potluck ps | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a bug of ours: the user gets one line, we get the whole story
        if os.environ.get("POTLUCK_DEBUG") == "1":
            raise
        _complain(PotluckError.code, f"Potluck broke: {type(error).__name__}: {error}. {_keep_story(error)}")
        return PotluckError.exit_code


def _complain(code: str, message: str) -> None:
    from potluck.telemetry import clean

    click.echo(f"{click.style(f'{code}:', fg='red')} {clean(message, keep=chr(10))}", err=True)


def _keep_story(error: Exception) -> str:
    """Write the traceback to the log; say where, and what to do."""
    import traceback
    from datetime import UTC, datetime

    from potluck.settings import log_dir

    story = "".join(traceback.format_exception(error))
    try:
        log_dir().mkdir(parents=True, exist_ok=True)
        path = log_dir() / "bugs.log"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"--- {datetime.now(UTC).isoformat()} potluck {__version__}\n{story}\n")
    except OSError:
        return "Try again with POTLUCK_DEBUG=1 to see where."
    return f"The traceback is in {path}: please report it."
