"""Hosts with a systemd of their own as process 1, on one clean root of Debian below a layer each.

Each has its own network namespace, with a device that leads nowhere, its own mounts, pids, bpffs
and part of the cgroup tree, and a real strongSwan. Everything is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.lab.cgroups import Tree
from ipsecgate.lab.netns import Namespace
from ipsecgate.lab.uml import children_of
from tests.system.booted_systemd import CHECKOUT, INIT, OURS, UNITS

APP = "usr/local/lib/app.py"
WANTED = {
    "sysinit": ("systemd-journald.service", "systemd-tmpfiles-setup.service"),
    "multi-user": ("strongswan.service",),
}
APP_UNIT = f"""
[Service]
ExecStart=/usr/bin/python3 -I /{APP} {{calls}}
[Install]
WantedBy=multi-user.target
"""


class Host:
    """A host; `calls` are the arguments of its gated service, `app.service`."""

    def __init__(self, name: str, number: int, root: Path, calls: str, folder: Path) -> None:
        self.name = name
        self.pid = 0
        self._folder, self._root = folder / name, root
        self._tree = Tree(f"{folder.name}-{name}")
        self._namespace = Namespace(f"{folder.name}-{name}")
        self._process: subprocess.Popen[str] | None = None
        self._layer, self.bpffs = self._folder / "layer", self._folder / "bpf"
        for words in (
            "link add eth0 type veth peer name far",
            "link set far up",
            "link set eth0 up",
            "link set lo up",
            f"addr add 192.0.2.{number}/24 dev eth0",
            "route add default dev eth0",
        ):
            subprocess.run(["ip", "-n", self._namespace.name, *words.split()], check=True)
        self._make_layer(calls)

    def _make_layer(self, calls: str) -> None:
        for folder in (*OURS, *(f"{UNITS}/{name}.target.wants" for name in WANTED)):
            (self._layer / folder).mkdir(parents=True, exist_ok=True)
        (self._layer / "etc/ipsecgate").rmdir()
        for folder in (folder for folder in OURS if folder != "etc/ipsecgate"):
            os.setxattr(self._layer / folder, "trusted.overlay.opaque", b"y")
        for target, units in WANTED.items():
            for unit in units:
                (self._layer / UNITS / f"{target}.target.wants" / unit).symlink_to(f"../{unit}")
        wants = self._layer / UNITS / "multi-user.target.wants/app.service"
        wants.symlink_to("/etc/systemd/system/app.service")
        self._write("etc/systemd/system/app.service", APP_UNIT.format(calls=calls))
        self._write(APP, Path(__file__).with_name("app.py").read_text())

    def _write(self, path: str, text: str) -> None:
        (self._layer / path).parent.mkdir(parents=True, exist_ok=True)
        (self._layer / path).write_text(text)

    def spawn(self) -> None:
        """Begin its boot."""
        self.bpffs.mkdir()
        (self._folder / "scratch").mkdir()
        (self._folder / "charon").mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf", str(self.bpffs)], check=True)
        join = 'echo 0 >"$0" && exec "$@"'
        procs = self._tree.make("system") / "cgroup.procs"
        enter = ["nsenter", f"--net={self._namespace.path}", "--"]
        spaces = ("--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts")
        places = (self._layer, self._folder / "scratch", self.bpffs, CHECKOUT)
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    *("sh", "-c", join, str(procs), *enter, "unshare", *spaces, "sh", "-c", INIT),
                    *("init", *map(str, places), str(self._folder / "charon"), str(self._root), ""),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.close()

    def is_up(self) -> bool:
        """Return whether its boot is over."""
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        self.pid = next(iter(children_of(self._process.pid)), 0)
        with contextlib.suppress(FileNotFoundError):
            if self.pid and Path(f"/proc/{self.pid}/comm").read_text() == "systemd\n":
                state = self.run("systemctl", "is-system-running").stdout.strip()
                return state in ("running", "degraded")
        return False

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it, outside its units."""
        spaces = ("--mount", "--pid", "--cgroup", "--net", "--uts", "--root", "--wd")
        words = ["nsenter", f"--target={self.pid}", *spaces, "--", *argv]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    def file(self, path: str) -> Path:
        """Return the path from here to a file in its root."""
        return Path(f"/proc/{self.pid}/root{path}")

    def calls(self, address: str) -> str:
        """Return the errno of a call in the cgroup of its gated service."""
        cgroup = "/sys/fs/cgroup/system.slice/app.service/cgroup.procs"
        script = (
            f"open('{cgroup}', 'w').write('0'); import errno, socket; s = socket.socket(); "
            f"s.setblocking(False); print(errno.errorcode[s.connect_ex(('{address}', 5432))])"
        )
        done = self.run("/usr/bin/python3", "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def close(self) -> None:
        """End it, and remove what it left."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # this also kills process 1 and with it all others
            self._process.wait()
        if self.bpffs.is_dir():
            with contextlib.suppress(OSError):
                Pins(self.bpffs, "default").unload()
            subprocess.run(["umount", str(self.bpffs)], check=False)
        self._namespace.remove()
        self._tree.remove()


class Fleet:
    """The hosts, by name; booted in the `with`."""

    def __init__(self, root: Path, calls: dict[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"ipsecgate-fleet-{os.getpid()}-", dir="/run"))
        self.hosts: dict[str, Host] = {}
        self._root, self._calls = root, calls

    def __enter__(self) -> Self:
        try:
            for number, (name, calls) in enumerate(self._calls.items(), 1):
                self.hosts[name] = Host(name, number, self._root, calls, self._folder)
                self.hosts[name].spawn()
            deadline = time.monotonic() + 300
            waiting = list(self.hosts.values())
            while waiting := [host for host in waiting if not host.is_up()]:
                assert time.monotonic() < deadline, f"{waiting[0].name} does not boot"
                time.sleep(0.2)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        for host in self.hosts.values():
            host.close()
        shutil.rmtree(self._folder, ignore_errors=True)
