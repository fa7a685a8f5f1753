"""The controller's side of inspection: sends notifications to the inspector process.

    Inspector.inspect(call, done) -> a thread of `inspector_main` reads memory and socket
                                  -> done(finding)
    no answer within a second     -> done(None), for this call and all that wait behind it

A hostile target can serve the memory that we read, or the "socket" that we query, itself
(userfaultfd, FUSE), and so block the reader for as long as it likes; not even SIGKILL ends that.
Hence a separate process reads: the controller's event loop and its lock are never at stake.

Rule of this module: nothing here waits for an answer. A call that could not be inspected is
reported as None, in its turn.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import ipsecgate
from ipsecgate.core.codec.seccomp import Notification, packed
from ipsecgate.edges.holding.inspector_main import ANSWER, Finding, decode

log = logging.getLogger("ipsecgate")

TICK = 0.25  # seconds
TICKS, TICKS_TO_START = 4, 40  # without an answer: until we give up a call, or the process's start
IN_FLIGHT = 64  # notifications sent and not yet answered: the socket buffer holds them all
START = 10.0  # seconds for the process to accept another inspector's socket

# The child needs the controller's own path: ours may not be on Python's default path.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from ipsecgate.edges.holding.inspector_main import main
main()
"""

Done = Callable[[Finding | None], None]
"""Receives what a call asks for, None if it could not be inspected."""


class _Running:
    """A running `inspector_main`, and our end of its standard input."""

    def __init__(self) -> None:
        """Raises: OSError."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(START)
        folder = str(Path(ipsecgate.__file__).parents[1])
        with theirs, ExitStack() as stack:
            stack.callback(self.socket.close)
            self.popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", PROGRAM, folder],
                stdin=theirs.fileno(),
                start_new_session=True,  # Ctrl-C is for the controller alone
            )
            stack.pop_all()

    def end(self) -> None:
        """Kill the process; its threads that block in the kernel may outlive the call."""
        self.socket.close()
        self.popen.kill()


class InspectorProcess:
    """The inspector process: started for the first inspector, restarted after it died."""

    def __init__(self) -> None:
        self._running: _Running | None = None

    def connect(self) -> socket.socket | None:
        """Return a socket that a thread of the process serves; None if there is no process."""
        if self._running is not None and self._running.popen.poll() is not None:
            self.close()
        try:
            self._running = self._running or _Running()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return None
        ours.setblocking(False)
        with theirs:
            try:
                socket.send_fds(self._running.socket, [b"\0"], [theirs.fileno()])
            except OSError:
                self.close()  # `ours` reads its end; the next `connect` starts another process
        return ours

    def close(self) -> None:
        """End the process and all its threads."""
        if self._running is not None:
            self._running.end()
            self._running = None


class Inspector:
    """Inspects the calls of one listener, in the order in which they are passed in."""

    def __init__(self, process: InspectorProcess) -> None:
        self._process = process
        self._pending: deque[tuple[Notification, Done]] = deque()
        self._sent = 0  # how many of the pending calls were sent: the first ones
        self._abandoned = 0  # answers still to come for calls that we gave up
        self._ready = False
        self._timer: asyncio.TimerHandle | None = None
        self._ticks = 0
        self._socket: socket.socket | None = None
        self._connect()

    def inspect(self, call: Notification, done: Done) -> None:
        """Find out what a call asks for, and pass it to `done`, perhaps before this returns."""
        self._pending.append((call, done))
        self._send_pending()

    def close(self) -> None:
        """Stop; no pending call's `done` is called any more."""
        self._disconnect()
        self._pending.clear()

    def _connect(self) -> None:
        self._socket = self._process.connect()
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._on_answer)

    def _disconnect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._ready, self._sent, self._abandoned = False, 0, 0

    def _send_pending(self) -> None:
        if self._socket is None:
            self._connect()
        if self._socket is None or self._abandoned:
            self._give_up()
            return
        with suppress(OSError):  # the process is gone: `_on_answer` reads the end of the stream
            while self._ready and self._sent < min(len(self._pending), IN_FLIGHT):
                call, _ = self._pending[self._sent]
                self._socket.send(packed(call))
                self._sent += 1
        if self._timer is None:
            self._ticks = 0
            self._timer = asyncio.get_running_loop().call_later(TICK, self._on_tick)

    def _finish_first(self, finding: Finding | None) -> None:
        _, done = self._pending.popleft()
        done(finding)

    def _give_up(self) -> None:
        while self._pending:
            self._finish_first(None)

    def _on_answer(self) -> None:
        assert self._socket is not None  # noqa: S101
        try:
            answer = self._socket.recv(ANSWER.size + 1)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        self._ticks = 0
        if not answer:
            self._disconnect()
            if self._pending:  # the first call may have killed the process: never send it twice
                self._finish_first(None)
        elif not self._ready:
            self._ready = True
        elif self._abandoned:
            self._abandoned -= 1
        else:
            self._sent -= 1
            self._finish_first(decode(answer))
        if self._pending:
            self._send_pending()

    def _on_tick(self) -> None:
        # Count ticks instead of time: if the whole machine was suspended, nobody is blocked.
        self._timer = None
        if not self._pending:
            return
        self._ticks += 1
        if self._ticks < (TICKS if self._ready else TICKS_TO_START):
            self._timer = asyncio.get_running_loop().call_later(TICK, self._on_tick)
            return
        if self._ready:
            self._abandoned, self._sent = self._sent, 0
            call, _ = self._pending[0]
            log.warning(
                "thread %d blocks the inspection of its call: until that ends, the other calls of "
                "its listener are not held, only checked by the hooks", call.pid,
            )  # fmt: skip
        else:
            self._disconnect()
        self._give_up()
