"""The rules by which netfilter translates addresses in one network namespace, and their changes.

Rules of this module:
- Ask the kernel itself, over netlink and getsockopt(); the tools are not needed.
- Where no chain of type nat and no legacy table exists, read nothing else.
- nftables notifies of changes. iptables-legacy does not, so its tables are compared every `PERIOD`
  while there are any, and looked for at each pulse of the service while there are none.
- A table that cannot be decoded is an error which names it, and the rules are unknown.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from ipsecgate.core.codec import iptables, nftables
from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.model.nat import ChainName, Rule, Ruleset, Set, SetName
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.pulse import until_pulse
from ipsecgate.edges.kernel.namespaces import Namespace
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket, Requests
from ipsecgate.errors import GateError

ATTEMPTS = 10
PAUSE = 0.05  # seconds, in which further changes are taken together
PERIOD = 2.0  # seconds
_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_*, IP6T_SO_GET_*
_FAMILIES = {4: (socket.AF_INET, socket.IPPROTO_IP), 6: (socket.AF_INET6, socket.IPPROTO_IPV6)}
_NAMES = {4: "ip_tables_names", 6: "ip6_tables_names"}

_libc = ctypes.CDLL(None, use_errno=True)


class NatError(GateError):
    """The NAT rules of a network namespace can't be read."""


class NatRules:
    """Reads the NAT rules of a network namespace, None: that in which it was made.

    An async context manager. It may be used from another namespace than it was made in.
    """

    def __init__(self, namespace: Namespace | None = None) -> None:
        """Raises: OSError."""
        open_socket = socket.socket if namespace is None else namespace.socket
        self._requests = Requests(nftables.NETLINK_NETFILTER, open_socket)
        self._legacy = _Legacy(namespace)

    async def __aenter__(self) -> Self:
        await self._requests.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._legacy.close()
        await self._requests.__aexit__(kind, value, trace)

    async def read(self) -> Ruleset:
        """Return the rules. Raises: NatError."""
        try:
            nft, legacy = await self._nftables(), self._legacy.read()
        except (OSError, DecodeError, iptables.TableError) as error:
            raise NatError(
                f"cannot read the NAT rules, so flows that they may concern stay refused: {error}",
                hint="see `nft list ruleset` and `iptables-legacy-save`",
            ) from error
        if not nft.translates and not legacy.translates:
            return Ruleset()
        return Ruleset(
            (*nft.bases, *legacy.bases),
            {**nft.chains, **legacy.chains},
            {**nft.sets, **legacy.sets},
        )

    @property
    def legacy_state(self) -> bytes:
        """What differs when a legacy table has changed; empty if there is none. Raises: OSError."""
        return self._legacy.state()

    async def _nftables(self) -> Ruleset:
        for _ in range(ATTEMPTS):
            try:
                before = self._generation()
                found = await self._dump()
                if self._generation() == before:
                    return found
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # a set was removed meanwhile
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    return Ruleset()  # the kernel has no nftables
                raise
        raise OSError(errno.EAGAIN, "the rules change all the time")

    def _generation(self) -> int:
        return self._requests.ask(nftables.encode_generation, nftables.decode_generation)[0]

    async def _dump(self) -> Ruleset:
        dump = self._requests.dump
        bases = await dump(partial(nftables.encode_list, nftables.GETCHAIN), nftables.decode_bases)
        if not bases:
            return Ruleset()
        dormant = await dump(
            partial(nftables.encode_list, nftables.GETTABLE), nftables.decode_dormant
        )
        bases = [base for base in bases if base.table not in dormant]
        if not any(base.nat for base in bases) and not self._legacy.tables():
            return Ruleset()
        chains: dict[ChainName, list[Rule]] = {}
        for chain, rule in await dump(
            partial(nftables.encode_list, nftables.GETRULE), nftables.decode_rules
        ):
            chains.setdefault(chain, []).append(rule)
        headers = await dump(partial(nftables.encode_list, nftables.GETSET), nftables.decode_sets)
        sets: dict[SetName, Set] = {}
        for header in headers:
            elements = None
            if header.is_fixed:
                encode = partial(nftables.encode_elements, header.name)
                items = await dump(encode, nftables.decode_elements)
                elements = nftables.elements_of(header, items)
            sets[header.name] = Set(header.size, elements)
        return Ruleset(tuple(bases), {name: tuple(rules) for name, rules in chains.items()}, sets)


class NatWatch:
    """Follows the NAT rules of this network namespace; `deliver` is called with each new state.

    None: the rules are unknown, because they could not be read (`errors`).
    """

    def __init__(self, deliver: Callable[[Ruleset | None], None]) -> None:
        self._deliver = deliver
        self._due = asyncio.Event()
        self._known = False
        self._last: Ruleset | None = None
        self.errors: list[Problem] = []

    async def run(self) -> None:
        """Follow until cancelled. Raises: OSError if netlink can't be used at all."""
        now = asyncio.get_running_loop().time
        watch = RawNetlinkSocket(
            nftables.NETLINK_NETFILTER, lambda _datagram: self._due.set(), self._on_error
        )
        try:
            with suppress(FileNotFoundError):  # the kernel has no netfilter
                watch.join((nftables.NFNLGRP_NFTABLES,))
            async with NatRules() as rules:
                while True:
                    legacy = rules.legacy_state
                    self._due.clear()
                    await self._read(rules)
                    while not self._due.is_set() and rules.legacy_state == legacy:
                        pause = PERIOD if legacy else until_pulse(now())
                        with suppress(TimeoutError):
                            async with asyncio.timeout(pause):
                                await self._due.wait()
                    await asyncio.sleep(PAUSE)
        finally:
            watch.close()

    async def _read(self, rules: NatRules) -> None:
        found: Ruleset | None = None
        try:
            found = await rules.read()
            self.errors = []
        except NatError as error:
            self.errors = [Problem.of(error)]
        if not self._known or found != self._last:
            self._known, self._last = True, found
            self._deliver(found)

    def _on_error(self, _error: OSError) -> None:
        self._due.set()  # notifications were lost


class _Legacy:
    """The tables of iptables-legacy, of both families."""

    def __init__(self, namespace: Namespace | None) -> None:
        self._namespace = namespace
        self._names: dict[int, int] = {}  # the open files with the names of the tables
        self._sockets: dict[int, socket.socket] = {}

    def _open(self, version: int) -> None:
        """Open what tells of a family's tables, once the kernel has the module. Raises: OSError."""
        # The file stays that of the namespace in which it was opened.
        path = f"/proc/thread-self/net/{_NAMES[version]}"
        self._names[version] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Any Internet socket will do. A raw one, as iptables has, would take CAP_NET_RAW.
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        self._sockets[version] = socket.socket(_FAMILIES[version][0], kind)

    def close(self) -> None:
        for descriptor in self._names.values():
            os.close(descriptor)
        for one in self._sockets.values():
            one.close()
        self._names, self._sockets = {}, {}

    def tables(self) -> list[tuple[int, str]]:
        """Return the tables that exist. To ask for another would create it. Raises: OSError."""
        for version in _NAMES.keys() - self._sockets.keys():
            with suppress(FileNotFoundError):  # the kernel has none of this family
                if self._namespace is None:
                    self._open(version)
                else:
                    self._namespace.run(partial(self._open, version))
        found = []
        for version, descriptor in self._names.items():
            names = os.pread(descriptor, 4096, 0).decode().split()
            found += [(version, name) for name in iptables.TABLES if name in names]
        return found

    def state(self) -> bytes:
        """Return the entries of all tables. Raises: OSError."""
        return b"".join(self._entries(*table)[1] for table in self.tables())

    def read(self) -> Ruleset:
        """Return the rules of all tables. Raises: OSError, TableError."""
        found = Ruleset()
        for version, name in self.tables():
            info, blob = self._entries(version, name)
            table = iptables.decode_table(name, version, iptables.decode_info(info), blob)
            found = Ruleset((*found.bases, *table.bases), {**found.chains, **table.chains})
        return found

    def _entries(self, version: int, name: str) -> tuple[bytes, bytes]:
        """Return what the kernel says of a table, and its entries. Raises: OSError."""
        for _ in range(ATTEMPTS):
            info = self._ask(version, _GET_INFO, name, iptables.INFO.size)
            size = iptables.decode_info(info).size
            head = 40  # struct ipt_get_entries: name, size, padding
            try:
                asked = struct.pack("=32sI", name.encode(), size)
                raw = self._ask(version, _GET_ENTRIES, asked, head + size)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                continue  # the table was replaced meanwhile
            return info, raw[head:]
        raise OSError(errno.EAGAIN, f"table {name} changes all the time")

    def _ask(self, version: int, option: int, asked: str | bytes, size: int) -> bytes:
        raw = asked.encode() if isinstance(asked, str) else asked
        buffer = ctypes.create_string_buffer(raw, size)
        length = ctypes.c_uint32(size)
        _, level = _FAMILIES[version]
        descriptor = self._sockets[version].fileno()
        if _libc.getsockopt(descriptor, level, option, buffer, ctypes.byref(length)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return buffer.raw[: length.value]
