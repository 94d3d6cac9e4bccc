"""What do podman and docker share? Their command line, mostly.

A container has a read-only root, no capability, no way to new privileges, limits, and of the machine only the box's
folders. A job without an image gets the skeleton image: empty folders and the links of a merged /usr, 11 kB, over which
the machine's own /usr is mounted read-only. So the machine's Python works in a real container, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from potluck.errors import NotFound
from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import (
    CONTAINED,
    ETC,
    READ_ENV_AND_RUN,
    Executor,
    binds,
    exports,
    folders_of_root,
    hand_over,
    inside_environment,
    job_user,
    links_of_root,
    outside_environment,
    own_folder,
    shim_plan,
    tmp_bytes,
    try_out,
)
from potluck.worker.jobs.limits import PREFIX, Groups

NOFILE = 1_048_576
LABEL = "potluck.box"


class ContainerEngine(Executor):
    """podman or docker."""

    takes_images = True
    STOPS = CONTAINED
    program: ClassVar[str]
    script: ClassVar[str] = READ_ENV_AND_RUN

    def engine(self) -> list[str]:
        """The program with what it always needs to be told."""
        return [self.program]

    def own_options(self, box: Box, groups: Groups) -> list[str]:
        return []

    def gpu_options(self, box: Box) -> list[str]:
        raise NotImplementedError

    def prepare(self, box: Box) -> None:
        super().prepare(box)
        hand_over(box)
        if not box.image:
            self.skeleton()

    def run_argv(self, box: Box, groups: Groups) -> list[str]:
        user, group = job_user()
        tmp = tmp_bytes(box)
        argv = [*self.engine(), "run", "--name", f"{PREFIX}{box.id}", "--label", f"{LABEL}={box.id}"]
        argv += ["--interactive", "--pull", "never", "--log-driver", "none", "--hostname", "potluck"]
        argv += ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        argv += ["--security-opt", "label=disable"]  # SELinux would ask for /usr to be relabelled
        argv += ["--user", f"{user}:{group}"]
        argv += ["--pids-limit", str(box.pids)] if box.pids else []
        argv += ["--memory", str(box.memory_bytes), "--memory-swap", str(box.memory_bytes)] if box.memory_bytes else []
        argv += ["--cpus", f"{box.cpu:g}"] if box.cpu > 0 else []
        argv += ["--oom-score-adj", "500", *ulimits(), "--ulimit", "core=0:0"]
        argv += ["--ulimit", f"fsize={box.disk_bytes}:{box.disk_bytes}"] if box.disk_bytes else []
        if not box.network or box.host_network:
            argv += ["--network", "host" if box.network else "none"]
        for folder in ("/tmp", "/var/tmp"):
            argv += ["--tmpfs", f"{folder}:rw,exec,mode=1777,size={tmp}"]
        argv += ["--shm-size", str(tmp), "--workdir", str(box.work), "--entrypoint", ""]
        for path, may_write in binds(box):
            argv += ["--volume", f"{path}:{path}:{'rw' if may_write else 'ro'}"]
        argv += self.gpu_options(box) if box.gpus else []
        argv += self.own_options(box, groups)
        if box.image:
            argv.append(box.image)
        else:
            for place in ("/usr", *folders_of_root(), *(f"/etc/{name}" for name in ETC)):
                if Path(place).exists():
                    argv += ["--volume", f"{place}:{place}:ro"]
            argv.append(self.skeleton_name())
        return [*argv, "sh", "-c", self.script, "sh", *box.argv]

    def feed(self, box: Box) -> str:
        if not box.image:
            return exports(inside_environment(box))
        # An image has a PATH of its own, and a Python.
        return exports(inside_environment(box, path=""))

    def cleanup(self, id_: str) -> list[list[str]]:
        return [[*self.engine(), "rm", "--force", f"{PREFIX}{id_}"]]

    def inspect(self, id_: str) -> list[str]:
        return [*self.engine(), "inspect", "--format", "{{.State.StartedAt}} {{.State.OOMKilled}}", f"{PREFIX}{id_}"]

    # --- images

    def skeleton_name(self) -> str:
        return f"localhost/potluck-host:{hashlib.sha256(skeleton_tar()).hexdigest()[:12]}"

    def skeleton(self) -> None:
        """Have the skeleton image here. Needs no network."""
        there, _ = try_out([*self.engine(), "image", "inspect", "--format", "{{.Id}}", self.skeleton_name()])
        if there:
            return
        tar = own_folder() / f"skeleton.{threading.get_ident()}.tar"
        tar.write_bytes(skeleton_tar())
        try:
            done, said = try_out([*self.engine(), "import", str(tar), self.skeleton_name()])
        finally:
            tar.unlink(missing_ok=True)
        if not done:
            raise NotFound(f"{self.program} does not take the skeleton image: {said}")

    def pull(self, image: str, *, stop: threading.Event, say: Callable[[str], None]) -> str:
        look = [*self.engine(), "image", "inspect", "--format", "{{.Id}}", image]
        there, digest = try_out(look)
        if not there:
            say(f"the image {image} is being pulled")
            pull_image([*self.engine(), "pull", image], image, stop)
            there, digest = try_out(look)
        if not there:
            raise NotFound(f"the image {image} was pulled, but {self.program} does not find it: {digest}")
        return digest

    def container_plan(self, box: Box, groups: Groups, *, kernel_limits: bool = True, **more: Any) -> dict[str, Any]:
        return shim_plan(
            box,
            groups,
            argv=self.run_argv(box, groups),
            env=outside_environment(),
            cwd="/",
            feed=self.feed(box),
            join=False,
            rlimits=False,
            kernel_limits=kernel_limits,
            ask=self.inspect(box.id),
            ask_after=[125, 126, 127, 137],
            cleanup=self.cleanup(box.id),
            **more,
        )


def skeleton_tar() -> bytes:
    """The same bytes each time: its hash is its name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folders = ["dev", "etc", "proc", "run", "sys", "tmp", "usr", "var", "var/tmp"]
        for name in [*folders, *(folder.strip("/") for folder in folders_of_root())]:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o1777 if name.endswith("tmp") else 0o755
            tar.addfile(entry)
        for name, target in links_of_root():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(entry)
    return buffer.getvalue()


def pull_image(argv: list[str], image: str, stop: threading.Event) -> None:
    said: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=outside_environment(),
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = process.stdout
    reader = threading.Thread(target=lambda: said.extend(lines), name="image-pull", daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            if stop.wait(0.2):
                raise NotFound(f"the image {image} was not pulled: the job was ended meanwhile")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5.0)
        lines.close()
    if process.returncode != 0:
        words = [line.strip() for line in said if line.strip()]
        raise NotFound(
            f"the image {image} cannot be pulled: {words[-1][:300] if words else f'exit code {process.returncode}'}. "
            "Is its name right, and may everybody pull it?"
        )


def ulimits() -> list[str]:
    """This process's own hard limits: a container cannot be given more, and the engines' defaults may be.

    podman lowers its own limit of processes to the kernel's greatest process number, and what it starts has that.
    """
    if sys.platform == "win32":
        return []
    import resource

    bounds = []
    for name, number, most in (
        ("nofile", resource.RLIMIT_NOFILE, NOFILE),
        ("nproc", resource.RLIMIT_NPROC, _pid_max()),
    ):
        hard = resource.getrlimit(number)[1]
        bound = most if hard == resource.RLIM_INFINITY else min(hard, most)
        bounds += ["--ulimit", f"{name}={bound}:{bound}"]
    return bounds


def _pid_max() -> int:
    try:
        return int(Path("/proc/sys/kernel/pid_max").read_text())
    except (OSError, ValueError):
        return 32768
