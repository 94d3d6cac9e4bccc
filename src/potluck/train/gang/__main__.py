"""`python -m potluck.train.gang`: the place where a gang's members meet, started by an agent.

    python -m potluck.train.gang plain --host 192.168.1.7 --least 2
    python -m potluck.train.gang torchft --host 192.168.1.7 --least 2 --port 29510

It prints the address for POTLUCK_GANG's `store` or `lighthouse`, and serves until it is ended. It keeps nothing: when its
machine dies, start another one, and write its address into the members' file `where`.
"""

from __future__ import annotations

import argparse
import threading


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m potluck.train.gang", description="Where a gang's members meet.")
    parser.add_argument("engine", choices=("plain", "torchft"))
    parser.add_argument("--host", required=True, help="the address at which the members reach this machine")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--least", type=int, default=1, help="members without whom no step is taken")
    given = parser.parse_args()
    if given.engine == "plain":
        from potluck.train.gang import meeting

        meeting.serve(given.host, given.port, least=given.least, say=lambda address: print(address, flush=True))
        return
    from potluck.train.gang import torchft_engine

    server = torchft_engine.lighthouse(given.host, given.port, least=given.least)
    print(torchft_engine.reachable(server.address(), given.host), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
