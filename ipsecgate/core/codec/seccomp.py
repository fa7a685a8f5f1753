"""Codec for seccomp user notification: the filter, its notifications, and the responses.

    connect(), sendto()    reported if the address has the length of an Internet one; a filter
                           sees the arguments, but not the memory that they point to
    sendmsg(), sendmmsg()  always reported, if the filter was built with `datagrams`

Rules of this module: a call of a foreign architecture or of x32, or one that cannot be read, is not
held. That lets nothing through, because the hooks decide about every call.

Source: seccomp_unotify(2); linux/seccomp.h, linux/filter.h, linux/audit.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address

from ipsecgate.core.model.flow import Address, unmap
from ipsecgate.core.model.value import value


@value
class Abi:
    """A machine's AUDIT_ARCH_* and system call numbers."""

    arch: int
    seccomp: int
    connect: int
    sendto: int
    sendmsg: int
    sendmmsg: int


ABIS = {
    "x86_64": Abi(0xC000003E, 317, connect=42, sendto=44, sendmsg=46, sendmmsg=307),
    "aarch64": Abi(0xC00000B7, 277, connect=203, sendto=206, sendmsg=211, sendmmsg=269),
}

# struct sockaddr_in, sockaddr_in6 and sockaddr_storage.
INET_LENGTHS = (16, 28, 128)
AF_UNSPEC, AF_INET, AF_INET6 = 0, 2, 10

RET_ALLOW, RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
NR, ARCH, ARGUMENTS = 0, 4, 16  # in struct seccomp_data

ERESTARTNOINTR = 513  # linux/errno.h, kernel-internal: restart the call after the signal handler
NOTIFICATION = struct.Struct("=QIIiIQ6Q")
RESPONSE = struct.Struct("=QqiI")
CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE

_INSTRUCTION = struct.Struct("=HBBI")
# The start of struct msghdr, and so of struct mmsghdr: msg_name, msg_namelen.
MSGHDR = struct.Struct("=QI")

RawNotification = tuple[int, int, int, int, int, int, int, int, int, int, int, int]
"""The fields of struct seccomp_notif: id, pid, flags; nr, arch, instruction, six arguments."""

Read = Callable[[int, int], bytes]
"""Reads (address, length) of the target's memory; returns fewer bytes where it is not mapped."""


class NotificationError(ValueError):
    """Bytes that no kernel writes."""


def program(abi: Abi, *, datagrams: bool = False) -> bytes:
    """Return the filter as struct sock_filter[]. `datagrams`: also report sendmsg(), sendmmsg()."""
    lines = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 1, 0, abi.arch),
        (RETURN, 0, 0, RET_ALLOW),
        (LOAD, 0, 0, NR),
        *_if_internet(abi.connect, 2),
        *_if_internet(abi.sendto, 5),
    ]
    for number in (abi.sendmsg, abi.sendmmsg) if datagrams else ():
        lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, RET_USER_NOTIF)]
    lines.append((RETURN, 0, 0, RET_ALLOW))
    return b"".join(_INSTRUCTION.pack(*line) for line in lines)


def _if_internet(number: int, argument: int) -> Sequence[tuple[int, int, int, int]]:
    """Return instructions that report a call if its length argument is one of `INET_LENGTHS`."""
    lengths = [
        (JUMP_EQUAL, left, 0, length) for left, length in zip((3, 2, 1), INET_LENGTHS, strict=True)
    ]
    return [
        (JUMP_EQUAL, 0, 6, number),
        (LOAD, 0, 0, ARGUMENTS + 8 * argument),  # the low half: both machines are little-endian
        *lengths,
        (RETURN, 0, 0, RET_ALLOW),
        (RETURN, 0, 0, RET_USER_NOTIF),
    ]


@value
class Notification:
    """A held call: struct seccomp_notif. `pid` is the calling thread's id."""

    id: int
    pid: int
    nr: int
    arch: int
    args: tuple[int, ...]

    @property
    def fd(self) -> int:
        """The target's descriptor of the socket: the first argument of all these calls."""
        return self.args[0] & 0xFFFFFFFF


def notification(raw: bytes) -> Notification:
    """Decode struct seccomp_notif. Raises: NotificationError."""
    if len(raw) != NOTIFICATION.size:
        raise NotificationError(f"notification of {len(raw)} bytes, not {NOTIFICATION.size}")
    ident, pid, _flags, nr, arch, _ip, *args = NOTIFICATION.unpack(raw)
    return Notification(ident, pid, nr, arch, tuple(args))


def response(ident: int, error: int | None) -> bytes:
    """Encode struct seccomp_notif_resp: fail with the errno, or continue the call if it is None."""
    return RESPONSE.pack(ident, 0, -(error or 0), CONTINUE if error is None else 0)


def destination(call: Notification, abi: Abi, read: Read) -> tuple[Address, int] | None:
    """Return a call's destination address and port; None if it has no Internet address.

    For sendmmsg() that is the first message's. The call returns how many messages were sent, and
    the caller must repeat it for one that was refused.
    """
    if call.arch != abi.arch:
        return None  # a container's filter may report foreign architectures, too
    if call.nr == abi.connect:
        where, length = call.args[1:3]
    elif call.nr == abi.sendto:
        where, length = call.args[4:6]
    elif call.nr not in (abi.sendmsg, abi.sendmmsg):
        return None
    else:
        header = read(call.args[1], MSGHDR.size)
        if len(header) < MSGHDR.size:
            return None  # the kernel will return EFAULT
        where, length = MSGHDR.unpack(header)
    length = min(length & 0xFFFFFFFF, max(INET_LENGTHS))
    if not where or length < min(INET_LENGTHS):
        return None
    return sockaddr(read(where, length), to_send=call.nr != abi.connect)


def sockaddr(raw: bytes, *, to_send: bool = False) -> tuple[Address, int] | None:
    """Decode struct sockaddr_in or sockaddr_in6, v4-mapped as IPv4; None for any other.

    AF_UNSPEC means "disconnect" to connect(), and AF_INET to the sending calls (`to_send`).
    """
    if len(raw) < 16:
        return None
    (family,), (port,) = struct.unpack_from("=H", raw), struct.unpack_from("!H", raw, 2)
    if family == AF_INET or (family == AF_UNSPEC and to_send):
        return IPv4Address(raw[4:8]), port
    if family == AF_INET6 and len(raw) >= 24:
        return unmap(IPv6Address(raw[8:24])), port
    return None


def has_signal(status: str) -> bool:
    """Return whether the thread is certain to run a signal handler, given /proc/TID/status.

    Another thread may handle a signal that is pending for the whole process, so that counts only if
    there is no other thread. Source: proc(5). Raises: NotificationError.
    """
    pending, shared, blocked, caught, threads = (
        int(_word(status, name), 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigCgt", "Threads")
    )
    return bool((pending | (shared if threads == 1 else 0)) & caught & ~blocked)


def thread_group(status: str) -> int:
    """Return the process id (thread group) in /proc/TID/status. Raises: NotificationError."""
    return int(_word(status, "Tgid", "[0-9]{1,10}"))


def _word(status: str, name: str, digits: str = "[0-9a-f]{1,16}") -> str:
    found = re.search(rf"^{name}:\s*({digits})$", status, re.MULTILINE)
    if found is None:
        raise NotificationError(f"no {name} in a thread's status")
    return found[1]
