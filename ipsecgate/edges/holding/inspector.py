"""What held calls ask for, found out by a process of its own, a thread for each listener.

    Eye.ask -> a thread of `looking` reads the caller's memory, looks at its socket -> looked
    it does not come back within a second -> stuck

A hostile caller can serve that memory, or what it gives for a socket, itself (userfaultfd,
FUSE), and keep whoever looks waiting for as long as it likes, not even to be killed. So it
is somebody who has neither the controller's loop nor its lock, nor anything to do for others.

Rules of this module: nothing here waits for an answer; a call that was not seen is told as
such, in its turn.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import ipsecgate
from ipsecgate.core.codec.seccomp import Notification, packed
from ipsecgate.edges.holding.inspector_process import ANSWER, Found, decode

TICK = 0.25  # seconds between looks at an eye that was asked something
TICKS, TICKS_TO_START = 4, 40  # without an answer, or before it can give one, are too many
IN_FLIGHT = 64  # questions sent that have no answer: the socket holds them all
START = 10.0  # seconds that the process may take to take over an eye

# With the controller's own path: what is installed may not be on Python's.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from ipsecgate.edges.holding.inspector_process import main
main()
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A call; `deadline` is its caller's from before, 0: it has none."""

    call: Notification
    deadline: float


class _Process:
    """A running `looking`, and our end of its standard input."""

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
                start_new_session=True,  # a terminal's interrupt is the controller's
            )
            stack.pop_all()

    def end(self) -> None:
        """Kill it; who waits in the kernel is gone later."""
        self.socket.close()
        self.popen.kill()


class InspectorProcess:
    """The process, started when the first eye is opened, and again when it died."""

    def __init__(self) -> None:
        self._process: _Process | None = None

    def connect(self) -> socket.socket | None:
        """Return a socket on which a thread of the process answers; None: there is none."""
        if self._process is not None and self._process.popen.poll() is not None:
            self.close()
        try:
            self._process = self._process or _Process()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError:
            return None
        ours.setblocking(False)
        with theirs:
            try:
                socket.send_fds(self._process.socket, [b"\0"], [theirs.fileno()])
            except OSError:
                self.close()  # its threads' sockets tell, the next one asks for another
        return ours

    def close(self) -> None:
        """End the process, and with it all that its threads look at."""
        if self._process is not None:
            self._process.end()
            self._process = None


class Inspector:
    """Looks at the calls of one listener, in the order in which they are asked about.

    `looked` is told what each asks for, None where nobody could see it; `stuck` that one
    keeps whoever looks waiting: nobody looks at any other until that is over.
    """

    def __init__(
        self,
        looker: InspectorProcess,
        looked: Callable[[Question, Found | None], None],
        stuck: Callable[[Question], None],
    ) -> None:
        self._looker = looker
        self._looked = looked
        self._stuck = stuck
        self._asked: deque[Question] = deque()
        self._sent = 0  # of those, from the first on
        self._late = 0  # answers that come when nobody waits for them any more
        self._ready = False
        self._tick: asyncio.TimerHandle | None = None
        self._ticks = 0
        self._socket: socket.socket | None = None
        self._connect()

    def ask(self, call: Notification, deadline: float = 0.0) -> None:
        """Ask about a call."""
        self._asked.append(Question(call, deadline))
        self._send()

    def close(self) -> None:
        """Look no more, and tell nothing more."""
        self._disconnect()
        self._asked.clear()

    def _connect(self) -> None:
        self._socket = self._looker.connect()
        if self._socket is not None:
            asyncio.get_running_loop().add_reader(self._socket, self._on_answer)

    def _disconnect(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._ready, self._sent, self._late = False, 0, 0

    def _send(self) -> None:
        if self._socket is None:
            self._connect()
        if self._socket is None or self._late:
            self._let_go()
            return
        with suppress(OSError):  # it is gone: `_on_answer` reads its end
            while self._ready and self._sent < min(len(self._asked), IN_FLIGHT):
                self._socket.send(packed(self._asked[self._sent].call))
                self._sent += 1
        if self._tick is None:
            self._ticks = 0
            self._tick = asyncio.get_running_loop().call_later(TICK, self._on_tick)

    def _let_go(self) -> None:
        while self._asked:
            self._looked(self._asked.popleft(), None)

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
            if self._asked:  # it may be what the process died of
                self._looked(self._asked.popleft(), None)
        elif not self._ready:
            self._ready = True
        elif self._late:
            self._late -= 1
        else:
            self._sent -= 1
            self._looked(self._asked.popleft(), decode(answer))
        if self._asked:
            self._send()

    def _on_tick(self) -> None:
        # Ticks, not a time: where the whole machine stood still, nobody is stuck.
        self._tick = None
        if not self._asked:
            return
        self._ticks += 1
        if self._ticks < (TICKS if self._ready else TICKS_TO_START):
            self._tick = asyncio.get_running_loop().call_later(TICK, self._on_tick)
            return
        if self._ready:
            self._late, self._sent = self._sent, 0
            self._stuck(self._asked[0])
        else:
            self._disconnect()
        self._let_go()
