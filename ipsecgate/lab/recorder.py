"""Record when the kernel changes a host's SAs, policies and routes, in a process of its own.

A thread would share the interpreter with its process, and its times would be tens of milliseconds
late. The recorder has no thread beside it and runs ahead of other processes, so a time is late by
one wake-up. It never waits for its reader: the socket between them has room for the longest test.
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
from pathlib import Path
from typing import Self

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.netns import NETLINK_XFRM, LabError, Namespace
from ipsecgate.lab.xfrm_events import GROUPS, XfrmEvent, parse

RTMGRP_IPV4_ROUTE = 0x40
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
BUFFER = 8 << 20  # bytes of notifications
ROOM = 64 << 20  # bytes between the recorder and its reader

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


class Recorder:
    """Follow a namespace's XFRM events, and ROUTE for any change of its IPv4 routes.

    It starts at construction. `local` are the namespace's addresses, to tell out from in.
    """

    def __init__(self, namespace: Namespace, local: Iterable[Address]) -> None:
        self._local = set(local)
        self._events: list[XfrmEvent] = []
        self._reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        writer.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, ROOM)
        writer.setblocking(False)
        with namespace.inside():
            sources = (
                _follower(NETLINK_XFRM, GROUPS),
                _follower(socket.NETLINK_ROUTE, RTMGRP_IPV4_ROUTE),
            )
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_record, args=(*sources, writer), daemon=True)
        self._process.start()
        for each in (*sources, writer):
            each.close()
        self.events()  # its answer means that it follows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def events(self) -> list[XfrmEvent]:
        """Return the events since `forget`. Raises: LabError if the kernel dropped some."""
        with contextlib.suppress(ConnectionError):
            self._reader.send(b"?")
        while self._receive():
            pass
        return self._events

    def forget(self) -> None:
        """Drop the events so far."""
        self.events()
        self._events = []

    def wait(self, *names: str, since: float = 0.0, timeout: float = 10.0) -> float | None:
        """Return the time of the first outbound event of these names since `since`, or None.

        An EXPIRE counts only if it removes the SA.
        """
        deadline = time.monotonic() + timeout
        while True:
            for event in self._events:
                counts = event.hard or event.name != "EXPIRE"
                if event.outbound and event.name in names and event.time >= since and counts:
                    return event.time
            left = max(0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                return None
            self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._reader.close()

    def _receive(self) -> bool:
        """Receive one message; return False if it answers the question of `events`."""
        message = b""
        with contextlib.suppress(ConnectionError):
            message = self._reader.recv(STAMP.size + LARGEST)
        if not message:
            raise LabError("the recorder of the kernel's events has ended; its error is above")
        when, source = STAMP.unpack_from(message)
        if source == XFRM:
            self._events += parse(message[STAMP.size :], when, self._local)
        elif source == ROUTE:
            self._events.append(XfrmEvent(when, "ROUTE"))
        return bool(source != ANSWER)


def _follower(family: int, groups: int) -> socket.socket:
    source = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family)
    source.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    source.bind((0, groups))
    return source


def _record(xfrm: socket.socket, routes: socket.socket, writer: socket.socket) -> None:
    sources = (xfrm, routes, writer)
    _close_all_but({0, 1, 2, *(source.fileno() for source in sources)})
    _take_precedence()
    while True:
        ready, _, _ = select.select(sources, [], [])
        for number, source in ((XFRM, xfrm), (ROUTE, routes)):
            if source in ready:
                data = source.recv(LARGEST)
                stamp = STAMP.pack(time.monotonic(), number)
                writer.send(stamp + data if number == XFRM else stamp)
        # An answer follows what the kernel told before the question.
        if ready == [writer]:
            if not writer.recv(1):
                return
            writer.send(STAMP.pack(0, ANSWER))


def _close_all_but(kept: set[int]) -> None:
    """Close inherited descriptors: our parent's connections must end when it closes them."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))


def _take_precedence() -> None:
    """Ask for deadline scheduling, ahead of all other tasks: `RUNTIME` of every `PERIOD` at least.

    SCHED_FIFO would do, but a kernel with CONFIG_RT_GROUP_SCHED refuses it in a room: with the cpu
    controller on, only the root cgroup may have such tasks. Where this is refused too, times are
    late when the processors are busy.
    """
    attributes = SCHED_ATTR.pack(
        SCHED_ATTR.size, SCHED_DEADLINE, FLAGS, 0, 0, RUNTIME, PERIOD, PERIOD
    )
    ctypes.CDLL(None).syscall(SYS_SCHED_SETATTR[platform.machine()], 0, attributes, 0)
