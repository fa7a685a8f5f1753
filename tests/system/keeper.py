"""A service manager that keeps descriptors, as systemd does with FileDescriptorStoreMax=."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress
from typing import Self

from ipsecgate.lab.gated import Gated

FIRST_FD = 3


class Keeper:
    """What a service manager does with descriptors: takes them, and starts the successor."""

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
        """Take in what was sent so far."""
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
        """Tell whether it has more descriptors than before."""
        self.take()
        return len(self.kept) > before

    def fill(self) -> None:
        """Have no room for more until `take`."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.setblocking(False)
            teller.connect(self.path)
            with suppress(BlockingIOError):
                while True:
                    teller.send(b"STATUS=full")

    def words(self) -> tuple[list[str], dict[str, str], list[int]]:
        """Return what starts a controller with what is kept, as systemd would.

        The program that becomes it, its environment, and its descriptors: see `Gated.start`.
        """
        self.take()
        names, fds = list(self.kept), list(self.kept.values())
        script = 'export LISTEN_PID=$$; exec "$@"'
        moved = " ".join(f"{FIRST_FD + n}<&{fd}" for n, fd in enumerate(fds))
        shell = f"exec {moved}; {script}" if fds else script
        listen = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        env = {"NOTIFY_SOCKET": self.path, **listen}
        return ["bash", "-c", shell, "keeper"], env, fds

    def start(self, gate: Gated) -> None:
        """Start a controller, and wait until it is ready. Raises: LabError."""
        gate.start(*self.words())
