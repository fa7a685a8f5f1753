"""A process that speaks: asked by a line, it answers with one of JSON."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipsecgate.lab.host import Host

PIPE = subprocess.PIPE


class Voice:
    """One that runs, and says so with its first line."""

    def __init__(self, host: Host, argv: Sequence[str], cgroup: Path | None = None) -> None:
        process = host.popen(argv, cgroup=cgroup, stdin=PIPE, stdout=PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        assert self._output.readline(), f"it does not run: {argv}"

    def ask(self, word: str = "?") -> list[dict[str, Any]]:
        """Return what it says of each of its targets."""
        self._input.write(f"{word}\n")
        self._input.flush()
        told: list[dict[str, Any]] = json.loads(self._output.readline())
        return told
