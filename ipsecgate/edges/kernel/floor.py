"""Keep the host floor in the kernel's SPD: add what is missing, then remove what is left over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from ipsecgate.core.codec.xfrm import encode_policy_dump
from ipsecgate.core.codec.xfrm_floor import decode_late, encode_delete, encode_set
from ipsecgate.core.model.events import XfrmEvent
from ipsecgate.core.model.policy import FloorPolicy
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.state.floor import parse_own
from ipsecgate.edges.kernel.netlink import Requests
from ipsecgate.edges.kernel.probe import has_xfrm
from ipsecgate.edges.kernel.xfrm import NETLINK_XFRM

log = logging.getLogger("ipsecgate")

RETRY = 2.0  # seconds


class Floor:
    """Maintains the floor with one instance's tag in a task of its own, so no flow waits for it.

    `errors`: why the floor is not as configured, empty if it is.
    """

    def __init__(self, tag: int) -> None:
        self._tag = tag
        self._wanted: asyncio.Queue[tuple[FloorPolicy, ...]] = asyncio.Queue()
        self.errors: list[Problem] = []

    def set(self, wanted: tuple[FloorPolicy, ...]) -> None:
        """Replace the floor with these policies as soon as `run` gets to it."""
        self._wanted.put_nowait(wanted)

    async def run(self) -> None:
        """Apply what `set` asks for until cancelled; retry failures unless they are outdated."""
        while True:
            wanted = await self._wanted.get()
            while not self._wanted.empty():
                wanted = self._wanted.get_nowait()
            try:
                await keep(self._tag, wanted)
                self.errors = []
            except OSError as error:
                text = f"cannot set the host floor, will retry: {error.strerror or error}"
                self.errors = [Problem(text, "see `ip xfrm policy`, and `ipsecgate check`")]
                log.error("%s", self.errors[0])
                await asyncio.sleep(RETRY)
                if self._wanted.empty():
                    self.set(wanted)


async def keep(tag: int, wanted: tuple[FloorPolicy, ...]) -> None:
    """Replace the floor that has this tag with these policies, in this network namespace.

    If the kernel rejects one policy, the others are still set.
    Raises: OSError, the first rejection; DecodeError.
    """
    failures: list[OSError] = []
    if not wanted and not has_xfrm():
        return
    async with Requests(NETLINK_XFRM) as requests:
        late = await requests.dump(encode_policy_dump, decode_late)
        present = {own for entry in late if (own := parse_own(entry, tag)) is not None}
        for policy in wanted:
            if policy not in present:
                try:
                    requests.ask(partial(encode_set, policy, tag), _nothing)
                except OSError as error:
                    failures.append(error)
        kept = {_identity(policy) for policy in wanted}
        for policy in present:
            if _identity(policy) not in kept:
                requests.ask(partial(encode_delete, policy, tag), _nothing)
    if failures:
        raise failures[0]


def _identity(policy: FloorPolicy) -> tuple[object, ...]:
    """Return the fields by which the kernel identifies a policy."""
    return policy.dst, policy.proto, policy.sport, policy.dport


def _nothing(_datagram: bytes) -> Iterable[XfrmEvent]:
    return ()
