"""What does training do to this machine? Processor, memory, GPU and temperature, as far as it tells.

A thread of its own looks once a second, because some drivers take their time; nobody waits for it. psutil and pynvml are
used where they are: a job's own environment need not have them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import torch

EVERY_S = 1.0


class Machine:
    """Of the process that made it. `figures` are the newest ones, by name; what is not known is left out."""

    def __init__(self, device: torch.device) -> None:
        self.figures: dict[str, float] = {}
        self._device = device
        self._cores = _cores()
        self._process = _process()
        self._gpu = _Gpu(device) if device.type == "cuda" else None
        self._used_s, self._looked_at = time.process_time(), time.perf_counter()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="potluck-machine", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        used_s, now = time.process_time(), time.perf_counter()
        figures = {"cpu": (used_s - self._used_s) / max(now - self._looked_at, 1e-9) / self._cores}
        self._used_s, self._looked_at = used_s, now
        if self._process is not None:
            with contextlib.suppress(Exception):  # what a machine does not tell is no reason to disturb a training
                figures["memory_bytes"] = float(self._process.memory_info().rss)
        if self._gpu is not None:
            figures |= self._gpu.figures()
        if "temperature_c" not in figures and (warmest := _warmest()) is not None:
            figures["temperature_c"] = warmest
        self.figures = figures

    def close(self) -> None:
        self._closed.set()


class _Gpu:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            index = device.index if device.index is not None else torch.cuda.current_device()
            # by its number torch may mean another one: CUDA_VISIBLE_DEVICES renumbers them
            uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
            if uuid is not None:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            else:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml = pynvml
        except Exception:  # noqa: BLE001 - no driver, another version, no right to ask: it is not known then
            self._nvml = None

    def figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with contextlib.suppress(Exception):
            found["gpu_memory_bytes"] = float(torch.cuda.memory_reserved(self._device))
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                found["gpu"] = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu / 100
            with contextlib.suppress(Exception):
                sensor = self._nvml.NVML_TEMPERATURE_GPU
                found["temperature_c"] = float(self._nvml.nvmlDeviceGetTemperature(self._handle, sensor))
        return found


def _process() -> Any:
    try:
        import psutil

        return psutil.Process()
    except Exception:  # noqa: BLE001 - not installed, or built for another Python
        return None


def _warmest() -> float | None:
    try:
        import psutil

        sensors = psutil.sensors_temperatures()
    except Exception:  # noqa: BLE001 - not installed, or a system without them
        return None
    return max((float(one.current) for group in sensors.values() for one in group if one.current), default=None)


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1
