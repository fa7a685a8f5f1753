"""The socket to which container runtimes send their seccomp listeners (`listenerPath`).

Rules of this module:
- Root only: the socket's mode says so, and each peer's credentials are checked.
- A message that cannot be used is logged, and every descriptor that came with it is closed. The
  calls of such a container fail (ENOSYS); they never go unheld.
- A runtime connects long before it sends, and may keep the connection open afterwards, so the end
  of the JSON text ends the message, not the end of the stream.
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

PEERS = 256  # connections at a time, or a quarter of the descriptors: netlink and IKE need some
MAX_FDS = 4  # per message: the listener, and what a later specification may add
FD = struct.Struct("=i")
ANCILLARY_SIZE = socket.CMSG_LEN(MAX_FDS * FD.size)

OnListener = Callable[[Container, int], None]
"""Receives a container and its listener, and owns the listener from then on."""
OnError = Callable[[str], object]


async def run(path: Path, on_listener: OnListener, on_error: OnError) -> None:
    """Accept listeners until cancelled; pass what goes wrong to `on_error`. Raises: OSError."""
    serving: set[asyncio.Task[None]] = set()
    limit = min(PEERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def on_peer(peer: socket.socket) -> None:
        if len(serving) >= limit:
            peer.close()
            on_error(
                f"a container's seccomp listener was rejected: {limit} runtimes are connected "
                "and have not sent theirs yet"
            )
            return
        task = peers.create_task(_serve(peer, on_listener, on_error))
        serving.add(task)
        task.add_done_callback(serving.discard)

    async with asyncio.TaskGroup() as peers:
        with listening(path, on_peer):
            await asyncio.Event().wait()


async def _serve(peer: socket.socket, on_listener: OnListener, on_error: OnError) -> None:
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
            on_listener(made, fds.pop(made.listener))
    except (OciError, OSError, ValueError) as error:
        on_error(f"a container's seccomp listener was rejected: {error}")
    finally:
        for fd in fds:
            os.close(fd)


async def _receive(peer: socket.socket, fds: list[int]) -> Container | None:
    """Return the message, and append its descriptors to `fds`; None if the peer sent nothing.

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
                # Not socket.recv_fds(): it would drop MSG_CMSG_CLOEXEC.
                data, ancillary, flags, _ = peer.recvmsg(
                    MESSAGE_LIMIT, ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            for level, kind, numbers in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += (fd for (fd,) in FD.iter_unpack(numbers))
            if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                raise OciError(f"the message has more than {MAX_FDS} descriptors with it")
            raw += data
            made = container(raw) if raw else None
            if made is not None:
                return made
            if not data and raw:
                raise OciError("the message is not a container process state")
            if not data:
                return None
    finally:
        loop.remove_reader(peer)
