"""The building blocks of faults."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vici import Session
from vici.exception import CommandException, SessionException

from ipsecgate.edges.bpf import elements
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import control
from ipsecgate.errors import GateError
from ipsecgate.lab.host import Host
from ipsecgate.lab.netns import NETLINK_XFRM
from ipsecgate.lab.path import index_of
from tests.chaos.targets import NEVER
from tests.chaos.world import World, ip
from tests.processes import process_state

PIDFD_GETFD = 438
STORM = 3000
OVERRUN = 200
VICI_TIMEOUT = 2.0  # seconds: another fault may have suspended the daemon

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def rewritten(world: World, change: Callable[[str], str]) -> Iterator[None]:
    """Change the configuration file without a reload; the end restores it."""
    config = world.gate.config
    before = config.read_text()
    config.write_text(change(before))
    try:
        yield
    finally:
        config.write_text(before)


def controller(world: World) -> int:
    """Return the controller's process id, or 0 if another fault has ended it."""
    process = world.gate.process
    return process.pid if process is not None and process.poll() is None else 0


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """Suspend a process (SIGSTOP) for the duration of the block; 0: do nothing."""
    if not pid:
        yield
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        while not is_stopped(pid):
            time.sleep(0.001)
    yield
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextmanager
def suspended_controller(world: World) -> Iterator[int]:
    """Suspend the controller for the duration of the block, and record for how long it was away.

    Yield its pid or 0. On a busy machine it returns late: when it answers.
    """
    pid, began = controller(world), time.monotonic()
    with suspended(pid):
        yield pid
    with suppress(GateError):
        control.ask(world.gate.paths.control, "status")
    world.suspended.append((began, time.monotonic()))


def reload(world: World) -> bool:
    """Request a reload; return False if it was refused or there is no controller."""
    try:
        control.ask(world.gate.paths.control, "reload")
    except GateError:
        return False
    return True


def either(world: World, rng: random.Random) -> Host:
    return rng.choice([world.lab.a, world.lab.b])


def vici(host: Host, command: str, **request: Any) -> None:
    """Send a VICI command; ignore a daemon that is down, suspended, or fails the command."""
    if command == "terminate":
        request = {"timeout": "-1", **request}
    with (
        suppress(OSError, CommandException, SessionException),
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(VICI_TIMEOUT)
        sock.connect(str(host.charon.vici_socket))
        answer = getattr(Session(sock), command)(request)
        if command == "terminate":
            list(answer)


def is_stopped(pid: int) -> bool:
    """Return whether a process is suspended, or has ended."""
    return process_state(pid) in (None, "T", "Z")


def delete(world: World, rng: random.Random, what: str, *, outbound: bool) -> None:
    """Delete a random state or policy of host a in that direction, if there is one."""
    command = ["ip", "-n", world.lab.a.namespace.name, "xfrm", what]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    site = world.lab.a.site
    local = [
        net for family in (4, 6) for net in (site.outer[family].ip, site.inner[family].network)
    ]
    found = []
    for block in f"\n{lines}".split("\nsrc ")[1:]:
        words = block.split()
        is_outbound = words[0].removesuffix("/128") in map(str, local)
        if "socket" in words or is_outbound is not outbound:
            continue
        name = ["src", words[0], "dst", words[2]]
        if what == "state":
            name += ["proto", "esp", "spi", words[words.index("spi") + 1]]
        else:
            name += ["dir", words[words.index("dir") + 1]]
        found.append(name)
    if found:
        ip(world.lab.a, "xfrm", what, "delete", *rng.choice(found))


def port(world: World, name: str, state: str) -> None:
    with world.lab.path.route() as route:
        route.link("set", index=index_of(route, name), state=state)


def route_of(world: World) -> dict[str, str]:
    lab = world.lab
    there, via = str(lab.b.site.inner[4].network), str(lab.b.outer[4])
    return {"dst": there, "gateway": via, "prefsrc": str(lab.a.inner[4])}


def storm_of_states(world: World, count: int) -> None:
    """Add and delete states that belong to no connection."""
    name = "src 192.0.2.77 dst 192.0.2.78 proto esp spi 0x{:x}"
    keys = f"enc cbc(aes) 0x{'11' * 16} auth-trunc hmac(sha256) 0x{'11' * 32} 128"
    lines = []
    for spi in range(0x1000, 0x1000 + count):
        lines += [f"xfrm state add {name.format(spi)} mode transport {keys}"]
        lines += [f"xfrm state delete {name.format(spi)}"]
    batch = ["ip", "-n", world.lab.a.namespace.name, "-batch", "-"]
    text = "\n".join(lines)
    subprocess.run(batch, input=text, text=True, capture_output=True, check=False)


def overrun(world: World, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Overrun the controller's XFRM socket: suspend it, and shrink its buffer to one message."""
    with suspended_controller(world) as pid:
        if pid:
            shrink(pid)
        storm_of_states(world, OVERRUN // 2)
        meanwhile()
        storm_of_states(world, OVERRUN // 2)


def shrink(pid: int) -> None:
    """Minimize the receive buffer of a process's XFRM socket."""
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            fd = _libc.syscall(PIDFD_GETFD, pidfd, int(entry.name), 0)
            if fd < 0:
                continue
            with suppress(OSError), socket.socket(fileno=fd) as sock:
                if sock.family == socket.AF_NETLINK and sock.proto == NETLINK_XFRM:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                fd = -1
            if fd >= 0:
                os.close(fd)
    finally:
        os.close(pidfd)


@contextmanager
def filled(world: World, name: str, keys: Iterator[bytes], value: bytes) -> Iterator[None]:
    """Fill a map of the hooks until it is full; the end deletes these entries."""
    fd = Pins(world.gate.paths.bpffs, world.gate.instance).current.open_map(name)
    added = []
    try:
        for key in keys:
            try:
                elements.update(fd, key, value)
            except OSError as error:
                if error.errno not in (errno.E2BIG, errno.ENOSPC, errno.ENOMEM):
                    raise
                break
            added.append(key)
        yield
    finally:
        for key in added:
            elements.delete(fd, key)
        os.close(fd)


def storm_at_never(world: World) -> None:
    """Make the hooks refuse thousands of different flows."""
    visit(world, world.gate.cgroup, STORM)


def visit(world: World, cgroup: Path, flows: int = 20) -> None:
    """Send to uncovered flows from a cgroup, which must refuse them all; count the results."""
    done = world.lab.a.run(World.argv("storm", NEVER, str(flows)), cgroup=cgroup)
    world.tally.attempts += flows
    world.tally.refused += int(done.stdout)
    world.tally.let_go += flows - int(done.stdout)
