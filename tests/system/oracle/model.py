"""A naive reading of the kernel's rules for a call: policy by policy, state by state.

If the kernel does something that this reading does not allow, the run ends.

Source: xfrm_policy_match(), xfrm_tmpl_resolve_one(), xfrm_state_look_at(), linux 6.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple, Protocol

from ipsecgate.core.model.flow import Address
from tests.system.oracle.caller import DEVICE
from tests.system.oracle.topology import VRF, Tunnel, Way
from tests.system.oracle.world import (
    AH,
    BEET,
    ESP,
    TRANSPORT,
    TUNNEL,
    Call,
    Kind,
    Life,
    Masked,
    Policy,
    Sel,
    State,
    Tmpl,
    World,
)

REFUSED, CLEAR, COVERED = "refused", "clear", "covered"


class Host(Protocol):
    """What the kernel answered before there was any policy."""

    def way(self, call: Call) -> Way | None: ...
    def source_for(self, destination: Address) -> Address: ...
    def index_of(self, device: str) -> int: ...


class Path(NamedTuple):
    """A packet behind some templates: whether it is protected, and the ends of the last SA.

    `first`: the first template that has a state, with its ends; `is_moved`: an SA has sent it to
    another destination.
    """

    protected: bool
    local: Address
    remote: Address
    first: tuple[Tmpl, Address, Address] | None = None
    is_moved: bool = False


class Has(Enum):
    """Whether a template has a state."""

    NO = "no"
    MAYBE = "maybe"
    YES = "yes"


@dataclass(frozen=True, slots=True)
class Packet:
    """A flow as the kernel looks it up: everything is known."""

    src: Address
    dst: Address
    proto: int
    sport: int
    dport: int
    mark: int
    oif: int
    if_id: int = 0


def differs(port: int, masked: Masked) -> bool:
    value, mask = masked
    return bool((port ^ value) & mask)


def selects(sel: Sel, packet: Packet) -> bool:
    return (
        packet.src in sel.src.network
        and packet.dst in sel.dst.network
        and sel.proto in (0, packet.proto)
        and not differs(packet.sport, sel.sport)
        and not differs(packet.dport, sel.dport)
        and sel.ifindex in (0, packet.oif)
    )


def accepts(state: State, packet: Packet) -> bool:
    """Return whether a state's own selector accepts a packet."""
    if state.unspec and state.sel is None:
        return True
    if state.sel is None:
        return state.dst.version == packet.dst.version
    return state.sel.dst.version == packet.dst.version and selects(state.sel, packet)


def marked(mark: int, masked: Masked) -> bool:
    value, mask = masked
    return mark & mask == value


def is_any(address: Address) -> bool:
    return not int(address)


class Model:
    """The answers of one world."""

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host

    # --- the kernel's lookup -------------------------------------------------------------

    def packet(self, call: Call, sport: int) -> Packet | None:
        """Return a call as the kernel looks it up first, None if there is no route."""
        way = self.host.way(call)
        if way is None:
            return None
        src = call.src or way.source
        if call.inside:  # forwarded, as any packet: without the socket's mark
            oif = self.host.index_of(way.device)
            return Packet(src, call.dst, call.proto, sport, call.dport, 0, oif)
        # IPv4 looks up with the interface of the route, IPv6 only with that of a bound socket.
        oif = self.host.index_of(way.device if call.dst.version == 4 else call.device)
        return Packet(src, call.dst, call.proto, sport, call.dport, call.mark, oif)

    def inside(self, call: Call) -> tuple[Packet, Tunnel] | None:
        """Return a packet as a tunnel device looks it up, and the device; None: no tunnel."""
        way, packet = self.host.way(call), self.packet(call, call.sport or self.world.port)
        if packet is None or way is None or way.tunnel is None:
            return None
        if way.tunnel.if_id:  # with the interface below it
            oif, if_id = self.host.index_of(DEVICE), way.tunnel.if_id
            return replace(packet, oif=oif, if_id=if_id), way.tunnel
        oif = self.host.index_of(way.tunnel.name)
        return replace(packet, mark=way.tunnel.mark, oif=oif), way.tunnel

    def is_tunneled(self, call: Call) -> bool:
        way = self.host.way(call)
        return way is not None and way.tunnel is not None

    def describe(self, call: Call) -> str:
        """Return the kind of a call's origin and way, for the table of results."""
        way = self.host.way(call)
        if call.inside:
            origin = "container" if self.translated(call) is None else "container, translated"
        else:
            origin = "VRF" if call.device == VRF else "device" if call.device else "host"
        to = "no route" if way is None else way.tunnel.kind if way.tunnel else "wire"
        return f"{origin} to {to}"

    def translated(self, call: Call) -> Packet | None:
        """Return a container's packet once the host has given it another source, None: it has not.

        The host looks it up again then.
        """
        way, packet = self.host.way(call), self.packet(call, call.sport or self.world.port)
        if way is None or packet is None or way.translated is None:
            return None
        return replace(packet, src=way.translated)

    def answers(self, call: Call) -> set[str]:
        """Return every answer that the kernel may give; more than one if policies tie.

        A tunnel device gets what is left in clear, and looks it up again. It drops what is then
        not protected by an SA of its own, and takes no clear packets for an exception.
        """
        if self.packet(call, 0) is None:
            return {REFUSED}
        first, inside = self.forwarded(call), self.inside(call)
        if inside is None:
            return first
        packet, tunnel = inside
        found = first & {REFUSED}
        if COVERED in first:
            found |= self.beyond(call)
        if CLEAR in first and any(
            t.mode != TRANSPORT for p in self.tied(self.first(call)) for t in p.tmpls
        ):
            found.add(CLEAR)  # in a plain tunnel
            if call.inside and self.world.nat:
                found.add(REFUSED)  # as in `beyond`
        if CLEAR in first:
            tied = self.tied(packet)
            outcomes = [self.outcomes(p, packet, tunnel) for p in tied]
            found |= set().union(*outcomes) if outcomes else {REFUSED}
        return found

    def forwarded(self, call: Call) -> set[str]:
        """Return the answers before any tunnel device, with the host's own second lookup."""
        if not call.inside:
            return self.of_socket(call)
        first, translated = self.final(self.first(call)), self.translated(call)
        if translated is None:
            return first
        kept = {REFUSED, COVERED} if self.is_spared() else {REFUSED}
        return first & kept | (self.final(translated) if first - kept else set())

    def beyond(self, call: Call) -> set[str]:
        """Return the answers to a call that is covered before it reaches the tunnel device.

        In transport mode the device gets the protected packet. Whether it takes it for a flow of
        its own is left open; and so is a container's packet that a NAT rule for the wire
        translates, because the SA would lead it there: with the new source, none may.
        """
        if call.inside and self.world.nat:
            return {COVERED, REFUSED}
        tied = self.tied(self.first(call))
        if all(any(t.mode != TRANSPORT and not t.optional for t in p.tmpls) for p in tied):
            return {COVERED}
        return {COVERED, REFUSED}

    def first(self, call: Call) -> Packet:
        packet = self.packet(call, call.sport or self.world.port)
        assert packet is not None
        return packet

    def lookups(self, call: Call) -> list[Packet]:
        """Return the packets that the kernel looks up, none if there is no route."""
        packet, inside = self.packet(call, call.sport or self.world.port), self.inside(call)
        again = self.translated(call), inside[0] if inside else None
        return [one for one in (packet, *again) if one is not None]

    def of_socket(self, call: Call) -> set[str]:
        """Return the answers of a socket's own lookup.

        TCP looks up first with source port 0, before it chooses one. A refusal may then be final (a
        blocking policy, a pinned SPI whose state does not fit) or not: a missing state only gives a
        black hole route, and the next lookup decides. IPv4 always looks up again with the port,
        IPv6 only after a black hole route.
        """
        packet = self.first(call)
        last = self.final(packet)
        if call.kind is not Kind.TCP or call.port_known:
            return last
        packet = replace(packet, sport=0)
        first, early = self.final(packet), self.tied(packet)
        if early and all(p.block for p in early):
            return {REFUSED}
        if call.dst.version == 4:
            return last | (first & {REFUSED})
        return first | (last if REFUSED in first else set())

    def final(self, packet: Packet) -> set[str]:
        """Return the possible answers to a call whose last lookup is of this packet."""
        outcomes = [self.outcomes(p, packet) for p in self.tied(packet)]
        return set().union(*outcomes) if outcomes else {CLEAR}

    def passes(self, call: Call) -> bool:
        """Return whether policies without templates, and no others, let a call leave in clear."""
        if self.is_tunneled(call) or self.packet(call, 0) is None:
            return False
        packet = self.translated(call)
        if packet is None or self.is_spared():
            packet = self.first(call)
        tied = self.tied(packet)
        return bool(tied) and not any(p.block or p.tmpls for p in tied)

    def is_spared(self) -> bool:
        """Return whether the host translates only what IPsec does not protect."""
        return any(rule.unprotected for rule in self.world.nat)

    def tied(self, packet: Packet) -> list[Policy]:
        """Return the matching policies of the best priority; the kernel chooses the oldest."""
        matching = [
            p for p in self.world.policies
            if p.sel.src.version == packet.dst.version
            and selects(p.sel, packet)
            and p.if_id == packet.if_id
            and marked(packet.mark, p.mark)
        ]  # fmt: skip
        best = min((p.priority for p in matching), default=0)
        return [p for p in matching if p.priority == best]

    def outcomes(self, policy: Policy, packet: Packet, tunnel: Tunnel | None = None) -> set[str]:
        """Return the possible answers to a packet under a policy, inside a tunnel device if any."""
        if policy.block:
            return {REFUSED}
        found: set[str] = set()
        paths = [Path(False, packet.src, packet.dst)]
        for tmpl in policy.tmpls:
            paths = [
                after
                for path in paths
                for after in self.after(path, tmpl, policy, packet, found)
            ]  # fmt: skip
        for path in paths:
            dropped = tunnel is not None and not takes(tunnel, path)
            found.add(REFUSED if dropped else COVERED if path.protected else CLEAR)
        if tunnel is not None and tunnel.kind == "vti6" and self.has_state_from_any(policy):
            found.add(REFUSED)  # measured on Linux 6.1, although vti6_state_check() takes it
        return found

    def has_state_from_any(self, policy: Policy) -> bool:
        """Return whether a state for this policy has no address of its own."""
        reqids = {t.reqid for t in policy.tmpls}
        return any(is_any(s.src) for s in self.world.states if s.reqid in reqids)

    def after(
        self, path: Path, tmpl: Tmpl, policy: Policy, packet: Packet, found: set[str]
    ) -> Iterator[Path]:
        """Yield the paths after a template; add a possible refusal to `found`."""
        local, remote = path.local, path.remote
        if tmpl.mode in (TUNNEL, BEET):
            assert tmpl.dst is not None
            local, remote = tmpl.src or self.host.source_for(tmpl.dst), tmpl.dst
        has = self.has_state(tmpl, policy, local, remote, packet)
        if has is not Has.NO:
            yield Path(
                path.protected or tmpl.proto in (ESP, AH),
                local,
                remote,
                path.first or (tmpl, local, remote),
                path.is_moved or tmpl.mode != TRANSPORT,
            )
        if has is not Has.YES and tmpl.optional:
            yield path
        elif has is not Has.YES:
            found.add(REFUSED)

    def has_state(
        self, tmpl: Tmpl, policy: Policy, local: Address, remote: Address, packet: Packet
    ) -> Has:
        """Search as xfrm_state_find() does: first by both ends, then by the far end.

        Each search reads one bucket of a hash table with at least 8 buckets. The first also accepts
        a state from any address that happens to be in the bucket. The second is meant for those
        states, but does not compare the source, so it accepts any state in the bucket. Whether
        such a state is found depends on the hash.
        """
        value, mask = policy.mark
        found = [
            s for s in self.world.states
            if s.dst == remote
            and (s.reqid, s.mode, s.proto) == (tmpl.reqid, tmpl.mode, tmpl.proto)
            and tmpl.spi in (0, s.spi)
            and marked(value & mask, s.mark)
            and s.if_id == policy.if_id
            and s.life is not Life.EXPIRED
        ]  # fmt: skip
        exact = [s for s in found if s.src == local]
        wildcard = [s for s in found if is_any(s.src)]
        valid = [s for s in found if s.life is not Life.LARVAL and accepts(s, packet)]
        if any(s in exact for s in valid):
            return Has.YES
        if any(s.life is Life.LARVAL for s in exact):
            # A negotiation is in progress, so there is no second search.
            return Has.MAYBE if any(s in wildcard for s in valid) else Has.NO
        if any(s.life is Life.LARVAL for s in wildcard):
            return Has.MAYBE if valid else Has.NO
        if any(s in wildcard for s in valid):
            return Has.YES
        return Has.MAYBE if valid else Has.NO


def takes(tunnel: Tunnel, path: Path) -> bool:
    """Return whether a tunnel device sends a packet behind these templates.

    Source: vti_state_check(), vti6_state_check(); xfrmi_xmit2(): no loop through itself.
    """
    if tunnel.if_id:
        return path.is_moved
    if path.first is None:
        return False
    tmpl, local, remote = path.first
    return tmpl.mode == TUNNEL and (local, remote) == (tunnel.near, tunnel.far)
