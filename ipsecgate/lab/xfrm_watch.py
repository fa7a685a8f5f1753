"""Record the kernel's XFRM notifications (SAs and policies) with their times.

The watch is independent of the gate: it has its own netlink socket and parses only the few header
fields that it needs, without the gate's decoder. It reads the clock when a message arrives, so a
time is late by one thread wake-up (tens of microseconds on an idle machine).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Self

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.netns import NETLINK_XFRM, LabError, Namespace

# linux/xfrm.h: message types, and the groups XFRMNLGRP_EXPIRE, _SA and _POLICY as bits.
NAMES = {
    0x10: "NEWSA",
    0x11: "DELSA",
    0x13: "NEWPOLICY",
    0x14: "DELPOLICY",
    0x18: "EXPIRE",
    0x19: "UPDPOLICY",
    0x1A: "UPDSA",
    0x1C: "FLUSHSA",
    0x1D: "FLUSHPOLICY",
}
GROUPS = 1 << 1 | 1 << 2 | 1 << 3
HEADER = 16
BUFFER = 8 << 20
SO_RCVBUFFORCE = 33
POLICY_OUT = 1
# Offsets in struct xfrm_usersa_info: the SA's id, its source, its family.
SA_ID, SA_SOURCE, SA_FAMILY = 56, 80, 212
EXPIRE_HARD = 224  # after a whole struct xfrm_usersa_info
# struct xfrm_usersa_id of DELSA: daddr, spi, family.
# Where dir is in struct xfrm_userpolicy_info and in struct xfrm_userpolicy_id.
POLICY_DIR, POLICY_ID_DIR, POLICY_FAMILY = 160, 60, 40
# Attributes follow struct xfrm_userpolicy_info.
POLICY_SIZE, XFRMA_TMPL = 168, 5
WANTED_SA = ("NEWSA",)
WANTED_POLICY = ("NEWPOLICY", "UPDPOLICY")


@dataclass(frozen=True, slots=True)
class XfrmEvent:
    """One notification. `name`: as in linux/xfrm.h without XFRM_MSG_. `time`: CLOCK_MONOTONIC.

    `outbound`: None if the message does not say. `spi`: for a policy, that of its first template; 0
    for a trap. `hard`: an EXPIRE that removes the SA, without a DELSA.
    """

    time: float
    name: str
    outbound: bool | None = None
    saddr: Address | None = None
    daddr: Address | None = None
    spi: int = 0
    hard: bool = False


class XfrmWatch:
    """A watch of one host's XFRM events. `local`: its addresses, to determine the direction."""

    def __init__(self, namespace: Namespace, local: Iterable[Address]) -> None:
        self._namespace = namespace
        self._local = set(local)
        self._socket: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._events: list[XfrmEvent] = []
        self._lost: OSError | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Join the multicast groups. Events after this returns are recorded."""
        with self._namespace.inside():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._socket.bind((0, GROUPS))
        self._reader = threading.Thread(target=self._read, name="xfrm-watch", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End the watch; its events stay available."""
        self._ended.set()
        if self._reader is not None:
            self._reader.join()
            self._reader = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def events(self) -> tuple[XfrmEvent, ...]:
        """Return the events so far. Raises: LabError if the kernel dropped events."""
        with self._changed:
            if self._lost is not None:
                raise LabError(f"XFRM events were lost: {self._lost}")
            return tuple(self._events)

    def wait_sa(self, timeout: float = 10.0, since: float = 0.0) -> float | None:
        """Return the time of the first new outbound SA since `since`; None after `timeout`."""
        return self._wait(WANTED_SA, timeout, since)

    def wait_policy(self, timeout: float = 10.0, since: float = 0.0) -> float | None:
        """Return the time of the first outbound policy added or updated since `since`, or None."""
        return self._wait(WANTED_POLICY, timeout, since)

    def _wait(self, names: tuple[str, ...], timeout: float, since: float) -> float | None:
        def first() -> float | None:
            times = (e.time for e in self._events if e.name in names and e.outbound)
            return next((time for time in times if time >= since), None)

        with self._changed:
            self._changed.wait_for(lambda: first() is not None, timeout)
            return first()

    def _read(self) -> None:
        if self._socket is None:
            return
        while not self._ended.is_set():
            if not select.select([self._socket], [], [], 0.05)[0]:
                continue
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                self._lost = error
                return
            now = time.monotonic()
            seen = list(parse(data, now, self._local))
            with self._changed:
                self._events += seen
                self._changed.notify_all()


def parse(data: bytes, now: float, local: set[Address]) -> Iterator[XfrmEvent]:
    """Parse a datagram of XFRM notifications; skip types that are not in `NAMES`."""
    at = 0
    while at + HEADER <= len(data):
        length, number = struct.unpack_from("=IH", data, at)
        body = data[at + HEADER : at + length]
        at += max((length + 3) & ~3, HEADER)
        if number in NAMES:
            yield _event(NAMES[number], body, now, local)


def _event(name: str, body: bytes, now: float, local: set[Address]) -> XfrmEvent:
    with contextlib.suppress(struct.error, IndexError, ValueError):
        if name in ("NEWSA", "UPDSA", "EXPIRE"):
            (family,) = struct.unpack_from("=H", body, SA_FAMILY)
            saddr = _address(body, SA_SOURCE, family)
            daddr = _address(body, SA_ID, family)
            (spi,) = struct.unpack_from("!I", body, SA_ID + 16)
            hard = name == "EXPIRE" and body[EXPIRE_HARD] != 0
            return XfrmEvent(now, name, saddr in local, saddr, daddr, spi, hard)
        if name == "DELSA":
            spi, family = struct.unpack_from("!I", body, 16)[0], body[20]
            daddr = _address(body, 0, family)
            return XfrmEvent(now, name, daddr not in local, None, daddr, spi)
        if name in ("NEWPOLICY", "UPDPOLICY", "DELPOLICY"):
            at = POLICY_ID_DIR if name == "DELPOLICY" else POLICY_DIR
            (family,) = struct.unpack_from("=H", body, POLICY_FAMILY)
            saddr, daddr = _address(body, 16, family), _address(body, 0, family)
            spi = _template_spi(body[POLICY_SIZE:]) if name != "DELPOLICY" else 0
            return XfrmEvent(now, name, body[at] == POLICY_OUT, saddr, daddr, spi)
    return XfrmEvent(now, name)


def _template_spi(attributes: bytes) -> int:
    """Return the SPI of the first template, 0 if there is none."""
    at = 0
    while at < len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if kind == XFRMA_TMPL:
            return int(struct.unpack_from("!I", attributes, at + 4 + 16)[0])
        at += max((length + 3) & ~3, 4)
    return 0


def _address(body: bytes, at: int, family: int) -> Address:
    return ip_address(body[at : at + (16 if family == socket.AF_INET6 else 4)])
