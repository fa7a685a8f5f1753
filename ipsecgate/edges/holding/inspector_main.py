"""The inspectors: processes that receive calls, look at their targets, and answer known ones.

    parent      standard input brings a listener with its call file and a socket, or the end of one
    inspector   forked for each listener: receive -> glance -> known to be free? "continue"
                                                            -> else inspect, and ask the controller

Rules of this module:
- Each inspector serves one listener, so a target that blocks its inspector delays only itself.
- "Continue" opens nothing, because the hooks judge the call again. So an inspector may give that
  answer, and only that, to calls that name no flow, or one that the controller called free in this
  epoch: since the controller last wrote to the hooks' maps.
- Import little: the parent starts when the first call may already be waiting.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import socket
import sys
import time
from contextlib import suppress

from ipsecgate.core.codec.seccomp import NOTIFICATION, RawNotification
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.call_file import LOOKING, SPARE, WAIT, WATCHED, CallFile
from ipsecgate.edges.holding.look import NO_ADDRESS, Finding, Glance, Looker
from ipsecgate.edges.holding.messages import FREE, Question, encode
from ipsecgate.edges.holding.messages import LOOKING as SAY_LOOKING
from ipsecgate.edges.holding.messages import STARTED as SAY_STARTED

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCK_AGAIN = 0.02  # seconds
KNOWN = 4096  # calls remembered at most as free, or as asked about

_libc = ctypes.CDLL(None)


def main() -> None:
    """Start and end inspectors, until standard input is closed. An argument names the epoch."""
    _die_with(os.getppid())
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    netns = seccomp.inspect_socket(own.detach()).netns
    epoch = memoryview(mmap.mmap(int(sys.argv[2]), 8, prot=mmap.PROT_READ)).cast("Q")
    # The controller's priority is not for calls: each one would cost two microseconds more, and a
    # program that makes them without a pause would take all of the processor.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    gc.freeze()  # inspectors share memory that nobody writes to
    gc.disable()
    with socket.socket(fileno=0) as controller:
        Parent(controller, netns, epoch).run()


def _die_with(parent: int) -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Parent:
    """Forks an inspector for each listener that the controller sends."""

    def __init__(self, controller: socket.socket, netns: int, epoch: memoryview) -> None:
        self._controller = controller
        self._netns = netns
        self._epoch = epoch
        self._inspectors: dict[bytes, int] = {}  # pids, by the listener's number

    def run(self) -> None:
        """Carry out requests: a number, with the descriptors of a listener or alone."""
        while True:
            number, fds, *_ = socket.recv_fds(self._controller, 64, 3)
            if not number:
                os._exit(0)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if fds:
                self._fork(number, *fds)
            elif pid := self._inspectors.pop(number, 0):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for fd in fds:
                os.close(fd)

    def _fork(self, number: bytes, listener: int, file: int, ours: int) -> None:
        """Start an inspector. If it cannot start, the controller sees the end of its socket."""
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            return
        if pid:
            self._inspectors[number] = pid
            return
        try:
            _die_with(parent)
            self._controller.close()
            own = CallFile.open_again(file)
            os.close(file)
            controller = socket.socket(fileno=ours)
            Inspector(listener, own, controller, self._netns, self._epoch).run()
        except OSError:
            pass  # the controller is gone; or it notices, and starts another one
        finally:
            os._exit(0)


class Inspector:
    """Receives the calls of one listener, and answers those that need no decision."""

    def __init__(
        self,
        listener: int,
        file: CallFile,
        controller: socket.socket,
        netns: int,
        epoch: memoryview,
    ) -> None:
        self._listener = listener
        self._file = file
        self._controller = controller
        self._epoch = epoch
        self._looker = Looker(listener, netns)
        self._free: list[int] = []  # places for calls
        self._known: set[Glance | None] = set()  # free in `_known_in`
        self._known_in = 0
        self._asked: dict[int, Glance] = {}  # by id

    def run(self) -> None:
        """Take over what a predecessor left, then serve until the listener is over.

        Raises: OSError if the controller is gone.
        """
        self._controller.send(SAY_STARTED)
        self._await_predecessor()
        left = [
            (place, call) for place, call in self._file.calls() if not self._file.is_asked(place)
        ]
        self._free = self._file.free()
        for place, call in left:
            if not seccomp.is_waiting(self._listener, call.id) or self._serve(place):
                self._file.clear(place)
                self._free += [place] if place != SPARE else []
        while True:
            self._free = self._free or self._file.free()
            if not self._free:
                self._file.continue_one(self._listener)
                continue
            place = self._free[-1]
            if not self._file.receive(self._listener, place):
                if seccomp.is_over(self._listener):
                    return
            elif not self._serve(place):
                self._free.pop()

    def _await_predecessor(self) -> None:
        """Wait until our predecessor is gone, which was killed; if that takes long, it is blocked.

        Then all calls continue. Before it is gone, we cannot know what it received.
        """
        deadline = time.monotonic() + self._file.words[WAIT] / 1000
        while not self._file.lock():
            if time.monotonic() < deadline:
                time.sleep(LOCK_AGAIN)
                continue
            self._file.continue_unasked(self._listener)
            if seccomp.has_call(self._listener, LOCK_AGAIN):
                self._file.continue_one(self._listener)

    def _serve(self, place: int) -> bool:
        """Answer a call, and return True; or ask the controller."""
        raw: RawNotification = NOTIFICATION.unpack_from(self._file.bytes, place)
        ident, words = raw[0], self._file.words
        words[LOOKING] = ident
        if not words[WATCHED]:
            self._controller.send(SAY_LOOKING)
        seen = self._glance(raw)
        if self._is_free(seen):
            seccomp.answer(self._listener, ident, None)
            words[LOOKING] = 0
            return True
        finding = self._inspect(raw, place, seen)
        words[LOOKING] = 0
        if finding is None:
            seccomp.answer(self._listener, ident, None)
            return True
        self._controller.send(encode(Question(place, ident, raw[1], finding)))
        return False

    def _glance(self, raw: RawNotification) -> Glance | None:
        try:
            return self._looker.glance(raw)
        except (OSError, OverflowError, ValueError):
            return None

    def _inspect(self, raw: RawNotification, place: int, seen: Glance | None) -> Finding | None:
        """Return what a call asks for; None if it need not wait."""
        self._hear()
        if seen in self._known:
            return None
        try:
            finding = self._looker.inspect(self._file.call(place))
        except (OSError, ValueError):
            return None
        if finding is None:
            return None
        # Only if nothing has changed meanwhile is the question about what was seen.
        if seen is None or seen != self._glance(raw):
            seen = (finding.flow,)
            if self._is_free(seen):
                return None
        if len(self._asked) >= KNOWN:
            self._asked.clear()
        self._asked[raw[0]] = seen
        return finding

    def _is_free(self, seen: Glance | None) -> bool:
        return seen in self._known and self._known_in == self._epoch[0]

    def _hear(self) -> None:
        """Read which flows are free."""
        now = self._epoch[0]
        if self._known_in != now or len(self._known) >= KNOWN:
            self._known, self._known_in = {NO_ADDRESS}, now
        with suppress(BlockingIOError):
            while said := self._controller.recv(FREE.size, socket.MSG_DONTWAIT):
                epoch, ident = FREE.unpack(said)
                seen = self._asked.pop(ident, None)
                if seen is not None and epoch == now:
                    self._known.add(seen)
