"""A room of its own for a command, on a kernel that has ESP: its host's, and nothing else of it.

A guest brings a kernel and a clean world. Where the kernel is there already the world is made of
namespaces: network (so SAs, policies, routes, rules and most sysctls), mounts, IPC, host name and
cgroups. In it /run, /tmp and /dev/shm are empty and in memory, what is written to /etc and /var
stays in memory, /sys/fs/bpf is a bpffs of its own, and /sys/fs/cgroup shows the room's own part
of the tree. All of that is gone with the room's last process; the cgroup is removed by us.

Rules of this module:
- A folder that the command needs (its own, the checkout, the results) is the host's, to read and
  to write.
- Pids are the host's, since what the hooks tell of is: `bpf_get_current_pid_tgid` knows no
  pid namespace. Two rooms tell their things apart by them, as two labs do.
- Where systemd runs, the cgroup tree is its own: it is asked for a part (a delegated scope).
  Where it does not, the room is at the top of the tree, whose controllers stay switched on.
- It is a harness, not a jail: /dev, the clock, modules and the kernel's sysctls are the host's.

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
"""What is in memory and empty at first; the first of them before the layers, the others after."""
LAYERED = ("/etc", "/var")
"""What is the host's, with what is written hidden_folders in memory."""
LAYERS = Path("/run/room")
FILES = 65536
"""Open files that a process may have, as in a guest; fewer where the host allows fewer."""
PATIENCE = 30.0
"""Seconds a command that was interrupted may take to clean up."""
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
TIMED_OUT, CANNOT_RUN = 124, 126

_libc = ctypes.CDLL(None, use_errno=True)


def run(argv: Sequence[str], timeout: float, results: Path | None = None) -> int:
    """Run `argv` in a new room, return its exit code: as a shell's if a signal ended it.

    `timeout`: seconds, then it is killed and the code is 124. `results` is a folder that is
    made if it is missing; the command has it in IPSECGATE_RESULTS. Where systemd runs this
    process becomes a scope of it, and `run` does not return. Raises: GateError.
    """
    if os.geteuid():
        raise GateError("a room is made of namespaces", hint="run it as root")
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        os.environ["IPSECGATE_RESULTS"] = str(results.absolute())
    if SYSTEMD.is_dir():
        try:
            os.execvp("systemd-run", delegated(argv, timeout))  # noqa: S606
        except OSError as error:
            hint = "apt-get install systemd"
            raise GateError(f"no part of systemd's cgroups: {error}", hint=hint) from error
    return _run(argv, timeout, tree.root())


def delegated(argv: Sequence[str], timeout: float) -> list[str]:
    """Return the words by which systemd gives us a part of the cgroup tree, and we go on there."""
    scope = f"--unit={PREFIX}-{os.getpid()}"
    return [
        *("systemd-run", "--scope", "--quiet", "--collect", "--property=Delegate=yes", scope, "--"),
        *(sys.executable, "-m", "ipsecgate.lab.room", "--delegated", f"--timeout={timeout}", "--"),
        *argv,
    ]


def _run(argv: Sequence[str], timeout: float, base: Path) -> int:
    """Make the room's cgroup in `base`, run the command, end all that it left, tidy up."""
    sweep()
    with contextlib.suppress(OSError):  # tests that need controllers say so
        delegate_controllers(base)
    cgroup = base / f"{PREFIX}-{os.getpid()}"
    cgroup.mkdir()
    try:
        with exit_on_sigterm():
            return _wait(_start(argv, cgroup), timeout)
    finally:
        cgroups.discard(cgroup)


def sweep() -> None:
    """Remove the rooms of dead owners, and end who is still in them."""
    for found in [path for path in tree.walk() if is_leftover(path.name, PREFIX)]:
        cgroups.discard(found)


def _start(argv: Sequence[str], cgroup: Path) -> int:
    """Return the pid of a child that enters the room and becomes the command."""
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
        sys.stderr.write(f"no room for {argv[0]}: {error}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(CANNOT_RUN)


def _wait(pid: int, timeout: float) -> int:
    """Return the child's exit code, 124 if it is not over in time: then it is left as it is."""
    fd = os.pidfd_open(pid)
    over = select.poll()
    over.register(fd, select.POLLIN)
    try:
        if not over.poll(timeout * 1000):
            sys.stderr.write(f"killed after {timeout:g} s\n")
            return TIMED_OUT
    except KeyboardInterrupt:  # the terminal told the child as well
        over.poll(PATIENCE * 1000)
        raise
    finally:
        os.close(fd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


# --- within: the child, before it becomes the command ---------------------------------------


def required_folders() -> list[Path]:
    """Return the folders that a command of ours needs as they are: program, Python, results."""
    results = os.environ.get("IPSECGATE_RESULTS")
    return [
        Path(__file__).resolve().parents[2],
        Path(sys.prefix),
        *([Path(results)] if results else []),
    ]


def hidden_folders(folders: Iterable[Path]) -> list[Path]:
    """Return those that the room would hide, the outermost of them only."""
    hidden = {one for one in folders if any(Path(top) in one.parents for top in (*EMPTY, *LAYERED))}
    return sorted(one for one in hidden if not any(other in one.parents for other in hidden))


def enter(cgroup: Path, keep: Sequence[Path]) -> None:
    """Move this process into a new room: a cgroup that is there, and the host's folders to keep.

    Raises: OSError, GateError; the process is then good for nothing else.
    """
    tree.join(cgroup)
    home = Path.cwd()
    _call("unshare", CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET)
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    opened = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in keep]
    _furnish()
    for path, fd in opened:
        path.mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
        os.close(fd)
    os.chdir(home)  # it may be another mount now
    # No process may be where controllers are given to others: the command is one floor below.
    floor = Path("/sys/fs/cgroup/command")
    floor.mkdir()
    tree.join(floor)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _furnish() -> None:
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
    # Not only hidden: who looks for the cgroup tree takes the first mount of the list.
    for point in [path for path, _ in mounted() if path.is_relative_to("/sys")][::-1]:
        _call("umount2", os.fsencode(point), MNT_DETACH)
    mount("sysfs", Path("/sys"), "sysfs")
    mount("cgroup2", Path("/sys/fs/cgroup"), "cgroup2")
    mount("bpf", Path("/sys/fs/bpf"), "bpf")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """Mount, as mount(2). Raises: OSError."""
    words = (os.fsencode(source), os.fsencode(target), kind.encode())
    _call("mount", *words, ctypes.c_ulong(flags), options.encode())


def _call(name: str, *arguments: object) -> None:
    """Make a system call by libc's function. Raises: OSError with its name and arguments."""
    if getattr(_libc, name)(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}: {name}{arguments[:3]}")


def _die_with_parent() -> None:
    parent = os.getppid()
    _call("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(CANNOT_RUN)


def _own_scope() -> Path:
    """Return the scope that we are in, and be one floor below: it is to have controllers."""
    scope = tree.own()
    keeper = scope / "keeper"
    keeper.mkdir()
    tree.join(keeper)
    return scope


def delegate_controllers(base: Path) -> None:
    """Give what is in a cgroup the controllers that it has itself. Raises: OSError."""
    controllers = (base / "cgroup.controllers").read_text().split()
    (base / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def main() -> int:
    """Run a command in a room of its own on this kernel."""
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
