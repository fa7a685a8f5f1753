"""Real rooms on this machine's kernel: what a command sees in one, and what stays behind."""

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
from tests.guest.processes import outlived
from tests.until import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")

CHECKOUT = Path(__file__).parents[2]
STORY = """
cat /proc/self/cgroup | grep ^0:
for folder in /run /tmp /var/tmp /dev/shm; do ls -A $folder; done; ls /sys/fs/bpf/ipsecgate || true
ip -brief link; ip netns list; ip xfrm policy; ip rule | grep -c lookup
echo >/etc/witness; echo >/var/witness; echo >/run/witness; echo >/tmp/witness; echo >here
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


def left() -> list[Path]:
    """Return the cgroups of rooms."""
    return [path for path in cgroups.walk() if path.name.startswith(PREFIX)]


@pytest.fixture(autouse=True)
def _nothing_stays() -> object:
    before = left()
    yield
    # systemd removes a scope when its last process has ended.
    wait_until(lambda: left() == before, "a cgroup stays")


def test_it_is_a_world_of_its_own(tmp_path: Path) -> None:
    names = ("/etc/witness", "/var/witness", "/run/witness", "/tmp/witness", "/run/netns/left")
    forwards = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    told = ran("sh", "-euc", STORY, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[:3] == ["0::/command", "lock", "room"]
    own = {path.parts[2] for path in (tmp_path, CHECKOUT) if path.parts[1] == "tmp"}
    assert set(lines[3:-4]) == own, "of /tmp what the command needs, and nothing else anywhere"
    assert lines[-4].split()[:2] == ["lo", "UNKNOWN"]
    assert lines[-3:] == ["3", "/sys/fs/cgroup/command/", "/sys/fs/cgroup/left/"]
    assert (tmp_path / "here").exists(), "its own folder is the host's"
    assert [name for name in names if Path(name).exists()] == []
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == forwards
    assert socket.gethostname() != "elsewhere"


@pytest.mark.parametrize(
    ("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)], ids=["7", "137", "0"]
)
def test_exit_code_and_output_are_passed_on(script: str, code: int) -> None:
    told = ran("sh", "-c", f"echo out; echo error >&2; {script}")
    assert (told.returncode, told.stdout, told.stderr) == (code, "out\n", "error\n")


def test_what_cannot_be_run_is_told() -> None:
    told = ran("/no/such/program")
    assert told.returncode == CANNOT_RUN
    assert "/no/such/program" in told.stderr


def test_what_a_command_leaves_is_ended() -> None:
    told = ran("sh", "-c", "setsid sleep 1003 >/dev/null 2>&1 & echo $!")
    assert not outlived([int(told.stdout)])


def test_a_command_that_takes_too_long_is_killed() -> None:
    told = ran("sh", "-c", "echo $$; exec sleep 1004", options=("--timeout", "3"))
    assert told.returncode == TIMED_OUT
    assert "killed after 3 s" in told.stderr
    assert not outlived([int(told.stdout)])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_room_dies_with_its_owner(number: signal.Signals, code: int) -> None:
    words = room("sh", "-c", "echo $$; exec sleep 1005")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        command = int(owner.stdout.readline())
        owner.send_signal(number)
        assert owner.wait(timeout=60) == code
    assert not outlived([command])
    if number == signal.SIGKILL:  # nobody was left to do it, but the next one
        assert ran("true").returncode == 0


def test_two_rooms_do_not_meet() -> None:
    script = "mkdir /sys/fs/cgroup/mine && ip netns add mine && touch /tmp/mine && cat"
    one, other = (
        subprocess.Popen(room("sh", "-c", script), stdin=subprocess.PIPE) for _ in range(2)
    )
    for process in (one, other):
        process.communicate(timeout=60)
    assert (one.returncode, other.returncode) == (0, 0)


# --- words ------------------------------------------------------------------------------------


def test_only_what_is_hidden_is_kept_and_once() -> None:
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
