"""The verbs of the control socket, but for those whose clients wait (`controller.waiters`).

Rules of this module: a request changes nothing, but for `hold` and `reload`. What the words of a
request mean is found out before anything is done.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ipsecgate.admin.status_document import Configured, ControllerStatus, Process
from ipsecgate.controller import report
from ipsecgate.controller.hook_writer import HookWriter
from ipsecgate.controller.journal import Journal
from ipsecgate.controller.namespaces import Namespaces
from ipsecgate.controller.reload import Reload
from ipsecgate.controller.silence import silent
from ipsecgate.controller.tally import Tally
from ipsecgate.controller.targets import Targets
from ipsecgate.controller.time_to_covered import TimesToCovered
from ipsecgate.controller.timers import Timers
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.host.control_server import Handler, Request

if TYPE_CHECKING:
    from ipsecgate.admin.why import Decided


class Part(Protocol):
    """A part of the controller that may have something to report."""

    @property
    def errors(self) -> Sequence[Problem]:
        """The problems that the operator should fix."""


@value
class Verbs:
    """What the answers are made of.

    `parts`: in the order in which `status` shows their errors. `config`: returns what the
    configuration in force was read as. `is_ready`: whether the hook tables have been published.
    """

    gate: Gate
    parts: Sequence[Part]
    config: Callable[[], Config]
    is_ready: Callable[[], bool]
    since: float
    hooks: HookWriter
    journal: Journal
    listeners: Listeners
    namespaces: Namespaces
    reload: Reload
    tally: Tally
    targets: Targets
    timers: Timers
    times: TimesToCovered

    def handlers(self) -> dict[str, Handler]:
        """Return what carries out each verb."""
        return {
            "status": self._status,
            "events": self._events,
            "hold": self._hold,
            "reload": self._reload,
            "why": self._why,
            "configuration": self._configuration,
        }

    async def _status(self, _request: Request) -> ControllerStatus:
        process = Process(
            pid=os.getpid(),
            since=self.since,
            ready=self.is_ready(),
            tasks=len(asyncio.all_tasks()),
            timers=len(self.timers),
        )
        return report.controller_status(
            self.gate,
            process,
            targets=self.targets.wanted,
            namespaces=self.namespaces.document(),
            tally=self.tally,
            time_to_covered=self.times.document({policy.name for policy in self.gate.policies}),
            changed_entries=self.hooks.repaired,
            errors=[problem for part in self.parts for problem in part.errors],
            silent=await silent(self.gate),
        )

    async def _why(self, request: Request) -> Decided:
        flow = request.read(report.flow_of)
        return report.why(self.gate, flow, await silent(self.gate))

    async def _events(self, request: Request) -> dict[str, Any]:
        since = request.read(lambda words: int(words["since"]))
        last = self.journal.last_refusal
        return {"events": self.journal.since(since), "last_refusal": last, "pid": os.getpid()}

    async def _configuration(self, _request: Request) -> Configured:
        return report.configured(self.gate, self.config(), self.targets.wanted)

    async def _reload(self, _request: Request) -> Mapping[str, Any]:
        return await self.reload.run()

    async def _hold(self, request: Request) -> dict[str, Any]:
        fd, limit = request.read(lambda words: (int(words["fd"]), float(words["limit"])))
        self.listeners.take(request.pid, fd, limit)
        return {}
