"""Serve a gate's metrics over HTTP, on an address or on a UNIX socket.

The answer is what the scraper asks for: Prometheus text or OpenMetrics. A scrape waits for nothing
but the gate, so the exporter looks up no names.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from ipsecgate.edges.host.listen import Listen
from ipsecgate.errors import GateError, UsageError

IDLE = 10.0  # seconds that a client may be silent


@contextmanager
def listening(where: Listen, registry: CollectorRegistry) -> Iterator[WSGIServer]:
    """Listen until the block ends; `serve_forever` of the server answers. Raises: GateError."""
    if where.path is not None:
        _remove_stale(where.path)
    try:
        server = _Server(where)
    except OSError as error:
        raise GateError(
            f"cannot listen on {where}: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0, ""),
        ) from error
    server.set_app(make_wsgi_app(registry))
    try:
        yield server
    finally:
        server.server_close()
        if where.path is not None:
            where.path.unlink(missing_ok=True)


_HINTS = {
    errno.EADDRINUSE: "another program listens there: choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have that address",
    errno.ENOENT: "the folder does not exist; the unit makes /run/ipsecgate",
    errno.EACCES: "the unit may not use ports below 1024, nor folders other than /run/ipsecgate",
}


def _remove_stale(path: Path) -> None:
    """Remove the socket that a dead exporter left. Raises: UsageError if it is not one."""
    try:
        if not stat.S_ISSOCK(path.stat(follow_symlinks=False).st_mode):
            raise UsageError(f"{path} exists, and is not a socket", hint="choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(os.fspath(path)) == 0:
            raise UsageError(f"another program listens on {path}", hint="choose another path")
    path.unlink()


class _Handler(WSGIRequestHandler):
    """Answers one client, and logs nothing: scrapes come every few seconds."""

    timeout = IDLE

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its base's name
        """Log nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, where: Listen) -> None:
        self._where = where
        self.address_family = (
            socket.AF_UNIX
            if where.path is not None
            else socket.AF_INET6
            if ":" in where.address
            else socket.AF_INET
        )
        super().__init__((where.address, where.port), _Handler)

    def server_bind(self) -> None:
        """Bind. The base would look up the name of the address, which may take seconds."""
        if self._where.path is not None:
            self.socket.bind(os.fspath(self._where.path))
        else:
            TCPServer.server_bind(self)
        self.server_name, self.server_port = self._where.address, self._where.port
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """Accept a client. One of a UNIX socket has no address, and the base wants one."""
        client, address = self.socket.accept()
        return client, address or ("", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away."""
