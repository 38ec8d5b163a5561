"""Two hosts for a test: network namespaces with a cable between them, or one loopback where those are not allowed."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

INTERFACE = "eth0"
ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of TEST-NET-1: nobody's."""


@dataclass(frozen=True)
class Host:
    """Where a command runs that begins with `inside`; others reach it by `address`."""

    address: str
    interface: str
    inside: tuple[str, ...] = ()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, str]]:
    """Both, and why they are not apart, if they are not; namespaces are gone afterwards."""
    with ExitStack() as held:
        if shutil.which("ip") is None:
            reason = "there is no command ip (Debian: apt-get install iproute2)"
        else:
            try:
                yield (*_apart(held), "")
                return
            except _Refused as refused:
                reason = str(refused)
        alike = Host("127.0.0.1", "lo")
        yield alike, alike, reason


class _Refused(Exception):
    """The system does not let this process make namespaces."""


def _apart(held: ExitStack) -> tuple[Host, Host]:
    names = [f"longtake-{os.getpid()}-{number}" for number in (0, 1)]
    for name in names:
        _ip("netns", "add", name)
        held.callback(_ip, "netns", "delete", name)  # the cable goes with the last process inside
    ends = [["netns", name, "name", INTERFACE] for name in names]
    _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        _ip("-netns", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-netns", name, "link", "set", interface, "up")
        _ip("netns", "exec", name, "true")
    first, second = (
        Host(address, INTERFACE, ("ip", "netns", "exec", name)) for name, address in zip(names, ADDRESSES, strict=True)
    )
    return first, second


def _ip(*arguments: str) -> None:
    ended = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if ended.returncode != 0:
        raise _Refused(f"ip {' '.join(arguments)}: {ended.stderr.strip()}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
