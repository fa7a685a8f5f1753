"""Record when the kernel changes its SAs, policies and routes, in a process of its own.

A thread would share the interpreter with the test, and its time stamps would be tens of
milliseconds late. The process has real-time priority. It keeps the events until it is asked for
them: blocked by a slow reader, it would stamp the next event late.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import platform
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.netns import NETLINK_XFRM, Namespace
from ipsecgate.lab.xfrm_watch import BUFFER, GROUPS, SO_RCVBUFFORCE, XfrmEvent, parse

RTMGRP_IPV4_ROUTE = 0x40

# linux/sched/types.h, struct sched_attr: size, policy, flags, nice, priority, runtime, deadline and
# period in ns. linux/sched.h; asm/unistd.h
SCHED_ATTR = struct.Struct("=IIQiIQQQ")
SCHED_DEADLINE = 6
FLAGS = 1 | 2  # SCHED_FLAG_RESET_ON_FORK, SCHED_FLAG_RECLAIM
SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
# Long, because a guest counts the time for which its own machine ran something else. Three may run.
RUNTIME, PERIOD = 300_000_000, 1_000_000_000


class KernelEvents:
    """Follow a namespace's XFRM events, and ROUTE for any change of its IPv4 routes.

    `local` are its addresses, to tell out from in.
    """

    def __init__(self, namespace: Namespace, local: Iterable[Address]) -> None:
        context = multiprocessing.get_context("fork")
        self._output, told = context.Pipe()
        with namespace.inside():
            sources = (
                follower(NETLINK_XFRM, GROUPS),
                follower(socket.NETLINK_ROUTE, RTMGRP_IPV4_ROUTE),
            )
        self._events: list[XfrmEvent] = []
        arguments = (*sources, set(local), told)
        self._process = context.Process(target=follow, args=arguments, daemon=True)
        self._process.start()
        for source in sources:
            source.close()
        told.close()

    def events(self) -> list[XfrmEvent]:
        """Return the events since `forget`. Raises: EOFError if the kernel dropped some."""
        self._output.send("?")
        self._events += self._output.recv()
        return self._events

    def forget(self) -> None:
        """Drop the events so far."""
        self.events()
        self._events = []

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._output.close()


def follower(family: int, groups: int) -> socket.socket:
    source = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    source.bind((0, groups))
    return source


def follow(
    xfrm: socket.socket, routes: socket.socket, local: set[Address], told: Connection
) -> None:
    take_precedence()
    sources: tuple[socket.socket | Connection, ...] = (xfrm, routes, told)
    seen: list[XfrmEvent] = []
    while True:
        ready, _, _ = select.select(sources, [], [])
        for source in (xfrm, routes):
            if source in ready:
                data = source.recv(1 << 16)
                now = time.monotonic()
                seen += parse(data, now, local) if source is xfrm else [XfrmEvent(now, "ROUTE")]
        if told in ready:
            told.recv()
            threading.Thread(target=told.send, args=(seen,)).start()
            seen = []


def take_precedence() -> None:
    """Get deadline scheduling, ahead of all other tasks: `RUNTIME` of every `PERIOD` at least.

    SCHED_FIFO would do, but a kernel with CONFIG_RT_GROUP_SCHED refuses it in a room: with the cpu
    controller on, only the root cgroup may have such tasks. Threads start as ordinary ones.
    """
    attributes = SCHED_ATTR.pack(
        SCHED_ATTR.size, SCHED_DEADLINE, FLAGS, 0, 0, RUNTIME, PERIOD, PERIOD
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(SYS_SCHED_SETATTR[platform.machine()], 0, attributes, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "sched_setattr")
