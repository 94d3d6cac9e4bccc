"""The switch that joins the machines of gang_net.py, and the janitor of all that they were made of.

A machine is a network namespace whose only way out is a TUN device, and this process holds its other end. So each packet
comes by here, and leaves when a cable of its machine's bandwidth and delay would have delivered it; the kernels' own TCP
does the rest. (`tc netem` is not in every kernel; TUN is.)

    argv[1]    {"tag", "machines": [{"name", "netns", "device", "address", "up", "down", "delay_s", "folders"}]}
               bits per second; an empty netns: the namespace that we are started in; folders: its control groups
    stdout     "ready", when everything is there
    stdin      {"cut": [name, name]} or {"mend": [name, name]}, one a line: nothing arrives, and nobody is told

It ends with its standard input, however its parent ended, and takes along namespaces, processes in them and groups.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import ipaddress
import itertools
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MTU = 8000  # few packets, since each costs Python some microseconds
BUFFER_S = 0.2  # of a cable; what comes then is dropped
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_AT_SWITCH, _AT_TARGET = 0, 1


@dataclass
class Port:
    """One machine's cable."""

    name: str
    tun: int
    up: float
    down: float
    delay_s: float
    free_at: list[float] = field(default_factory=lambda: [0.0, 0.0])  # up, down

    def carry(self, way: int, now: float, size: int) -> float:
        """When a packet of `size` bytes is at the other end; 0: dropped."""
        begins = max(self.free_at[way], now)
        if begins - now > BUFFER_S:
            return 0.0
        self.free_at[way] = begins + size * 8 / (self.down if way else self.up)
        return self.free_at[way] + self.delay_s


class Switch:
    def __init__(self, ports: dict[bytes, Port]) -> None:
        self._ports = ports  # by IPv4 address
        self._by_tun = {port.tun: port for port in ports.values()}
        self._cut: set[frozenset[str]] = set()
        self._due: list[tuple[float, int, int, Port, bytes]] = []
        self._count = itertools.count()
        self._words = b""

    def serve(self) -> None:
        tuns = list(self._by_tun)
        while True:
            wait_s = max(self._due[0][0] - time.monotonic(), 0.0) if self._due else None
            ready, _, _ = select.select([0, *tuns], [], [], wait_s)
            for number in ready:
                if number == 0:
                    if not self._listen():
                        return
                else:
                    self._take(self._by_tun[number])
            self._deliver(time.monotonic())

    def _listen(self) -> bool:
        if not (words := os.read(0, 4096)):
            return False
        *lines, self._words = (self._words + words).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "cut" in order:
                self._cut.add(frozenset(order["cut"]))
            else:
                self._cut.discard(frozenset(order["mend"]))
        return True

    def _take(self, source: Port) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(32):
                packet = os.read(source.tun, 65536)
                target = self._ports.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                if target is None or frozenset((source.name, target.name)) in self._cut:
                    continue
                if at := source.carry(0, time.monotonic(), len(packet)):
                    heapq.heappush(self._due, (at, next(self._count), _AT_SWITCH, target, packet))

    def _deliver(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            at, _, where, target, packet = heapq.heappop(self._due)
            if where == _AT_TARGET:
                with contextlib.suppress(OSError):  # its queue is full: so are cables'
                    os.write(target.tun, packet)
            elif at := target.carry(1, at, len(packet)):
                heapq.heappush(self._due, (at, next(self._count), _AT_TARGET, target, packet))


# --- what the machines are made of ----------------------------------------------------------------------------------


def lay(machine: dict[str, Any]) -> Port:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    device, netns = machine["device"], machine["netns"]
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    there: tuple[str, ...] = ()
    if netns:
        ip("netns", "add", netns)
        ip("link", "set", device, "netns", netns)
        there = ("-n", netns)
        ip(*there, "link", "set", "lo", "up")
    silence = f"echo 1 > /proc/sys/net/ipv6/conf/{device}/disable_ipv6 || true"
    enter = ["nsenter", f"--net=/var/run/netns/{netns}"] if netns else []
    subprocess.run([*enter, "/bin/sh", "-c", silence], capture_output=True, check=False)
    ip(*there, "addr", "add", f"{machine['address']}/24", "dev", device)
    ip(*there, "link", "set", device, "mtu", str(MTU), "up")
    return Port(machine["name"], tun, machine["up"], machine["down"], machine["delay_s"])


def clear(netns: str) -> None:
    """Everything that runs there was started there by a test."""
    for _ in range(50):
        found = subprocess.run(["ip", "netns", "pids", netns], capture_output=True, text=True, check=False).stdout
        if not end(found.split()):
            break
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", netns], capture_output=True, check=False)


def remove_group(folder: Path) -> None:
    for _ in range(50):
        groups = [Path(name) for name, _, _ in os.walk(folder, topdown=False)]
        for group in groups:
            with contextlib.suppress(OSError):
                end((group / "cgroup.procs").read_text().split())
            with contextlib.suppress(OSError):
                group.rmdir()
        if not folder.exists():
            return
        time.sleep(0.05)


def end(pids: list[str]) -> int:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)
    return len(pids)


def forget_the_dead(tag: str) -> None:
    """What is left of tests whose janitor was killed, too. The names have the test's process id."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    groups = {folder.name: folder for top in ("", "cpu") for folder in Path("/sys/fs/cgroup", top).glob(f"{tag}-*-*")}
    names = {*re.findall(rf"^({tag}-\d+-\S+)", listed, re.MULTILINE), *groups}
    for name in names:
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            clear(name)
            if name in groups:
                remove_group(groups[name])


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(words)}: {done.stderr.strip()}")


def main() -> None:
    plan = json.loads(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    forget_the_dead(plan["tag"])
    machines = plan["machines"]
    try:
        ports = {ipaddress.IPv4Address(machine["address"]).packed: lay(machine) for machine in machines}
        print("ready", flush=True)
        Switch(ports).serve()
    finally:
        for machine in machines:
            if machine["netns"]:
                clear(machine["netns"])
            for folder in machine["folders"]:
                remove_group(Path(folder))


if __name__ == "__main__":
    main()
