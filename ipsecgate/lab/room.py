"""Run a command in a room: namespaces on the host's own kernel, for a host whose kernel has ESP.

A guest provides a kernel and a clean environment. If the host's kernel is good enough, a room
provides the clean environment with namespaces: network (SAs, policies, routes, rules and most
sysctls), mounts, IPC, host name and cgroups. In a room, /run, /tmp and /dev/shm start empty and are
in memory, changes to /etc and /var stay in memory, /sys/fs/bpf is a new bpffs, and /sys/fs/cgroup
shows only the room's part of the tree. All this disappears with the room's last process, except the
cgroup, which we remove.

Rules of this module:
- The folders that the command needs (working folder, checkout, results) are shared with the host,
  readable and writable.
- There is no pid namespace, because the hooks (`bpf_get_current_pid_tgid`) report host pids.
  The things of two rooms are named after their pids, as those of two labs are.
- If systemd runs, it owns the cgroup tree, so ask it for a delegated scope. Otherwise the room is a
  child of the root cgroup, whose controllers stay enabled.
- It is a harness, not a jail: /dev, the clock, modules and the global sysctls are the host's.

    python -m ipsecgate.lab.room [--timeout S] -- CMD...
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from ipsecgate.edges.host import cgroups as tree
from ipsecgate.edges.host.mounts import mounted
from ipsecgate.errors import GateError
from ipsecgate.lab import cgroups
from ipsecgate.lab.netns import is_leftover
from ipsecgate.lab.signals import exit_on_sigterm

PREFIX = "ipsecgate-room"
# linux/sched.h, linux/mount.h, linux/prctl.h
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWNET = 0x08000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1

EMPTY = {"/run": "755", "/tmp": "1777", "/var/tmp": "1777", "/dev/shm": "1777"}  # noqa: S108
"""Folders that start empty, in memory, with their modes. The first one holds the layers, so it is
mounted before them; the others are mounted after."""
LAYERED = ("/etc", "/var")
"""Host folders whose changes stay in memory."""
LAYERS = Path("/run/room")
FILES = 65536
"""Limit of open files per process, as in a guest; less if the host's hard limit is lower."""
CLEANUP_TIMEOUT = 30.0
"""Seconds that an interrupted command may take to clean up."""
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
TIMED_OUT, CANNOT_RUN = 124, 126

_libc = ctypes.CDLL(None, use_errno=True)


def run(argv: Sequence[str], timeout: float, results: Path | None = None) -> int:
    """Run `argv` in a new room; return its exit code, or 128 + N if signal N ended it.

    `timeout`: in seconds; then it is killed and the code is 124. `results`: a folder (created if
    missing) that the command finds in IPSECGATE_RESULTS. If systemd runs, this process is replaced
    by systemd-run, and `run` does not return. Raises: GateError.
    """
    if os.geteuid():
        raise GateError("a room needs namespaces", hint="run it as root")
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        os.environ["IPSECGATE_RESULTS"] = str(results.absolute())
    if SYSTEMD.is_dir():
        try:
            os.execvp("systemd-run", delegated(argv, timeout))  # noqa: S606
        except OSError as error:
            hint = "apt-get install systemd"
            raise GateError(f"cannot get a cgroup from systemd: {error}", hint=hint) from error
    return _run(argv, timeout, tree.root())


def delegated(argv: Sequence[str], timeout: float) -> list[str]:
    """Return the systemd-run command that continues this program in a delegated scope."""
    scope = f"--unit={PREFIX}-{os.getpid()}"
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", "--property=Delegate=yes", scope, "--"),
        *(sys.executable, "-m", "ipsecgate.lab.room", "--delegated", f"--timeout={timeout}", "--"),
        *argv,
    ]


def _run(argv: Sequence[str], timeout: float, base: Path) -> int:
    """Make the room's cgroup in `base`, run the command, kill what it left behind, clean up."""
    sweep()
    with contextlib.suppress(OSError):  # tests that need controllers check for them
        delegate_controllers(base)
    cgroup = base / f"{PREFIX}-{os.getpid()}"
    cgroup.mkdir()
    try:
        with exit_on_sigterm():
            return _wait(_start(argv, cgroup), timeout)
    finally:
        cgroups.discard(cgroup)


def sweep() -> None:
    """Remove the rooms of dead owners and kill the processes in them."""
    for found in [path for path in tree.walk() if is_leftover(path.name, PREFIX)]:
        cgroups.discard(found)


def _start(argv: Sequence[str], cgroup: Path) -> int:
    """Fork a child that enters the room and executes the command; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        _die_with_parent()
        enter(cgroup, hidden_folders([Path.cwd(), *required_folders()]))
        os.execvp(argv[0], list(argv))  # noqa: S606
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"cannot run {argv[0]} in a room: {error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(CANNOT_RUN)


def _wait(pid: int, timeout: float) -> int:
    """Return the child's exit code, or 124 at the timeout: then the child is still running."""
    fd = os.pidfd_open(pid)
    over = select.poll()
    over.register(fd, select.POLLIN)
    try:
        if not over.poll(timeout * 1000):
            sys.stderr.write(f"killed after {timeout:g} s\n")
            return TIMED_OUT
    except KeyboardInterrupt:  # the terminal sends SIGINT to the child, too
        over.poll(CLEANUP_TIMEOUT * 1000)
        raise
    finally:
        os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


# --- in the child, before it executes the command -------------------------------------------


def required_folders() -> list[Path]:
    """Return the folders that our commands need unchanged: checkout, Python, results."""
    results = os.environ.get("IPSECGATE_RESULTS")
    return [
        Path(__file__).resolve().parents[2],
        Path(sys.prefix),
        *([Path(results)] if results else []),
    ]


def hidden_folders(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that the room would hide, without those below another one of them."""
    hidden = {
        folder
        for folder in folders
        if any(Path(top) in folder.parents for top in (*EMPTY, *LAYERED))
    }
    return sorted(f for f in hidden if not any(other in f.parents for other in hidden))


def enter(cgroup: Path, keep: Sequence[Path]) -> None:
    """Move this process into a new room: an existing cgroup, and the host folders to `keep`.

    Raises: OSError, GateError; the process is then unusable and should exit.
    """
    tree.join(cgroup)
    home = Path.cwd()
    _call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET)
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    opened = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in keep]
    _mount_filesystems()
    for path, fd in opened:
        path.mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
        os.close(fd)
    os.chdir(home)  # the path may be on another mount now
    # A cgroup that delegates controllers may hold no process: put the command one level below.
    below = Path("/sys/fs/cgroup/command")
    below.mkdir()
    tree.join(below)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _mount_filesystems() -> None:
    """Mount the room's own file systems over the host's."""
    (first, mode), *others = EMPTY.items()
    mount("tmpfs", Path(first), "tmpfs", 0, f"mode={mode}")
    Path(first, "lock").mkdir()
    for folder in LAYERED:
        layer = LAYERS / folder.strip("/")
        for name in ("upper", "work"):
            (layer / name).mkdir(parents=True)
        options = f"lowerdir={folder},upperdir={layer}/upper,workdir={layer}/work"
        mount("overlay", Path(folder), "overlay", 0, options)
    for folder, mode in others:
        mount("tmpfs", Path(folder), "tmpfs", 0, f"mode={mode}")
    # Unmount instead of hiding: programs use the first cgroup2 mount in the list.
    for point in [path for path, _ in mounted() if path.is_relative_to("/sys")][::-1]:
        _call("umount2", os.fsencode(point), MNT_DETACH)
    mount("sysfs", Path("/sys"), "sysfs")
    mount("cgroup2", Path("/sys/fs/cgroup"), "cgroup2")
    mount("bpf", Path("/sys/fs/bpf"), "bpf")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """Call mount(2). Raises: OSError."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode())
    _call("mount", *words, ctypes.c_ulong(flags), options.encode())


def _call(name: str, *arguments: object) -> None:
    """Call a libc function. Raises: OSError with its name and arguments."""
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}: {name}{arguments[:3]}")


def _die_with_parent() -> None:
    parent = os.getppid()
    _call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(CANNOT_RUN)


def _own_scope() -> Path:
    """Return our scope, after moving this process one level below: it will delegate controllers."""
    scope = tree.own()
    keeper = scope / "keeper"
    keeper.mkdir()
    tree.join(keeper)
    return scope


def delegate_controllers(base: Path) -> None:
    """Enable all of a cgroup's controllers for its children. Raises: OSError."""
    controllers = (base / "cgroup.controllers").read_text().split()
    (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def main() -> int:
    """Run a command in a room on this kernel."""
    parser = argparse.ArgumentParser(prog="python -m ipsecgate.lab.room", description=main.__doc__)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (600)")
    parser.add_argument("--delegated", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+", metavar="CMD")
    options = parser.parse_args()
    try:
        if options.delegated:
            return _run(options.command, options.timeout, _own_scope())
        return run(options.command, options.timeout)
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
