"""`python -m potluck.train.gang`: the place where a gang's members meet, started by an agent; or a measurement.

    python -m potluck.train.gang plain --host 192.168.1.7 --least 2
    python -m potluck.train.gang torchft --host 192.168.1.7 --least 2 --port 29510
    python -m potluck.train.gang solo --seconds 8

The first two print the address for POTLUCK_GANG's `store` or `lighthouse`, and serve until they are ended. They keep
nothing: when their machine dies, start another one, and write its address into the members' file `where`. The third one
measures how fast this machine is alone (trial.py), and ends.
"""

from __future__ import annotations

import argparse
import threading


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m potluck.train.gang", description="Where a gang's members meet.")
    parser.add_argument("engine", choices=("plain", "torchft", "solo"), metavar="plain|torchft|solo")
    parser.add_argument("--host", help="the address at which the members reach this machine")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--least", type=int, default=1, help="members without whom no step is taken")
    parser.add_argument("--seconds", type=float, default=8.0, help="of solo: for how long to measure")
    given = parser.parse_args()
    if given.engine == "solo":
        from potluck.train.gang import trial

        trial.standard(given.seconds)
    if not given.host:
        parser.error("--host is needed: the address at which the members reach this machine")
    if given.engine == "plain":
        from potluck.train.gang import meeting

        meeting.serve(given.host, given.port, least=given.least, say=lambda address: print(address, flush=True))
        return
    from potluck.train.gang import lighthouse

    server = lighthouse.lighthouse(given.host, given.port, least=given.least)
    print(lighthouse.reachable(server.address(), given.host), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
