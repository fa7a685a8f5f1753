"""A lab host as an operator finds it: an installed gate, units, and programs with names.

It uses the default paths, so run it in a guest or a room only, where they are the world's own.
Addresses and names are fixed; times and pids are not.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ipsecgate.edges.host import control
from ipsecgate.edges.host.cgroups import root
from ipsecgate.errors import NoControllerError
from ipsecgate.lab import cgroups
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.netns import LabError

CONFIG_FILE = Path("/etc/ipsecgate/ipsecgate.toml")
VICI = Path("/run/charon.vici")
SOCKET = Path("/run/ipsecgate/control.sock")
LOG = Path("/var/log/ipsecgate.log")
PROGRAMS = Path("/run/programs")
TIMEOUT = 90.0

USUAL = "retransmit_tries = 5\n retransmit_timeout = 4.0\n retransmit_base = 1.8"
"""strongSwan's defaults, which the lab shortens."""

KNOCK = """
import os, socket, sys, time
pause, *words = sys.argv[1:]
while True:
    for address, port in zip(words[::2], words[1::2]):
        with socket.socket() as sock:
            try:
                sock.connect((address, int(port)))
                result = "connected"
            except OSError as error:
                result = str(error)
        print(time.strftime("%H:%M:%S"), f"{address} port {port}: {result}", flush=True)
    time.sleep(float(pause))
"""
LOCAL = {4: "10.1.0.1", 6: "2001:db8:1::1"}
"""The addresses of host a behind its tunnels."""


class GatedHost:
    """Host a with a configuration, units and routes to the networks behind host b.

    A context manager; `start()` starts the controller. `servers`: addresses of host b.
    """

    def __init__(
        self, prefix: str, config: str, networks: Iterable[str], servers: Iterable[str]
    ) -> None:
        self.config = config
        self.lab = Lab(prefix)
        self.controller: subprocess.Popen[str] | None = None
        self._units: set[Path] = set()
        self._networks, self._servers = list(networks), list(servers)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lab)
            self.lab.a.charon.configure(USUAL)
            self._addresses()
            CONFIG_FILE.parent.mkdir(parents=True, exist_ok=True)
            CONFIG_FILE.write_text(self.config)
            VICI.unlink(missing_ok=True)
            VICI.symlink_to(self.lab.a.charon.vici_socket)
            PROGRAMS.mkdir(exist_ok=True)
            stack.callback(self._unload)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _addresses(self) -> None:
        a, b = self.lab.a.namespace.name, self.lab.b.namespace.name
        for family, address in LOCAL.items():
            ip(a, "address", "add", address, "dev", "lo", *(["nodad"] * (family == 6)))
            ip(b, "route", "add", address, "via", str(self.lab.a.outer[family]))
        for network in self._networks:
            family = 6 if ":" in network else 4
            via = str(self.lab.b.outer[family])
            ip(a, "route", "add", network, "via", via, "src", LOCAL[family])
        for address in self._servers:
            ip(b, "address", "add", address, "dev", "lo", *(["nodad"] * (":" in address)))

    # --- the gate -----------------------------------------------------------------------

    def words(self, *arguments: str) -> list[str]:
        """Return the command that runs the CLI in host a."""
        return [*self.lab.a.launcher(), *program(*arguments)]

    def start(self) -> None:
        """Start the controller, and wait until it is ready."""
        with LOG.open("a") as out:
            self.controller = self.lab.a.popen(program("run"), stdout=out, stderr=out)
        self.wait(lambda: self.ask().get("ready"), "the controller is not ready")

    def stop(self, *, kill: bool = False) -> None:
        """Stop the controller, or kill it; the hooks stay."""
        if self.controller is not None:
            self.controller.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self.controller.wait()
            self.controller = None

    def _unload(self) -> None:
        self.stop()
        self.lab.a.run(program("unload", "--force"), check=False)
        VICI.unlink()
        for path in self._units:
            cgroups.discard(path)
        shutil.rmtree(CONFIG_FILE.parent)

    def ask(self) -> dict[str, Any]:
        """Return the controller's own status; {} while there is none."""
        try:
            return control.ask(SOCKET, "status", 60.0)
        except NoControllerError:
            return {}

    def wait(self, holds: Callable[[], object], failure: str) -> None:
        """Wait until a condition holds. Raises: LabError."""
        deadline = time.monotonic() + TIMEOUT
        while not holds():
            if time.monotonic() > deadline:
                raise LabError(f"{failure}: {self.ask()}")
            time.sleep(0.05)

    # --- the services -------------------------------------------------------------------

    def unit(self, name: str) -> Path:
        """Make the cgroup of a service, and return it."""
        path = root() / f"system.slice/{name}.service"
        path.mkdir(parents=True, exist_ok=True)
        self._units.add(path)
        return path

    def knock(self, name: str, seconds: float, *targets: tuple[str, int]) -> None:
        """Start the service `name`: it connects to each target again and again.

        Its log is /var/log/NAME.log.
        """
        argv = [*named(name), str(seconds)]
        argv += [word for address, port in targets for word in (address, str(port))]
        # In the host before in the unit: the gate would notice a process of another namespace.
        join = ("sh", "-c", 'echo 0 > "$0" && exec "$@"', f"{self.unit(name)}/cgroup.procs")
        with Path(f"/var/log/{name}.log").open("a") as log:
            self.lab.a.popen([*join, *argv], stdout=log)


def program(*arguments: str) -> list[str]:
    """Return the command line of the CLI."""
    return [sys.executable, "-P", "-m", "ipsecgate", *arguments]


def named(name: str) -> list[str]:
    """Return the command of the knocking program as a process called `name`: that of its file."""
    file = PROGRAMS / name
    if not file.is_symlink():
        file.symlink_to("/usr/bin/python3")
    return [str(file), "-S", "-I", "-c", KNOCK]


def ip(namespace: str, *words: str) -> None:
    """Run ip(8) in a namespace. Raises: LabError."""
    family = ["-6"] if any(":" in word for word in words) else []
    command = ["ip", *family, "-n", namespace, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
