"""How does a hub come by its PostgreSQL?

    life.py       EmbeddedPostgres(data_dir).start() → conninfo     our own server, made on first use
    address.py    check_server(address) → Server, or LedgerError    somebody else's (`--database`)

Below them: place.py (in which folder), machine.py (with which programs, as which user).
"""

from potluck.hub.postgres.address import Server, check_server, redact
from potluck.hub.postgres.life import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "Server", "check_server", "redact"]
