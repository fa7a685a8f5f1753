"""Listen on a Unix socket for root's clients, and survive a lack of file descriptors.

If there is no descriptor for a client, asyncio's own server tries to accept it a hundred times, and
sets a timer each time; with slow logging, each timer leads to a hundred more. We counted 3,700
attempts per second. Here it is one per second, and one line in the log until a client is accepted.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("ipsecgate")

BACKLOG = 128
RETRY = 1.0  # seconds
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

OnClient = Callable[[socket.socket], object]
"""Receives a client's non-blocking socket, and must close it."""


@contextmanager
def listening(path: Path, on_client: OnClient) -> Iterator[None]:
    """Accept clients in the running event loop until the block ends. Raises: OSError."""
    path.unlink(missing_ok=True)  # the controller holds a lock, so nobody else listens here
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as server:
        old_mask = os.umask(0o177)
        try:
            server.bind(os.fspath(path))
        finally:
            os.umask(old_mask)
        server.listen(BACKLOG)
        acceptor = _Acceptor(server, on_client)
        acceptor.start()
        try:
            yield
        finally:
            acceptor.stop()
            path.unlink(missing_ok=True)


class _Acceptor:
    """Accepts clients of a listening socket, and pauses while no descriptor is free."""

    def __init__(self, server: socket.socket, on_client: OnClient) -> None:
        self._server = server
        self._on_client = on_client
        self._loop = asyncio.get_running_loop()
        self._restart: asyncio.TimerHandle | None = None
        self._warned = False

    def start(self) -> None:
        self._restart = None
        self._loop.add_reader(self._server, self._accept)

    def stop(self) -> None:
        self._loop.remove_reader(self._server)
        if self._restart is not None:
            self._restart.cancel()

    def _accept(self) -> None:
        try:
            client, _ = self._server.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # the client has disconnected
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            if not self._warned:
                log.warning("cannot accept new clients for now: %s", error.strerror)
            self._warned = True
            self._loop.remove_reader(self._server)  # it stays readable, so it would spin
            self._restart = self._loop.call_later(RETRY, self.start)
            return
        self._warned = False
        client.setblocking(False)
        self._on_client(client)
