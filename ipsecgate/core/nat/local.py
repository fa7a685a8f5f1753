"""What the host's NAT rules make of its own flows: of their source, and of their destination.

The kernel looks the flow up in the SPD as it begins, and again if POSTROUTING has changed its
source. Between the two the backstop sees the packet in clear, and cannot know that XFRM will still
transform it. So a flow whose source changes is refused, before there is a packet. Where the rules
may do several things, nothing is assumed: the backstop sees what they did.

Source: nf_nat_ipv4_out(), nf_xfrm_me_harder(); ip_finish_output() in net/ipv4/ip_output.c.
"""

from __future__ import annotations

from dataclasses import replace

from ipsecgate.core.model.flow import PORT_MASK, TCP, UDP, Address, FlowPath
from ipsecgate.core.model.nat import AddressType, Device, Packet, Service, Translation
from ipsecgate.core.model.prefixes import Prefix, PrefixSet
from ipsecgate.core.nat.mentions import Candidate
from ipsecgate.core.nat.translation import Nat

SPARE = (
    "put a rule before it that accepts what IPsec protects (iptables: -m policy --dir out --pol "
    "ipsec -j ACCEPT; nft: rt ipsec exists accept)"
)


def translated(
    path: FlowPath, nat: Nat, to: Address, *, oif: Device, masquerade: Address | None
) -> FlowPath:
    """Return the path of the host's flows to a destination, refused if NAT changes their source.

    `masquerade`: the address that MASQUERADE would use there, None if unknown. The socket's mark is
    unknown. The rules may spare what an SA protects as it begins; what none does is refused anyway.
    """
    if path.source is None or path.is_bent or not nat.translates:
        return path
    packet = Packet(
        to, TCP, path.source, oif=oif, mark=None, ipsec=True, masquerade=masquerade,
        saddr_type=AddressType.LOCAL, daddr_type=AddressType.UNICAST,
    )  # fmt: skip
    found: set[Translation] = set()
    for proto in (TCP, UDP):
        sources = nat.sources(replace(packet, proto=proto))
        if sources is None:
            return path
        found |= sources
    if any(one.low <= path.source <= one.high for one in found):  # type: ignore[operator]
        return path
    become = " or ".join(sorted({_ends(one) for one in found}))
    rules = " and ".join(sorted({one.rule for one in found}))
    text = f"NAT changes the source {path.source} into {become}, by {rules}: {SPARE}"
    return replace(path, outside=text)


def _ends(one: Translation) -> str:
    return str(one.low) if one.low == one.high else f"{one.low}-{one.high}"


def service(at: Candidate, nat: Nat, packet: Packet, followed: PrefixSet) -> Service | None:
    """Return a service address with its backends, None if it has none or not all are known.

    `packet`: one of its flows. `followed`: the networks of which one must contain a backend.
    """
    found = nat.destinations(packet)
    if found is None:
        return None
    backends = set()
    for one in found:
        low, high = one.ports
        if one.low != one.high or (low != high and one.ports != (0, PORT_MASK)):
            return None
        backends.add((one.low, low if one.rule and low == high else 0))
    if not any(followed.overlaps(_host(address)) for address, _ in backends):
        return None
    rules = " and ".join(sorted({one.rule for one in found if one.rule}))
    return Service(packet.daddr, packet.proto, at.ports, tuple(sorted(backends, key=str)), rules)


def _host(address: Address) -> Prefix:
    return address.version, int(address), address.max_prefixlen
