"""Real rooms on this machine's kernel: what a command sees, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups
from ipsecgate.lab.room import CANNOT_RUN, PREFIX, TIMED_OUT, delegated, hidden_folders
from tests.processes import outlived
from tests.until import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")

CHECKOUT = Path(__file__).parents[2]
SCRIPT = """
cat /proc/self/cgroup | grep ^0:
for folder in /run /tmp /var/tmp /dev/shm; do ls -A $folder; done; ls /sys/fs/bpf/ipsecgate || true
ip -brief link show up; ip netns list; ip xfrm policy; ip rule | grep -c lookup
for folder in /etc /var /run /tmp; do echo >$folder/marker; done; echo >here
hostname elsewhere; sysctl -qw net.ipv4.ip_forward=1; ip netns add left
mkdir -p /sys/fs/cgroup/left; ls -d /sys/fs/cgroup/*/
"""


def room(*argv: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", "ipsecgate.lab.room", *options, "--", *argv]


def ran(
    *argv: str, options: tuple[str, ...] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    words = room(*argv, options=options)
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)


def room_cgroups() -> list[Path]:
    return [path for path in cgroups.walk() if path.name.startswith(PREFIX)]


@pytest.fixture(autouse=True)
def _nothing_stays() -> object:
    before = room_cgroups()
    yield
    # systemd removes a scope when its last process has ended.
    wait_until(lambda: room_cgroups() == before, "a cgroup stays")


def test_a_room_is_isolated(tmp_path: Path) -> None:
    names = ("/etc/marker", "/var/marker", "/run/marker", "/tmp/marker", "/run/netns/left")
    forwards = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    done = ran("sh", "-euc", SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["0::/command", "lock", "room"]
    own = {path.parts[2] for path in (tmp_path, CHECKOUT) if path.parts[1] == "tmp"}
    assert set(lines[3:-4]) == own, "only the folders in /tmp that the command needs, nothing else"
    assert lines[-4].split()[:2] == ["lo", "UNKNOWN"]
    assert lines[-3:] == ["3", "/sys/fs/cgroup/command/", "/sys/fs/cgroup/left/"]
    assert (tmp_path / "here").exists(), "the working folder is the host's"
    assert [name for name in names if Path(name).exists()] == []
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forwards
    assert socket.gethostname() != "elsewhere"


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)], ids=["7", "137", "0"]
)
def test_exit_code_and_output_are_passed_on(script: str, code: int) -> None:
    done = ran("sh", "-c", f"echo out; echo error >&2; {script}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "error\n")


def test_a_missing_program_is_reported() -> None:
    done = ran("/no/such/program")
    assert done.returncode == CANNOT_RUN
    assert "/no/such/program" in done.stderr


def test_background_processes_of_a_command_are_killed() -> None:
    done = ran("sh", "-c", "setsid sleep 1003 >/dev/null 2>&1 & echo $!")
    assert not outlived([int(done.stdout)])


def test_a_command_that_takes_too_long_is_killed() -> None:
    done = ran("sh", "-c", "echo $$; exec sleep 1004", options=("--timeout", "3"))
    assert done.returncode == TIMED_OUT
    assert "killed after 3 s" in done.stderr
    assert not outlived([int(done.stdout)])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_room_dies_with_its_owner(number: signal.Signals, code: int) -> None:
    words = room("sh", "-c", "echo $$; exec sleep 1005")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        command = int(owner.stdout.readline())
        owner.send_signal(number)
        assert owner.wait(timeout=60) == code
    assert not outlived([command])
    if number == signal.SIGKILL:  # the next room removes what the killed owner left behind
        assert ran("true").returncode == 0


def test_two_rooms_at_a_time_are_isolated() -> None:
    script = "mkdir /sys/fs/cgroup/mine && ip netns add mine && touch /tmp/mine && cat"
    one, other = (
        subprocess.Popen(room("sh", "-c", script), stdin=subprocess.PIPE) for _ in range(2)
    )
    for process in (one, other):
        process.communicate(timeout=60)
    assert (one.returncode, other.returncode) == (0, 0)


# --- helpers ----------------------------------------------------------------------------------


def test_hidden_folders_are_only_the_outermost_below_a_hidden_top() -> None:
    tops = ["/tmp/a/b", "/tmp/a", "/home/x", "/var/lib/ci/work", "/tmp", "/etcetera/x", "/run/x"]
    assert hidden_folders(map(Path, tops)) == [
        Path("/run/x"),
        Path("/tmp/a"),
        Path("/var/lib/ci/work"),
    ]


def test_systemd_is_asked_for_a_delegated_scope() -> None:
    words = delegated(["pytest", "-k", "x y"], 60.0)
    scope = words[: words.index("--")]
    assert {"--scope", "--property=Delegate=yes", f"--unit={PREFIX}-{os.getpid()}"} <= set(scope)
    assert words[-4:] == ["--", "pytest", "-k", "x y"]
