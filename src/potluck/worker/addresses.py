"""At which addresses might other machines reach this one?

Never by its name: on Debian that leads to 127.0.1.1, which no other machine reaches. Which of the addresses really works
for whom is found out by knocking (door.py).
"""

from __future__ import annotations

import contextlib
import ipaddress
import random
import socket
from collections.abc import Mapping, Sequence

import psutil

MOST = 8
LOOPBACK = "127.0.0.1"
# Bridges to containers and virtual machines inside this one. Many machines have the same address there.
_INNER = ("br-", "cni", "docker", "lxc", "lxdbr", "podman", "vboxnet", "vethernet", "virbr", "vmnet")
_FAR = (  # asked for the way to it; nothing is sent
    (socket.AF_INET, "198.51.100.1"),
    (socket.AF_INET6, "2001:db8::1"),
)


def here() -> list[str]:
    """This machine's addresses at the moment, the best first; 127.0.0.1 is the last."""
    return ranked(_interfaces(), preferred=[address for family, far in _FAR if (address := _way_to(family, far))])


def ranked(interfaces: Mapping[str, Sequence[str]], *, preferred: Sequence[str]) -> list[str]:
    """The order in which to try them: where the default route leads, then other IPv4, IPv6, and inner bridges."""

    def place(name: str, address: str) -> tuple[bool, bool, bool]:
        return name.lower().startswith(_INNER), ":" in address, address not in preferred

    found = [(place(name, a), a) for name, every in interfaces.items() for a in every if is_usable(a)]
    once = dict.fromkeys(address for _, address in sorted(found, key=lambda pair: pair[0]))
    return [*list(once)[:MOST], LOOPBACK]


def is_usable(address: str) -> bool:
    """May another machine reach one at this address?"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved)


def interface_of(address: str) -> str:
    """The name of the interface that has this address; empty: none."""
    for name, every in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in every):
            return name
    return ""


def free_port(address: str) -> int:
    """A port that nobody has at this address now.

    From below those that kernels hand out by themselves: so it is still free when its user comes for it, minutes later.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(200):
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server((address, port), family=family):
            return port
    with socket.create_server((address, 0), family=family) as server:
        return int(server.getsockname()[1])


def _interfaces() -> dict[str, list[str]]:
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address for one in every if one.family in families and "%" not in one.address]
        for name, every in psutil.net_if_addrs().items()
        if name in up
    }


def _way_to(family: int, far: str) -> str:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((far, 9))
        return str(way.getsockname()[0])
    return ""
