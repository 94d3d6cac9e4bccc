"""How do members that have agreed to take part connect, and introduce themselves?

Over Gloo; where every member trains on a GPU of its own, gradients go over NCCL. That part has never run: there was no GPU
where it was written, and only who chooses it, and when, is tested.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllreduceOptions, ProcessGroupGloo, ReduceOp, Store, TCPStore
from torch.distributed.distributed_c10d import PrefixStore

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


def backend(cards: Sequence[Card], *, has_nccl: bool) -> str:
    """ "nccl" if all members train on a CUDA GPU, no two on the same one (NCCL refuses that), else "gloo"."""
    devices = [str(card.papers.get("device", "")) for card in cards]
    all_cuda = has_nccl and all(device.startswith("cuda ") for device in devices)
    return "nccl" if all_cuda and len(set(devices)) == len(devices) > 1 else "gloo"


def connect(store: Store, rank: int, cards: Sequence[Card], address: str) -> Group:
    """A group over this address.

    Not over what the machine's own name resolves to, which on Debian is 127.0.1.1.
    """
    options = _Gloo._Options()
    options._devices = [_Gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=CONNECT_S)
    gloo = _Gloo(store, rank, len(cards), options)
    # whether NCCL is there need not be agreed on: a torch that has CUDA on Linux has it
    if backend(cards, has_nccl=dist.is_nccl_available()) == "nccl":
        return _Both(gloo, PrefixStore("nccl", store), rank, len(cards))
    return gloo


class _Both:
    """Gloo for what is in main memory, NCCL for what is on the GPU. It has never run; see the head of this file.

    A step's figures go over Gloo and are waited for first: when a member dies its kernel tells that one at once, while NCCL
    would wait for as long as a sum may take.
    """

    def __init__(self, gloo: Group, store: Store, rank: int, size: int) -> None:
        from torch._C import _distributed_c10d as c10d

        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that wait() fails, instead of ending the process
        self._gloo = gloo
        made: Any = c10d.ProcessGroupNCCL  # torch's types of it differ from build to build
        options = made.Options()
        options._timeout = timedelta(seconds=CONNECT_S)
        self._nccl = made(store, rank, size, options)

    def allreduce(self, tensors: list[Tensor], options: AllreduceOptions) -> Any:
        if tensors[0].device.type != "cuda":
            return self._gloo.allreduce(tensors, options)
        self._nccl._set_default_timeout(options.timeout)
        return self._nccl.allreduce(tensors, options)

    def abort(self) -> None:
        """At once, whatever is under way."""
        self._nccl.abort()


def abort(group: Group) -> None:
    """End what NCCL waits for. Gloo fails by itself."""
    if isinstance(group, _Both):
        group.abort()


def summing(patience_s: float) -> AllreduceOptions:
    options = AllreduceOptions()
    options.reduceOp = ReduceOp(ReduceOp.SUM)
    options.timeout = timedelta(seconds=patience_s)
    return options
