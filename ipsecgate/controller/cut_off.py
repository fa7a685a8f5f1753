"""Closes the sockets of gated cgroups whose flows have lost their SA."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ipsecgate.admin import loader
from ipsecgate.core.model.flow import Flow
from ipsecgate.edges.kernel import sockets
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")


async def close_sockets(paths: Paths, is_cut_off: Callable[[Flow], bool]) -> None:
    """Close the sockets whose flows are cut off; the backstop blocks those that can't be closed."""
    try:
        lost = [sock for sock in await sockets.connected() if is_cut_off(sock.flow)]
        gated = await asyncio.to_thread(loader.gated_ids, paths) if lost else ()
        closed = await sockets.destroy([sock for sock in lost if sock.cgroup in gated])
    except OSError as error:
        log.warning("cannot close sockets, so their packets are blocked: %s", error.strerror)
    else:
        log.info("closed %d sockets that no SA protects any more", closed)
