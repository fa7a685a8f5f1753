"""One seccomp listener: its descriptor, its inspector, and the calls that we answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from ipsecgate.core.model.events import CallMade
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.call_file import SLOT, SPARE, CallFile
from ipsecgate.edges.holding.inspector import Inspector, Inspectors
from ipsecgate.edges.holding.messages import Question


class Listener:
    """A listener that is followed.

    `limit`: seconds that a call may be held. Owns the descriptor.
    """

    inspector: Inspector  # from `follow` on

    def __init__(self, number: int, fd: int, limit: float, path: Path) -> None:
        """Map the call file. Raises: OSError, UntrustedError."""
        self.number = number
        self.fd = fd
        self.limit = limit
        self.path = path
        self.places: dict[int, int] = {}  # in the call file, of the calls to answer, by id
        self.held: dict[int, tuple[CallMade, asyncio.TimerHandle]] = {}  # by id
        self._file = CallFile.create(path)

    def follow(
        self, inspectors: Inspectors, on_question: Callable[[Listener, Question, float], None]
    ) -> None:
        """Start an inspector, which also asks about the calls that a predecessor left.

        `on_question` gets the deadline that a predecessor gave a call, 0.0 if none did.
        """
        for place, _ in self._file.calls():
            self._file.set_asked(place, asked=False)

        def asked(question: Question) -> None:
            place = question.place
            if place % SLOT or not SLOT <= place <= SPARE or question.ident in self.places:
                return
            self.places[question.ident] = place
            self._file.set_asked(place, asked=True)
            on_question(self, question, self._file.deadline(place))

        seccomp.wake_on_one_processor(self.fd)
        self.inspector = Inspector(inspectors, self.number, self.fd, self._file, asked)

    def hold(self, made: CallMade, timer: asyncio.TimerHandle) -> None:
        """Record until when a call is held."""
        self._file.set_deadline(self.places[made.call.id], timer.when())
        self.held[made.call.id] = made, timer

    def answer(self, ident: int, error: int | None) -> None:
        """Fail a call with an errno, or let it continue (None); then forget it."""
        seccomp.answer(self.fd, ident, error)
        self.forget(ident)

    def forget(self, ident: int) -> None:
        """Free a call's slot and cancel its timer."""
        place = self.places.pop(ident, None)
        if place is not None:
            self._file.clear(place)
        held = self.held.pop(ident, None)
        if held is not None:
            held[1].cancel()

    def close(self) -> None:
        """Close the descriptor. Unless another process has it, its calls now fail with ENOSYS."""
        self.inspector.close()
        for _, timer in self.held.values():
            timer.cancel()
        os.close(self.fd)
        self._file.close()
