"""Which device does a task compute on, and how is what it does kept from the machine's owner's way?"""

from __future__ import annotations

import os

import torch

from potluck.errors import BadInput


def choose(wanted: str, *, cuda: int, mps: bool) -> str:
    """The device for `wanted` ("auto", "cpu", "cuda", "cuda:1", "mps") on a machine with `cuda` GPUs and maybe MPS."""
    if wanted in ("auto", ""):
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    kind, _, number = wanted.partition(":")
    if kind == "cpu" and not number:
        return "cpu"
    if kind == "mps" and not number:
        if not mps:
            raise BadInput("this machine has no MPS (Apple GPU), or its torch cannot use it: take --device auto")
        return "mps"
    if kind == "cuda" and (number.isdecimal() or not number):
        if int(number or 0) >= cuda:
            raise BadInput(f"--device {wanted}: torch sees {cuda} CUDA devices here: take --device auto")
        return f"cuda:{int(number or 0)}"
    raise BadInput(f"--device {wanted}: it must be auto, cpu, cuda, cuda:N or mps")


def pick(wanted: str) -> torch.device:
    """`choose` on this machine."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device(choose(wanted, cuda=cuda, mps=torch.backends.mps.is_available()))


def use_threads() -> None:
    """Give torch the threads of OMP_NUM_THREADS. More of them than cores of ours would spin and steal from others."""
    if (text := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(text) > 0:
        torch.set_num_threads(int(text))


def pause_s(step_s: float, share: float) -> float:
    """How long to rest after a step of `step_s`, so that `share` of the time is work."""
    return step_s * (1 / min(max(share, 0.01), 1.0) - 1)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was told; a step's time means nothing before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_fatal(error: BaseException) -> bool:
    """Out of memory, or a device that has faulted: the process must not go on."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "out of memory",
            "can't allocate memory",
            "CUDA error",
            "device-side assert",
            "cuDNN error",
        )
    )
