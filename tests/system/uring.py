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


def _submit(fd: int, opcode: int, address: int, length: int, offset: int, *, setup: int = 0) -> int:
    """Submit one request; return its result, -errno for an error. Raises: OSError."""
    params = ctypes.create_string_buffer(120)
    struct.pack_into("=I", params, 8, setup)
    ring = libc.syscall(SETUP, 1, params)
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    try:
        sq_entries, cq_entries = struct.unpack_from("=II", params, 0)
        sq = struct.unpack_from("=8I", params, 40)  # head tail mask entries flags dropped array
        cq = struct.unpack_from("=6I", params, 80)  # head tail mask entries overflow cqes
        sq_ring = mmap.mmap(ring, sq[6] + 4 * sq_entries, offset=OFF_SQ_RING)
        cq_ring = mmap.mmap(ring, cq[5] + 16 * cq_entries, offset=OFF_CQ_RING)
        sqes = mmap.mmap(ring, 64 * sq_entries, offset=OFF_SQES)
        entry = struct.pack("=BBHiQQIIQ", opcode, 0, 0, fd, offset, address, length, 0, 7)
        sqes[: len(entry)] = entry
        sq_ring[sq[6] : sq[6] + 4] = struct.pack("=I", 0)
        sq_ring[sq[1] : sq[1] + 4] = struct.pack("=I", 1)  # tail
        if libc.syscall(ENTER, ring, 1, 0, setup & WAKE_UP, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        for _ in range(100):  # a connect() that passed the hooks waits for its SYN-ACK
            if struct.unpack_from("=I", cq_ring, cq[1])[0]:
                break
            time.sleep(0.001)
        else:
            raise OSError(errno.EINPROGRESS, "under way")
        _user, result, _flags = struct.unpack_from("=QiI", cq_ring, cq[5])
        return int(result)
    finally:
        os.close(ring)


def new() -> int:
    """Return a ring's descriptor. Raises: OSError."""
    ring = int(libc.syscall(SETUP, 1, ctypes.create_string_buffer(120)))
    if ring < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")
    return ring


def connect(sock: socket.socket, address: str, port: int) -> None:
    """Connect. Raises: OSError."""
    name = ctypes.create_string_buffer(sockaddr(address, port))
    _raise(_submit(sock.fileno(), OP_CONNECT, ctypes.addressof(name), 0, len(name) - 1))


def polled_connect(address: str, port: int) -> None:
    """Make a UDP socket and connect it, both in a kernel thread. Raises: OSError."""
    fd = _submit(socket.AF_INET, OP_SOCKET, 0, 0, socket.SOCK_DGRAM, setup=SQPOLL)
    _raise(fd)
    name = ctypes.create_string_buffer(sockaddr(address, port))
    where, length = ctypes.addressof(name), len(name) - 1
    _raise(_submit(fd, OP_CONNECT, where, 0, length, setup=SQPOLL))


def sendmsg(sock: socket.socket, address: str, port: int) -> None:
    """Send one byte. Raises: OSError."""
    name = ctypes.create_string_buffer(sockaddr(address, port))
    message, _kept = msghdr(name)
    raw = ctypes.create_string_buffer(message)
    _raise(_submit(sock.fileno(), OP_SENDMSG, ctypes.addressof(raw), 1, 0))


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
