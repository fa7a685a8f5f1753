"""The socket at which container runtimes leave their seccomp listeners (`listenerPath`).

Rules of this module: root only, as the socket's mode and each peer's credentials say; a
message that is not understood is told, and every descriptor that came with it closed: calls
of such a container fail (ENOSYS), they never go unheld. A runtime connects long before it
sends, and may keep the connection after: what ends a message is its own end.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from ipsecgate.core.codec.oci import MESSAGE_LIMIT, Container, OciError, container
from ipsecgate.edges.host.unix_sockets import listening

PEERS = 256  # at a time, or a quarter of the descriptors: the kernel and IKE need some
MAX_FDS = 4  # of a message: the listener, and what a later specification may add
FD = struct.Struct("=i")
ROOM = socket.CMSG_LEN(MAX_FDS * FD.size)

Taken = Callable[[Container, int], None]
"""Is given a container and its listener, which is the callee's to close from then on."""
Told = Callable[[str], object]


async def run(path: Path, taken: Taken, told: Told) -> None:
    """Take listeners in until cancelled; `told` hears what was wrong. Raises: OSError."""
    serving: set[asyncio.Task[None]] = set()
    room = min(PEERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def on_peer(peer: socket.socket) -> None:
        if len(serving) >= room:
            peer.close()
            told(f"a container's listener was not taken: {room} runtimes have not sent theirs yet")
            return
        task = peers.create_task(_serve(peer, taken, told))
        serving.add(task)
        task.add_done_callback(serving.discard)

    async with asyncio.TaskGroup() as peers:
        with listening(path, on_peer):
            await asyncio.Event().wait()


async def _serve(peer: socket.socket, taken: Taken, told: Told) -> None:
    fds: list[int] = []
    try:
        with peer:
            _pid, uid, _gid = struct.unpack(
                "=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            if uid not in (0, os.geteuid()):
                raise OciError(f"the container runtime runs as user {uid}, not as root")
            made = await _receive(peer, fds)
            if made is None:
                return  # a container that was not created after all
            if made.listener >= len(fds):
                raise OciError(f"container {made.name} was sent without its listener")
            taken(made, fds.pop(made.listener))
    except (OciError, OSError, ValueError) as error:
        told(f"a container's listener was not taken: {error}")
    finally:
        for fd in fds:
            os.close(fd)


async def _receive(peer: socket.socket, fds: list[int]) -> Container | None:
    """Return the message, its descriptors in `fds`; None if the peer sent nothing.

    Raises: OciError, OSError.
    """
    raw = b""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(peer, readable.set)
    try:
        while True:
            await readable.wait()
            readable.clear()
            try:
                # socket.recv_fds() would drop the flag.
                data, ancillary, flags, _ = peer.recvmsg(
                    MESSAGE_LIMIT, ROOM, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            for level, kind, numbers in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += (fd for (fd,) in FD.iter_unpack(numbers))
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                raise OciError("too many descriptors")
            raw += data
            made = container(raw) if raw else None
            if made is not None:
                return made
            if not data and raw:
                raise OciError("the message is no container process state")
            if not data:
                return None
    finally:
        loop.remove_reader(peer)
