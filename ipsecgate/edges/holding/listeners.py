"""Every seccomp listener of an instance: waiting calls become events, and answers are carried out.

    an inspector asks about a call -> CallMade
    hold()       -> CallExpired at the limit; CallInterrupted or CallGone when the thread changes
    answer()     -> the call continues, or fails; if it was not held, its flow is free
    end_epoch()  -> no flow is free any more

Inspectors receive the calls, and answer those that name no flow of this network namespace, that
cannot be inspected, or whose flow is free: they continue at once. That opens nothing, because the
hooks, or the kernel, still judge them.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from ipsecgate.core.model.events import (
    Call,
    CallEvent,
    CallExpired,
    CallGone,
    CallInterrupted,
    CallMade,
)
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.policy import HOLD_IMPATIENT, HOLD_LONGEST
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.inspector import Inspectors
from ipsecgate.edges.holding.listener import Listener
from ipsecgate.edges.holding.messages import Question
from ipsecgate.edges.holding.precedence import Precedence
from ipsecgate.edges.host import systemd

CALLS_PER_TURN = 64  # calls checked before the event loop does other work
CALLS_AGAIN = 1.0  # seconds within which an interrupted thread repeats its call
CHECK = 0.1  # seconds between two rounds of checks on the threads of held calls
CHECK_EACH = 0.001  # seconds per call that a round takes at least, to spread the load
RETRY = 1.0  # seconds
NAME = re.compile(r"hold-(\d+)-([\d.]+)")  # of a listener that systemd keeps: number and limit


class Listeners:
    """The listeners of an instance.

    `deliver` gets the events. `folder` keeps the calls that wait, for a successor.
    """

    def __init__(self, deliver: Callable[[CallEvent], None], folder: Path) -> None:
        """Raises: OSError."""
        self._deliver = deliver
        self._folder = folder
        self._inspectors = Inspectors()
        self._precedence = Precedence()
        self._listeners: dict[int, Listener] = {}  # by number
        self._ends = select.epoll()  # of listeners
        # Interrupted calls by thread: the call's deadline, and until when we remember it.
        self._interrupted: dict[tuple[int, Flow], tuple[float, float]] = {}
        self._check_timer: asyncio.TimerHandle | None = None
        self._to_check: deque[tuple[Listener, CallMade]] = deque()  # the rest of this round

    def take(self, pid: int, fd: int, limit: float) -> None:
        """Copy a listener from a process and follow it.

        Raises: OSError; ValueError if the descriptor or the limit is unusable.
        """
        self.add(seccomp.copy_descriptor(pid, fd), limit)

    def add(self, fd: int, limit: float) -> None:
        """Follow a listener, which we own from now on, even on error.

        Raises: OSError; ValueError if the descriptor or the limit is unusable.
        """
        number = time.monotonic_ns()  # unique among predecessors' and kept listeners, too
        try:
            if not seccomp.is_listener(fd):
                raise ValueError("the descriptor is not a seccomp listener")
            if not 0 <= limit <= HOLD_LONGEST:
                raise ValueError(f"a call cannot be held for {limit:g} s")
            listener = Listener(number, fd, limit, self._folder / str(number))
        except BaseException:
            os.close(fd)
            raise
        self._follow(listener)
        self._keep(listener)

    def adopt(self, kept: Mapping[int, str]) -> None:
        """Follow the listeners that the service manager kept; their calls are inspected again.

        `kept`: names by descriptor. Files of other listeners are deleted.
        """
        for fd, name in kept.items():
            found = NAME.fullmatch(name)
            if found is None or not seccomp.is_listener(fd):
                continue
            number, limit = found.groups()
            self._follow(Listener(int(number), fd, float(limit), self._folder / number))
        for file in self._folder.glob("*"):
            if int(file.name) not in self._listeners:
                file.unlink()

    def hold(self, made: CallMade) -> None:
        """Keep a call waiting, and deliver CallExpired when it reaches its limit."""
        listener = self._listeners.get(made.call.listener)
        if listener is None or made.call.id not in listener.places:
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(made.limit, self._deliver, CallExpired(made.call))
        listener.hold(made, timer)
        if self._check_timer is None:
            self._check_timer = loop.call_later(CHECK, self._check_held)

    def answer(self, call: Call, error: int | None) -> None:
        """Fail a call with an errno, or let it continue (None), if it still waits."""
        listener = self._listeners.get(call.listener)
        if listener is None or call.id not in listener.places:
            return
        was_held = call.id in listener.held
        if was_held:
            self._precedence.take()
        listener.answer(call.id, error)
        if error is None and not was_held:
            listener.inspector.tell_free(call.id)

    def end_epoch(self) -> None:
        """Have a call of any flow reported as CallMade: the hooks may judge it differently now."""
        self._inspectors.end_epoch()

    def close(self) -> None:
        """Close every listener."""
        if self._check_timer is not None:
            self._check_timer.cancel()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        self._inspectors.close()
        asyncio.get_running_loop().remove_reader(self._ends)
        self._ends.close()

    # --- calls in -------------------------------------------------------------------

    def _follow(self, listener: Listener) -> None:
        if not self._listeners:
            asyncio.get_running_loop().add_reader(self._ends, self._on_end)
        self._listeners[listener.number] = listener
        self._ends.register(listener.fd, 0)  # reports only its end, not each call
        listener.follow(self._inspectors, self._on_question)

    def _keep(self, listener: Listener) -> None:
        """Have the service manager keep the listener for a successor; retry if it is busy."""
        if listener.number not in self._listeners or not systemd.has_manager():
            return
        if not systemd.keep(listener.fd, f"hold-{listener.number}-{listener.limit:.3f}"):
            asyncio.get_running_loop().call_later(RETRY, self._keep, listener)

    def _on_end(self) -> None:
        """Drop the listeners that no process is left to call."""
        ended = {fd for fd, _ in self._ends.poll(0)}
        for listener in [each for each in self._listeners.values() if each.fd in ended]:
            self._ends.unregister(listener.fd)
            del self._listeners[listener.number]
            for ident in listener.places:
                self._deliver(CallGone(Call(listener.number, ident)))
            listener.close()
            listener.path.unlink(missing_ok=True)

    def _on_question(self, listener: Listener, question: Question, deadline: float) -> None:
        """Report a call; `deadline` is the one that a predecessor gave it, 0.0 if none did."""
        # Only if the call still waits did the inspector read its own thread, not another one's.
        if not seccomp.is_waiting(listener.fd, question.ident):
            listener.forget(question.ident)
            return
        flow, blocking = question.finding
        limit = listener.limit if blocking else min(listener.limit, HOLD_IMPATIENT)
        now = time.monotonic()
        first_deadline, remembered_until = self._interrupted.pop((question.pid, flow), (0.0, 0.0))
        if now <= remembered_until:
            deadline = first_deadline
        if deadline:
            limit = max(0.0, deadline - now)
        call = Call(listener.number, question.ident)
        self._deliver(CallMade(call, flow, question.pid, limit, time.time()))

    # --- the threads of held calls ----------------------------------------------------

    def _check_held(self) -> None:
        """Report held calls whose thread was killed or has a signal to handle, in batches."""
        now = time.monotonic()
        if not self._to_check:
            self._interrupted = {
                key: value for key, value in self._interrupted.items() if now <= value[1]
            }
            self._to_check.extend(
                (listener, made)
                for listener in self._listeners.values()
                for made, _ in listener.held.values()
            )
        for _ in range(min(CALLS_PER_TURN, len(self._to_check))):
            listener, made = self._to_check.popleft()
            if listener.number not in self._listeners or made.call.id not in listener.held:
                continue  # answered meanwhile
            if not seccomp.is_waiting(listener.fd, made.call.id):
                listener.forget(made.call.id)
                self._deliver(CallGone(made.call))
            elif seccomp.is_interrupted(made.pid):
                deadline = listener.held[made.call.id][1].when()
                self._interrupted[made.pid, made.flow] = deadline, now + CALLS_AGAIN
                self._deliver(CallInterrupted(made.call))
        pause = CALLS_PER_TURN * CHECK_EACH if self._to_check else CHECK
        loop = asyncio.get_running_loop()
        any_held = any(listener.held for listener in self._listeners.values())
        self._check_timer = loop.call_later(pause, self._check_held) if any_held else None
