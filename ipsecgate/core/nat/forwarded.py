"""Where flows of another namespace lead when the gate's host forwards and translates them.

The kernel looks a flow up in the SPD with its own source when it forwards it, and again if a rule
of POSTROUTING has changed the source. Where the rules may do several things, none is assumed: a
network for which they do is divided, down to single addresses, while there are `PARTS`.

Source: ip_forward() in net/ipv4/ip_forward.c; nf_nat_ipv4_out(), nf_xfrm_me_harder().
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ipsecgate.core.model.flow import Address, FlowPath, Network
from ipsecgate.core.model.namespace import DeviceAddress, Link, WayOut, masquerade_address
from ipsecgate.core.model.nat import AddressType, Device, Packet, Translation
from ipsecgate.core.model.value import value
from ipsecgate.core.nat.translation import Nat

PARTS = 64  # of one network


@value
class Forwarding:
    """The NAT rules of another namespace and of the gate's, None: unknown; and the gate's links.

    `floor`: the host floor is in force. It blocks what the first lookup finds no policy for.
    """

    there: Nat | None
    here: Nat | None
    links: Mapping[int, Link]
    addresses: tuple[DeviceAddress, ...]
    floor: bool = False

    def paths(self, network: Network, way: WayOut) -> Iterator[tuple[Network, FlowPath]]:
        """Yield the paths of the flows to a network, all of which leave in one way."""
        waiting, left = [network], PARTS
        while waiting:
            part = waiting.pop()
            path = self._path(part, way)
            if isinstance(path, FlowPath):
                yield part, path
            elif left and part.prefixlen < part.max_prefixlen:
                left -= 1
                waiting += part.subnets()
            else:
                yield part, FlowPath(None, outside=path)

    def _path(self, network: Network, way: WayOut) -> FlowPath | str:
        """Return the path of all flows to a network, or why they have no common one."""
        if way.source is None:
            return FlowPath(None, outside=way.reason)
        if not way.link:
            return FlowPath(way.source)  # to an address of the host or of its own: it never leaves
        for nat, whose in ((self.there, "its namespace"), (self.here, "this host")):
            if nat is None:
                text = f"the rules of {whose} that translate addresses cannot be read"
                return FlowPath(None, outside=text)
        sent = Packet(network[0], saddr=way.source, bits=network.prefixlen,
                      saddr_type=AddressType.LOCAL, daddr_type=AddressType.UNICAST)  # fmt: skip
        arrived = replace(sent, local=False, iif=self._device(way.arrives),
                          saddr_type=AddressType.UNICAST)  # fmt: skip
        if not _goes_on(self.there, sent, network) or _sources(self.there, sent).keys() != {
            way.source
        }:
            return "rules of its namespace may translate or mark its packets"
        if not _goes_on(self.here, arrived, network):
            return "rules of this host may translate its destination, or mark its packets"
        leaving = replace(arrived, oif=self._device(way.link), masquerade=masquerade_address(
            self.addresses, way.link, way.gateway or network[0]))  # fmt: skip
        # Behind a rule for packets without IPsec, what an SA protects keeps its source. If none
        # does, it does not matter which source it gets: it is refused.
        protected = _sources(self.here, replace(leaving, ipsec=True))
        path = FlowPath(way.source, way.if_id, way.mark)
        if protected.keys() == {way.source}:
            return path
        found = protected | _sources(self.here, replace(leaving, ipsec=False))
        if len(found) != 1 or None in found:
            return "rules of this host may give it one of several sources"
        if self.floor:
            text = "the host floor (gate.floor) blocks its packets before the host translates them"
            return FlowPath(None, outside=text)
        ((source, rule),) = found.items()
        return replace(path, translated=source, rule=rule)

    def _device(self, index: int) -> Device | None:
        link = self.links.get(index)
        return None if link is None else Device(link.index, link.name)


def _goes_on(nat: Nat | None, packet: Packet, network: Network) -> bool:
    """Tell whether packets keep their destination, and no rule marks them."""
    found = nat.destinations(packet) if nat is not None else None
    unchanged = Translation(network[0], network[-1])
    return found is not None and all(one == unchanged for one in found)


def _sources(nat: Nat | None, packet: Packet) -> dict[Address | None, str]:
    """Return the sources that packets may get and by which rules, with None for any other."""
    found: Iterable[Translation] | None = nat.sources(packet) if nat is not None else None
    if found is None:
        return {None: ""}
    return {one.low if one.low == one.high else None: one.rule for one in found}
