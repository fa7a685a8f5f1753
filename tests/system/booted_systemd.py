"""A real systemd as process 1 on the lab's host a, with the program as `make install` leaves it.

It shares the network of host a and has its own pids, mounts, devices and part of the cgroup tree.
Its root is this machine's or another, under a layer with the installed program and the units and
settings of the test. Everything that it writes is deleted at the end, except the bpffs, which tests
inspect.

This module judges nothing. The root's own units are present, but a boot starts only those that
`WANTED` names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import control
from ipsecgate.errors import NoControllerError
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.uml import children_of

CHECKOUT = Path(__file__).parents[2]
INSTALLED = CHECKOUT / ".cache/root"
UNITS = "usr/lib/systemd/system"
CHARON = "/run/charon"  # the lab's strongSwan appears here: PrivateTmp= hides its real folder
# Folders of which only our layer is visible: units that this machine starts, its caches and logs.
OURS = (
    *("etc/systemd/system", "etc/ipsecgate", "var/cache", "var/log"),
    *(f"{UNITS}/{name}.target.wants" for name in ("sysinit", "sockets", "timers", "multi-user")),
)
WANTED = {"sysinit": ("systemd-journald.service", "systemd-tmpfiles-setup.service")}
TIMEOUT = 60.0

# Process 1 runs this until it becomes systemd: make the root as container tools do, and enter it.
INIT = """
set -eu
read -r _go
layer=$1 scratch=$2 bpf=$3 checkout=$4 charon=$5 below=$6 enabled=$7 new=$2/root
mkdir -p "$scratch/upper" "$scratch/work" "$new"
layers=lowerdir=$layer:$below,upperdir=$scratch/upper,workdir=$scratch/work
mount -t overlay -o "$layers" overlay "$new"
mount -t proc proc "$new/proc"
mount -t sysfs sysfs "$new/sys"
mount -t cgroup2 cgroup2 "$new/sys/fs/cgroup"
mount --bind "$bpf" "$new/sys/fs/bpf"
for folder in dev run tmp; do mount -t tmpfs -o mode=755 tmpfs "$new/$folder"; done
for node in null zero full random urandom tty; do cp -a "/dev/$node" "$new/dev"; done
ln -s /proc/self/fd pts/ptmx "$new/dev"
mkdir -p "$new$checkout" "$new/run/charon"
mount --bind "$checkout" "$new$checkout"
mount --bind "$charon" "$new/run/charon"
cd "$new"
pivot_root . .
umount -l .
mount --make-rshared /
[ -z "$enabled" ] || SYSTEMD_OFFLINE=1 systemctl --quiet enable $enabled
exec env -i container=ipsecgate-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --unit=multi-user.target --show-status=no
"""


class BootedSystemd:
    """Such a systemd; `files`: what the test adds to the root, by path.

    `clean_root`: start without the program in this root, not on the machine's.
    """

    def __init__(self, lab: Lab, files: Mapping[str, str], clean_root: Path | None = None) -> None:
        self._lab = lab
        self._below = clean_root or Path("/")
        self._enabled = "" if clean_root else "ipsecgate-load ipsecgate"
        self._folder = Path(tempfile.mkdtemp(prefix=f"{lab.name}-", dir="/run"))
        self._layer, self.bpffs = self._folder / "layer", self._folder / "bpf"
        self.cgroup = lab.cgroup("manager")
        self._process: subprocess.Popen[str] | None = None
        self.pid = 0  # of its process 1, as seen from here
        if clean_root is None:
            shutil.copytree(INSTALLED, self._layer, symlinks=True)
        for folder in (*OURS, *(f"{UNITS}/{name}.target.wants" for name in WANTED)):
            (self._layer / folder).mkdir(parents=True, exist_ok=True)
        for folder in OURS:
            os.setxattr(self._layer / folder, "trusted.overlay.opaque", b"y")
        for target, units in WANTED.items():
            for unit in units:
                (self._layer / UNITS / f"{target}.target.wants" / unit).symlink_to(f"../{unit}")
        for name, text in files.items():
            (self._layer / name).parent.mkdir(parents=True, exist_ok=True)
            (self._layer / name).write_text(text)

    def __enter__(self) -> Self:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_reason: object) -> None:
        self.close()

    def boot(self) -> None:
        """Start it, and wait until every wanted unit has started."""
        for folder in (self.cgroup.parents[1], self.cgroup.parent):
            (folder / "cgroup.subtree_control").write_text("+cpu +memory +pids")
        scratch = self._folder / "scratch"
        for folder in (self.bpffs, scratch):
            folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", str(self.bpffs)], check=True)
        places = (self._layer, scratch, self.bpffs, CHECKOUT)
        namespaces = ("--pid", "--fork", "--kill-child", "--mount", "--cgroup")
        with (self._folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [
                    *(*self._lab.a.launcher(self.cgroup), "unshare", *namespaces, "sh", "-c"),
                    *(INIT, "init", *map(str, places), str(self._lab.a.charon.folder)),
                    *(str(self._below), self._enabled),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )
        assert self._process.stdin is not None
        self.until(self._is_forked, "it does not start")
        # Process 1 can enable cgroup controllers for its units only if it is alone in its cgroup.
        (self._lab.cgroup("beside") / "cgroup.procs").write_text(str(self._process.pid))
        self._process.stdin.write("go\n")
        self._process.stdin.close()
        self.until(
            self._is_up, "it does not start", within=300
        )  # this includes compiling the hooks

    def _is_forked(self) -> bool:
        assert self._process is not None
        self.pid = next(iter(children_of(self._process.pid)), 0)
        return bool(self.pid)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        return self._is_systemd() and self.systemctl("is-system-running").stdout.strip() in (
            "running",
            "degraded",
        )

    def _is_systemd(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{self.pid}/comm").read_text() == "systemd\n"
        return False

    def until(self, holds: Callable[[], object], what: str, within: float = TIMEOUT) -> None:
        """Wait until the condition holds. Raises: AssertionError with `what` and the log."""
        deadline = time.monotonic() + within
        while not holds():
            assert time.monotonic() < deadline, f"{what}\n{self.log()}"
            time.sleep(0.05)

    # --- running commands in it -------------------------------------------------------

    def words(self, *argv: str) -> list[str]:
        """Return the command that runs `argv` in it, outside its units."""
        spaces = ("--mount", "--pid", "--cgroup", "--net", "--wd=/")
        return ["nsenter", f"--target={self.pid}", *spaces, "--", *argv]

    def run(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in it; the caller checks the exit code."""
        return subprocess.run(
            self.words(*argv), capture_output=True, text=True, check=False, timeout=TIMEOUT * 2
        )

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words)

    def start(self, name: str, command: Sequence[str], *properties: str) -> None:
        """Start a transient unit; `output(name)` returns its output."""
        said = f"StandardOutput=file:/run/{name}.out"
        options = [f"--property={word}" for word in (said, *properties)]
        done = self.run("systemd-run", "--quiet", f"--unit={name}", *options, "--", *command)
        assert done.returncode == 0, done.stderr

    def file(self, path: str) -> Path:
        """Return the path from here to a file in its root."""
        return Path(f"/proc/{self.pid}/root{path}")

    def output(self, name: str) -> str:
        return self.file(f"/run/{name}.out").read_text()

    def show(self, unit: str, key: str) -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", f"--property={key}", unit).stdout.strip()

    def ask(self) -> dict[str, Any]:
        """Return the controller's status, {} if none answers."""
        with contextlib.suppress(NoControllerError):
            return control.ask(self.file("/run/ipsecgate/control.sock"), "status", TIMEOUT)
        return {}

    @contextlib.contextmanager
    def successor(self) -> Iterator[None]:
        """Wait at the end until a controller that the block has started is ready."""
        old = self.ask()["pid"]
        yield
        self.until(
            lambda: (status := self.ask()) and status["pid"] != old and status["ready"],
            "no new controller became ready",
        )

    def main_pid(self, unit: str) -> int:
        """Return the main process of a service: the one whose parent is process 1."""
        pids = (self.cgroup / f"system.slice/{unit}/cgroup.procs").read_text().split()
        (main,) = (int(pid) for pid in pids if self._is_parent(pid))
        return main

    def _is_parent(self, pid: str) -> bool:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return f"\nPPid:\t{self.pid}\n" in Path(f"/proc/{pid}/status").read_text()
        return False

    def log(self, unit: str = "") -> str:
        """Return the journal of a unit, or all of it."""
        if not self._is_systemd():
            return (self._folder / "log").read_text()
        only = (f"--unit={unit}",) if unit else ()
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *only).stdout

    def reboot(self) -> None:
        """Shut it down and boot it again: of its files only those on disk are left."""
        self.shut_down()
        self._lose_hooks()
        for folder in sorted(self.cgroup.glob("**/"), reverse=True):
            folder.rmdir()
        self.cgroup = self._lab.cgroup("manager")
        self.boot()

    # --- its end ----------------------------------------------------------------------

    def shut_down(self) -> None:
        """Shut it down, as `systemctl poweroff` does, and wait."""
        assert self._process is not None
        os.kill(self.pid, signal.SIGRTMIN + 4)
        self._process.wait(TIMEOUT * 2)

    def close(self) -> None:
        """Kill it, and remove everything that it left."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # this also kills process 1 and with it all others
            self._process.wait()
        if self.bpffs.is_dir():
            self._lose_hooks()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lose_hooks(self) -> None:
        with contextlib.suppress(OSError):
            Pins(self.bpffs, "default").unload()
        subprocess.run(["umount", str(self.bpffs)], check=False)
