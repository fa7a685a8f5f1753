"""A process in a host that answers each line of its input with one line of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipsecgate.lab.host import Host

PIPE = subprocess.PIPE


class Reporter:
    """A running process; construction waits for its first line, which says that it is ready."""

    def __init__(self, host: Host, argv: Sequence[str], cgroup: Path | None = None) -> None:
        process = host.popen(argv, cgroup=cgroup, stdin=PIPE, stdout=PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._input, self._output = process.stdin, process.stdout
        assert self._output.readline(), f"it exited: {argv}"

    def ask(self, word: str = "?") -> list[dict[str, Any]]:
        """Send a request; return the report for each of its targets."""
        self._input.write(f"{word}\n")
        self._input.flush()
        reports: list[dict[str, Any]] = json.loads(self._output.readline())
        return reports

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
