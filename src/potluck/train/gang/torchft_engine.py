"""How does torchft's Manager serve as a gang's engine?

Its lighthouse says before each step who takes part, and its Manager tells who must heal from whom. We use neither its
DistributedDataParallel (it fails when a peer dies, on Gloo), nor its averaging (by members, not samples), nor its
transport of checkpoints (it unpickles): research/heterogeneous.md 0 has the measurements.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._C._distributed_c10d import ReduceOp, Store, TCPStore

from potluck.errors import PotluckError
from potluck.train.gang import groups, healing
from potluck.train.gang.engine import CONNECT_S, FIRST_PATIENCE_S, Crew, Lonely, Mismatch, Say, Shared, fits, lonely
from potluck.train.gang.lighthouse import lighthouse as lighthouse
from potluck.train.gang.lighthouse import reachable as reachable
from potluck.train.gang.place import Place

os.environ.setdefault("RUST_LOG", "error")  # before the import: its log says every step what we say in a sentence
logging.getLogger("torchft").setLevel(logging.CRITICAL)

from torchft.checkpointing.transport import CheckpointTransport  # noqa: E402
from torchft.manager import Manager  # noqa: E402
from torchft.process_group import ProcessGroupGloo  # noqa: E402

_AGAIN_S = 0.2
_HEARTBEAT_S = 0.1
_NOT_READY = "the others are not ready"
_LOOK_S = 3.0
"""How long one question to the lighthouse may last, before we look whether it is elsewhere by now."""


class TorchftEngine:
    def __init__(self, place: Place, shared: Shared, say: Say) -> None:
        self.patience_s = FIRST_PATIENCE_S
        self._place, self._shared, self._say = place, shared, say
        self._giver = healing.Giver(place.address, shared.save)
        self._group: _Group | None = None
        self._manager: Manager | None = None
        self._works: list[Any] = []
        self._failure = self._lighthouse = ""

    # --- meeting

    def meet(self) -> Crew:
        deadline = time.monotonic() + self._place.wait_s
        while True:
            try:
                crew = self._try(max(deadline - time.monotonic(), 1.0))
            except Mismatch:
                self.leave()
                raise
            except (OSError, RuntimeError, TimeoutError, PotluckError) as error:
                self._dismiss()
                crew, reason = None, str(error)
            else:
                reason = self._failure
            if crew is not None:
                return crew
            if time.monotonic() > deadline:
                raise Lonely(lonely(self._place.wait_s, reason))
            self._say("retry", f"{self._place.member}: {reason.partition(', details')[0]}")
            time.sleep(0 if reason == _NOT_READY else _AGAIN_S)

    def _try(self, wait_s: float) -> Crew | None:
        """One quorum. None: it came to nothing, and another is needed."""
        place = self._place.now()
        if place.lighthouse != self._lighthouse:
            self._dismiss()
        if self._manager is None:
            self._manager, self._group = self._hire(place)
        manager, group = self._manager, self._group
        assert group is not None
        manager.load_state_dict({"step": self._shared.step, "batches_committed": manager.batches_committed()})
        try:
            manager.start_quorum(timeout=timedelta(seconds=min(wait_s, _LOOK_S)))
        except (RuntimeError, TimeoutError) as error:
            if not _is_late(error):
                raise
            manager._quorum_future = None  # or it would raise the same again
            self._failure = _NOT_READY
            return None
        if group.unfit is not None:
            raise group.unfit
        if (failed := manager.errored()) is not None:
            self._failure = str(failed.original_exception)
            group.abort(errored=False)
            manager.should_commit()  # it says no, and asks for another group with the next quorum
            return None
        assert group.crew is not None
        return group.crew

    def _hire(self, place: Place) -> tuple[Manager, _Group]:
        self._lighthouse = place.lighthouse
        store = groups.own_store(place.address)
        group = _Group(self, self._shared, place, self._say, store)
        manager = Manager(
            pg=group,
            load_state_dict=self._take,
            state_dict=lambda: None,  # the transport writes the state by itself
            min_replica_size=place.least,
            use_async_quorum=False,
            timeout=timedelta(seconds=FIRST_PATIENCE_S),
            quorum_timeout=timedelta(seconds=place.wait_s),
            connect_timeout=timedelta(seconds=CONNECT_S),
            rank=0,
            world_size=1,
            store_addr=place.address,
            store_port=store.port,
            lighthouse_addr=place.lighthouse,
            replica_id=place.member,
            hostname=place.address,
            heartbeat_interval=timedelta(seconds=_HEARTBEAT_S),
            checkpoint_transport=_Transport(self._giver),
        )
        manager._client = _Client(manager._client)
        return manager, group

    def _take(self, path: Path) -> None:
        self._shared.load(path)
        path.unlink(missing_ok=True)

    def _dismiss(self) -> None:
        """Without a lighthouse a Manager is of no use any more; a new one asks for the newest address."""
        self._works.clear()
        manager, self._manager, self._group = self._manager, None, None
        if manager is not None:
            manager.shutdown(wait=False)

    # --- summing

    def sum(self, tensor: Tensor) -> None:
        assert self._manager is not None
        self._works.append(self._manager.allreduce(tensor, reduce_op=ReduceOp.SUM))

    def finish(self) -> str:
        assert self._manager is not None and self._group is not None
        while self._works:
            self._works.pop().wait()  # the last first: it is the figures, over Gloo (groups.py); errors go to the manager
            if self._manager.errored() is not None:
                groups.abort(self._group.inner)
        failed = self._manager.errored()
        if failed is None:
            return ""
        reason = str(failed.original_exception)
        failed.original_exception.__traceback__ = None  # its frames hold works, and these the connections
        self._group.abort(errored=False)  # so that the others, who may wait for us, notice at once
        return reason

    def commit(self, ok: bool) -> bool:
        assert self._manager is not None
        if not ok and self._manager.errored() is None:
            self._manager.report_error(RuntimeError("the step was given up"))
        try:
            return bool(self._manager.should_commit())
        except (RuntimeError, TimeoutError) as error:
            self._say("retry", f"{self._place.member}: {error}")
            self._dismiss()
            return False

    def leave(self) -> None:
        self._dismiss()
        self._giver.close()


class _Client:
    """A Manager's own, of a replica that is one process: no other has a say in its commit, so none is asked each step."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def should_commit(self, group_rank: int, step: int, ok: bool, timeout: timedelta) -> bool:
        return ok


class _Group(ProcessGroupGloo):  # type: ignore[misc]  # torchft has no types for mypy
    """torchft's group, over the member's own address, whose members have shown each other their papers."""

    def __init__(self, engine: TorchftEngine, shared: Shared, place: Place, say: Say, own_store: TCPStore) -> None:
        super().__init__(timeout=timedelta(seconds=CONNECT_S))
        self._engine, self._shared, self._place, self._tell = engine, shared, place, say
        self._own = own_store  # it lives as long as the group
        self.crew: Crew | None = None
        self.unfit: Mismatch | None = None
        self._made = 0

    def configure(self, store_addr: str, *given: Any, **more: Any) -> None:
        host, _, port = store_addr.partition("/")[0].rpartition(":")
        groups.knock(host.strip("[]"), int(port))
        super().configure(store_addr, *given, **more)

    def _create_pg(self, store: Store, rank: int, world_size: int) -> Any:
        cards = groups.introduce(store, rank, world_size, self._shared.card())
        try:
            if reason := fits(self._shared, cards, self._place.member):
                self._tell("unfit", reason)
                raise RuntimeError(reason)
        except Mismatch as mismatch:
            self.unfit = mismatch
            raise
        made = groups.connect(store, rank, cards, self._place.address)
        self._made += 1
        self.crew = Crew(cards, rank, f"{self._own.port}-{self._made}")
        return made

    @property
    def inner(self) -> groups.Group:
        return self._pg

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        opts.timeout = timedelta(seconds=self._engine.patience_s)
        return super().allreduce(tensors, opts)


class _Transport(CheckpointTransport):  # type: ignore[misc]
    """The Manager's way to hand over the state, by healing.py."""

    def __init__(self, giver: healing.Giver) -> None:
        self._giver = giver

    def metadata(self) -> str:
        return self._giver.url

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        self._giver.offer(step)

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        path = self._giver.folder / f"taken-{step}.safetensors"
        healing.fetch(metadata, step, path, silence_s=timeout.total_seconds())
        return {"user": {"default": path}, "torchft": {"step": step, "batches_committed": 0}}

    def shutdown(self, wait: bool = True) -> None:
        """The giver outlives the manager."""


def _is_late(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or "Timeout expired" in str(error)
