"""The lab's side of a client or server process: start was `Host`'s, here are its answers."""

from __future__ import annotations

import json
import select
import subprocess
from types import TracebackType
from typing import Any, Self

from ipsecgate.lab.netns import LabError

READY_TIMEOUT = 30.0
ANSWER_TIMEOUT = 60.0
STOP_TIMEOUT = 10.0

Report = dict[str, Any]


class Server:
    """A running tcp-server or udp-server; ready when this is constructed.

    Raises: LabError if it ended or kept silent.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._line(READY_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def report(self, expect: int = 0, settle: float = 0.0) -> Report:
        """Return what was counted since the last report.

        A udp-server waits until `expect` distinct datagrams are in, or until none came for
        `settle` seconds.
        """
        if self.process.stdin is None:
            raise LabError("the server has no input")
        self.process.stdin.write(f"{expect} {settle}\n")
        self.process.stdin.flush()
        return self._line(ANSWER_TIMEOUT)

    def stop(self) -> None:
        """End the server."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _line(self, timeout: float) -> Report:
        output = self.process.stdout
        if output is None or not select.select([output], [], [], timeout)[0]:
            raise LabError(f"no answer from the server in {timeout:.0f} s")
        line = output.readline()
        if not line:
            raise LabError(f"the server ended with {self.process.wait()}")
        report: Report = json.loads(line)
        return report


class Client:
    """A running tcp-client or udp-client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def result(self, timeout: float = 200.0) -> Report:
        """Wait for the client's report; its own limit comes first.

        Raises: LabError if it ended without one; TimeoutExpired.
        """
        said, _ = self.process.communicate(timeout=timeout)
        if not said:
            raise LabError(f"the client ended with {self.process.returncode} and no report")
        report: Report = json.loads(said)
        return report
