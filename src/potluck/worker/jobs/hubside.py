"""How does an attempt speak with its hub: what it fetches, what it tells on the way, and how its end gets home?

    the attempt's thread   project, checkpoint, the end
    courier                stages of the attempt, and its figures and pictures, about once a second
    checkpoints            looks for whole checkpoints and sends them (checkpoints.py)
    job-log                output (output.py)

Each waits for the hub with the line's patience and gives up when the lease is gone. A hub that answers "fenced" is
believed by nobody here: only the answer to `orders` ends a job.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from potluck.blobs import BlobStore
from potluck.client import Hub
from potluck.errors import Fenced, NotKnown, PotluckError
from potluck.protocol import (
    Blob,
    CheckpointReport,
    JobLease,
    JobProgress,
    JobReport,
    Point,
    ReportAnswer,
    Tree,
)
from potluck.worker.jobs import checkpoints, outputs, reports
from potluck.worker.jobs.attempt import Folders, Off
from potluck.worker.jobs.output import Output, send_rest
from potluck.worker.jobs.points import Points
from potluck.worker.line import LOCAL, GivenUp, Line

T = TypeVar("T")
LOOK_S = 0.5  # between two looks for new figures
PATIENCE_S = 5.0  # of one transfer; the line's patience is the lease's
POOL_LETS_GO_S = 12.0
"""The pool's child gets so long to hand in and free the GPU. Its lane gives up after 8 s by itself."""
_MAX_STAGES = 1000


class HubSide:
    """One lease's line to the hub."""

    def __init__(
        self,
        lease_id: str,
        line: Line,
        store: BlobStore,
        *,
        lease: JobLease | None = None,
        quiet: Callable[[float], bool] = lambda seconds: True,
        gone: Callable[[], bool] = bool,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._id = lease_id
        self._line = line
        self._store = store
        self._lease = lease
        self._quiet = quiet
        self._gone = gone
        self._say = say
        self._stages: queue.Queue[JobProgress | None] = queue.Queue(_MAX_STAGES)
        self._confirmed = threading.Event()
        self._refused = ""
        self._points: Points | None = None
        self._pictures: dict[str, Blob] = {}  # that the hub does not have yet
        self._figures = threading.Lock()
        self._watcher: checkpoints.Watcher | None = None
        self._courier: threading.Thread | None = None

    # --- what the attempt asks for (attempt.Side)

    def project(self, folder: Path, off: Callable[[], bool]) -> None:
        assert self._lease is not None
        self._fetch(self._lease.project, folder, off)

    def checkpoint(self, folder: Path, off: Callable[[], bool]) -> None:
        assert self._lease is not None and self._lease.resume_from is not None
        self._fetch(self._lease.resume_from, folder, off)

    def tell(self, progress: JobProgress) -> None:
        with contextlib.suppress(queue.Full):  # a hub that was away for very long: stages are only for people
            self._stages.put_nowait(progress)
        if self._courier is None:
            self._courier = threading.Thread(target=self._carry, name="job-courier", daemon=True)
            self._courier.start()

    def confirm(self, off: Callable[[], bool]) -> None:
        """The hub has heard of the attempt, so the lease lives; and the pool has left the GPU, if the job wants one."""
        while not self._confirmed.wait(0.1):
            if off():
                raise Off
        if self._refused:
            raise Off(self._refused)
        if self._lease is not None and self._lease.gpus and not self._quiet(POOL_LETS_GO_S):
            self._say("the pool's training process did not leave the GPU in time: the job starts beside it")

    @contextlib.contextmanager
    def watched(self, folders: Folders) -> Iterator[None]:
        self._points = Points(
            folders.metrics, folders=(folders.work, folders.output), keep=self._keep_picture, say=self._say
        )
        self._watcher = checkpoints.Watcher(
            folders.checkpoint, snapshots=folders.root / "snapshots", send=self._send_checkpoint, say=self._say
        )
        stop = threading.Event()
        threading.Thread(target=self._watcher.watch, args=(stop,), name="job-checkpoints", daemon=True).start()
        try:
            yield
        finally:
            stop.set()

    # --- the end

    def bring_home(self, kept: reports.Kept, folders: Folders, output: Output | None) -> ReportAnswer:
        """Everything that is left to tell, and then the end itself. `GivenUp` if the lease or the agent is gone."""
        report = kept.report
        with contextlib.suppress(PotluckError, OSError):  # an older checkpoint is there, or none; the end matters more
            self._last_checkpoint(folders, report)
        tree, note = self._outputs(folders.output)
        self._last_figures()
        if output is None:
            with contextlib.suppress(PotluckError):
                sent = send_rest(self.send_log, kept.log_sent, reports.rest_of(folders.root))
                report = replace(report, log_bytes=sent)
        else:
            while not output.wait_sent(0.5):
                self._check()
            report = replace(report, log_bytes=output.sent)
        reason = f"{report.reason}; {note}".lstrip("; ") if note else report.reason
        report = replace(report, outputs=tree, reason=reason)
        try:
            return self._call(lambda hub: hub.end(self._id, report))
        except PotluckError as error:
            return ReportAnswer(False, str(error))

    def send_log(self, offset: int, piece: bytes, skip: bool) -> int:
        return self._call(lambda hub: hub.send_log(self._id, offset, piece, skip=skip))

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._stages.put_nowait(None)

    # --- underneath

    def _call(self, ask: Callable[[Hub], T], give_up: Callable[[], bool] = bool) -> T:
        return self._line.call(ask, give_up=lambda: self._gone() or give_up(), also=LOCAL, refusal=NotKnown)

    def _check(self) -> None:
        if self._gone() or self._line.closed.is_set():
            raise GivenUp

    def _off(self) -> bool:
        return self._gone() or self._line.closed.is_set()

    def _fetch(self, blob: Blob, folder: Path, off: Callable[[], bool]) -> None:
        def give_up() -> bool:
            return off() or self._off()

        def fetch(hub: Hub) -> None:
            tree = hub.read_tree(blob, patience_s=PATIENCE_S, give_up=give_up)
            hub.fetch_tree(tree, folder, self._store, patience_s=PATIENCE_S, give_up=give_up)

        try:
            self._line.call(fetch, give_up=give_up, refusal=NotKnown)
        except GivenUp:
            raise Off from None

    def _outputs(self, folder: Path) -> tuple[Blob | None, str]:
        """What the job left, at the hub; or a sentence on why it is not."""
        if not folder.is_dir():
            return None, ""
        try:
            tree = outputs.collect(folder)
            if not tree.files and not tree.skipped:
                return None, ""
            return self._upload(folder, tree), ""
        except (PotluckError, OSError) as error:
            return None, f"its outputs could not be collected: {error}"

    def _upload(self, folder: Path, tree: Tree) -> Blob:
        return self._call(lambda hub: hub.upload_tree(folder, tree, patience_s=PATIENCE_S, give_up=self._off))

    # --- checkpoints

    def _send_checkpoint(self, folder: Path, tree: Tree) -> None:
        try:
            blob = self._upload(folder, tree)
            report = CheckpointReport(blob, len(tree.files), tree.size_bytes)
            self._call(lambda hub: hub.checkpoint(self._id, report))
        except GivenUp:
            raise Fenced("the job is not this worker's any more") from None

    def _last_checkpoint(self, folders: Folders, report: JobReport) -> None:
        asked = report.outcome in ("returned", "cancelled") and report.signal != "SIGKILL"
        whole = report.exit_code == 0 or (report.exit_code is not None and asked)
        if self._watcher is not None:
            self._watcher.finish(whole=whole)
        elif whole and folders.checkpoint.is_dir():  # it ended under an earlier agent
            checkpoints.Watcher(
                folders.checkpoint, snapshots=folders.root / "snapshots", send=self._send_checkpoint, say=self._say
            ).finish(whole=True)

    # --- the courier

    def _carry(self) -> None:
        while True:
            try:
                stage = self._stages.get(timeout=LOOK_S)
                if stage is None:
                    return
                self._call(lambda hub, stage=stage: hub.progress(self._id, stage))  # type: ignore[misc]
            except queue.Empty:
                try:
                    with self._figures:
                        self._send_figures(self._points.read() if self._points is not None else [])
                except GivenUp:
                    return
                except PotluckError as error:
                    self._say(f"its figures could not be sent: {error}")
            except GivenUp:
                return
            except Fenced as error:
                self._refused = str(error)
                self._confirmed.set()
                return
            except PotluckError as error:
                self._say(f"the hub does not take a stage of the job: {error}")
                self._confirmed.set()
            else:
                self._confirmed.set()

    def _last_figures(self) -> None:
        if self._points is None:
            return
        with contextlib.suppress(PotluckError), self._figures:
            for batch in self._points.finish():
                self._send_figures(batch)

    def _send_figures(self, batch: list[Point]) -> None:
        if not batch:
            return
        for point in batch:
            for blob in point.images.values():
                if self._pictures.pop(blob.hash, None) is not None:
                    path = self._store.path(blob.hash)
                    self._call(lambda hub, path=path: hub.upload(path, patience_s=PATIENCE_S, give_up=self._off))  # type: ignore[misc]
        self._call(lambda hub: hub.send_points(self._id, batch))

    def _keep_picture(self, png: bytes) -> Blob:
        blob = self._store.add_bytes(png)
        self._pictures[blob.hash] = blob
        return blob
