"""The inspector process: reads the memory and the socket of targets.

    standard input   receives one socket per listener; each gets a thread
    each socket      struct seccomp_notif in; the finding, or "nothing", out

Rules of this module:
- Each thread serves one listener, so a target that blocks its thread delays only itself.
- The controller treats a finding as untrusted data: one address and a few numbers.
- Import little: the process starts when the first call may already be waiting.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import threading
from contextlib import suppress
from ipaddress import IPv6Address
from typing import NamedTuple

from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, destination, notification
from ipsecgate.core.model.flow import UDP, Address, Flow, unmap
from ipsecgate.edges.holding import seccomp

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STACK = 256 << 10  # bytes per thread

# The kind of answer, then protocol, destination port, source port, mark, destination, source.
# In host byte order; addresses are IPv6, or IPv4 mapped into it.
ANSWER = struct.Struct("=BBHHI16s16s")
NOTHING, NON_BLOCKING, BLOCKING = range(3)
NO_ADDRESS = bytes(16)
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2


class Finding(NamedTuple):
    """The flow that a call asks for, and whether its caller expects the call to block."""

    flow: Flow
    blocking: bool


def main() -> None:
    """Serve every socket that arrives on standard input, until that is closed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    netns = seccomp.inspect_socket(own.detach()).netns
    threading.stack_size(STACK)
    with socket.socket(fileno=0) as controller:
        while True:
            data, fds, *_ = socket.recv_fds(controller, 1, 1)
            if not data:
                os._exit(0)  # do not wait for threads: some may be blocked for ever
            for fd in fds:
                # If no thread can start, the socket is closed, and the controller notices.
                with suppress(RuntimeError):
                    inspector = socket.socket(fileno=fd)
                    threading.Thread(target=serve, args=(inspector, netns), daemon=True).start()
                del inspector


def serve(inspector: socket.socket, netns: int) -> None:
    """Report that we are ready, then answer notifications until the other end closes."""
    with inspector, suppress(OSError):
        inspector.send(encode(None))
        while raw := inspector.recv(NOTIFICATION.size):
            try:
                finding = inspect(notification(raw), netns)
            except (OSError, ValueError):
                finding = None
            inspector.send(encode(finding))


def inspect(call: Notification, netns: int) -> Finding | None:
    """Return what a call asks for; None if it names no Internet address or another netns.

    Raises: OSError; ValueError if the descriptor is not an Internet socket.
    """
    abi = seccomp.abi()
    to = destination(
        call, abi, lambda address, length: seccomp.read_memory(call.pid, address, length)
    )
    if to is None:
        return None
    sock = seccomp.inspect_socket(seccomp.copy_descriptor(call.pid, call.fd))
    if sock.netns != netns:
        return None
    daddr, dport = to
    saddr = sock.saddr if sock.saddr and sock.saddr.version == daddr.version else None
    flow = Flow(daddr, sock.proto, dport, saddr, sock.sport, sock.mark)
    connects_udp = call.nr == abi.connect and sock.proto == UDP
    return Finding(flow, sock.blocking and not connects_udp)


def encode(finding: Finding | None) -> bytes:
    """Return an `ANSWER`."""
    if finding is None:
        return ANSWER.pack(NOTHING, 0, 0, 0, 0, NO_ADDRESS, NO_ADDRESS)
    flow, blocking = finding
    return ANSWER.pack(
        BLOCKING if blocking else NON_BLOCKING,
        flow.proto,
        flow.dport,
        flow.sport,
        flow.mark,
        _packed(flow.daddr),
        _packed(flow.saddr),
    )


def decode(raw: bytes) -> Finding | None:
    """Read an `ANSWER`; None for "nothing" and for bytes that are not an answer."""
    if len(raw) != ANSWER.size:
        return None
    kind, proto, dport, sport, mark, daddr, saddr = ANSWER.unpack(raw)
    if kind not in (NON_BLOCKING, BLOCKING):
        return None
    source = None if saddr == NO_ADDRESS else unmap(IPv6Address(saddr))
    flow = Flow(unmap(IPv6Address(daddr)), proto, dport, source, sport, mark)
    return Finding(flow, kind == BLOCKING)


def _packed(address: Address | None) -> bytes:
    if address is None:
        return NO_ADDRESS
    return MAPPED + address.packed if address.version == 4 else address.packed
