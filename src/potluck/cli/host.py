"""How is a hub started?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from potluck.cli.options import Value
from potluck.errors import BadInput, PotluckError


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
@click.option(
    "--tunnel",
    is_flag=False,
    flag_value="cloudflared",
    type=click.Choice(["cloudflared", "ngrok"]),
    metavar="[cloudflared|ngrok]",
    help="Be reachable from everywhere through this program, if it is installed. Without a name: cloudflared.",
)
def host_command(**flags: Any) -> int:
    """Start a hub on this machine."""
    from potluck import settings, telemetry

    chosen = settings.load(settings.HubSettings, flags)
    if chosen.tunnel:
        _check_tunnel(chosen.tunnel, flags)
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


def _check_tunnel(program: str, flags: dict[str, Any]) -> None:
    """Refuse what was typed and cannot be had together."""
    from potluck import settings

    if flags["bind"] is not None and not settings.is_loopback(flags["bind"]):
        raise BadInput(
            f"behind a tunnel the hub listens on this machine only, so that {program} is the one way in: "
            f"leave --bind {flags['bind']} away, or --tunnel"
        )
    if flags["tls"]:
        raise BadInput(
            f"behind a tunnel the hub speaks plain http with {program}, on this machine; "
            "from there on everything is https anyway: leave --tls away"
        )
