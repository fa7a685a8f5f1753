"""Record when the kernel changes its SAs, policies and routes, in a process of its own.

A thread would share the interpreter with the test, and its time stamps would be tens of
milliseconds late. The process has real-time priority, and no thread of its own: one of ordinary
priority would hold the interpreter while it waits for a processor. It never waits for its reader
either, so the socket between them takes what the longest test makes.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import select
import socket
import struct
import time
from collections.abc import Iterable

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.netns import NETLINK_XFRM, Namespace
from ipsecgate.lab.xfrm_watch import BUFFER, GROUPS, SO_RCVBUFFORCE, XfrmEvent, parse

RTMGRP_IPV4_ROUTE = 0x40
SO_SNDBUFFORCE = 32
ROOM = 64 << 20  # bytes

# linux/sched/types.h, struct sched_attr: size, policy, flags, nice, priority, runtime, deadline and
# period in ns. linux/sched.h; asm/unistd.h
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
SCHED_DEADLINE = 6
FLAGS = 1 | 2  # SCHED_FLAG_RESET_ON_FORK, SCHED_FLAG_RECLAIM
SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
# Long, because a guest counts the time for which its own machine ran something else. Three may run.
RUNTIME, PERIOD = 300_000_000, 1_000_000_000

STAMP = struct.Struct("=dB")  # the time of a datagram, and which source it is from; or an answer
XFRM, ROUTE, ANSWER = range(3)
LARGEST = 1 << 16  # bytes of a datagram


class KernelEvents:
    """Follow a namespace's XFRM events, and ROUTE for any change of its IPv4 routes.

    `local` are its addresses, to tell out from in.
    """

    def __init__(self, namespace: Namespace, local: Iterable[Address]) -> None:
        context = multiprocessing.get_context("fork")
        self._reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        writer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, ROOM)
        writer.setblocking(False)
        with namespace.inside():
            sources = (
                follower(NETLINK_XFRM, GROUPS),
                follower(socket.NETLINK_ROUTE, RTMGRP_IPV4_ROUTE),
            )
        self._local = set(local)
        self._events: list[XfrmEvent] = []
        self._process = context.Process(target=follow, args=(*sources, writer), daemon=True)
        self._process.start()
        for each in (*sources, writer):
            each.close()

    def events(self) -> list[XfrmEvent]:
        """Return the events since `forget`. Raises: EOFError if the kernel dropped some."""
        with contextlib.suppress(BrokenPipeError):
            self._reader.send(b"?")
        while True:
            stamped = self._reader.recv(STAMP.size + LARGEST)
            if not stamped:
                raise EOFError("the process that records the kernel's events has ended")
            when, source = STAMP.unpack_from(stamped)
            if source == ANSWER:
                return self._events
            if source == XFRM:
                self._events += parse(stamped[STAMP.size :], when, self._local)
            else:
                self._events.append(XfrmEvent(when, "ROUTE"))

    def forget(self) -> None:
        """Drop the events so far."""
        self.events()
        self._events = []

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._reader.close()


def follower(family: int, groups: int) -> socket.socket:
    source = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    source.bind((0, groups))
    return source


def follow(xfrm: socket.socket, routes: socket.socket, writer: socket.socket) -> None:
    take_precedence()
    while True:
        ready, _, _ = select.select((xfrm, routes, writer), [], [])
        for number, source in ((XFRM, xfrm), (ROUTE, routes)):
            if source in ready:
                data = source.recv(LARGEST)
                stamp = STAMP.pack(time.monotonic(), number)
                writer.send(stamp + data if number == XFRM else stamp)
        # An answer follows what the kernel told before the question.
        if ready == [writer]:
            writer.recv(1)
            writer.send(STAMP.pack(0, ANSWER))


def take_precedence() -> None:
    """Get deadline scheduling, ahead of all other tasks: `RUNTIME` of every `PERIOD` at least.

    SCHED_FIFO would do, but a kernel with CONFIG_RT_GROUP_SCHED refuses it in a room: with the cpu
    controller on, only the root cgroup may have such tasks.
    """
    attributes = SCHED_ATTR.pack(
        SCHED_ATTR.size, SCHED_DEADLINE, FLAGS, 0, 0, RUNTIME, PERIOD, PERIOD
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_SCHED_SETATTR[platform.machine()], 0, attributes, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "sched_setattr")
