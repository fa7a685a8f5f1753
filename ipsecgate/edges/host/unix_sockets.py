"""A socket for root's clients: who connects is taken at once, or later if there is no room.

asyncio's own server tries a hundred times to take one client for whom there is no descriptor,
and sets a timer for each; where logging is slow, each timer leads to a hundred more. We counted
3,700 a second. Here it is one, and one line in the log until a client was taken again.
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
NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Taken = Callable[[socket.socket], object]
"""Is given a client's socket, which does not block and is the callee's to close."""


@contextmanager
def listening(path: Path, taken: Taken) -> Iterator[None]:
    """Take clients while the block runs, in a loop that runs already. Raises: OSError."""
    path.unlink(missing_ok=True)  # the lock says that nobody else listens here
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as server:
        old_mask = os.umask(0o177)
        try:
            server.bind(os.fspath(path))
        finally:
            os.umask(old_mask)
        server.listen(BACKLOG)
        door = _Door(server, taken)
        door.open()
        try:
            yield
        finally:
            door.close()
            path.unlink(missing_ok=True)


class _Door:
    """A listening socket that is watched, or will be after a pause."""

    def __init__(self, server: socket.socket, taken: Taken) -> None:
        self._server = server
        self._taken = taken
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self._told = False

    def open(self) -> None:
        self._again = None
        self._loop.add_reader(self._server, self._on_client)

    def close(self) -> None:
        self._loop.remove_reader(self._server)
        if self._again is not None:
            self._again.cancel()

    def _on_client(self) -> None:
        try:
            client, _ = self._server.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # it has gone again
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not self._told:
                log.warning("cannot accept new clients for now: %s", error.strerror)
            self._told = True
            self._loop.remove_reader(self._server)  # it stays readable
            self._again = self._loop.call_later(RETRY, self.open)
            return
        self._told = False
        client.setblocking(False)
        self._taken(client)
