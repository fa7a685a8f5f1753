"""Containers whose runtime passed us a seccomp listener: their calls are held."""

from __future__ import annotations

import asyncio
import logging

from ipsecgate.admin import loader
from ipsecgate.controller.service import Service
from ipsecgate.core.codec.oci import Container
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")


class Containers:
    """Takes over containers' listeners."""

    def __init__(self, paths: Paths, listeners: Listeners, service: Service) -> None:
        self._paths = paths
        self._listeners = listeners
        self._service = service

    def add(self, container: Container, listener: int) -> None:
        """Hold a container's calls from now on; warn if the hooks do not check them."""
        self._listeners.add(listener, container.hold)
        log.info("holding the calls of container %s", container.name)
        self._service.spawn(self._warn_if_ungated(container))

    async def _warn_if_ungated(self, container: Container) -> None:
        try:
            gated = await asyncio.to_thread(loader.is_gated, self._paths, container.pid)
        except (ProcessLookupError, FileNotFoundError):
            return  # it has ended
        except (OSError, GateError) as error:  # only this warning depends on it
            log.warning("cannot check whether container %s is gated: %s", container.name, error)
            return
        if not gated:
            log.warning(
                "container %s is not gated: the hooks do not check its calls", container.name
            )
