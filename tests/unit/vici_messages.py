"""VICI messages as charon writes them, and what they mean."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

from ipsecgate.core.codec.vici_selectors import Names
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildName, ChildSa

# The /etc/services and /etc/protocols of these tests.
SERVICES = {("https", "tcp"): 443, ("domain", None): 53, ("iso-tsap", "tcp"): 102}
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "ipv6-icmp": 58}


def protocol(name: str) -> int:
    try:
        return PROTOCOLS[name]
    except KeyError:
        raise OSError("protocol not found") from None


def service(name: str, proto: str | None) -> int:
    try:
        return SERVICES[name, proto]
    except KeyError:
        raise OSError("service/proto not found") from None


NAMES = Names(protocol, service)


def ts(network: str, proto: int = 0, ports: tuple[int, int] = (0, 65535)) -> TrafficSelector:
    """Return a traffic selector."""
    return TrafficSelector(ip_network(network), proto, ports)


def conn(**body: Any) -> dict[str, Any]:
    """Return a `list-conn` event of the connection "gw"; `body` replaces parts of it."""
    child = {"mode": b"TUNNEL", "local-ts": [b"10.1.0.0/16"], "remote-ts": [b"10.2.0.0/16"]}
    children = body.pop("children", {"net": child})
    addresses = {"local_addrs": [b"192.0.2.1"], "remote_addrs": [b"192.0.2.2"]}
    return {"gw": {**addresses, "version": b"IKEv2", "local-1": {"class": b"psk"}, **body,
                   "children": children}}  # fmt: skip


CHILD = {
    "name": b"net",
    "uniqueid": b"3",
    "reqid": b"1",
    "state": b"INSTALLED",
    "mode": b"TUNNEL",
    "protocol": b"ESP",
    "spi-in": b"c0ffee01",
    "spi-out": b"0000beef",
    "local-ts": [b"10.1.0.0/16"],
    "remote-ts": [b"10.2.3.0/24[tcp/https]"],
}
# CHILD as the codec parses it.
SA = ChildSa(
    *(ChildName("gw", "net"), 1, 0xC0FFEE01, 0xBEEF, ip_address("192.0.2.2")),
    *((ts("10.1.0.0/16"),), (ts("10.2.3.0/24", 6, (443, 443)),)),
    unique=3,
    local_host=ip_address("192.0.2.1"),
)
HOSTS = {"local-host": b"192.0.2.1", "remote-host": b"192.0.2.2"}


def ike_sa(**child: Any) -> dict[str, Any]:
    """Return a `list-sa` event of "gw" with one CHILD_SA; `child` replaces parts of it."""
    children = {"net-3": {**CHILD, **child}}
    body = {"uniqueid": b"7", "state": b"ESTABLISHED", **HOSTS}
    return {"gw": {**body, "child-sas": children}}


# A `child-updown` or `ike-updown` event of SA.
UP: dict[str, Any] = {"up": "yes", **ike_sa()}
