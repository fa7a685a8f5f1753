"""What strongSwan has loaded and established, for `ipsecgate check`; read once, without asyncio.

VICI does not tell the proposals of a connection: they come from swanctl.conf, if it is in there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from vici import Session

from ipsecgate.core.check.connections import Connection, Loaded
from ipsecgate.core.codec.swanctl import proposals
from ipsecgate.core.codec.vici import child_configs, child_sas, is_userspace_esp, widen
from ipsecgate.core.codec.vici_sections import (
    Section,
    ViciError,
    number,
    sections,
    split_children,
    subsection,
    text,
    texts,
)
from ipsecgate.core.model.ipsec import ChildConfig, ChildSa, SaId
from ipsecgate.core.state.silence import Silent, silent_children
from ipsecgate.edges.strongswan.events import NAMES
from ipsecgate.edges.strongswan.swanctl_conf import read_text

TIME_LIMIT = 5.0  # seconds for each answer


def read(path: Path) -> tuple[Loaded, list[Silent]]:
    """Return what the daemon at `path` has loaded, and its silent children. Raises: OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIME_LIMIT)
        sock.connect(os.fspath(path))
        session = Session(sock)
        named, stats = session.version(), session.stats()
        algorithms = {kind: set(names) for kind, names in session.get_algorithms().items()}
        listed, established = list(session.list_conns()), list(session.list_sas())
        traps = [name for each in session.list_policies({"trap": "yes"}) for name in each]
    children, unread = _children(listed)
    written = proposals(read_text())
    connections = [
        _connection(name, body, written.get(name, ()))
        for message in listed
        for name, body in sections(message)
    ]
    loaded = Loaded(
        daemon=_name(named),
        userspace_esp=is_userspace_esp(stats),
        plugins=frozenset(texts(stats, "plugins")),
        algorithms=algorithms,
        connections=tuple(connections),
        children=tuple(children),
        traps=frozenset(traps),
        unread=tuple(unread),
    )
    return loaded, _silent(established)


def version(path: Path, limit: float = TIME_LIMIT) -> str:
    """Return the daemon's name and version, within so many seconds. Raises: OSError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit)
        sock.connect(os.fspath(path))
        return _name(Session(sock).version())


def _name(answer: Mapping[str, bytes]) -> str:
    return " ".join(answer[key].decode() for key in ("daemon", "version"))


def _children(listed: list[Section]) -> tuple[list[ChildConfig], list[str]]:
    """Return the children, and why some could not be read as they are."""
    children: list[ChildConfig] = []
    unread: list[str] = []
    for message in listed:
        for child in split_children(message, "children"):
            try:
                children += child_configs(child, NAMES)
            except ViciError as error:
                unread.append(str(error))
                children += child_configs(widen(child), NAMES)
    return children, unread


def _connection(name: str, body: Section, written: tuple[str, ...]) -> Connection:
    """Read a connection; its sides are sections such as local-1 and remote-1."""
    sides = [side for key, side in sections(body) if key.startswith(("local", "remote"))]
    return Connection(
        name,
        remotes=tuple(texts(body, "remote_addrs")),
        classes=frozenset(text(side, "class") for side in sides if "class" in side),
        eap=frozenset(text(side, "eap-type") for side in sides if "eap-type" in side),
        proposals=written,
    )


def _silent(established: list[Section]) -> list[Silent]:
    found: list[ChildSa] = []
    packets: dict[SaId, int] = {}
    for message in established:
        for one in split_children(message, "child-sas"):
            try:
                (sa,) = child_sas(one, NAMES)
            except (ViciError, ValueError):
                continue  # not installed, or not understood; the controller reports the latter
            found.append(sa)
            counts = _counts(one)
            packets[sa.outbound] = number(counts, "packets-out")
            if sa.inbound is not None:
                packets[sa.inbound] = number(counts, "packets-in")
    return silent_children(found, packets)


def _counts(message: Mapping[str, Section]) -> Section:
    """Return the section of the one CHILD_SA in a message."""
    ((_, body),) = sections(message)
    ((_, child),) = sections(subsection(body, "child-sas"))
    return child
