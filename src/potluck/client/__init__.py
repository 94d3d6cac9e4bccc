"""How does Python talk to a hub? Every route as one typed function; every failure as one of our errors.

    with Hub("https://hub.example:8470", token) as hub:
        for run in hub.runs():
            print(run.name, run.version)

Calls are made once: whoever calls knows whether to try again. Only those that can resume where they stopped keep trying
while there is progress: `upload`, `download`, `fetch`, and their kin for whole folders. A `Hub` may be shared between
threads.
"""

from potluck.client.hub import Hub
from potluck.client.reach import Link, check_address, parse_link

__all__ = ["Hub", "Link", "check_address", "parse_link"]
