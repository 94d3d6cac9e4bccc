"""How is a hub started?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from potluck.cli.options import Value
from potluck.errors import PotluckError


@click.command("host")
@click.option(
    "--database",
    "database_url",
    metavar="URL",
    help="A PostgreSQL (15 or newer) in place of the embedded one.",
)
@click.option(
    "--data-dir",
    type=Value("folder", lambda text: Path(text).expanduser()),
    metavar="DIR",
    help="Where the hub keeps everything.",
)
@click.option("--bind", metavar="ADDR", help="The address to listen on; 127.0.0.1 for this machine only.")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="The port to listen on; 0 for any free one.")
@click.option(
    "--house-worker/--no-house-worker",
    default=None,
    help="Start a trusted worker here (it merges). Default: yes.",
)
@click.option("--name", metavar="NAME", help="What people see. Default: this machine's name.")
@click.option("--tls/--no-tls", default=None, help="Encrypt. Default: yes, unless --bind is this machine only.")
def host_command(**flags: Any) -> int:
    """Start a hub on this machine."""
    from potluck import settings, telemetry

    chosen = settings.load(settings.HubSettings, flags)
    telemetry.setup(chosen.log)
    try:
        from potluck.hub.app import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("potluck"):
            raise
        raise PotluckError(f"a hub needs the package {error.name}, which is not here: pip install '.[hub]'") from error
    settings.remember_hub_dir(chosen.data_dir)
    code = serve(chosen)
    return code if isinstance(code, int) else 0
