"""`ipsecgate demo` on a kernel without ESP, interrupted while its guest runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.guest.marks import where_guests_run
from tests.processes import descendants, outlived

pytestmark = where_guests_run


def test_an_interrupted_demo_leaves_nothing_behind() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ipsecgate", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        assert demo.stdout
        output = []
        for line in demo.stdout:
            output.append(line)
            if "two hosts" in line:
                break
        started = descendants(demo.pid)
        assert any("linux.uml" in command for command in started.values()), "".join(output)
        folders = set(re.findall(r"/tmp/ipsecgate-guest-[^/ ]+", " ".join(started.values())))
        assert folders
        time.sleep(1)
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
        assert demo.wait(30) == 130
    assert not outlived(started)
    assert not [folder for folder in folders if Path(folder).exists()]
