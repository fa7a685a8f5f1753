"""Have strongSwan negotiate a child, and find out whether that succeeded.

Rules of this module:
- Only an `initiate` with a timeout reports its end, and it blocks one of charon's 16 workers. So at
  most `MAX_WAITING` have one. The others start without, and their failure is noticed only when
  their limit is reached.
- The first attempt asks for no log: the 19 extra messages slow charon down where system calls are
  slow (from 20 to 23 ms in user-mode-linux; not measurable on a fast machine). An attempt that
  fails fast is repeated once, at once, with the log, to get the cause; after one that fails slowly,
  the next attempt asks for the log.
- Success must be confirmed: strongSwan may report it for another child of the same IKE_SA. Failure
  must be checked, too: strongSwan also reports it if the child is already up.
- When the limit is reached, drop the half-open IKE_SA. Otherwise the next attempt would join it,
  and its retransmission timer, whose intervals have grown long by then.

Core decides when to negotiate, and whether to try again after the limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ipsecgate.core.codec.causes import failure_cause, gave_up, out_of_time
from ipsecgate.core.codec.vici_sections import text
from ipsecgate.core.model.ipsec import ChildName, ChildSa
from ipsecgate.core.model.problem import Cause
from ipsecgate.edges.strongswan.vici import Message, ViciConnection, refusal

MAX_WAITING = 4
DIAGNOSE_WITHIN = 2.0  # seconds; an attempt that failed later failed for lack of an answer
SETTLE = 0.25  # seconds for the child-updown event to follow a reported success
NO_LOG = "-1"  # below every log level
UNEXPLAINED = " failed"  # the end of a refusal without a cause
OUT_OF_TIME = " not established after "


class Negotiator:
    """Negotiations with the daemon at `path`, each on a separate connection.

    `established` lists the CHILD_SAs; `drop_half_open` drops an IKE configuration's half-open
    IKE_SAs.
    """

    def __init__(
        self,
        path: Path,
        established: Callable[[], Awaitable[Iterable[ChildSa]]],
        drop_half_open: Callable[[str], Awaitable[None]],
    ) -> None:
        self._path = path
        self._established = established
        self._drop_half_open = drop_half_open
        self._spare: list[ViciConnection] = []
        self._connections = asyncio.Semaphore(2 * MAX_WAITING)
        self._waiting = 0
        self._ups: dict[ChildName, asyncio.Event] = {}
        self._unexplained: set[ChildName] = set()  # whose last attempt failed without a cause

    async def prepare(self) -> None:
        """Open the first negotiation's connection in advance. Raises: IkeUnreachableError."""
        self._spare.append(await ViciConnection.open(self._path))

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._spare:
            self._spare.pop().close()

    def on_child_up(self, name: ChildName) -> None:
        """Record that a child came up."""
        if name in self._ups:
            self._ups[name].set()

    async def negotiate(self, name: ChildName, limit: float) -> Cause | None:
        """Negotiate a child for up to `limit` seconds; return why it failed, None if it is up.

        Raises: IkeError, ViciError.
        """
        clock = asyncio.get_running_loop().time
        self._ups.setdefault(name, asyncio.Event()).clear()
        began = clock()
        deadline = began + limit
        log: list[str] | None = [] if name in self._unexplained else None
        self._unexplained.discard(name)
        while (reason := await self._initiate(name, deadline - clock(), log)) is not None:
            if await self._is_up(name):
                return None
            if OUT_OF_TIME in reason:
                break
            if log is not None or not reason.endswith(UNEXPLAINED):
                return failure_cause(log or (reason,))
            if clock() - began > DIAGNOSE_WITHIN:
                self._unexplained.add(name)
                return gave_up(clock() - began)
            log = []
        if reason is None and await self._comes_up(name, deadline):
            return None
        await self._drop_half_open(name.ike)
        return out_of_time(limit)

    async def _initiate(self, name: ChildName, limit: float, log: list[str] | None) -> str | None:
        """Initiate once; return why that failed, None on success or without a wait for the end.

        charon waits if fewer than `MAX_WAITING` attempts do. `log` receives what it logs.
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
        """Wait for the child until the deadline.

        Check early whether it was already up, because then no event follows.
        """
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
    """Return a time limit as `initiate` takes it; 0 would mean no limit."""
    return str(max(1, round(seconds * 1000)))
