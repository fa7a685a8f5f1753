"""Carries out the gate's commands on the hooks' maps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import assert_never

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.policy import Settings
from ipsecgate.core.tables.layout import LayoutError, Setting, TableId
from ipsecgate.core.tables.packed import ports_setting
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.sockets import udp_ports
from ipsecgate.errors import GateError

log = logging.getLogger("ipsecgate")

IKE_PORTS = (500, 4500)  # RFC 7296 section 2


class HookWriter:
    """Writes tables and settings into the data path."""

    def __init__(self, data: Datapath) -> None:
        self._data = data
        self.repaired = 0  # entries that somebody else had changed
        self._verifying = asyncio.Lock()

    def begin(self, settings: Settings, netns: int) -> None:
        """Set the network namespace whose SPD counts, and the settings that are stricter."""
        self._data.set(Setting.NETNS, netns)
        self._exempt(0)  # the daemon may have ended, and another process may have its pid
        self._data.set(Setting.ERROR, settings.errnos.uncovered)
        if not settings.audit:
            self._data.set(Setting.AUDIT, 0)
        if settings.deny:
            self._data.set(Setting.DENY, 1)

    def relax(self, settings: Settings) -> None:
        """Set the settings that are laxer, once the tables are published."""
        self._data.set(Setting.AUDIT, int(settings.audit))
        self._data.set(Setting.DENY, int(settings.deny))

    async def execute(self, command: do.HookWrite) -> None:
        """Carry out a command. Raises: OSError; GateError if a table cannot be published."""
        match command:
            case do.Publish() | do.Change():
                await self._publish(command)
            case do.SetModes():
                self._data.set(Setting.AUDIT, int(command.audit))
                self._data.set(Setting.DENY, int(command.deny))
                self._data.set(Setting.ERROR, command.error)
            case do.SetPaths():
                self._set_paths(command)
            case do.SetTunnels():
                self._data.set_tunnels(command.indexes)
            case do.ExemptIke():
                self._exempt(command.pid)
                await self._learn_ports(command.pid)
            case _:
                assert_never(command)

    def _set_paths(self, command: do.SetPaths) -> None:
        """Write paths, and what depends on them: first the stricter part of it, then the laxer."""
        wanted = {Setting.PATHS: command.bound_too, Setting.MARKS: command.marks}
        before = {which: self._data.setting(which) for which in wanted}
        strict = {
            Setting.PATHS: max(before[Setting.PATHS], command.bound_too),
            Setting.MARKS: before[Setting.MARKS] | command.marks,
        }
        self._set_changed(before, strict)
        self._data.set_paths(command.origin, command.paths)
        self._set_changed(strict, wanted)

    def _set_changed(self, before: Mapping[Setting, int], wanted: Mapping[Setting, int]) -> None:
        """Write settings that differ: each write begins a generation, and hooks decide again."""
        for which, value in wanted.items():
            if before[which] != value:
                self._data.set(which, value)

    def _exempt(self, pid: int) -> None:
        """Exempt a process in its present cgroup only, because its pid may be used again."""
        self._data.set(Setting.IKE, 0)
        if not pid:
            return
        try:
            cgroup = cgroups.of_process(pid).stat().st_ino
        except (OSError, GateError) as error:
            # It has ended, so another process may have its pid; or its cgroup is not visible.
            log.warning(
                "the IKE daemon (pid %d) is not exempt, because its cgroup is unknown: %s",
                pid,
                error,
            )
            return
        self._data.set(Setting.IKE_CGROUP, cgroup)
        self._data.set(Setting.IKE, pid)

    async def _learn_ports(self, pid: int) -> None:
        """Find out the daemon's ports, by which the backstop recognises its network namespace."""
        if not pid or not self._data.setting(Setting.IKE):
            return
        try:
            found = await udp_ports(pid, self._data.setting(Setting.IKE_CGROUP))
        except (OSError, DecodeError) as error:
            log.warning("the IKE daemon's ports are unknown, so 500 and 4500 count: %s", error)
            found = []
        usual = [port for port in IKE_PORTS if port in found]
        self._data.set(Setting.IKE_PORTS, ports_setting(usual or found or IKE_PORTS))

    async def _publish(self, command: do.Publish | do.Change) -> None:
        try:
            if isinstance(command, do.Publish):
                await self._data.publish(command.table, command.content)
            else:
                await self._data.change(command.table, command.entries.items())
        except (OSError, LayoutError) as error:
            # The old SPD table may call flows live whose SAs are gone, so withdraw it and end.
            if command.table is TableId.SPD:
                self._data.withdraw(TableId.SPD)
            reason = error.strerror if isinstance(error, OSError) else error
            raise GateError(
                f"cannot publish the {command.table.name} table: {reason}",
                hint="protected flows are refused until a controller runs again",
            ) from error

    async def verify(self, command: do.Verify) -> None:
        """Compare a table, beside the commands that come meanwhile: one that writes ends it."""
        async with self._verifying:
            repaired = await self._data.repair(command.table, command.content)
        self.repaired += repaired
        if repaired:
            name = command.table.name
            log.error(
                "%d entries of the %s table differed from what was published: repaired",
                repaired,
                name,
            )
