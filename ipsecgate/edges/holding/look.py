"""Look at a held call: which address and which socket it names.

    glance    all that its flow depends on, as cheaply as possible, to recognise a known one
    inspect   its flow, to decide about it

Rule of this module: this may block for as long as the target likes, if the target itself serves the
memory that we read (userfaultfd, FUSE), or the "socket" whose copy we close (FUSE). So only an
inspector may do it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ipsecgate.core.codec.seccomp import (
    INET_LENGTHS,
    MSGHDR,
    Notification,
    RawNotification,
    destination,
)
from ipsecgate.core.model.flow import UDP, Flow
from ipsecgate.edges.holding import seccomp

TARGETS = 64  # threads whose descriptors and memory an inspector keeps within reach

Glance = tuple[object, ...]
"""Which call, with which address, by which kind of socket (`seccomp.socket_facts`); or a flow."""
NO_ADDRESS: Glance = ()
"""A message without an address, which needs no look at its socket."""


class Finding(NamedTuple):
    """The flow that a call asks for, and whether its caller expects the call to block."""

    flow: Flow
    blocking: bool


class Looker:
    """Looks at the calls of one listener's targets."""

    def __init__(self, listener: int, netns: int) -> None:
        self._listener = listener
        self._netns = netns
        self._abi = seccomp.abi()
        # By thread: its pidfd, which tells if another thread gets its number, and its memory.
        self._targets: dict[int, tuple[int, int]] = {}

    def glance(self, raw: RawNotification) -> Glance | None:
        """Return what a call's flow depends on; None if that takes an `inspect`.

        Raises: OSError, OverflowError, ValueError, likewise.
        """
        ident, pid, _, nr, arch, _, fd, second, third, _, fifth, sixth = raw
        abi = self._abi
        if arch != abi.arch:
            return None
        pidfd, memory = self._targets.get(pid) or self._reach(ident, pid)
        try:
            if nr == abi.connect:
                where, length = second, third & 0xFFFFFFFF
            elif nr == abi.sendto:
                where, length = fifth, sixth & 0xFFFFFFFF
            else:
                header = os.pread(memory, MSGHDR.size, second)
                if len(header) != MSGHDR.size:
                    raise ProcessLookupError
                where, length = MSGHDR.unpack(header)
                if not where:
                    return NO_ADDRESS
            if not where or length not in INET_LENGTHS:
                return None
            address = os.pread(memory, length, where)
            if len(address) != length:  # perhaps the thread has another memory, since execve()
                raise ProcessLookupError
            return nr, address, seccomp.socket_facts(pidfd, fd & 0xFFFFFFFF)
        except ProcessLookupError:
            self._forget(pid)
            return None

    def _reach(self, ident: int, pid: int) -> tuple[int, int]:
        """Open a caller's pidfd and memory. Raises: OSError if that is impossible."""
        if len(self._targets) >= TARGETS:
            self._forget(next(iter(self._targets)))
        pidfd = seccomp.open_thread(pid)
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(pidfd)
            raise
        self._targets[pid] = pidfd, memory
        # Only if the call still waits did we open its own thread, not another one with that pid.
        if not seccomp.is_waiting(self._listener, ident):
            self._forget(pid)
            raise ProcessLookupError
        return pidfd, memory

    def _forget(self, pid: int) -> None:
        for fd in self._targets.pop(pid):
            os.close(fd)

    def inspect(self, call: Notification) -> Finding | None:
        """Return what a call asks for; None if it names no Internet address.

        Raises: OSError; ValueError if the descriptor is not an Internet socket.
        """
        to = destination(
            call, self._abi, lambda address, length: seccomp.read_memory(call.pid, address, length)
        )
        if to is None:
            return None
        sock = seccomp.inspect_socket(seccomp.copy_descriptor(call.pid, call.fd))
        # Only if the call still waits did we read its own thread, not another one with that pid.
        if not seccomp.is_waiting(self._listener, call.id):
            return None
        daddr, dport = to
        saddr = sock.saddr if sock.saddr and sock.saddr.version == daddr.version else None
        netns = 0 if sock.netns == self._netns else sock.netns
        mark = 0 if netns else sock.mark
        flow = Flow(daddr, sock.proto, dport, saddr, sock.sport, mark, sock.device, netns)
        connects_udp = call.nr == self._abi.connect and sock.proto == UDP
        return Finding(flow, sock.blocking and not connects_udp)
