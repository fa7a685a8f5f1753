"""Named network namespaces: create, enter, inspect, remove.

Rules of this module: every name is `<prefix>-<pid of the owner>-<role>`, so that labs of
different owners can coexist, and the leftovers of a dead owner can be distinguished from the
namespaces of a live one. Only the calling thread changes its namespace, and it always returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ipsecgate.core.model.flow import Address
from ipsecgate.errors import GateError

if TYPE_CHECKING:
    from pyroute2 import IPRoute

RUN = Path("/run/netns")
CLONE_NEWNET = 0x40000000
NETLINK_XFRM = 6
XFRM_MSG_FLUSHSA = 28
XFRM_MSG_FLUSHPOLICY = 29
CLOSE_WAIT = "08"
# SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
OPENING_OR_CLOSING = {"03", "04", "05", CLOSE_WAIT, "09", "0B"}
REQUEST_WITH_ACK = 0x1 | 0x4

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(GateError):
    """The lab cannot be built as requested, or an operation in it failed."""


def setns(fd: int) -> None:
    """Move the calling thread to the network namespace behind `fd`. Raises: OSError."""
    if _libc.setns(fd, CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"setns({fd})")


class Namespace:
    """One network namespace, created at construction and removed by `remove()`."""

    def __init__(self, name: str) -> None:
        # pyroute2 would fork this whole process; ip(8) needs only a vfork, five times as fast.
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.name = name
        self.path = RUN / name

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run the calling thread in the namespace; sockets opened meanwhile stay in it."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                setns(home)
        finally:
            os.close(home)

    def route(self) -> IPRoute:
        """Return a new rtnetlink socket in the namespace; the caller closes it."""
        from pyroute2 import IPRoute  # noqa: PLC0415 - optional: `ipsecgate demo --help` has no need

        with self.inside():
            return IPRoute()

    def sysctl(self, key: str, value: str) -> None:
        """Set a per-namespace sysctl, `key` with slashes. Raises: OSError."""
        with self.inside():
            Path("/proc/sys/net", key).write_text(value)

    def proc(self, name: str) -> str:
        """Read /proc/net/`name` of the namespace; "" if this kernel does not have it."""
        with self.inside():
            # /proc/net shows the main thread's namespace, not this thread's.
            try:
                return Path("/proc/thread-self/net", name).read_text()
            except FileNotFoundError:
                return ""

    def tcp_is_quiet(self) -> bool:
        """Return whether no TCP connection is opening or closing, so that none sends by itself.

        Source: the states of include/net/tcp_states.h, fourth column of /proc/net/tcp.
        """
        return self._tcp_states().isdisjoint(OPENING_OR_CLOSING)

    def has_close_wait(self) -> bool:
        """Return whether a process here has yet to close a connection that its peer closed."""
        return CLOSE_WAIT in self._tcp_states()

    def _tcp_states(self) -> set[str]:
        lines = (self.proc("tcp") + self.proc("tcp6")).splitlines()
        return {line.split()[3] for line in lines}

    def counters(self) -> dict[str, int]:
        """Return the kernel's counters by nstat(8) name, such as TcpExtTCPSynRetrans.

        These are all of /proc/net/{snmp,netstat,snmp6,xfrm_stat}. XfrmOutNoStates and the like are
        missing on a kernel without CONFIG_XFRM_STATISTICS.
        """
        found: dict[str, int] = {}
        for name in ("snmp", "netstat"):
            lines = [line.split() for line in self.proc(name).splitlines()]
            for head, values in zip(lines[::2], lines[1::2], strict=True):
                group = head[0].rstrip(":")
                numbers = zip(head[1:], values[1:], strict=True)
                found |= {group + key: int(value) for key, value in numbers}
        for name in ("snmp6", "xfrm_stat"):
            for line in self.proc(name).splitlines():
                key, value = line.split()
                found[key] = int(value)
        return found

    def flush_xfrm(self, *, states: bool = True, policies: bool = True) -> None:
        """Flush the namespace's SAD (including larval states), its SPD, or both.

        The policies of charon's own sockets stay: a flush does not cover them.
        Source: xfrm_flush_sa() and xfrm_flush_policy() in net/xfrm/xfrm_user.c.
        """
        with self.inside():
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
        with netlink:
            for number, wanted in ((XFRM_MSG_FLUSHSA, states), (XFRM_MSG_FLUSHPOLICY, policies)):
                if not wanted:
                    continue
                body = bytes(8) if number == XFRM_MSG_FLUSHSA else b""
                head = struct.pack("=IHHII", 16 + len(body), number, REQUEST_WITH_ACK, 1, 0)
                netlink.send(head + body)
                (code,) = struct.unpack_from("=i", netlink.recv(4096), 16)
                # The kernel answers ESRCH if the table is already empty.
                if code not in (0, -3):
                    raise OSError(-code, os.strerror(-code), f"XFRM flush in {self.name}")

    def try_sa(self, source: Address, destination: Address) -> None:
        """Add an SA with the lab's ciphers and delete it. Raises: LabError without ESP."""
        name = f"src {source} dst {destination} proto esp spi 0x1000"
        keys = ("enc", "cbc(aes)", "0x" + "11" * 16, "auth-trunc", "hmac(sha256)", "0x" + "11" * 32)
        ip = ["ip", "-n", self.name, "xfrm", "state"]
        for argv in (
            [*ip, "add", *name.split(), "mode", "transport", *keys, "128"],
            [*ip, "delete", *name.split()],
        ):
            run = subprocess.run(argv, capture_output=True, text=True, check=False)
            if run.returncode:
                raise LabError(
                    f"cannot add an ESP SA in {self.name}: {run.stderr.strip()}",
                    hint="`ipsecgate check` shows what the kernel lacks",
                )

    def pids(self) -> list[int]:
        """Return the processes whose main thread is in the namespace."""
        return pids_in(self.path)

    def remove(self) -> None:
        """Kill the processes in the namespace and remove it."""
        discard(self.path)


def pids_in(path: Path) -> list[int]:
    """Return the processes whose main thread is in the namespace at `path`."""
    wanted = path.stat()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            have = (entry / "ns/net").stat()
            if (have.st_dev, have.st_ino) == (wanted.st_dev, wanted.st_ino):
                found.append(int(entry.name))
    return found


def discard(path: Path) -> None:
    """Kill the processes of a named namespace and remove it, even if only its file is left."""
    from pyroute2 import netns as pyroute2_netns  # noqa: PLC0415

    try:
        for pid in pids_in(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # For a bare name it looks in /var/run, which need not be /run.
        pyroute2_netns.remove(str(path))
    except FileNotFoundError:
        if path.exists():
            raise  # otherwise another lab has removed it


def is_leftover(name: str, prefix: str) -> bool:
    """Return whether `name` is `<prefix>-<pid>` or `<prefix>-<pid>-…` of a dead process.

    Our own pid counts as dead: call this only when no lab of that prefix is open.
    """
    found = re.fullmatch(re.escape(prefix) + r"-(\d+)(-.*)?", name)
    if found is None:
        return False
    return int(found[1]) == os.getpid() or not Path("/proc", found[1]).exists()
