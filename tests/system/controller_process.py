"""A controller as systemd starts it, without IKE, in a namespace whose only link leads nowhere."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups, control
from ipsecgate.errors import NoControllerError
from ipsecgate.lab.netns import Namespace
from tests.system.caller import Caller
from tests.system.hooked_cgroup import PEER, THERE

PORT = 9


@dataclass
class ControllerProcess:
    """A controller with a configuration, a cgroup to gate, and a service manager's socket."""

    name: str
    cache: Path
    folder: Path
    cgroup: Path
    namespace: Namespace
    manager: socket.socket
    process: subprocess.Popen[bytes] | None = None
    heard: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "ipsecgate.toml"

    def argv(self, *words: str) -> list[str]:
        return [
            "--config", str(self.config), "--run-dir", str(self.folder / "run"),
            "--cache-dir", str(self.cache), "-i", self.name, *words,
        ]  # fmt: skip

    def start(
        self,
        *,
        code: str = "",
        env: Mapping[str, str] | None = None,
        files: int | None = None,
        wrap: Sequence[str] = (),
    ) -> None:
        """Start the controller; `code` runs first in its process, to break one step."""
        program = f"{code}\nfrom ipsecgate.cli import main\nmain({self.argv('run')!r})\n"

        def limit() -> None:
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        self._forget()
        log = (self.folder / "log").open("ab")
        with self.namespace.inside(), log:
            self.process = subprocess.Popen(
                [*wrap, sys.executable, "-c", program],
                env={**os.environ, "NOTIFY_SOCKET": str(self.folder / "notify"), **(env or {})},
                stdout=log,
                stderr=log,
                preexec_fn=limit,  # noqa: PLW1509
            )

    def _forget(self) -> None:
        """Drop what an earlier controller has sent."""
        self.heard.clear()
        self.manager.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self.manager.recv(4096)

    def hears(self, word: str, within: float = 30.0) -> bool:
        """Wait for a notification that begins with `word`; return whether it came."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            self.manager.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self.heard += self.manager.recv(4096).decode().splitlines()
            except TimeoutError:
                break
            if any(line.startswith(word) for line in self.heard):
                return True
        return False

    def ask(self, verb: str = "status") -> dict[str, Any]:
        return control.ask(self.folder / "run" / self.name / "control.sock", verb, 60.0)

    def eventually(self, holds: Callable[[], Any], within: float = 30.0) -> bool:
        """Wait for the condition; return whether it came true. The controller may start late."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            with suppress(NoControllerError):
                if holds():
                    return True
            time.sleep(0.02)
        return False

    def configure(self, text: str) -> None:
        """Write the configuration: keys of [gate], then policies."""
        self.config.write_text(f'[gate]\nvici = "{self.folder}/vici"\n{text}')

    def cli(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "ipsecgate", *self.argv(*words)]
        with self.namespace.inside():
            return subprocess.run(argv, capture_output=True, text=True, check=False)

    def ended(self, within: float = 60.0) -> int:
        assert self.process is not None
        return self.process.wait(within)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def controller(unique: str, cache: Path, tmp_path: Path) -> Iterator[ControllerProcess]:
    with ExitStack() as stack:
        namespace = Namespace(unique)
        stack.callback(namespace.remove)
        for words in (
            "link set lo up",
            "link add out0 type veth peer name nowhere",
            "link set out0 arp off up",
            "link set nowhere up",
            "addr add 198.51.100.1/32 dev out0",
            "route add default dev out0",
        ):
            subprocess.run(["ip", "-n", unique, *words.split()], check=True)
        cgroup = cgroups.root() / unique
        cgroup.mkdir()
        stack.callback(cgroup.rmdir)
        stack.callback(Pins(Path("/sys/fs/bpf"), unique).unload)
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(tmp_path / "notify"))
        made = ControllerProcess(unique, cache, tmp_path, cgroup, namespace, manager)
        made.config.write_text(
            f'[gate]\ncgroups = ["{cgroup}"]\nvici = "{tmp_path}/vici"\n'
            f'[[policy]]\nname = "there"\nremote = ["{THERE[4]}"]\n'
        )
        stack.callback(made.end)
        yield made


@pytest.fixture
def caller(controller: ControllerProcess) -> Iterator[Caller]:
    made = Caller(controller.namespace.path, controller.cgroup)
    yield made
    made.close()


def refused(caller: Caller) -> bool:
    told = caller("tcp", PEER[4], PORT)
    assert told in ("EPERM", "EINPROGRESS")
    return told == "EPERM"
