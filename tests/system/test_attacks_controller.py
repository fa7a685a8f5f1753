"""Attacks on the controller: descriptors that bypass the hooks, and load on its sockets."""

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

from ipsecgate.core.codec.seccomp import program
from ipsecgate.edges.holding import oci, seccomp
from ipsecgate.edges.host import control_server
from ipsecgate.lab.charon import load_tun
from tests.system import uring
from tests.system.caller import Caller
from tests.system.controller_process import ControllerProcess, caller, controller, refused

__all__ = ["caller", "controller"]


def exec_with(controller: ControllerProcess, fd: int) -> subprocess.CompletedProcess[str]:
    """Run `exec` with an inherited descriptor."""
    argv = [sys.executable, "-m", "ipsecgate", *controller.argv("exec", "--", "echo", "ran")]
    with controller.namespace.inside():
        return subprocess.run(
            argv, pass_fds=[fd], capture_output=True, text=True, check=False, timeout=60
        )


WAYS: dict[str, Callable[[], int]] = {
    "an Internet socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).detach(),
    "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).detach(),
    "an io_uring instance": uring.new,
    "a TUN or TAP device": lambda: os.open("/dev/net/tun", os.O_RDWR),
}


def test_an_inherited_descriptor_that_bypasses_the_hooks_is_refused(
    controller: ControllerProcess,
) -> None:
    load_tun()
    controller.start()
    assert controller.hears("READY=1"), controller.log
    for name, make in WAYS.items():
        fd = make()
        done = exec_with(controller, fd)
        os.close(fd)
        assert (done.returncode, done.stdout) == (1, ""), name
        assert name in done.stderr
    fd = os.open(os.devnull, os.O_RDWR)
    done = exec_with(controller, fd)
    os.close(fd)
    assert done.stdout == "ran\n", done.stderr


RECREATE = """
from ipsecgate.edges.host import cgroups
from ipsecgate.cli import main
joining = cgroups.join
def join(cgroup):
    cgroup.rmdir()
    cgroup.mkdir()
    joining(cgroup)
cgroups.join = join
"""


def test_a_command_does_not_run_in_a_recreated_cgroup(controller: ControllerProcess) -> None:
    """The cgroup is recreated between the lookup of its name and joining it."""
    controller.configure("")
    controller.start()
    assert controller.hears("READY=1"), controller.log
    assert (
        controller.cli("attach", str(controller.cgroup)).returncode == 0
    )  # so the controller does not follow its name
    program = f"{RECREATE}\nmain({controller.argv('exec', '--', 'echo', 'ran')!r})"
    with controller.namespace.inside():
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert "removed and created again" in done.stderr


TYPE = "import fcntl, termios\nfor letter in b'x', b'\\n': fcntl.ioctl(0, termios.TIOCSTI, letter)"


def test_a_user_on_roots_terminal_can_write_its_input(controller: ControllerProcess) -> None:
    """A limit in docs/threat-model.md, on kernels that still allow TIOCSTI."""
    controller.start()
    assert controller.hears("READY=1"), controller.log
    command = controller.argv(
        "exec", "--user", "nobody", "--", "/usr/bin/python3", "-S", "-c", TYPE
    )
    ours, terminal = os.openpty()
    with controller.namespace.inside(), os.fdopen(ours, "rb"), os.fdopen(terminal, "rb") as root:
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
    """Connect many clients of root's that send something and stay connected, if accepted."""
    with contextlib.ExitStack() as stack:
        for number in range(size):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(5)
            _connect(client, path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # disconnected
                client.sendall(says[number % len(says)])
        yield


def _connect(client: socket.socket, path: Path) -> None:
    while True:
        try:
            client.connect(str(path))
        except BlockingIOError:  # the backlog is full
            time.sleep(0.01)
        else:
            return


def test_a_crowd_of_clients_does_not_stop_the_controller(
    controller: ControllerProcess, caller: Caller
) -> None:
    controller.start(env={"WATCHDOG_USEC": "2000000"})
    assert controller.hears("READY=1"), controller.log
    assert controller.process is not None
    run = controller.folder / "run" / controller.name
    fds = Path(f"/proc/{controller.process.pid}/fd")
    before = len(list(fds.iterdir()))
    nonsense = (b"", b"{", b"[" * 4000, b'{"verb": "status"}\n', b'{"verb": "hold"}\n')
    with crowd(run / "control.sock", 400, *nonsense), crowd(run / "seccomp.sock", 400, b"", b"{"):
        controller.heard.clear()
        assert controller.hears("WATCHDOG=1", 5), "the controller still decides"
        assert refused(caller)
        assert len(list(fds.iterdir())) <= before + control_server.CLIENTS + oci.PEERS + 8
        began = time.monotonic()
        assert controller.eventually(lambda: controller.ask()["ready"]), (
            "silent clients are disconnected"
        )
        assert time.monotonic() - began < 15
    assert controller.eventually(lambda: len(list(fds.iterdir())) <= before + 2)
    assert controller.process.poll() is None, controller.log


@contextlib.contextmanager
def filtered() -> Iterator[int]:
    """Run a process under a seccomp filter, as in a container, and yield its listener."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        listener = seccomp.install(program(seccomp.abi()))
        theirs.send(b"%d" % listener)
        theirs.recv(1)
        os._exit(0)
    with ours, theirs:
        yield seccomp.copy_descriptor(child, int(ours.recv(9)))
        ours.send(b"x")
    os.waitpid(child, 0)


def test_a_runtime_with_an_absurd_pid_does_not_end_the_controller(
    controller: ControllerProcess,
) -> None:
    """Its /proc path was too long, and the failed lookup of its cgroup ended the controller."""
    controller.start()
    assert controller.hears("READY=1"), controller.log
    message = {"fds": ["seccompFd"], "metadata": "", "state": {"id": "odd"}}
    raw = json.dumps(message)[:-1] + f', "pid": {"9" * 4200}}}'
    with filtered() as listener, socket.socket(socket.AF_UNIX) as runtime:
        runtime.connect(str(controller.folder / "run" / controller.name / "seccomp.sock"))
        socket.send_fds(runtime, [raw.encode()], [listener])
        os.close(listener)
        assert controller.eventually(
            lambda: "holding the calls of container odd" in controller.log
        ), controller.log
    assert controller.eventually(
        lambda: "cannot check whether container odd is gated" in controller.log
    ), controller.log
    assert controller.ask()["ready"]
    assert controller.process is not None
    assert controller.process.poll() is None
