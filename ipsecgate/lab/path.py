"""The path between the two hosts: interfaces, a bridge, a delay, and a way to silence IKE.

Rules of this module: addresses come from the ranges reserved for documentation (RFC 5737,
RFC 3849), and exist only in the lab's namespaces. Duplicate address detection is off, so an
address works at once. Bridge snooping and spanning tree are off, so the wire carries only what
the hosts send.
"""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

from ipsecgate.lab.netns import LabError, Namespace

if TYPE_CHECKING:
    from pyroute2 import IPRoute

Interface = IPv4Interface | IPv6Interface

LINK = "eth0"
BRIDGE = "path0"
FAMILIES = (4, 6)
NO_DAD = 0x02
FOREVER = 0xFFFFFFFF
NETEM_HANDLE = 0x10000
NETEM_LIMIT = 10_000
IKE_PORTS = (500, 4500)


@dataclass(frozen=True, slots=True)
class Site:
    """The name and addresses of one host, by family (4, 6).

    `outer`: on the wire, for IKE and transport mode. `inner`: on lo; tunnel mode protects its
    whole network. `bare`: also on the wire, but in no connection's selectors.
    """

    name: str
    outer: dict[int, Interface]
    inner: dict[int, Interface]
    bare: dict[int, Interface]

    @property
    def port(self) -> str:
        """The bridge port of this host: every frame that enters it was sent by the host."""
        return f"port-{self.name}"


def _site(name: str, outer: str, inner: tuple[str, str], bare: str) -> Site:
    prefixes = ("192.0.2.{}/24", "2001:db8::{}/64")
    return Site(
        name,
        {f: ip_interface(p.format(outer)) for f, p in zip(FAMILIES, prefixes, strict=True)},
        {f: ip_interface(i) for f, i in zip(FAMILIES, inner, strict=True)},
        {f: ip_interface(p.format(bare)) for f, p in zip(FAMILIES, prefixes, strict=True)},
    )


SITE_A = _site("a", "1", ("198.51.100.1/24", "2001:db8:a::1/64"), "4")
SITE_B = _site("b", "2", ("203.0.113.1/24", "2001:db8:b::1/64"), "3")


def prepare(namespace: Namespace) -> None:
    """Set the sysctls that a namespace's links inherit; load IPv6 if it is a module.

    Raises: LabError if the kernel has no IPv6.
    """
    if not namespace.proc("if_inet6") and not Path("/proc/sys/net/ipv6").exists():
        subprocess.run(["modprobe", "ipv6"], check=False, capture_output=True)
    if not Path("/proc/sys/net/ipv6").exists():
        raise LabError("this kernel has no IPv6", hint="load its ipv6 module")
    for scope in ("all", "default"):
        for key in ("accept_dad", "accept_ra", "router_solicitations"):
            namespace.sysctl(f"ipv6/conf/{scope}/{key}", "0")


def connect(path: Namespace, hosts: dict[str, Namespace]) -> None:
    """Connect the hosts' namespaces by a bridge in `path` and assign their addresses."""
    sites = (SITE_A, SITE_B)
    with path.route() as route:
        route.link("add", ifname=BRIDGE, kind="bridge", br_stp_state=0, br_mcast_snooping=0)
        bridge = index_of(route, BRIDGE)
        for site in sites:
            with hosts[site.name].path.open("rb") as there:
                peer = {"ifname": LINK, "net_ns_fd": there.fileno()}
                route.link("add", ifname=site.port, kind="veth", peer=peer)
            port = index_of(route, site.port)
            path.sysctl(f"ipv6/conf/{site.port}/disable_ipv6", "1")
            route.link("set", index=port, master=bridge, state="up")
        path.sysctl(f"ipv6/conf/{BRIDGE}/disable_ipv6", "1")
        route.link("set", index=bridge, state="up")
    for site, other in (sites, sites[::-1]):
        _configure(hosts[site.name], site, other)


def _configure(host: Namespace, site: Site, other: Site) -> None:
    """Bring a host's links up; add its addresses and the routes to the other host's network."""
    with host.route() as route:
        loop, link = index_of(route, "lo"), index_of(route, LINK)
        for index in (loop, link):
            route.link("set", index=index, state="up")
        for family in FAMILIES:
            _address(route, link, site.outer[family])
            _address(route, loop, ip_interface(site.inner[family].ip))
            _address(route, link, site.bare[family], source=False)
            route.route(
                "add",
                dst=str(other.inner[family].network),
                gateway=str(other.outer[family].ip),
                prefsrc=str(site.inner[family].ip),
            )


def _address(route: IPRoute, index: int, interface: Interface, source: bool = True) -> None:
    """Add an address. Unless `source`, an IPv6 address is deprecated, so it is never chosen."""
    extra: dict[str, object] = {}
    if interface.version == 6:
        extra["flags"] = NO_DAD
        if not source:
            extra["IFA_CACHEINFO"] = {"ifa_preferred": 0, "ifa_valid": FOREVER}
    address, length = str(interface.ip), interface.network.prefixlen
    route.addr("add", index=index, address=address, prefixlen=length, **extra)


def index_of(route: IPRoute, name: str) -> int:
    """Return the index of a link. Raises: LabError."""
    found = route.link_lookup(ifname=name)
    if not found:
        raise LabError(f"no link {name}")
    return int(found[0])


def set_delay(path: Namespace, one_way_ms: float) -> None:
    """Delay each direction with netem on the port where it leaves the bridge; 0 removes the delay.

    Raises: LabError if the kernel has no netem.
    """
    from pyroute2 import NetlinkError  # noqa: PLC0415

    with path.route() as route:
        for site in (SITE_A, SITE_B):
            index = index_of(route, site.port)
            try:
                if one_way_ms:
                    delay = round(one_way_ms * 1000)
                    options = {"delay": delay, "limit": NETEM_LIMIT}
                    route.tc("replace", "netem", index=index, handle=NETEM_HANDLE, **options)
                elif any(
                    q["index"] == index and q["handle"] == NETEM_HANDLE
                    for q in route.get_qdiscs(index=index)
                ):
                    route.tc("del", index=index, handle=NETEM_HANDLE, root=True)
            except NetlinkError as error:
                if error.code == errno.ENOENT:
                    raise LabError("this kernel has no netem", hint="load sch_netem") from error
                raise


def mute_ike(host: Namespace, muted: bool) -> None:
    """Make the host receive IKE and never answer, or undo that.

    A routing rule drops packets from its UDP ports 500 and 4500, which needs no packet filter in
    the kernel. To the peer this looks like a dead host or a firewall.
    """
    action = "add" if muted else "del"
    for family in FAMILIES:
        for port in IKE_PORTS:
            command = ["ip", f"-{family}", "-n", host.name, "rule", action, "pref", "1"]
            match = ["ipproto", "udp", "sport", str(port), "blackhole"]
            subprocess.run([*command, *match], check=True, capture_output=True)
