"""The controller's side of inspection: starts an inspector for each listener, and watches it.

    it asks about a call          -> on_question
    it looks at one call for more than a second -> it is killed and replaced; until it is really
                                                   gone its successor lets all calls continue

A hostile target can serve the memory that an inspector reads, or the "socket" that it queries,
itself (userfaultfd, FUSE), and so block the inspector for as long as it likes; not even SIGKILL
ends that. Hence separate processes read: the controller's event loop and lock are never at stake.

Rules of this module:
- Nothing here waits for an inspector.
- Nothing here runs while no calls are made: an inspector says when it begins to look at one, unless
  we watch already.
- We receive calls only while no inspector can: otherwise it could take the one that we wait for.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import ipsecgate
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.call_file import LOOKING, WAIT, WATCHED, CallFile
from ipsecgate.edges.holding.messages import FREE, MESSAGE, Kind, Question, decode

log = logging.getLogger("ipsecgate")

TICK = 0.25  # seconds
TICKS, TICKS_TO_START = 4, 40  # with one call, or until it has started, at most
PATIENCE = 10_000  # milliseconds that it waits for its predecessor's end, before calls continue
RETRY = 1.0  # seconds until an inspector that did not start is started again
START = 10.0  # seconds for the parent of the inspectors to accept another one
PER_TURN = 64  # messages or calls, before the event loop does other work

# The child needs the controller's own path: ours may not be on Python's default path.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from ipsecgate.edges.holding.inspector_main import main
main()
"""


class _Parent:
    """A running `inspector_main`, and our end of its standard input."""

    def __init__(self, epoch: int) -> None:
        """Raises: OSError."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(START)
        folder = str(Path(ipsecgate.__file__).parents[1])
        with theirs, ExitStack() as stack:
            stack.callback(self.socket.close)
            self.popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", PROGRAM, folder, str(epoch)],
                stdin=theirs.fileno(),
                pass_fds=[epoch],
                start_new_session=True,  # Ctrl-C is for the controller alone
            )
            stack.pop_all()

    def end(self) -> None:
        """Kill the process, and so its inspectors; those that are blocked outlive the call."""
        self.socket.close()
        self.popen.kill()


class Inspectors:
    """The inspectors, and their parent: started for the first one, restarted after it died.

    The epoch ends with every change of what the hooks answer.
    """

    def __init__(self) -> None:
        """Raises: OSError."""
        self._parent: _Parent | None = None
        self._fd = os.memfd_create("ipsecgate-epoch")
        os.ftruncate(self._fd, 8)
        self._map = mmap.mmap(self._fd, 8)
        self._word = memoryview(self._map).cast("Q")
        self._word[0] = 1

    @property
    def epoch(self) -> int:
        """The number of the present epoch."""
        return self._word[0]

    def end_epoch(self) -> None:
        """Have every inspector forget which flows are free, at once."""
        self._word[0] += 1

    def start(self, number: int, listener: int, file: int) -> socket.socket | None:
        """Start an inspector; return a socket to it, None if that is impossible."""
        for _ in range(2):
            if self._parent is not None and self._parent.popen.poll() is not None:
                self.end_parent()
            try:
                self._parent = self._parent or _Parent(self._fd)
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError:
                return None
            ours.setblocking(False)
            with theirs:
                try:
                    fds = [listener, file, theirs.fileno()]
                    socket.send_fds(self._parent.socket, [str(number).encode()], fds)
                except OSError:
                    ours.close()
                    self.end_parent()
                else:
                    return ours
        return None

    def end(self, number: int) -> None:
        """End an inspector."""
        if self._parent is not None:
            with suppress(OSError):
                self._parent.socket.send(str(number).encode())

    def end_parent(self) -> None:
        """End them all; the next `start` starts another parent."""
        if self._parent is not None:
            self._parent.end()
            self._parent = None

    def close(self) -> None:
        """End them all, for good."""
        self.end_parent()
        self._word.release()
        self._map.close()
        os.close(self._fd)


class Inspector:
    """The inspector of one listener. While none can be started, all calls continue."""

    def __init__(
        self,
        inspectors: Inspectors,
        number: int,
        listener: int,
        file: CallFile,
        on_question: Callable[[Question], None],
    ) -> None:
        """Start it."""
        self._inspectors = inspectors
        self._number = number
        self._listener = listener
        self._file = file
        self._on_question = on_question
        self._socket: socket.socket | None = None
        self._started = False
        self._looking = 0  # the call that it looked at in the last tick
        self._ticks = 0  # for so long; or since it was to start
        self._timer: asyncio.TimerHandle | None = None
        self._continuing = False
        self._start(PATIENCE)

    def tell_free(self, ident: int) -> None:
        """Have calls like this one answered by the inspector, until the epoch ends."""
        if self._socket is not None:
            with suppress(OSError):  # it is slow to listen, and will ask again
                self._socket.send(FREE.pack(self._inspectors.epoch, ident))

    def close(self) -> None:
        """End it."""
        self._end()
        self._continue(begin=False)
        if self._timer is not None:
            self._timer.cancel()

    # --- the process ------------------------------------------------------------------

    def _start(self, patience: int = PATIENCE) -> None:
        """Start it; `patience`: how long it waits for its predecessor's end, in milliseconds."""
        self._continue(begin=False)
        self._started, self._looking, self._ticks = False, 0, 0
        words = self._file.words
        words[LOOKING], words[WATCHED], words[WAIT] = 0, 1, patience
        self._socket = self._inspectors.start(self._number, self._listener, self._file.fd)
        if self._socket is None:
            self._start_later()
            return
        asyncio.get_running_loop().add_reader(self._socket, self._on_message)
        self._set_timer(TICK, self._on_tick)

    def _start_later(self) -> None:
        self._continue(begin=self._file.is_unused())
        self._set_timer(RETRY, self._start)

    def _end(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._inspectors.end(self._number)

    def _on_message(self) -> None:
        for _ in range(PER_TURN):
            if self._socket is None:
                return
            try:
                raw = self._socket.recv(MESSAGE.size + 1)
            except BlockingIOError:
                return
            except OSError:
                raw = b""
            if not raw:
                self._ended()
                return
            match decode(raw):
                case Kind.STARTED:
                    self._started = True
                case Kind.LOOKING:
                    self._watch()
                case Question() as question:
                    self._on_question(question)

    def _ended(self) -> None:
        self._end()
        # This call may have killed it: never look at it twice.
        seccomp.answer(self._listener, self._file.words[LOOKING], None)
        if self._started:
            self._start()
        else:
            self._start_later()

    # --- whether it is blocked ----------------------------------------------------------

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _watch(self) -> None:
        self._file.words[WATCHED] = 1
        if self._timer is None:
            self._set_timer(TICK, self._on_tick)

    def _on_tick(self) -> None:
        # Count ticks instead of time: if the whole machine was suspended, nobody is blocked.
        self._timer = None
        words = self._file.words
        looking = words[LOOKING]
        if not self._started:
            self._ticks += 1
            if self._ticks == TICKS_TO_START:
                self._inspectors.end_parent()  # it hangs; `_ended` starts another one
        elif not looking:
            if not words[WATCHED]:
                return
            # One more tick, for a call that it began to look at a moment ago.
            words[WATCHED] = 0
        else:
            self._ticks = self._ticks + 1 if looking == self._looking else 1
            if self._ticks == TICKS:
                self._blocked(looking)
                return
        self._looking = looking
        self._set_timer(TICK, self._on_tick)

    def _blocked(self, ident: int) -> None:
        pids = [call.pid for _, call in self._file.calls() if call.id == ident]
        log.warning(
            "thread %d blocks the inspection of its call: until that ends, the other calls of its "
            "listener are not held, only checked by the hooks", pids[0] if pids else 0,
        )  # fmt: skip
        self._end()
        seccomp.answer(self._listener, ident, None)
        self._start(patience=0)

    # --- without an inspector -------------------------------------------------------------

    def _continue(self, *, begin: bool) -> None:
        """Begin or stop to let every call continue; those that were received do at once."""
        if begin == self._continuing:
            return
        self._continuing = begin
        loop = asyncio.get_running_loop()
        if not begin:
            loop.remove_reader(self._listener)
            return
        self._file.continue_unasked(self._listener)
        loop.add_reader(self._listener, self._continue_calls)

    def _continue_calls(self) -> None:
        for _ in range(PER_TURN):
            if not seccomp.has_call(self._listener):
                return
            self._file.continue_one(self._listener)
