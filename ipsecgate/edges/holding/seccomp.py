"""seccomp's user notification: one thin wrapper per system call.

Source: seccomp(2), seccomp_unotify(2), pidfd_getfd(2), process_vm_readv(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import sys
from functools import cache, lru_cache
from pathlib import Path

from ipsecgate.core.codec.seccomp import (
    ABIS,
    Abi,
    has_signal,
    response,
    thread_group,
)
from ipsecgate.core.model.flow import Address, parse_address
from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError, KernelLacksError

# linux/seccomp.h
SET_MODE_FILTER = 1
NEW_LISTENER, WAIT_KILLABLE_RECV = 1 << 3, 1 << 5
RECEIVE, SEND, ID_VALID = 0xC0502100, 0xC0182101, 0x40082102  # SECCOMP_IOCTL_NOTIF_*
SET_FLAGS, SYNC_WAKE_UP = 0x40082104, 1 << 0
PIDFD_GETFD = 438  # the same number on every architecture
PIDFD_THREAD = os.O_EXCL  # Linux 6.9: a pidfd of any thread, not only of the process's first

# Source: asm-generic/socket.h
SO_MARK, SO_PROTOCOL, SO_DOMAIN, SO_BINDTOIFINDEX, SO_NETNS_COOKIE = 36, 38, 39, 62, 71
IPPROTO_MPTCP = 262
_CSocket = socket.SocketType  # what `socket.socket` derives from: quicker to make
LISTENER_NAME = "anon_inode:seccomp notify"

_libc = ctypes.CDLL(None, use_errno=True)
# Prototypes, because a call by one takes half the time.
_ioctl = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True
)(("ioctl", _libc))
_getfd = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_uint, use_errno=True
)(("syscall", _libc))


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_char_p))


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def abi() -> Abi:
    """Return this machine's system call numbers. Raises: KernelLacksError."""
    machine = os.uname().machine
    if machine not in ABIS:
        raise KernelLacksError(
            f"system calls cannot be held on {machine}", hint=f"holding works on {', '.join(ABIS)}"
        )
    return ABIS[machine]


def _check(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def install(program: bytes) -> int:
    """Install a filter for this thread and its descendants; return the listener, close-on-exec.

    `program`: struct sock_filter[]. Once the supervisor has received a call, only a fatal signal
    interrupts it (WAIT_KILLABLE_RECV). Raises: GateError, KernelLacksError.
    """
    filters = _Program(len(program) // 8, program)
    flags = NEW_LISTENER | WAIT_KILLABLE_RECV
    number = abi().seccomp
    try:
        return _check(
            _libc.syscall(number, SET_MODE_FILTER, flags, ctypes.byref(filters)), "seccomp"
        )
    except OSError as error:
        match error.errno:
            case errno.EBUSY:
                raise GateError(
                    "this process already has a seccomp listener",
                    hint="a process tree can have only one: do not run `exec` inside `exec`, or "
                    "in a container that has a listener",
                ) from error
            case errno.EACCES:
                raise GateError(
                    "a seccomp filter needs CAP_SYS_ADMIN", hint="run it as root"
                ) from error
            case errno.EINVAL | errno.ENOSYS:
                raise KernelLacksError(
                    "the kernel cannot hold system calls",
                    hint="boot Linux 5.19 or newer with CONFIG_SECCOMP_FILTER",
                ) from error
        raise GateError(f"cannot install the seccomp filter: {error.strerror}") from error


def is_listener(fd: int) -> bool:
    """Return whether a descriptor is a seccomp listener. Raises: OSError."""
    return str(Path(f"/proc/self/fd/{fd}").readlink()) == LISTENER_NAME


def wake_on_one_processor(listener: int) -> None:
    """Have target and supervisor wake each other on the processor that they are on.

    Otherwise each call waits for an idle processor to wake up, twice. Before Linux 6.6 nothing
    happens.
    """
    _libc.ioctl(listener, ctypes.c_ulong(SET_FLAGS), ctypes.c_ulong(SYNC_WAKE_UP))


def has_call(listener: int, seconds: float = 0.0) -> bool:
    """Return whether a call waits to be received, within so many seconds."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(seconds * 1000))


def is_over(listener: int) -> bool:
    """Return whether no process is left that could call."""
    poll = select.poll()
    poll.register(listener, 0)
    return bool(poll.poll(0))


def receive(listener: int, buffer: int) -> bool:
    """Have the kernel write struct seccomp_notif to an address of ours, which must be zeroed.

    Blocks if no call waits. Returns False if the target went away. Raises: OSError.
    """
    if _ioctl(listener, RECEIVE, buffer) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOENT, errno.EINTR):
        return False
    raise OSError(number, f"seccomp listener: {os.strerror(number)}")


def answer(listener: int, ident: int, error: int | None) -> None:
    """Fail a call with an errno, or let it continue (None); no error if it no longer waits.

    Raises: OSError.
    """
    try:  # quicker than `suppress`
        fcntl.ioctl(listener, SEND, response(ident, error))
    except FileNotFoundError:
        return


def is_waiting(listener: int, ident: int) -> bool:
    """Return whether a call still waits for its answer. Raises: OSError."""
    try:
        fcntl.ioctl(listener, ID_VALID, ident.to_bytes(8, sys.byteorder))
    except FileNotFoundError:
        return False
    return True


def read_memory(pid: int, address: int, length: int) -> bytes:
    """Read another process's memory, up to the first unmapped page. Raises: OSError."""
    buffer = ctypes.create_string_buffer(length)
    local = _Vector(ctypes.addressof(buffer), length)
    remote = _Vector(address, length)
    copied = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw[: _check(copied, "process_vm_readv")]


def copy_descriptor(pid: int, fd: int) -> int:
    """Return our own copy of a descriptor that another process's thread `pid` has open.

    Raises: OSError; EBADF if the thread has no such descriptor.
    """
    try:
        process = open_thread(pid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
        # Before 6.9: open the process's first thread, which usually shares the descriptor table.
        process = os.pidfd_open(thread_group(_status(pid)))
    try:
        return _check(_getfd(PIDFD_GETFD, process, fd, 0), "pidfd_getfd")
    finally:
        os.close(process)


def open_thread(pid: int) -> int:
    """Return a pidfd of a thread. Raises: OSError; before Linux 6.9 if it is not a first one."""
    try:
        return os.pidfd_open(pid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.pidfd_open(pid)


def is_interrupted(pid: int) -> bool:
    """Return whether a waiting thread is certain to run a signal handler."""
    try:
        return has_signal(_status(pid))
    except OSError:
        return False


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text(errors="replace")


@lru_cache(maxsize=256)
def _bound(host: str) -> Address | None:
    address = parse_address(host.partition("%")[0])
    return None if address.is_unspecified else address


@value
class Socket:
    """The properties of a socket that determine its flows.

    `saddr` is None and `sport` 0 if it is not bound; `netns` is the namespace's cookie, `device`
    the interface index that it is bound to, 0: none.
    """

    proto: int
    saddr: Address | None
    sport: int
    mark: int
    blocking: bool
    netns: int
    device: int


def socket_facts(pidfd: int, fd: int) -> tuple[object, ...]:
    """Return what a flow depends on of a socket that a thread has open, by its pidfd.

    That is its own address, mark, protocol, device and network namespace.

    Cheaper than `inspect_socket`, but only good to compare with what it returned before.
    Raises: OSError; ESRCH if the thread has ended; ValueError for a strange address.
    """
    copy = _getfd(PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    sock = _CSocket(socket.AF_INET6, socket.SOCK_STREAM, 0, copy)
    try:
        return (
            sock.getsockname(),
            sock.getsockopt(socket.SOL_SOCKET, SO_MARK),
            sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL),
            sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX),
            sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8),
        )
    finally:
        sock.close()


def inspect_socket(fd: int) -> Socket:
    """Return an Internet socket's properties, and close the descriptor.

    Raises: OSError; ValueError if it is another kind of socket, because a caller may pass an
    Internet address with any socket.
    """
    try:
        # Pass family and type, so that Python does not query them: with AF_INET6, getsockname()
        # has room for the longer name.
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=fd)
    except OSError:
        os.close(fd)
        raise
    with sock:
        if sock.getsockopt(socket.SOL_SOCKET, SO_DOMAIN) not in (socket.AF_INET, socket.AF_INET6):
            raise ValueError("not an Internet socket")
        proto = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        mark = sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & 0xFFFFFFFF
        netns = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        device = sock.getsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX)
        blocking = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        host, port, *_ = sock.getsockname()
    return Socket(
        socket.IPPROTO_TCP if proto == IPPROTO_MPTCP else proto,
        _bound(host),
        port,
        mark,
        blocking,
        int.from_bytes(netns, sys.byteorder),
        device,
    )
