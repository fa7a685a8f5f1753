"""Having strongSwan negotiate a child, and learning how that ended.

Rules of this module:
- Only an `initiate` that waits hears of its end. A waiting one occupies one of charon's 16
  workers, so at most `MAX_WAITING` wait; more are started without, and their failure is known
  only when the limit runs out.
- The first attempt asks for no log: 19 more messages slow charon down where system calls are
  slow (20 ms became 23 in user-mode-linux, nothing measurable on a fast machine). One that
  failed fast is repeated at once, with the log, to hear the cause.
- A "yes" is not proof: it may be about another child of the same IKE_SA. Nor is a "no" always a
  failure: that is also strongSwan's answer when the child is up already.
- An attempt that ran into the limit is taken back. The next one would join it otherwise, and
  its retransmission timer, which by then waits for ever longer.

It does not decide when to negotiate or whether to try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ipsecgate.core.codec.causes import failure_cause
from ipsecgate.core.codec.vici_sections import text
from ipsecgate.core.model.ipsec import ChildName, ChildSa
from ipsecgate.edges.strongswan.vici import Message, ViciConnection, refusal

MAX_WAITING = 4
DIAGNOSE_WITHIN = 2.0  # seconds; what failed later failed for lack of an answer
SETTLE = 0.25  # seconds for child-updown to follow a "yes"
NO_LOG = "-1"  # below every log level
UNEXPLAINED = " failed"  # how a refusal ends that doesn't say why
OUT_OF_TIME = " not established after "


class Negotiator:
    """Negotiations with the daemon at `path`, each on a connection of its own.

    `established` lists the CHILD_SAs there are; `take_back` drops half-open IKE_SAs.
    """

    def __init__(
        self,
        path: Path,
        established: Callable[[], Awaitable[Iterable[ChildSa]]],
        take_back: Callable[[str], Awaitable[None]],
    ) -> None:
        self._path = path
        self._established = established
        self._take_back = take_back
        self._spare: list[ViciConnection] = []
        self._connections = asyncio.Semaphore(2 * MAX_WAITING)
        self._waiting = 0
        self._ups: dict[ChildName, asyncio.Event] = {}

    async def prepare(self) -> None:
        """Open a connection ahead of the first negotiation. Raises: IkeUnreachableError."""
        self._spare.append(await ViciConnection.open(self._path))

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._spare:
            self._spare.pop().close()

    def came_up(self, name: ChildName) -> None:
        """Take note that a child came up."""
        if name in self._ups:
            self._ups[name].set()

    async def negotiate(self, name: ChildName, limit: float) -> str | None:
        """Negotiate a child for `limit` seconds; return why it failed, None if it is up.

        Raises: IkeError, ViciError.
        """
        clock = asyncio.get_running_loop().time
        self._ups.setdefault(name, asyncio.Event()).clear()
        began = clock()
        deadline = began + limit
        log: list[str] | None = None
        while (refused := await self._ask(name, deadline - clock(), log)) is not None:
            if await self._is_up(name):
                return None
            if OUT_OF_TIME in refused:
                break
            if log is not None or not refused.endswith(UNEXPLAINED):
                return failure_cause(log or ()) or refused
            if clock() - began > DIAGNOSE_WITHIN:
                return f"the peer is silent: strongSwan gave up after {clock() - began:.0f} s"
            log = []
        if refused is None and await self._comes_up(name, deadline):
            return None
        await self._take_back(name.ike)
        return f"no CHILD_SA within {limit:g} s: the peer is slow or silent"

    async def _ask(self, name: ChildName, limit: float, log: list[str] | None) -> str | None:
        """Ask once, and wait for the end if there is a place; return the refusal.

        `log` gets what strongSwan logs meanwhile.
        """
        wait = self._waiting < MAX_WAITING
        message = {
            "ike": name.ike,
            "child": name.child,
            "timeout": milliseconds(limit) if wait else "-1",
        }
        if log is None:
            message["loglevel"] = NO_LOG
        stream = None if log is None else "control-log"
        self._waiting += wait
        try:
            async with self._connections:
                answer, lines = await self._exchange(message, stream)
        finally:
            self._waiting -= wait
        if log is not None:
            log.extend(text(line, "msg") for line in lines)
        return refusal(answer)

    async def _exchange(
        self, message: Message, stream: str | None
    ) -> tuple[Message, list[Message]]:
        connection = self._spare.pop() if self._spare else await ViciConnection.open(self._path)
        try:
            result = await connection.exchange("initiate", message, stream)
        except BaseException:
            connection.close()
            raise
        self._spare.append(connection)
        return result

    async def _comes_up(self, name: ChildName, deadline: float) -> bool:
        """Wait for the child until the deadline; soon look whether it was up all the time."""
        soon = asyncio.get_running_loop().time() + SETTLE
        for until in (min(soon, deadline), deadline):
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._ups[name].wait()
                    return True
            if await self._is_up(name):
                return True
        return False

    async def _is_up(self, name: ChildName) -> bool:
        return any(sa.name == name for sa in await self._established())


def milliseconds(seconds: float) -> str:
    """Return a time limit as `initiate` takes it; its 0 would be none at all."""
    return str(max(1, round(seconds * 1000)))
