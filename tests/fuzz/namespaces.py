"""Input from the kernel about links, namespaces and the routes of packets."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address, ip_network
from random import Random
from typing import Any

from ipsecgate.core.codec import forwarding, links, netlink
from ipsecgate.core.model.namespace import DeviceAddress, Link, Route
from ipsecgate.core.model.prefixes import as_prefix
from tests.fuzz.engine import Target
from tests.fuzz.kernel import FAMILIES, address
from tests.unit import xfrm_bytes as raw


class Namespaces(Target):
    """Links, their addresses and queueing disciplines, labels, namespaces' ids, packets' routes."""

    name = "namespaces"
    refusals = (netlink.DecodeError,)
    words = (*FAMILIES, b"veth\0", b"clsact\0", b"ingress\0",
             *(struct.pack("=H", kind) for kind in (16, 20, 24, 36, 72, 88)))  # fmt: skip

    def real(self, random: Random) -> tuple[bytes, Any]:
        of_links = (self._link, self._address, self._label, self._qdisc)
        return random.choice((*of_links, self._route, self._nsid))(random)

    def _link(self, random: Random) -> tuple[bytes, Any]:
        index, peer, master = (random.randrange(1, 9) for _ in range(3))
        netns = random.choice((None, -1, 0, 3))
        driver, loops = random.choice(("veth", "macvlan")), random.random() < 0.2
        program = random.random() < 0.2
        body = struct.pack("=BxHiII", 0, 1, index, 0x8 if loops else 1, 0)
        body += raw.attribute(3, b"eth0\0") + raw.attribute(5, struct.pack("=I", peer))
        body += raw.attribute(10, struct.pack("=I", master))
        body += raw.attribute(18, raw.attribute(1, driver.encode() + b"\0"))
        body += raw.attribute(43, raw.attribute(2, bytes([program])))
        if netns is not None:
            body += raw.attribute(37, struct.pack("=i", netns))
        link = Link(index, "eth0", driver, peer, netns, master, loops, not loops, program)
        return raw.message(16, body), ([link], [], [], [], [], [])

    def _address(self, random: Random) -> tuple[bytes, Any]:
        version, index = random.choice((4, 6)), random.randrange(1, 9)
        own, other = address(random, version), address(random, version)
        bits = random.randrange(own.max_prefixlen + 1)
        scope, flags = random.choice((0, 253, 254)), random.choice((0, 0x01, 0x20, 0x40, 0x80))
        body = struct.pack("=BBBBI", raw.FAMILY[version], bits, flags & 0xFF, scope, index)
        if peer := random.random() < 0.3:
            body += raw.attribute(1, other.packed) + raw.attribute(2, own.packed)
        else:
            body += raw.attribute(1, own.packed)
        body += raw.attribute(8, struct.pack("=I", flags))
        meant = DeviceAddress(
            index,
            own,
            ip_network((other if peer else own, bits), strict=False),
            is_global=scope == 0,
            is_secondary=version == 4 and flags == 1,
            is_usable=version == 4 or flags not in (0x20, 0x40),
        )
        return raw.message(20, body), ([], [], [], [], [meant], [])

    def _route(self, random: Random) -> tuple[bytes, Any]:
        version, is_local = random.choice((4, 6)), random.random() < 0.5
        source, gateway = address(random, version), address(random, version)
        link = random.randrange(1, 9)
        kind = 2 if is_local else 1
        body = struct.pack("=BBBBBBBBI", raw.FAMILY[version], 0, 0, 0, 254, 0, 0, kind, 0)
        body += raw.attribute(4, struct.pack("=I", link)) + raw.attribute(7, source.packed)
        if version == 4 and random.random() < 0.3:
            gateway = IPv6Address(random.getrandbits(128))
            body += raw.attribute(18, struct.pack("=H", 10) + gateway.packed)
        else:
            body += raw.attribute(5, gateway.packed)
        return raw.message(24, body), ([], [Route(link, source, gateway, is_local)], [], [], [], [])

    def _qdisc(self, random: Random) -> tuple[bytes, Any]:
        index, kind = random.randrange(1, 9), random.choice(("clsact", "ingress", "noqueue"))
        body = struct.pack("=BxHiIII", 0, 0, index, 0, 0, 0)
        body += raw.attribute(1, kind.encode() + b"\0")
        return raw.message(36, body), ([], [], [index] if kind != "noqueue" else [], [], [], [])

    def _nsid(self, random: Random) -> tuple[bytes, Any]:
        number = random.choice((-1, 0, 7))
        body = struct.pack("=Bxxx", 0) + raw.attribute(1, struct.pack("=i", number))
        return raw.message(88, body), ([], [], [], [number], [], [])

    def _label(self, random: Random) -> tuple[bytes, Any]:
        prefix = ip_network((random.getrandbits(128), random.randrange(129)), strict=False)
        body = struct.pack("=BxBBII", raw.FAMILY[6], prefix.prefixlen, 0, 0, 0)
        body += raw.attribute(1, prefix.network_address.packed)
        body += raw.attribute(2, struct.pack("=I", random.randrange(20)))
        return raw.message(72, body), ([], [], [], [], [], [as_prefix(prefix)])

    def feed(self, data: bytes) -> Any:
        return (
            list(links.decode_links(data)),
            list(forwarding.decode_packet(data)),
            list(links.decode_ingress(data)),
            list(links.decode_nsid(data)),
            list(links.decode_addresses(data)),
            list(links.decode_labels(data)),
        )
