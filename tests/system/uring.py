"""Just enough io_uring to make one socket(), connect() or sendmsg() through it.

Source: io_uring_setup(2), io_uring_enter(2), linux/io_uring.h. System call
numbers are the same on x86-64 and aarch64.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time

SETUP, ENTER = 425, 426
OP_SENDMSG, OP_CONNECT, OP_SOCKET = 9, 16, 45
SQPOLL, WAKE_UP = 1 << 1, 1 << 1  # flags of setup and enter: a kernel thread submits
OFF_SQ_RING, OFF_CQ_RING, OFF_SQES = 0, 0x8000000, 0x10000000

libc = ctypes.CDLL(None, use_errno=True)


def sockaddr(address: str, port: int) -> bytes:
    """Return struct sockaddr_in or sockaddr_in6."""
    if ":" in address:
        raw = socket.inet_pton(socket.AF_INET6, address)
        return struct.pack("=HH", socket.AF_INET6, socket.htons(port)) + bytes(4) + raw + bytes(4)
    raw = socket.inet_pton(socket.AF_INET, address)
    return struct.pack("=HH", socket.AF_INET, socket.htons(port)) + raw + bytes(8)


class Ring:
    """A ring with room for one request at a time; `setup` is SQPOLL or 0."""

    def __init__(self, setup: int = 0) -> None:
        """Set up the ring and map it. Raises: OSError."""
        params = ctypes.create_string_buffer(120)
        struct.pack_into("=I", params, 8, setup)
        self.fd = _set_up(params)
        self._wake_up = setup & WAKE_UP
        sq_entries, cq_entries = struct.unpack_from("=II", params, 0)
        # Offsets: head tail mask entries flags dropped array; head tail mask entries overflow cqes.
        self._sq_at = struct.unpack_from("=7I", params, 40)
        self._cq_at = struct.unpack_from("=6I", params, 80)
        sq_size, cq_size = self._sq_at[6] + 4 * sq_entries, self._cq_at[5] + 16 * cq_entries
        self._sq = mmap.mmap(self.fd, sq_size, offset=OFF_SQ_RING)
        self._cq = mmap.mmap(self.fd, cq_size, offset=OFF_CQ_RING)
        self._sqes = mmap.mmap(self.fd, 64 * sq_entries, offset=OFF_SQES)
        self._count = 0
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)  # with children forked later

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def submit(self, opcode: int, fd: int, address: int, length: int, offset: int) -> int:
        """Submit one request; return its result, -errno for an error. Raises: OSError."""
        entry = struct.pack("=BBHiQQIIQ", opcode, 0, 0, fd, offset, address, length, 0, 7)
        self._sqes[: len(entry)] = entry
        at, tail = self._sq_at[6], self._sq_at[1]
        self._sq[at : at + 4] = struct.pack("=I", 0)
        before = self._count
        self._count += 1
        self._sq[tail : tail + 4] = struct.pack("=I", self._count)
        if libc.syscall(ENTER, self.fd, 1, 0, self._wake_up, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        for _ in range(100):  # a connect() that passed the hooks waits for its SYN-ACK
            if struct.unpack_from("=I", self._cq, self._cq_at[1])[0] > before:
                break
            time.sleep(0.001)
        else:
            raise OSError(errno.EINPROGRESS, "under way")
        mask = struct.unpack_from("=I", self._cq, self._cq_at[2])[0]
        at = self._cq_at[5] + 16 * (before & mask)
        _user, result, _flags = struct.unpack_from("=QiI", self._cq, at)
        return int(result)


def _set_up(params: ctypes.Array[ctypes.c_char]) -> int:
    ring = int(libc.syscall(SETUP, 1, params))
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    return ring


def new() -> int:
    """Return the descriptor of a new ring. Raises: OSError."""
    return _set_up(ctypes.create_string_buffer(120))


def connect(sock: socket.socket, address: str, port: int) -> None:
    """Connect. Raises: OSError."""
    name = ctypes.create_string_buffer(sockaddr(address, port))
    with Ring() as ring:
        _raise(ring.submit(OP_CONNECT, sock.fileno(), ctypes.addressof(name), 0, len(name) - 1))


def polled_connect(ring: Ring, address: str, port: int) -> None:
    """Make a UDP socket and connect it, both in the ring's kernel thread. Raises: OSError.

    The thread works in the memory of the ring's maker, so the address is in `ring.shared`.
    """
    fd = ring.submit(OP_SOCKET, socket.AF_INET, 0, 0, socket.SOCK_DGRAM)
    _raise(fd)
    name = sockaddr(address, port)
    ring.shared[: len(name)] = name
    where = ctypes.addressof(ctypes.c_char.from_buffer(ring.shared))
    _raise(ring.submit(OP_CONNECT, fd, where, 0, len(name)))


def sendmsg(sock: socket.socket, address: str, port: int) -> None:
    """Send one byte. Raises: OSError."""
    name = ctypes.create_string_buffer(sockaddr(address, port))
    message, _kept = msghdr(name)
    raw = ctypes.create_string_buffer(message)
    with Ring() as ring:
        _raise(ring.submit(OP_SENDMSG, sock.fileno(), ctypes.addressof(raw), 1, 0))


def msghdr(name: ctypes.Array[ctypes.c_char]) -> tuple[bytes, tuple[object, ...]]:
    """Return struct msghdr for one byte, and the buffers that it points to (keep them alive)."""
    byte = ctypes.create_string_buffer(b"x")
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(byte), 1))
    header = struct.pack(
        "=QIIQQQQII",
        ctypes.addressof(name),
        len(name) - 1,
        0,
        ctypes.addressof(vector),
        1,
        0,
        0,
        0,
        0,
    )
    return header, (byte, vector)


def sendmmsg(sock: socket.socket, address: str, port: int) -> None:
    """Send two datagrams by one sendmmsg(2). Raises: OSError."""
    name = ctypes.create_string_buffer(sockaddr(address, port))
    header, _kept = msghdr(name)
    both = ctypes.create_string_buffer((header + bytes(8)) * 2)
    if libc.sendmmsg(sock.fileno(), both, 2, 0) < 0:
        raise OSError(ctypes.get_errno(), "sendmmsg")


def _raise(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
