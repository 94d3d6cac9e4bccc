"""When is a checkpoint whole, so that another machine could go on from it?

    a look      names, sizes, times of what is in POTLUCK_CHECKPOINT_DIR
    quiet       the same in every look for `quiet_s`, and no file of it is open for writing anywhere (asked of the kernel)
    a snapshot  a copy made of it while quiet, hashed while copied; the folder is looked at again: if anything moved
                meanwhile, the copy is thrown away
    sent        the snapshot, never the job's own files: they may change while they travel

A job that saves more often than that is never quiet. If its checkpoint is one file, it is whole whenever nobody has it open;
so after `restless_s` without quiet it is taken between two saves. (Of several files, some may be of the save before.)

A writer that writes to another name and renames is always safe. One that writes in place is, too, as long as it keeps a
file open while it writes it (all do), and goes on to the next one within `quiet_s`. A writer that is killed leaves half
a file that nobody has open: so after a crash only what was found quiet before it counts (an older checkpoint is better
than half a one), and the two common formats, zip (torch.save) and safetensors, are looked at for a missing end.

Files that grow all the time (logs, TensorBoard's) do not count for any of this; they travel along as far as they are.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from potluck.blobs import disk_errors
from potluck.errors import PotluckError
from potluck.protocol import Tree
from potluck.worker.jobs import outputs
from potluck.worker.jobs.outputs import Entry, Notes, files_below, fingerprint

QUIET_S = 5.0
RESTLESS_S = 15.0
_LOOK_S = 1.0
_AGAIN_S = 30.0  # after a checkpoint that could not be sent
_LOGS = (".log", ".jsonl", ".csv")

Seen = tuple[tuple[str, tuple[int, int, int, int]], ...]


class Watcher:
    """The checkpoints of one attempt. `send` gets the folder of a snapshot, which goes when it returns, and its tree."""

    def __init__(
        self,
        folder: Path,
        *,
        snapshots: Path,
        send: Callable[[Path, Tree], None],
        say: Callable[[str], None],
        quiet_s: float = QUIET_S,
        restless_s: float = RESTLESS_S,
        limit_bytes: int = outputs.LIMIT_BYTES,
    ) -> None:
        self._folder = folder
        self._snapshots = snapshots  # outside of what the job can reach
        self._send = send
        self._say = say
        self._quiet_s = quiet_s
        self._restless_s = restless_s
        self._limit_bytes = limit_bytes
        self._alone = threading.Lock()
        self._seen: Seen = ()
        self._since = 0.0  # when what is seen was first seen
        self._restless_since: float | None = None  # since when one file has changed without a pause
        self._quiet: Seen = ()  # found quiet last, while the command ran
        self._sent: Seen = ()
        self._not_before = 0.0
        self._said = ""

    def watch(self, stop: threading.Event) -> None:
        """Look about once a second until `stop` is set. For a thread of its own: sending takes its time.

        Set `stop` when the command has ended, and call `finish` then: what a killed command left looks quiet soon.
        """
        while not stop.wait(_LOOK_S):
            self.look(time.monotonic())

    def look(self, now: float) -> bool:
        """Was a new checkpoint found whole, and sent? `now`: monotonic seconds."""
        with self._alone:
            if now < self._not_before:
                return False
            seen, busy = self._see()
            if seen != self._seen or busy:
                same_file = len(seen) == 1 and [path for path, _ in seen] == [path for path, _ in self._seen]
                self._seen, self._since = seen, now
                if busy or not same_file:
                    self._restless_since = None
                elif self._restless_since is None:
                    self._restless_since = now
                elif now - self._restless_since >= self._restless_s:
                    return self._try(seen, now)
                return False
            if now - self._since < self._quiet_s:
                return False
            self._quiet = seen
            return self._try(seen, now)

    def finish(self, *, whole: bool, now: float | None = None) -> bool:
        """The last look, when no process of the job is left. Was a checkpoint sent?

        `whole`: the command left by itself, with exit code 0 or in its grace; then what is there is what it meant to
        leave. After a crash or a kill, it is sent only if it had been found quiet before, and could not be sent then.
        """
        with self._alone:
            seen, _ = self._see()
            if not whole and seen != self._quiet:
                return False
            return self._try(seen, time.monotonic() if now is None else now)

    def _see(self) -> tuple[Seen, bool]:
        """What is there; and is any of it, as far as it is new, being written?"""
        seen, busy, sent = [], False, dict(self._sent)
        for entry in files_below(self._folder, Notes()):
            if "tfevents" in entry.name or entry.name.endswith(_LOGS):
                continue
            print_ = fingerprint(entry.stat)
            seen.append((entry.path, print_))
            busy = busy or (sent.get(entry.path) != print_ and is_being_written(entry))
        return tuple(sorted(seen)), busy

    def _try(self, seen: Seen, now: float) -> bool:
        if not seen or seen == self._sent:
            return False
        snapshot = self._snapshots / secrets.token_hex(8)
        try:
            with disk_errors(snapshot):
                snapshot.mkdir(parents=True)
                tree = outputs.collect(self._folder, limit_bytes=self._limit_bytes, into=snapshot)
            after, busy = self._see()
            if after != seen or busy:
                self._seen, self._since = after, now
                return False
            cut = next((file.path for file in tree.files if is_cut(snapshot / file.path)), "")
            if cut or not tree.files:
                self._tell(f"The checkpoint is not sent: the end of {cut} is missing" if cut else "")
                return False
            self._send(snapshot, tree)
        except (PotluckError, OSError) as error:
            # The job goes on without; the hub may be back for the next one, or for this one in a while.
            self._not_before = now + _AGAIN_S
            self._tell(f"The checkpoint could not be sent: {error}")
            return False
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
        self._sent, self._said, self._restless_since = seen, "", None
        return True

    def _tell(self, sentence: str) -> None:
        if sentence and sentence != self._said:
            self._said = sentence
            self._say(sentence)


def is_being_written(entry: Entry) -> bool:
    """Has any process the file open for writing? False where the system cannot tell.

    Linux grants a read lease only on a file that nobody has open for writing. It is given back at once; should a writer
    come in between, the kernel tells us by a signal, which therefore must be one that is ignored by default (fcntl(2)).
    """
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        handle = entry.open()
    except OSError:
        return True  # gone, or replaced since it was listed: something is going on
    try:
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(handle)
    return False


def is_cut(path: Path) -> bool:
    """Is it a zip file (torch.save, numpy.savez) or a safetensors file whose end is missing?"""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] == b"PK\x03\x04":
            file.seek(max(0, size - 65_557))  # the longest end record: 22 bytes and a comment
            _, found, rest = file.read().rpartition(b"PK\x05\x06")
            return not found or len(rest) < 18 or len(rest) < 18 + int.from_bytes(rest[16:18], "little")
        if path.suffix != ".safetensors":
            return False
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size, 100_000_000):
            return True
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return bool(size != 8 + length + max(ends, default=0))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return True
