"""A service manager's descriptor store, as systemd's FileDescriptorStoreMax= provides it."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress
from typing import Self

from ipsecgate.lab.gated import Gated

FIRST_FD = 3


class FdStore:
    """Stores the descriptors that a controller sends, and starts the next controller with them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = f"{self._folder.name}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self.kept: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_reason: object) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self._socket.close()
        self._folder.cleanup()

    def take(self) -> None:
        """Store the descriptors that have been sent so far."""
        self._socket.setblocking(False)
        while True:
            try:
                said, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in said.decode().splitlines())
            if words.get("FDSTORE") == "1":
                (self.kept[words["FDNAME"]],) = fds

    def is_given(self, before: int = 0) -> bool:
        """Return whether it holds more than `before` descriptors."""
        self.take()
        return len(self.kept) > before

    def fill(self) -> None:
        """Fill the socket, so that nothing more can be sent until `take`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.setblocking(False)
            teller.connect(self.path)
            with suppress(BlockingIOError):
                while True:
                    teller.send(b"STATUS=full")

    def words(self) -> tuple[list[str], dict[str, str], list[int]]:
        """Return how systemd would start a controller with the stored descriptors.

        The command prefix, its environment and the descriptors, as `Gated.start` takes them.
        """
        self.take()
        names, fds = list(self.kept), list(self.kept.values())
        script = 'export LISTEN_PID=$$; exec "$@"'
        moved = " ".join(f"{FIRST_FD + n}<&{fd}" for n, fd in enumerate(fds))
        shell = f"exec {moved}; {script}" if fds else script
        listen = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        env = {"NOTIFY_SOCKET": self.path, **listen}
        return ["bash", "-c", shell, "store"], env, fds

    def start(self, gate: Gated) -> None:
        """Start a controller, and wait until it is ready. Raises: LabError."""
        gate.start(*self.words())
