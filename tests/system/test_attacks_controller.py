"""Who attacks the controller: descriptors that lead past the hooks, its sockets under load."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ipsecgate.core.seccomp import program
from ipsecgate.edges import control, oci, seccomp
from tests.system import uring
from tests.system.caller import Caller
from tests.system.unit import Unit, caller, refused, unit

__all__ = ["caller", "unit"]


def exec_with(unit: Unit, fd: int) -> subprocess.CompletedProcess[str]:
    """Run a command that would inherit a descriptor."""
    argv = [sys.executable, "-m", "ipsecgate", *unit.argv("exec", "--", "echo", "ran")]
    with unit.namespace.inside():
        return subprocess.run(
            argv, pass_fds=[fd], capture_output=True, text=True, check=False, timeout=60
        )


WAYS: dict[str, Callable[[], int]] = {
    "an Internet socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).detach(),
    "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).detach(),
    "an io_uring": uring.new,
    "a TAP device": lambda: os.open("/dev/net/tun", os.O_RDWR),
}


def test_an_inherited_way_past_the_hooks_is_refused(unit: Unit) -> None:
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)  # or it is built in
    unit.start()
    assert unit.hears("READY=1"), unit.log
    for name, make in WAYS.items():
        fd = make()
        done = exec_with(unit, fd)
        os.close(fd)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert name in done.stderr
    fd = os.open(os.devnull, os.O_RDWR)
    done = exec_with(unit, fd)
    os.close(fd)
    assert done.stdout == "ran\n", done.stderr


ANEW = """
from ipsecgate.edges import cgroups
from ipsecgate.cli import main
joining = cgroups.join
def join(cgroup):
    cgroup.rmdir()
    cgroup.mkdir()
    joining(cgroup)
cgroups.join = join
"""


def test_a_command_does_not_run_in_a_cgroup_made_anew(unit: Unit) -> None:
    """It may be, by whoever may make cgroups there, between a look at the name and joining."""
    unit.configure("")
    unit.start()
    assert unit.hears("READY=1"), unit.log
    assert unit.cli("attach", str(unit.cgroup)).returncode == 0  # hence not followed by its name
    program = f"{ANEW}\nmain({unit.argv('exec', '--', 'echo', 'ran')!r})"
    with unit.namespace.inside():
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert "was made anew" in done.stderr


TYPE = "import fcntl, termios\nfor letter in b'x', b'\\n': fcntl.ioctl(0, termios.TIOCSTI, letter)"


def test_a_user_on_roots_terminal_may_type_there(unit: Unit) -> None:
    """A limit that docs/threat-model.md tells, where the kernel has it still."""
    unit.start()
    assert unit.hears("READY=1"), unit.log
    command = unit.argv("exec", "--user", "nobody", "--", "/usr/bin/python3", "-S", "-c", TYPE)
    ours, terminal = os.openpty()
    with unit.namespace.inside(), os.fdopen(ours, "rb"), os.fdopen(terminal, "rb") as root:
        argv = ["setsid", "--ctty", "--wait", sys.executable, "-m", "ipsecgate", *command]
        done = subprocess.run(argv, stdin=root, stderr=subprocess.PIPE, check=False, timeout=60)
        legacy = Path("/proc/sys/dev/tty/legacy_tiocsti")
        if legacy.exists() and legacy.read_text().strip() == "0":
            assert b"Errno 5" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            assert root.readline() == b"x\n"


@contextlib.contextmanager
def crowd(path: Path, size: int, *says: bytes) -> Iterator[None]:
    """Have many clients of root's that say something and stay, those that are let in."""
    with contextlib.ExitStack() as stack:
        for number in range(size):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(5)
            _connect(client, path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # hung up on
                client.sendall(says[number % len(says)])
        yield


def _connect(client: socket.socket, path: Path) -> None:
    while True:
        try:
            client.connect(str(path))
        except BlockingIOError:  # no room to wait in
            time.sleep(0.01)
        else:
            return


def test_a_crowd_at_its_sockets_stops_nothing_else(unit: Unit, caller: Caller) -> None:
    unit.start(env={"WATCHDOG_USEC": "2000000"})
    assert unit.hears("READY=1"), unit.log
    assert unit.process is not None
    run = unit.folder / "run" / unit.name
    fds = Path(f"/proc/{unit.process.pid}/fd")
    before = len(list(fds.iterdir()))
    nonsense = (b"", b"{", b"[" * 4000, b'{"verb": "status"}\n', b'{"verb": "hold"}\n')
    with crowd(run / "control.sock", 400, *nonsense), crowd(run / "seccomp.sock", 400, b"", b"{"):
        unit.heard.clear()
        assert unit.hears("WATCHDOG=1", 5), "decisions are made as ever"
        assert refused(caller)
        assert len(list(fds.iterdir())) <= before + control.CLIENTS + oci.PEERS + 8
        began = time.monotonic()
        assert unit.eventually(lambda: unit.ask()["ready"]), "silent ones are cut off"
        assert time.monotonic() - began < 15
    assert unit.eventually(lambda: len(list(fds.iterdir())) <= before + 2)
    assert unit.process.poll() is None, unit.log


@contextlib.contextmanager
def filtered() -> Iterator[int]:
    """Have a process under a filter, as a container's is, and its listener here."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        listener = seccomp.install(program(seccomp.abi()))
        theirs.send(b"%d" % listener)
        theirs.recv(1)
        os._exit(0)
    with ours, theirs:
        yield seccomp.take(child, int(ours.recv(9)))
        ours.send(b"x")
    os.waitpid(child, 0)


def test_a_runtime_that_tells_an_odd_pid_ends_nothing(unit: Unit) -> None:
    """A name too long for /proc made a look at its cgroup fail, and that ended the controller."""
    unit.start()
    assert unit.hears("READY=1"), unit.log
    message = {"fds": ["seccompFd"], "metadata": "", "state": {"id": "odd"}}
    raw = json.dumps(message)[:-1] + f', "pid": {"9" * 4200}}}'
    with filtered() as listener, socket.socket(socket.AF_UNIX) as runtime:
        runtime.connect(str(unit.folder / "run" / unit.name / "seccomp.sock"))
        socket.send_fds(runtime, [raw.encode()], [listener])
        os.close(listener)
        assert unit.eventually(lambda: "container odd: its calls are held" in unit.log), unit.log
    assert unit.eventually(lambda: "container odd: is its cgroup gated?" in unit.log), unit.log
    assert unit.ask()["ready"]
    assert unit.process is not None
    assert unit.process.poll() is None
