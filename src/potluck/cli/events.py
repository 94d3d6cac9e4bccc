"""What happened?"""

from __future__ import annotations

import click

from potluck.cli import output
from potluck.cli.follow import Connect
from potluck.cli.options import hub_options, json_option


@click.command("events")
@click.option("--after", type=int, default=0, metavar="ID", help="Only events newer than this one.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@json_option
@hub_options
def events_command(connect: Connect, after: int, last: int | None, as_json: bool) -> None:
    """List what happened, newest last."""
    with connect() as hub:
        events = sorted(hub.events(after), key=lambda event: event.id)
    events = events[-last:] if last else events
    if as_json:
        output.print_json(events)
        return
    if not events:
        output.say("Nothing has happened yet." if not after else "Nothing new.")
        return
    rows = [(e.id, output.when(e.at).astimezone().strftime("%H:%M:%S"), e.kind, e.actor, e.text) for e in events]
    output.print_table(("ID", "AT", "KIND", "BY", "WHAT"), rows, right=("ID",))
