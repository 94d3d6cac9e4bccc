"""A few machines on one, for gangs: an address, a cable and a share of the CPU of its own each.

    with Network({"a": Cable(), "b": Cable(up_mbit=20, down_mbit=100, delay_s=0.01)}) as network:
        network["a"].limit(0.5)        cores, by a control group of version 1 or 2
        network.cut("a", "b")          nothing arrives, and nobody is told

A machine is a network namespace; gang_switch.py joins them, and clears all of it away when this process ends, however it
ends. What runs there is started with `inside` before its command. Needs root, iproute2 and TUN. nsenter and not
`ip netns exec`: the latter mounts another /sys, in which no control groups are found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

TAG = "plg"
PERIOD_US = 10_000  # short, so that a limited machine is slow evenly instead of by fits and starts
_MOUNT = Path("/sys/fs/cgroup")


def what_is_missing() -> str:
    """Why there can be no such network here; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces takes root"
    for tool in ("ip", "nsenter"):
        if not shutil.which(tool):
            return f"`{tool}` is not installed"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is not there"
    name = f"{TAG}-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"no network namespace can be made here: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True)
class Cable:
    up_mbit: float = 200
    down_mbit: float = 200
    delay_s: float = 0.0005  # one way, to the switch


@dataclass
class Machine:
    name: str
    address: str
    netns: str
    cable: Cable
    groups: Groups

    @property
    def inside(self) -> tuple[str, ...]:
        """Put before a command, it runs on this machine, under the same process id."""
        enter = " && ".join(
            [*(f'echo 0 > "{file}"' for file in self.groups.doors), f'exec nsenter {self._net} -- "$@"']
        )
        return ("/bin/sh", "-c", enter, "sh")

    @property
    def bed(self) -> dict[str, Any]:
        """The same for a process that enters by itself (gang_elsewhere.py)."""
        return {"netns": f"/var/run/netns/{self.netns}", "groups": [str(file) for file in self.groups.doors]}

    @property
    def _net(self) -> str:
        return f"--net=/var/run/netns/{self.netns}"

    def limit(self, cores: float) -> None:
        """How much CPU all its processes get together, from now on."""
        self.groups.limit(cores)

    def run(self, *command: str, timeout_s: float = 60) -> str:
        done = subprocess.run(
            [*self.inside, *command], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)[:200]}: {done.stderr[-2000:]}"
        return done.stdout


@dataclass(frozen=True)
class Groups:
    """A machine's control group, where there are any. `folder` has the limit; processes enter by the `doors`."""

    version: int = 0
    folder: Path = field(default_factory=Path)

    @classmethod
    def make(cls, name: str) -> Groups:
        try:
            if (_MOUNT / "cgroup.controllers").exists():
                folder = _MOUNT / name
                folder.mkdir()
                # processes live only in leaves, and an agent makes groups for its jobs below the machine's
                for above in (_MOUNT, folder):
                    (above / "cgroup.subtree_control").write_text("+cpu +memory +pids")
                (folder / "agent").mkdir()
                return cls(2, folder)
            folder = _MOUNT / "cpu" / name
            folder.mkdir()
            return cls(1, folder)
        except OSError:
            return cls()

    @property
    def doors(self) -> list[Path]:
        match self.version:
            case 1:
                return [self.folder / "cgroup.procs"]
            case 2:
                return [self.folder / "agent" / "cgroup.procs"]
        return []

    def limit(self, cores: float) -> None:
        quota = max(1000, round(cores * PERIOD_US))
        match self.version:
            case 1:
                (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self.folder / "cpu.cfs_quota_us").write_text(str(quota))
            case 2:
                (self.folder / "cpu.max").write_text(f"{quota} {PERIOD_US}")


class Network:
    """The machines, and `hub`: the namespace that we are in ourselves, with an address on the same switch."""

    def __init__(self, cables: Mapping[str, Cable]) -> None:
        high, low = divmod(os.getpid() % 5000, 250)  # side by side with another test process
        self._net = f"10.{220 + high}.{low}"
        self.hub_address = f"{self._net}.254"
        self.machines: dict[str, Machine] = {}
        self._cables = cables
        self._switch: subprocess.Popen[str] | None = None

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    @property
    def can_limit(self) -> bool:
        return all(machine.groups.version for machine in self.machines.values())

    def __enter__(self) -> Self:
        for at, (name, cable) in enumerate(self._cables.items(), start=1):
            netns = f"{TAG}-{os.getpid()}-{name}"
            self.machines[name] = Machine(name, f"{self._net}.{at}", netns, cable, Groups.make(netns))
        hub: dict[str, Any] = {
            "name": "hub",
            "netns": "",
            "device": _device(254),
            "address": self.hub_address,
            "folders": [],
        }
        described = [hub | _speed(Cable(1000, 1000, 0.0))]
        for at, machine in enumerate(self.machines.values(), start=1):
            place = {"name": machine.name, "netns": machine.netns, "device": _device(at), "address": machine.address}
            folders = [str(machine.groups.folder)] if machine.groups.version else []
            described.append(place | {"folders": folders} | _speed(machine.cable))
        self._switch = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("gang_switch.py")),
                json.dumps({"tag": TAG, "machines": described}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests; the switch ends when they do
        )
        assert self._switch.stdout is not None
        if self._switch.stdout.readline().strip() != "ready":
            self.close()
            raise AssertionError("the network was not laid: what `ip` said is above")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._switch is not None:
            self._switch.communicate()
            self._switch = None

    def cut(self, one: str, other: str) -> None:
        self._order(cut=[one, other])

    def mend(self, one: str, other: str) -> None:
        self._order(mend=[one, other])

    def isolate(self, name: str) -> None:
        """As if somebody stepped on its cable."""
        for other in self._others(name):
            self.cut(name, other)

    def rejoin(self, name: str) -> None:
        for other in self._others(name):
            self.mend(name, other)

    def _others(self, name: str) -> Iterable[str]:
        return [other for other in [*self.machines, "hub"] if other != name]

    def _order(self, **order: list[str]) -> None:
        assert self._switch is not None and self._switch.stdin is not None
        self._switch.stdin.write(json.dumps(order) + "\n")
        self._switch.stdin.flush()


def _device(number: int) -> str:
    return f"{TAG}{os.getpid()}.{number}"


def _speed(cable: Cable) -> dict[str, float]:
    return {"up": cable.up_mbit * 1e6, "down": cable.down_mbit * 1e6, "delay_s": cable.delay_s}
