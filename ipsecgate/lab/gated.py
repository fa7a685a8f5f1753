"""A real gate on host a of a lab: `ipsecgate run` in its own process, with its own folders."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ipsecgate.core.tables.layout import Reason
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.holding.call_file import CallFile
from ipsecgate.edges.host import control
from ipsecgate.errors import NoControllerError
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.netns import LabError
from ipsecgate.paths import Paths

BPFFS = Path("/sys/fs/bpf")
READY_TIMEOUT = 300.0  # a start may compile the hooks, which takes minutes on an emulated processor
SPREAD_TIMEOUT = 60.0
_instances = itertools.count(1)


class Spread(NamedTuple):
    """How long after the first answer the last of many held calls was answered, and at the hooks.

    In seconds. The second does not include the time until the callers run again.
    """

    answered: float
    at_hooks: float


class _Held:
    """The calls that wait in the call files of a gate's listeners."""

    def __init__(self, folder: Path) -> None:
        self._files = [CallFile.open_existing(path) for path in folder.iterdir()]
        # The newest call first, because the oldest is answered first.
        self._places = [[place for place, _ in file.calls()][::-1] for file in self._files]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def left(self) -> int:
        """Return how many of them have not been answered."""
        for file, places in zip(self._files, self._places, strict=True):
            while places and not file.call(places[-1]).arch:
                places.pop()
        return sum(map(len, self._places))


class Gated:
    """A gate with one gated cgroup, `cgroup`. The end of the `with` removes it, pins included.

    `policies` is TOML that is appended to the configuration's [gate] table, so keys of [gate]
    come first. `cache` keeps compiled hooks from one gate to the next; None: compile them again.
    `host`: gate everything, as gate.host does.
    """

    def __init__(
        self, lab: Lab, *, policies: str = "", cache: Path | None = None, host: bool = False
    ) -> None:
        self.lab = lab
        self.instance = f"lab-{os.getpid()}-{next(_instances)}"
        self._folder = Path(tempfile.mkdtemp(prefix=f"{lab.name}-gate-"))
        self.cgroup = lab.cgroup(f"{self.instance}/app")
        self.config = self._folder / "ipsecgate.toml"
        self.log = self._folder / "log"
        gated = "host = true" if host else f'cgroups = ["{self.cgroup}"]'
        self.config.write_text(f'[gate]\nvici = "{lab.a.charon.vici_socket}"\n{gated}\n{policies}')
        cache = cache or self._folder / "cache"
        self.paths = Paths(self.config, self.instance, BPFFS, self._folder / "run", cache)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def argv(self, *arguments: str) -> list[str]:
        """Return the command line that runs a CLI verb on this gate."""
        paths = self.paths
        places = {"config": paths.config, "run-dir": paths.run, "cache-dir": paths.cache}
        options = [word for name, path in places.items() for word in (f"--{name}", str(path))]
        return [sys.executable, "-P", "-m", "ipsecgate", *options, "-i", self.instance, *arguments]

    def start(
        self,
        launcher: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        fds: Sequence[int] = (),
    ) -> None:
        """Start the controller and wait until it has published its tables. Raises: LabError.

        `launcher` is a command prefix that executes the controller, with `env` and `fds`.
        """
        argv = [*launcher, *self.argv("run")]
        with self.log.open("a") as log:
            self.process = self.lab.a.popen(argv, stdout=log, stderr=log, env=env, fds=fds)
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                if self.ask()["ready"]:
                    return
            except NoControllerError:
                if self.process.poll() is not None:
                    raise LabError(f"the controller exited:\n{self.log.read_text()}") from None
            if time.monotonic() > deadline:
                raise LabError(f"the controller is not ready:\n{self.log.read_text()}")
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the controller a signal and wait for its end; the hooks stay."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a CLI verb in host a. Raises: CalledProcessError if it fails and `check`."""
        return self.lab.a.run(self.argv(*arguments), check=check)

    def exec_argv(self, *command: str, options: Sequence[str] = ()) -> list[str]:
        """Return the argv of a command under `ipsecgate exec`, for `Host.run` and `popen`."""
        return self.argv("exec", *options, "--", *command)

    def status(self) -> dict[str, Any]:
        """Return the output of `status --json`; ignore its exit code."""
        document: dict[str, Any] = json.loads(self.cli("--json", "status", check=False).stdout)
        return document

    def ask(self, verb: str = "status") -> dict[str, Any]:
        """Send the controller a control request. Raises: NoControllerError, GateError."""
        return control.ask(self.paths.control, verb, 60.0)

    def reasons(self) -> dict[str, int]:
        """Return the hooks' counters by reason, read from the pinned map."""
        with Maps(Pins(BPFFS, self.instance)) as maps:
            return {reason.name.lower(): count for reason, count in maps.counters().items()}

    def spread(self, count: int, begin: Callable[[], None]) -> Spread:
        """Call `begin`, which has all held calls let go; return how long `count` of them take.

        It looks every 0.5 ms, at real-time priority if it may, because the callers want the
        processors, too.
        Raises: LabError.
        """
        with Maps(Pins(BPFFS, self.instance)) as maps, _Held(self.paths.holds) as held:
            waiting, before = held.left(), maps.counters()[Reason.ALLOW_COVERED]
            priority = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(2)
            with suppress(PermissionError):  # systemd gives no unit a share of it by default
                os.sched_setscheduler(0, *priority)
            try:
                begin()
                first = began = time.monotonic()
                answered = 0.0
                while True:
                    left, now = held.left(), time.monotonic()
                    seen = maps.counters()[Reason.ALLOW_COVERED] - before
                    if left == waiting and not seen:
                        first = now
                    if left == waiting - count:
                        answered = answered or now - first
                        if seen >= count:
                            return Spread(answered, time.monotonic() - first)
                    if now > began + SPREAD_TIMEOUT:
                        raise LabError(f"{left} of {waiting} calls wait, and {seen} were covered")
                    time.sleep(0.0005)
            finally:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def memory(self) -> float:
        """Return the controller's peak resident memory in MiB."""
        if self.process is None:
            raise LabError("no controller is running")
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024  # type: ignore[index]

    def wait_policy(self, name: str, timeout: float = 60.0) -> None:
        """Wait until the gate knows a loaded connection. Raises: LabError."""
        deadline = time.monotonic() + timeout
        while f"{name}/{name}" not in self.ask()["children"]:
            if time.monotonic() > deadline:
                raise LabError(f"the gate did not notice the connection {name}")
            time.sleep(0.02)

    def close(self) -> None:
        """Stop the controller and unload the hooks."""
        self.kill(signal.SIGTERM)
        self.cli("unload", "--force", check=False)
        shutil.rmtree(self._folder, ignore_errors=True)
