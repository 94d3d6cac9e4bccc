"""What is this machine, as far as can be known honestly and without torch?

Cores are those that this process may use (affinity and container quota), memory is what it may use, and a GPU is listed
only if its own library answers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import psutil

from potluck import __version__
from potluck.errors import BadInput
from potluck.protocol import GpuNow, Hardware, Json, MachineNow

FRESH_S = 2.0
G = TypeVar("G")


def detect() -> Hardware:
    """This machine, now."""
    return Hardware(
        hostname=platform.node(),
        os=_system(),
        arch=platform.machine(),
        cpu=_cpu_name(),
        cpu_cores=usable_cores(),
        memory_bytes=usable_memory(),
        gpus=[*_nvidia(), *_apple()],
        python=platform.python_version(),
        potluck=__version__,
    )


def choose_device(wanted: str, hardware: Hardware) -> str:
    """The device to compute on: "cpu", "cuda:N" or "mps". `BadInput` if the machine does not have it."""
    cuda = [gpu for gpu in hardware.gpus if gpu.get("kind") == "cuda"]
    mps = [gpu for gpu in hardware.gpus if gpu.get("kind") == "mps"]
    kind, _, number = wanted.strip().lower().partition(":")
    if kind in ("", "auto"):
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    if kind == "cpu" and not number:
        return "cpu"
    if kind == "cuda" and (number.isdecimal() or not number):
        index = int(number or 0)
        if index < len(cuda):
            return f"cuda:{index}"
        there = f"it has {len(cuda)}, cuda:0 to cuda:{len(cuda) - 1}" if cuda else "NVIDIA's driver shows none here"
        raise BadInput(f"--device {wanted}: this machine has no such GPU ({there}): take --device auto")
    if kind == "mps" and not number:
        if mps:
            return "mps"
        raise BadInput("--device mps: this is not a Mac with an Apple GPU: take --device auto")
    raise BadInput(f"--device {wanted}: it must be auto, cpu, cuda:0 (or another number) or mps")


def usable_cores() -> int:
    """The CPU cores that this process may use: never more than its affinity mask or its container's quota."""
    try:
        allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 0
    except OSError:
        allowed = 0
    cores = allowed or psutil.cpu_count() or 1
    quota = _cgroup_cores()
    return max(1, min(cores, round(quota + 0.25))) if quota else cores


@functools.cache
def engines() -> list[str]:
    """What gangs can be made of with this Python. It is only looked for: to import torch takes seconds and memory."""
    if importlib.util.find_spec("torch") is None:
        return []
    return ["plain", *(["torchft"] if importlib.util.find_spec("torchft") is not None else [])]


def usable_memory() -> int:
    """Bytes of memory: the machine's, or the container's limit if that is less."""
    total = int(psutil.virtual_memory().total)
    limit = _cgroup_memory()
    return min(total, limit) if limit else total


class Machine:
    """What is free of this machine at the moment. Asked often, it looks at most every two seconds.

    Memory that the pool's children hold counts as free: they end when a job comes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        pool: Callable[[], Collection[int]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder  # jobs write there
        self._pool = pool  # process ids
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: MachineNow | None = None
        self._seen_at = 0.0
        self._nvml: Any = None
        self._handles: list[tuple[int, Any, str]] | None = None

    def now(self) -> MachineNow:
        with self._lock:
            if self._seen is None or self._clock() - self._seen_at >= FRESH_S:
                self._seen, self._seen_at = self._look(), self._clock()
            return self._seen

    def _look(self) -> MachineNow:
        pool = _with_children(self._pool())
        total = usable_memory()
        ours = 0
        for pid in pool:
            with contextlib.suppress(psutil.Error):
                ours += psutil.Process(pid).memory_info().rss
        try:
            disk = shutil.disk_usage(self._folder).free
        except OSError:
            disk = 0
        return MachineNow(
            cpu_cores=usable_cores(),
            memory_bytes=total,
            memory_free_bytes=min(total, _memory_free() + ours),
            disk_free_bytes=disk,
            load=psutil.getloadavg()[0],
            gpus=self._gpus(pool),
            os={"darwin": "macos", "win32": "windows"}.get(sys.platform, "linux"),
            engines=engines(),
            arch={"amd64": "x86_64", "aarch64": "arm64"}.get(platform.machine().lower(), platform.machine().lower()),
        )

    def _gpus(self, pool: set[int]) -> list[GpuNow]:
        """Those that this process may use, numbered as NVIDIA's library does (CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
        if self._handles is None:
            self._handles = self._open()
        found = []
        for index, handle, name in self._handles:
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                ours = sum(
                    process.usedGpuMemory or 0
                    for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                    if process.pid in pool
                )
            except self._nvml.NVMLError:
                continue
            free = min(int(memory.total), int(memory.free) + ours)
            found.append(GpuNow(index, name, int(memory.total), free, *self._heat(handle)))
        return found

    def _heat(self, handle: Any) -> tuple[float, float | None]:
        busy, temperature = 0.0, None
        with contextlib.suppress(self._nvml.NVMLError):  # many laptops do not tell
            busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        with contextlib.suppress(self._nvml.NVMLError):
            temperature = float(self._nvml.nvmlDeviceGetTemperature(handle, self._nvml.NVML_TEMPERATURE_GPU))
        return busy, temperature

    def _open(self) -> list[tuple[int, Any, str]]:
        try:
            import pynvml
        except ImportError:
            return []
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            every = []
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                name = pynvml.nvmlDeviceGetName(handle)
                every.append((index, handle, name.decode(errors="replace") if isinstance(name, bytes) else str(name)))
            return _visible(every)
        except (pynvml.NVMLError, OSError):
            return []


def _with_children(pids: Collection[int]) -> set[int]:
    found = set(pids)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return found


def _memory_free() -> int:
    """Bytes that could be used now: of the machine, or of the container if it has less."""
    free = int(psutil.virtual_memory().available)
    if sys.platform != "linux":
        return free
    for folder in _cgroup_folders("memory"):
        limit = next((t for n in ("memory.max", "memory.limit_in_bytes") if (t := _read(f"{folder}/{n}").strip())), "")
        used = next(
            (t for n in ("memory.current", "memory.usage_in_bytes") if (t := _read(f"{folder}/{n}").strip())), ""
        )
        if limit.isdecimal() and used.isdecimal():
            stat = dict(line.split(" ", 1) for line in _read(f"{folder}/memory.stat").splitlines() if " " in line)
            cached = stat.get("total_inactive_file", stat.get("inactive_file", "0")).strip()
            free = min(free, max(0, int(limit) - int(used) + int(cached if cached.isdecimal() else 0)))
    return free


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release()}"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in _read("/proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _nvidia() -> list[dict[str, Json]]:
    """GPUs that NVIDIA's own library reports. No library, no driver: none."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError, OSError):
        return []
    try:
        found: list[dict[str, Json]] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(
                {
                    "kind": "cuda",
                    "name": name.decode(errors="replace") if isinstance(name, bytes) else str(name),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                }
            )
        return _visible(found)
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _visible(gpus: list[G]) -> list[G]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order, because that is how torch will count them."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None:
        return gpus
    kept = []
    for word in (word.strip() for word in mask.split(",")):
        if word.isdecimal():
            if int(word) >= len(gpus):
                break  # CUDA ignores everything from the first wrong number on
            kept.append(gpus[int(word)])
        elif word.startswith(("GPU-", "MIG-")):
            kept.append(gpus[min(len(kept), len(gpus) - 1)])
        else:
            break
    return kept


def _apple() -> list[dict[str, Json]]:
    """Apple's GPU shares the machine's memory, and every Mac with an Apple processor has one."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return [{"kind": "mps", "name": _cpu_name(), "memory_bytes": int(psutil.virtual_memory().total)}]
    return []


def _cgroup_cores() -> float:
    """The quota of this process's control group in cores; 0 if there is none."""
    if sys.platform != "linux":
        return 0.0
    quotas = []
    for folder in _cgroup_folders("cpu"):
        words = _read(f"{folder}/cpu.max").split()
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = (_read(f"{folder}/cpu.cfs_{part}_us").strip() for part in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=0.0)


def _cgroup_memory() -> int:
    if sys.platform != "linux":
        return 0
    limits = []
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(f"{folder}/{name}").strip()
            if text.isdecimal():
                limits.append(int(text))
    return min(limits, default=0)


def _cgroup_folders(controller: str) -> list[str]:
    """This process's group and all above it, in the second and the first version of control groups."""
    folders = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        root = f"/sys/fs/cgroup/{controller}" if names else "/sys/fs/cgroup"
        for depth in range(len(parts := [part for part in path.split("/") if part]) + 1):
            folders.append("/".join([root, *parts[:depth]]))
    return folders


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
