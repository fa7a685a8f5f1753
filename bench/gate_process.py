"""A gate of its own for a benchmark: a real controller in a namespace of this machine's kernel."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import control
from ipsecgate.lab.cgroups import Tree
from ipsecgate.lab.netns import Namespace

NAME = f"footprint-{os.getpid()}"
TICKS = os.sysconf("SC_CLK_TCK")
CACHE = Path(__file__).parents[1] / ".cache/footprint"


class Gate:
    """One instance in a namespace of its own: configuration, kernel policies, a controller."""

    def __init__(self, stack: ExitStack, name: str = NAME) -> None:
        self.name = name
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.place = Namespace(name)
        stack.callback(self.place.remove)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        tree = Tree(name)
        stack.callback(tree.remove)
        self.cgroup = tree.make("gated")
        self.pins = Pins(Path("/sys/fs/bpf"), name)
        stack.callback(self.pins.unload)
        self.config = self.folder / "ipsecgate.toml"
        self.config.write_text(
            f'[gate]\ncgroups = ["{self.cgroup}"]\nvici = "{self.folder}/vici"\n'
            '[[policy]]\nname = "there"\nremote = ["10.0.0.0/8"]\n'
        )
        self.manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.manager.bind(str(self.folder / "notify"))
        self.environment = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
            "PYTHONPYCACHEPREFIX": str(CACHE / "python"),
            "NOTIFY_SOCKET": str(self.folder / "notify"),
        }

    def argv(self, *words: str) -> list[str]:
        """Return the arguments of a verb."""
        return [
            "--config", str(self.config), "--run-dir", str(self.folder / "run"),
            "--cache-dir", str(CACHE), "-i", self.name, *words,
        ]  # fmt: skip

    def policies(self, what: str, count: int, *more: str) -> float:
        """Change kernel policies; return how many in a second."""
        # With the controller's priority, or it would not get to send as much on a busy machine.
        sender = self.popen(
            ["nice", "-n", "-20", sys.executable, "-m", "bench.spd_sender", what, str(count), *more]
        )
        return float(sender.communicate()[0])

    def popen(self, argv: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        """Start a program in the namespace."""
        with self.place.inside():
            return subprocess.Popen(
                argv, stdout=subprocess.PIPE, text=True, env=self.environment, **more
            )

    def verb(self, *words: str) -> float:
        """Run a verb of the program; return its seconds of processor time."""
        argv = [sys.executable, "-m", "ipsecgate", *self.argv(*words)]
        done = self.popen(argv, stderr=subprocess.DEVNULL)
        done.stdout.read()  # type: ignore[union-attr]
        _, _, usage = os.wait4(done.pid, 0)
        done.returncode = 0
        return usage.ru_utime + usage.ru_stime

    @contextmanager
    def controller(self, code: str = "", *, wait: bool = True) -> Iterator[Controller]:
        """Run a controller, and wait until it is ready; `code` runs first in its process."""
        self.manager.setblocking(False)
        with suppress(BlockingIOError):
            while self.manager.recv(4096):
                pass
        self.manager.settimeout(120)
        program = f"{code}\nfrom ipsecgate.cli import main\nmain({self.argv('run')!r})\n"
        began = time.monotonic()
        log = (self.folder / "log").open("w")
        with log:
            process = self.popen([sys.executable, "-c", program], stderr=log)
        try:
            if wait:
                self.wait_ready()
            yield Controller(self, process.pid, time.monotonic() - began)
        finally:
            process.terminate()
            process.wait()

    def wait_ready(self) -> None:
        """Wait until the controller reports that it is ready."""
        while not self.manager.recv(4096).startswith(b"READY"):
            pass


class Controller:
    """A running controller that has published its tables `ready_after` seconds after its start."""

    def __init__(self, gate: Gate, pid: int, ready_after: float) -> None:
        self.gate = gate
        self.pid = pid
        self.ready_after = ready_after
        self.ready_cpu = self.cpu()

    def cpu(self) -> float:
        """Return the seconds of processor time used so far, to 10 ms."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def run_time(self) -> float:
        """Return the seconds that its main thread has run so far. Source: proc(5), schedstat."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9

    def ask(self, verb: str) -> dict[str, Any]:
        """Ask over the control socket."""
        return control.ask(self.gate.folder / "run" / self.gate.name / "control.sock", verb, 60.0)

    def overruns(self) -> int:
        """Return how often notifications were lost."""
        return (self.gate.folder / "log").read_text().count("notifications were lost")

    def inspector(self) -> int | None:
        """Return the inspector's pid, if it runs."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(children[0]) if children else None
