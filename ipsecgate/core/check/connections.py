"""strongSwan's connections by themselves: selectors, addresses, traps, plugins, peers' names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field

from ipsecgate.core.check.finding import Finding, missing, ok, some, warning
from ipsecgate.core.check.proposals import lacking
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.ipsec import ChildConfig
from ipsecgate.core.model.value import value

NAME, PLUGINS = "connections", "plugins"
# Any of these can read the other side's public key or certificate.
PUBLIC_KEY = frozenset({"x509", "pubkey", "openssl", "botan", "wolfssl"})


@value
class Connection:
    """A loaded connection, and what its negotiation takes.

    `remotes`: its remote_addrs as written. `classes`: how either side proves its identity, as
    strongSwan says it: "pre-shared key", "public key", "EAP". `eap`: the EAP methods, such as
    EAP_MSCHAPV2. `proposals`: for IKE, as written in swanctl.conf, if it is in there.
    """

    name: str
    remotes: tuple[str, ...] = ()
    classes: frozenset[str] = frozenset()
    eap: frozenset[str] = frozenset()
    proposals: tuple[str, ...] = ()


@value
class Loaded:
    """What strongSwan has loaded. `algorithms`: names by kind, such as "prf". `unread`: see VICI.

    `traps`: the children (ike/child) with a trap in force.
    """

    daemon: str
    userspace_esp: bool = False
    plugins: frozenset[str] = frozenset()
    algorithms: Mapping[str, Collection[str]] = field(default_factory=dict)
    connections: tuple[Connection, ...] = ()
    children: tuple[ChildConfig, ...] = ()
    traps: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()

    @property
    def uses_certificates(self) -> bool:
        """Whether a connection proves an identity with a certificate or public key."""
        return any("public key" in one.classes for one in self.connections)


def check_connections(
    loaded: Loaded, addresses: frozenset[Address], unresolved: Mapping[str, str]
) -> list[Finding]:
    """Judge the connections.

    `addresses`: of this host. `unresolved`: names of peers that no lookup found, and why.
    """
    found = [
        *(
            warning(NAME, f"part of a connection cannot be read: {reason}", "report a bug")
            for reason in loaded.unread
        ),
        *_unresolved(loaded.connections, unresolved),
        *_same_selectors(loaded.children),
        *_no_source(loaded.children, addresses),
        *_no_trap(loaded.children, loaded.traps),
    ]
    if not loaded.connections:
        return [
            warning(
                NAME, "strongSwan has loaded no connection", "load them: `swanctl --load-conns`"
            )
        ]
    children = len(loaded.children)
    noun = "child" if children == 1 else "children"
    count = f"{len(loaded.connections)} loaded, with {children} {noun}"
    return found or [ok(NAME, count)]


def _unresolved(
    connections: Iterable[Connection], unresolved: Mapping[str, str]
) -> Iterator[Finding]:
    for connection in connections:
        for name in connection.remotes:
            if name in unresolved:
                yield missing(
                    NAME,
                    f"{connection.name}: its peer {name} does not resolve: {unresolved[name]}",
                    f"correct the name in remote_addrs, or mend its lookup (`getent hosts {name}`)",
                )


def _same_selectors(children: Iterable[ChildConfig]) -> Iterator[Finding]:
    """Yield children with equal selectors: the kernel has one policy for all of them."""
    groups: dict[object, list[ChildConfig]] = {}
    for child in children:
        if not child.wildcard and child.remote:
            sides = frozenset(child.local), frozenset(child.remote)
            groups.setdefault(sides, []).append(child)
    for group in groups.values():
        if len(group) > 1:
            yield warning(
                NAME,
                f"{some(child.name for child in group)} have the same traffic selectors, so the "
                "SA that came up last carries everything",
                "give each selectors of its own, unless they are gateways of which any will do",
            )


def _no_source(children: Iterable[ChildConfig], addresses: frozenset[Address]) -> Iterator[Finding]:
    for child in children:
        near = [one.network for one in child.local]
        if near and addresses and not any(a in net for net in near for a in addresses):
            yield warning(
                NAME,
                f"{child.name}: this host has no address in {some(near)}, so none of its own flows "
                "can use that child",
                "give the host an address in it, or correct local_ts; if it only forwards for that "
                "network, all is well",
            )


def _no_trap(children: Iterable[ChildConfig], traps: frozenset[str]) -> Iterator[Finding]:
    for child in children:
        if child.wildcard and str(child.name) not in traps:
            yield missing(
                NAME,
                f"{child.name} names no peer and has no trap, so a refused flow cannot start its "
                "negotiation",
                f"set start_action = trap for {child.name}, then `swanctl --load-conns`",
            )


def check_plugins(loaded: Loaded) -> list[Finding]:
    """Judge whether strongSwan has the plugins that its connections need."""
    found: list[Finding] = []
    for connection in loaded.connections:
        for proposal in connection.proposals:
            names = lacking(proposal, loaded.algorithms)
            if names:
                found.append(
                    missing(
                        PLUGINS,
                        f"{connection.name} proposes {proposal}, but no plugin of strongSwan's has "
                        f"{some(names)}",
                        "install libstrongswan-extra-plugins and libstrongswan-standard-plugins "
                        "and restart strongSwan, or propose what `swanctl --list-algs` lists",
                    )
                )
        found += _authentication(connection, loaded.plugins)
    count = f"{len(loaded.plugins)} loaded, with all that the connections are known to need"
    return found or [ok(PLUGINS, count)]


def _authentication(connection: Connection, plugins: frozenset[str]) -> Iterator[Finding]:
    if "public key" in connection.classes and not plugins & PUBLIC_KEY:
        yield missing(
            PLUGINS,
            f"{connection.name} uses certificates, but strongSwan has no plugin that reads them",
            "load the plugins x509, pubkey, pem and pkcs1 (package libstrongswan), then restart it",
        )
    needed = sorted(method.lower().replace("_", "-") for method in connection.eap)
    absent: Sequence[str] = [name for name in needed if name not in plugins]
    if absent:
        yield missing(
            PLUGINS,
            f"{connection.name} uses {some(sorted(connection.eap))}, but strongSwan has not loaded "
            f"{some(absent)}",
            "install libcharon-extauth-plugins (eap-mschapv2) or libcharon-extra-plugins (most "
            "others), then restart strongSwan",
        )
