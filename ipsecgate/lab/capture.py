"""What really went over the path: every frame the hosts sent each other, each one once.

Each host's frames are taken where they enter the bridge, on ingress only. (A host's own
interface would show tunnelled packets a second time, decrypted, as if they were in clear.)
The sockets hold 64 MiB each and are emptied in batches, to disturb little what is measured;
a frame that the kernel had to drop is an error, because it might have been the leak.
"""

from __future__ import annotations

import collections
import errno
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ipsecgate.lab.frames import Kind, Packet, parse
from ipsecgate.lab.netns import LabError, Namespace

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_IGNORE_OUTGOING = 23
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS = 35
BUFFER = 64 << 20
SNAP = 256
BATCH_PAUSE = 0.05
STAMPS_ON = 0.01

Frame = tuple[str, int, bytes]


@dataclass(frozen=True, slots=True)
class Captured:
    """The packets of a capture in the order of their time stamps."""

    packets: tuple[Packet, ...]

    def of(self, kind: Kind, sender: str | None = None) -> tuple[Packet, ...]:
        """Return the packets of a kind, of one sender or of both."""
        return tuple(p for p in self.packets if p.kind is kind and sender in (None, p.sender))

    @property
    def clear(self) -> tuple[Packet, ...]:
        """What anybody on the path could read: neither ESP, IKE nor the link's own."""
        return self.of(Kind.CLEAR)

    @property
    def syns(self) -> tuple[Packet, ...]:
        """TCP SYNs in clear."""
        return tuple(p for p in self.clear if p.is_syn)

    @property
    def esp(self) -> tuple[Packet, ...]:
        """Protected packets, also those in UDP."""
        return self.of(Kind.ESP)

    @property
    def ike(self) -> tuple[Packet, ...]:
        """IKE messages."""
        return self.of(Kind.IKE)

    def counts(self) -> dict[str, int]:
        """Return how many packets there are of each kind, by the kind's name."""
        found = collections.Counter(packet.kind for packet in self.packets)
        return {kind.value: found[kind] for kind in Kind}


class Capture:
    """A capture on the bridge ports of a path; `ports` gives each sender's.

    Used as `with Capture(…) as capture: …; seen = capture.stop()`, or start() and stop().
    """

    def __init__(self, path: Namespace, ports: Mapping[str, str]) -> None:
        self._path = path
        self._ports = ports
        self._sockets: dict[str, socket.socket] = {}
        self._frames: list[Frame] = []
        self._ended = threading.Event()
        self._reader: threading.Thread | None = None

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
        """Open the sockets; a frame sent after the return is captured."""
        with self._path.inside():
            for sender, port in self._ports.items():
                self._sockets[sender] = _open(port)
        # The kernel starts to stamp packets a moment later, by a work queue.
        time.sleep(STAMPS_ON)
        self._reader = threading.Thread(target=self._read, name="capture", daemon=True)
        self._reader.start()

    def stop(self) -> Captured:
        """End the capture. Raises: LabError if the kernel dropped a frame."""
        # Frames still under way in the hosts' queues are not waited for: that is up to
        # the caller, who knows the path's delay.
        self._join()
        for sender, sock in self._sockets.items():
            statistics = sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            _, dropped = struct.unpack("=II", statistics)
            if dropped:
                raise LabError(f"the capture lost {dropped} frames of {sender}")
        frames, self._frames = sorted(self._frames, key=lambda frame: frame[1]), []
        self.close()
        # REALTIME may be stepped, MONOTONIC not: convert with the offset of now.
        # Whoever loses the processor between the two clocks reads too little.
        offset = max(time.time_ns() - time.monotonic_ns() for _ in range(5))
        packets = [
            parse(data, sender, (wall - offset) / 1e9, wall) for sender, wall, data in frames
        ]
        return Captured(tuple(packets))

    def close(self) -> None:
        """Give up the capture, if it still runs."""
        self._join()
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()

    def _join(self) -> None:
        self._ended.set()
        if self._reader is not None:
            self._reader.join()
            self._reader = None

    def _read(self) -> None:
        more = True
        while more:
            # One more round after the end was asked for: what was queued by then counts.
            more = not self._ended.wait(BATCH_PAUSE)
            for sender, sock in self._sockets.items():
                self._drain(sender, sock)

    def _drain(self, sender: str, sock: socket.socket) -> None:
        room = socket.CMSG_SPACE(16)
        while True:
            try:
                data, ancillary, _, _ = sock.recvmsg(SNAP, room)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # told once; it is bound again when it is up
                    raise
                continue
            wall = 0
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
                    seconds, nanoseconds = struct.unpack("=qq", value)
                    wall = seconds * 1_000_000_000 + nanoseconds
            self._frames.append((sender, wall, data))


def _open(port: str) -> socket.socket:
    """Open a socket that sees what enters `port`, from the moment of its return."""
    # Protocol 0 first: a socket bound later would also see other ports' frames.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        sock.setblocking(False)
        sock.bind((port, ETH_P_ALL))
    except BaseException:
        sock.close()
        raise
    return sock
