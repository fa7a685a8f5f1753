"""`ipsecgate demo` on a kernel without ESP: in a guest, and interrupted."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ipsecgate.edges.probe import has_esp
from tests.guest.test_boot import outlived

pytestmark = pytest.mark.skipif(
    has_esp(), reason="this kernel has ESP: the demo needs no guest here"
)


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of a process's children, theirs and so on."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
            found |= {child: command.decode(errors="replace"), **descendants(child)}
    return found


def test_interrupted_it_leaves_nothing_behind() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ipsecgate", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout
        said = []
        for line in demo.stdout:
            said.append(line)
            if "two hosts" in line:
                break
        started = descendants(demo.pid)
        assert any("linux.uml" in command for command in started.values()), "".join(said)
        folders = set(re.findall(r"/tmp/ipsecgate-guest-[^/ ]+", " ".join(started.values())))
        assert folders
        time.sleep(1)
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(10) == 130
    assert not outlived(set(started))
    assert not [folder for folder in folders if Path(folder).exists()]
