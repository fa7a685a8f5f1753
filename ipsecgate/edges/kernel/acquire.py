"""Ask the IKE daemon for an SA as the kernel does, without a packet."""

from __future__ import annotations

import os
import socket

from ipsecgate.core.codec.netlink import dump_end
from ipsecgate.core.codec.xfrm_acquire import encode_acquire
from ipsecgate.core.model.ipsec import Acquire
from ipsecgate.edges.kernel.xfrm import NETLINK_XFRM

ANSWER_LIMIT = 1 << 16  # bytes


def send(acquire: Acquire) -> None:
    """Have the kernel pass an ACQUIRE to the daemons of this network namespace.

    The kernel has done so when it answers, which it does before send() returns. That says nothing
    about the daemon. Raises: OSError with the kernel's errno.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, kind, NETLINK_XFRM) as sock:
        sock.send(encode_acquire(acquire, sequence=1))
        answer = dump_end(sock.recv(ANSWER_LIMIT), sequence=1)
    if answer is not None and answer.error:
        raise OSError(answer.error, f"ACQUIRE: {os.strerror(answer.error)}")
