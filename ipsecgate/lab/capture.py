"""Capture every frame that the hosts send each other, once each.

The capture sees a host's frames where they enter the bridge, on ingress only. (The host's own
interface would show tunnelled packets a second time, decrypted, as if they had been sent in clear.)
Each socket buffers 64 MiB and is drained in batches, to disturb the measurement little. A frame
that the kernel dropped is an error, because it might have been the leak.
"""

from __future__ import annotations

import collections
import errno
import socket
import struct
import threading
import time
from collections.abc import Container, Mapping
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
    """The packets of a capture, ordered by timestamp."""

    packets: tuple[Packet, ...]

    def of_kind(self, kind: Kind, sender: str | None = None) -> tuple[Packet, ...]:
        """Return the packets of a kind, from one sender (a, b) or from both."""
        return tuple(p for p in self.packets if p.kind is kind and sender in (None, p.sender))

    @property
    def clear(self) -> tuple[Packet, ...]:
        """Packets that anybody on the path could read: not ESP, not IKE, not link housekeeping."""
        return self.of_kind(Kind.CLEAR)

    @property
    def syns(self) -> tuple[Packet, ...]:
        """TCP SYNs sent in clear."""
        return tuple(p for p in self.clear if p.is_syn)

    @property
    def esp(self) -> tuple[Packet, ...]:
        """Protected packets: ESP and AH, including ESP in UDP."""
        return self.of_kind(Kind.ESP)

    @property
    def ike(self) -> tuple[Packet, ...]:
        """IKE messages."""
        return self.of_kind(Kind.IKE)

    def counts(self) -> dict[str, int]:
        """Return the number of packets by the kind's name, 0 included."""
        found = collections.Counter(packet.kind for packet in self.packets)
        return {kind.value: found[kind] for kind in Kind}


class Capture:
    """A capture on the bridge ports of a path. `ports`: sender (a, b) to port name.

    `natt_ports`: the UDP ports of NAT traversal.

    Use it as `with Capture(…) as capture: …; seen = capture.stop()`, or with start() and stop().
    """

    def __init__(
        self, path: Namespace, ports: Mapping[str, str], natt_ports: Container[int]
    ) -> None:
        self._path = path
        self._ports = ports
        self._natt_ports = natt_ports
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
        """Open the sockets. Frames sent after this returns are captured."""
        with self._path.inside():
            for sender, port in self._ports.items():
                self._sockets[sender] = _open(port)
        # The kernel turns timestamps on a moment later, from a work queue.
        time.sleep(STAMPS_ON)
        self._reader = threading.Thread(target=self._read, name="capture", daemon=True)
        self._reader.start()

    def stop(self) -> Captured:
        """End the capture. Raises: LabError if the kernel dropped a frame.

        This does not wait for frames that are still in the hosts' queues. The caller must, because
        it knows the delay of the path.
        """
        self._join()
        for sender, sock in self._sockets.items():
            statistics = sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            _, dropped = struct.unpack("=II", statistics)
            if dropped:
                raise LabError(f"the capture lost {dropped} frames from {sender}")
        frames, self._frames = sorted(self._frames, key=lambda frame: frame[1]), []
        self.close()
        # CLOCK_REALTIME may be stepped, CLOCK_MONOTONIC may not: convert with the current offset.
        # A preemption between the two reads makes the offset too small, so take the largest.
        offset = max(time.time_ns() - time.monotonic_ns() for _ in range(5))
        packets = [
            parse(data, sender, (wall - offset) / 1e9, wall, self._natt_ports)
            for sender, wall, data in frames
        ]
        return Captured(tuple(packets))

    def close(self) -> None:
        """Abandon the capture if it is still running."""
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
            # Drain once more after stop() or close(): frames that are already queued count.
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
                # The kernel reports this once, and binds the socket again when the port is up.
                if error.errno != errno.ENETDOWN:
                    raise
                continue
            wall = 0
            for level, kind, value in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
                    seconds, nanoseconds = struct.unpack("=qq", value)
                    wall = seconds * 1_000_000_000 + nanoseconds
            self._frames.append((sender, wall, data))


def _open(port: str) -> socket.socket:
    """Open a socket that receives the frames that enter `port` from now on."""
    # Open it with protocol 0: with ETH_P_ALL it would receive every port's frames until bind().
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
