"""How do members that have agreed to take part connect, and introduce themselves?"""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, ReduceOp, Store, TCPStore

from potluck.train.gang.engine import CONNECT_S, Card

Group = Any  # a ProcessGroupGloo
_Gloo: Any = ProcessGroupGloo  # torch's types do not know its options


def own_store(address: str) -> TCPStore:
    """A store in this process, where the others find what they need to connect. Any port that is free."""
    return TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))


def knock(host: str, port: int) -> None:
    """OSError at once, if nobody is there any more: a TCPStore would try again for three times its timeout."""
    socket.create_connection((host, port), timeout=CONNECT_S).close()


def client_store(host: str, port: int) -> TCPStore:
    """Another member's."""
    knock(host, port)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))


def introduce(store: Store, rank: int, size: int, card: Card) -> tuple[Card, ...]:
    """Everybody's card, in the order of their ranks."""
    store.set(f"card/{rank}", json.dumps([card.name, card.step, card.papers]))
    return tuple(Card(*json.loads(store.get(f"card/{other}"))) for other in range(size))


def connect(store: Store, rank: int, size: int, address: str) -> Group:
    """A Gloo group over this address.

    Not over what the machine's own name resolves to, which on Debian is 127.0.1.1.
    """
    options = _Gloo._Options()
    options._devices = [_Gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=CONNECT_S)
    return _Gloo(store, rank, size, options)


def summing(patience_s: float) -> AllreduceOptions:
    options = AllreduceOptions()
    options.reduceOp = ReduceOp(ReduceOp.SUM)
    options.timeout = timedelta(seconds=patience_s)
    return options
