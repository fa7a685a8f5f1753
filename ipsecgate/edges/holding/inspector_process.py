"""The process that looks at held calls: struct seccomp_notif in, what flow that is out.

    standard input -> sockets, a thread for each -> a call comes in, its answer goes out

Rules of this module: a thread that a caller keeps waiting is nobody else's; whoever reads
the answers believes an address and some numbers, no more; little is imported, since it
starts when the first call may come.
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

from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, destination, notification
from ipsecgate.core.model.flow import UDP, Address, Flow, unmap
from ipsecgate.edges.holding import seccomp

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STACK = 256 << 10  # bytes a thread

# Whether there is a flow and whether its caller waits; protocol, ports, mark, addresses.
ANSWER = struct.Struct("=BBHHI16s16s")
NOTHING, IMPATIENT, PATIENT = range(3)
NOWHERE = bytes(16)
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2

Found = tuple[Flow, bool]
"""What a call asks for, and whether its caller is prepared to wait."""


def main() -> None:
    """Serve every socket that comes by standard input, until that is closed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    netns = seccomp.look(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()).netns
    threading.stack_size(STACK)
    with socket.socket(fileno=0) as controller:
        while True:
            said, fds, *_ = socket.recv_fds(controller, 1, 1)
            if not said:
                os._exit(0)  # no thread is waited for
            for fd in fds:
                with suppress(RuntimeError):  # no thread to be had: closed, hence told
                    asker = socket.socket(fileno=fd)
                    threading.Thread(target=serve, args=(asker, netns), daemon=True).start()
                del asker


def serve(asker: socket.socket, netns: int) -> None:
    """Answer what is asked on a socket until nobody asks; first, say that it can be."""
    with asker, suppress(OSError):
        asker.send(encode(None))
        while raw := asker.recv(NOTIFICATION.size):
            try:
                found = look(notification(raw), netns)
            except (OSError, ValueError):
                found = None
            asker.send(encode(found))


def look(call: Notification, netns: int) -> Found | None:
    """Look at what a call asks for; None for nothing on the Internet, or in another namespace.

    Raises: OSError; ValueError.
    """
    abi = seccomp.abi()
    to = destination(call, abi, lambda where, length: seccomp.read(call.pid, where, length))
    if to is None:
        return None
    sock = seccomp.look(seccomp.take(call.pid, call.fd))
    if sock.netns != netns:
        return None
    daddr, dport = to
    saddr = sock.saddr if sock.saddr and sock.saddr.version == daddr.version else None
    flow = Flow(daddr, sock.proto, dport, saddr, sock.sport, sock.mark)
    connects_udp = call.nr == abi.connect and sock.proto == UDP
    return flow, sock.blocking and not connects_udp


def encode(found: Found | None) -> bytes:
    """Return an answer as bytes, in host byte order."""
    if found is None:
        return ANSWER.pack(NOTHING, 0, 0, 0, 0, NOWHERE, NOWHERE)
    flow, patient = found
    return ANSWER.pack(
        PATIENT if patient else IMPATIENT,
        flow.proto,
        flow.dport,
        flow.sport,
        flow.mark,
        _packed(flow.daddr),
        _packed(flow.saddr),
    )


def decode(raw: bytes) -> Found | None:
    """Read an answer; what is none says nothing."""
    if len(raw) != ANSWER.size:
        return None
    kind, proto, dport, sport, mark, daddr, saddr = ANSWER.unpack(raw)
    if kind not in (IMPATIENT, PATIENT):
        return None
    source = None if saddr == NOWHERE else unmap(IPv6Address(saddr))
    return Flow(unmap(IPv6Address(daddr)), proto, dport, source, sport, mark), kind == PATIENT


def _packed(address: Address | None) -> bytes:
    if address is None:
        return NOWHERE
    return MAPPED + address.packed if address.version == 4 else address.packed
