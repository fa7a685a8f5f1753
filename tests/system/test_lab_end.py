"""The lab leaves nothing behind, whether it ends, is interrupted or is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.netns import RUN
from tests.until import wait_until

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
]


def commandline(pid: int) -> str:
    with contextlib.suppress(OSError):
        return "".join(
            Path(f"/proc/{pid}/{f}").read_text(errors="replace") for f in ("cmdline", "environ")
        )
    return ""


def remains(name: str) -> list[str]:
    """Return everything in the system that has a lab's name."""
    folders = (RUN, cgroups.root(), Path(tempfile.gettempdir()))
    left = [str(p) for folder in folders for p in folder.iterdir() if p.name.startswith(name)]
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return left + [f"pid {p}" for p in pids if name in commandline(p) and p != os.getpid()]


def gone(name: str) -> None:
    deadline = time.monotonic() + 30
    while left := remains(name):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_lab_leaves_nothing_behind(error: type[BaseException] | None) -> None:
    pids = []
    try:
        with Lab("ipsecgate-test-gone") as lab:
            sleeper = lab.a.popen(["sleep", "1000"], cgroup=lab.cgroup("x/y"))
            # One outlives its parent, and the lab did not start it itself.
            lab.b.run(["sh", "-c", "sleep 1001 >/dev/null 2>&1 &"])
            wait_until(lambda: sleeper.pid in lab.a.namespace.pids(), "it does not sleep")
            pids = [sleeper.pid, *lab.a.namespace.pids(), *lab.b.namespace.pids()]
            lab.capture().start()
            lab.record()
            assert len(remains(lab.name)) >= 5
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    assert len(pids) >= 5
    gone("ipsecgate-test-gone")
    # A zombie has no command line any more.
    wait_until(lambda: not any(commandline(pid) for pid in pids), "some go on")


def test_the_leftovers_of_a_killed_lab_are_removed() -> None:
    owner = os.fork()
    if owner == 0:
        with Lab("ipsecgate-test-killed") as lab:
            lab.a.popen(["sleep", "1002"], cgroup=lab.cgroup("x"))
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(owner, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(remains("ipsecgate-test-killed")) >= 5
    with Lab("ipsecgate-test-killed"):
        pass
    gone("ipsecgate-test-killed")
