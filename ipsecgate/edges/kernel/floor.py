"""Keep the host's floor in the kernel's SPD: add what is missing, then remove what is too much."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from ipsecgate.core.codec.xfrm import decode, encode_policy_dump
from ipsecgate.core.model.events import PolicySet, XfrmEvent
from ipsecgate.core.state.floor import FloorPolicy, encode_delete, encode_set, ours
from ipsecgate.edges.kernel.netlink import Requests
from ipsecgate.edges.kernel.probe import has_xfrm
from ipsecgate.edges.kernel.xfrm import NETLINK_XFRM

log = logging.getLogger("ipsecgate")

RETRY = 2.0  # seconds


class Floor:
    """Keeps the floor with this tag, beside whatever else is done: nothing gated waits for it."""

    def __init__(self, tag: int) -> None:
        self._tag = tag
        self._wanted: asyncio.Queue[tuple[FloorPolicy, ...]] = asyncio.Queue()
        self.errors: list[str] = []

    def set(self, wanted: tuple[FloorPolicy, ...]) -> None:
        """Make the floor be these policies, soon."""
        self._wanted.put_nowait(wanted)

    async def run(self) -> None:
        """Do so until cancelled; what fails is tried again, unless something newer is wanted."""
        while True:
            wanted = await self._wanted.get()
            while not self._wanted.empty():
                wanted = self._wanted.get_nowait()
            try:
                await keep(self._tag, wanted)
                self.errors = []
            except OSError as error:
                self.errors = [f"cannot set the host floor, will retry: {error.strerror or error}"]
                log.error("%s", self.errors[0])
                await asyncio.sleep(RETRY)
                if self._wanted.empty():
                    self.set(wanted)


async def keep(tag: int, wanted: tuple[FloorPolicy, ...]) -> None:
    """Make the floor with this tag be these policies, in this network namespace.

    One that the kernel does not take is not in the way of the others.
    Raises: OSError, the first of them; DecodeError.
    """
    failures: list[OSError] = []
    if not wanted and not has_xfrm():
        return
    async with Requests(NETLINK_XFRM) as requests:
        there = {
            one
            for event in await requests.dump(encode_policy_dump, decode)
            if isinstance(event, PolicySet) and (one := ours(event.entry, tag)) is not None
        }
        for one in wanted:
            if one not in there:
                try:
                    requests.ask(partial(encode_set, one, tag), _nothing)
                except OSError as error:
                    failures.append(error)
        kept = {_identity(one) for one in wanted}
        for one in there:
            if _identity(one) not in kept:
                requests.ask(partial(encode_delete, one, tag), _nothing)
    if failures:
        raise failures[0]


def _identity(one: FloorPolicy) -> tuple[object, ...]:
    """Return what the kernel knows a policy by."""
    return one.dst, one.proto, one.sport, one.dport


def _nothing(_datagram: bytes) -> Iterable[XfrmEvent]:
    return ()
