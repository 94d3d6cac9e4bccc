"""How does a command run in apptainer, the container runtime of clusters?

Its containers are processes of the user who starts them, so the shim's groups and signals reach them. It does not take
the job's folders alone by itself: --containall leaves the user's home, /tmp and the environment out.
"""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from potluck.worker.jobs.box import Box
from potluck.worker.jobs.executors.common import (
    CONTAINED,
    ETC,
    REACHES_THE_MACHINE,
    READ_ENV_AND_RUN,
    Executor,
    Found,
    binds,
    exports,
    folders_of_root,
    inside_environment,
    is_root,
    outside_environment,
    own_folder,
    shim_plan,
    system,
    try_out,
    visible_gpus,
)
from potluck.worker.jobs.executors.containers import pull_image, skeleton_tar
from potluck.worker.jobs.limits import Groups


class Apptainer(Executor):
    name = "apptainer"
    takes_images = True
    STOPS = CONTAINED - REACHES_THE_MACHINE

    def probe(self) -> Found:
        if system() != "linux":
            return Found(self.name, False, "apptainer is only for Linux")
        there, version = try_out(["apptainer", "--version"])
        if not there:
            return Found(self.name, False, version)
        test = ["apptainer", "exec", "--containall", "--no-home", "--bind", "/usr:/usr:ro"]
        works, said = try_out([*test, str(self.skeleton()), "/usr/bin/true"])
        return Found(self.name, works, "" if works else f"apptainer cannot run here: {said}", version.split()[-1])

    def skeleton(self) -> Path:
        """The skeleton image as a folder: apptainer takes one for an image."""
        folder = own_folder() / "skeleton"
        if not folder.exists():
            part = folder.with_name(f".skeleton.{os.getpid()}.{threading.get_ident()}")
            with tarfile.open(fileobj=BytesIO(skeleton_tar())) as tar:
                tar.extractall(part, filter="tar")
            try:
                part.rename(folder)
            except OSError:
                if not folder.exists():  # nobody else was quicker
                    raise
        return folder

    def plan(self, box: Box, groups: Groups) -> dict[str, Any]:
        argv = ["apptainer", "--quiet", "exec", "--containall", "--no-home", "--cleanenv", "--no-privs"]
        argv += ["--drop-caps", "all"] if is_root() else []
        argv += [] if box.network else ["--net", "--network", "none"]
        argv += ["--nv"] if box.gpus else []
        for path, may_write in binds(box):
            argv += ["--bind", f"{path}:{path}:{'rw' if may_write else 'ro'}"]
        image = self._reference(box.image)
        if not box.image:
            for place in ("/usr", *folders_of_root(), *(f"/etc/{name}" for name in ETC)):
                if Path(place).exists():
                    argv += ["--bind", f"{place}:{place}:ro"]
            image = str(self.skeleton())
        argv += ["--pwd", str(box.work), image, "sh", "-c", READ_ENV_AND_RUN, "sh", *box.argv]
        env = inside_environment(box) if not box.image else inside_environment(box, path="")
        return shim_plan(
            box,
            groups,
            argv=argv,
            env=outside_environment(),
            cwd="/",
            feed=exports({**visible_gpus(box), **env}),
            nested=True,
        )

    def prepare(self, box: Box) -> None:
        super().prepare(box)
        (box.scratch / "home").mkdir(exist_ok=True)

    def pull(self, image: str, *, stop: threading.Event, say: Callable[[str], None]) -> str:
        """apptainer turns an image into one file, and keeps it in its own cache."""
        say(f"the image {image} is being pulled")
        pull_image(["apptainer", "exec", "--containall", self._reference(image), "true"], image, stop)
        return ""

    @staticmethod
    def _reference(image: str) -> str:
        return image if "://" in image or image.endswith(".sif") else f"docker://{image}"
