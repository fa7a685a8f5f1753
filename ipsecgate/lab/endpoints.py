"""The lab's side of a client or server process: its reports. `Host` starts the process."""

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
    """A running tcp-server or udp-server. Construction waits until it is ready.

    Raises: LabError if it ends or does not answer in time.
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
        """Return the counts since the last report.

        A udp-server first waits until it has `expect` distinct datagrams, or until none has arrived
        for `settle` seconds.
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
            raise LabError(f"the server did not answer within {timeout:.0f} s")
        line = output.readline()
        if not line:
            raise LabError(f"the server exited with {self.process.wait()}")
        report: Report = json.loads(line)
        return report


class Client:
    """A running tcp-client or udp-client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def result(self, timeout: float = 200.0) -> Report:
        """Wait for the client's report. The client's own limit should be the shorter one.

        Raises: LabError if it exits without a report; TimeoutExpired.
        """
        output, _ = self.process.communicate(timeout=timeout)
        if not output:
            raise LabError(f"the client exited with {self.process.returncode} and no report")
        report: Report = json.loads(output)
        return report
