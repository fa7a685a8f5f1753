"""A naive reading of the kernel's rules for a call: policy by policy, state by state.

It does not judge, it explains. A gate that is stricter than the kernel must have a reason named
here. If the kernel does something that this reading does not allow, the run ends.

Source: xfrm_policy_match(), xfrm_tmpl_resolve_one(), xfrm_state_look_at(), linux 6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from ipsecgate.core.model.flow import Address
from tests.system.oracle.world import (
    AH,
    BEET,
    ESP,
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
Saddr = Callable[[Address, int], Address]
Path = tuple[bool, Address, Address]


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
    """The answers of one world. `source_for`: the kernel's source, by destination and mark."""

    def __init__(self, world: World, source_for: Saddr, device: int) -> None:
        self.world = world
        self.source_for = source_for
        self.device = device

    # --- the kernel's lookup -------------------------------------------------------------

    def packet(self, call: Call, sport: int) -> Packet:
        src = call.src or self.source_for(call.dst, call.mark)
        # IPv4 looks up with the interface of the route, IPv6 only with that of a bound socket.
        oif = self.device if call.dst.version == 4 else 0
        return Packet(src, call.dst, call.proto, sport, call.dport, call.mark, oif)

    def answers(self, call: Call) -> set[str]:
        """Return every answer that the kernel may give; more than one if policies tie.

        TCP looks up first with source port 0, before it chooses one. A refusal may then be final (a
        blocking policy, a pinned SPI whose state does not fit) or not: a missing state only gives a
        black hole route, and the next lookup decides. IPv4 always looks up again with the port,
        IPv6 only after a black hole route.
        """
        last = self.final(call, call.sport or self.world.port)
        if call.kind is not Kind.TCP or call.port_known:
            return last
        first = self.final(call, 0)
        early = self.tied(self.packet(call, 0))
        if early and all(p.block for p in early):
            return {REFUSED}
        if call.dst.version == 4:
            return last | (first & {REFUSED})
        return first | (last if REFUSED in first else set())

    def final(self, call: Call, sport: int) -> set[str]:
        """Return the possible answers to a call whose last lookup uses this port."""
        packet = self.packet(call, sport)
        outcomes = [self.outcomes(p, packet) for p in self.tied(packet)]
        return set().union(*outcomes) if outcomes else {CLEAR}

    def tied(self, packet: Packet) -> list[Policy]:
        """Return the matching policies of the best priority; the kernel chooses the oldest."""
        matching = [
            p for p in self.world.policies
            if p.sel.src.version == packet.dst.version
            and selects(p.sel, packet)
            and not p.if_id
            and marked(packet.mark, p.mark)
        ]  # fmt: skip
        best = min((p.priority for p in matching), default=0)
        return [p for p in matching if p.priority == best]

    def outcomes(self, policy: Policy, packet: Packet) -> set[str]:
        """Return the possible answers to a packet under a policy."""
        if policy.block:
            return {REFUSED}
        found: set[str] = set()
        paths = [
            (False, packet.src, packet.dst)
        ]  # whether protected so far, and the ends of the last SA
        for tmpl in policy.tmpls:
            paths = [
                after
                for path in paths
                for after in self.after(path, tmpl, policy, packet, found)
            ]  # fmt: skip
        return found | {COVERED if protected else CLEAR for protected, _, _ in paths}

    def after(
        self, path: Path, tmpl: Tmpl, policy: Policy, packet: Packet, found: set[str]
    ) -> Iterator[Path]:
        """Yield the paths after a template; add a possible refusal to `found`."""
        protected, local, remote = path
        if tmpl.mode in (TUNNEL, BEET):
            assert tmpl.dst is not None
            local, remote = tmpl.src or self.source_for(tmpl.dst, 0), tmpl.dst
        has = self.has_state(tmpl, policy, local, remote, packet)
        if has is not Has.NO:
            yield protected or tmpl.proto in (ESP, AH), local, remote
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

    # --- why the gate may be stricter ------------------------------------------------------

    def reasons(self, call: Call) -> list[str]:
        """Return the documented limits that apply to this call, the most specific first."""
        return list(dict.fromkeys(self._reasons(call)))

    def _reasons(self, call: Call) -> Iterator[str]:
        packet = self.packet(call, call.sport or self.world.port)
        tied = self.tied(packet)
        each = [self.outcomes(p, packet) for p in tied]
        if call.mark and call.src is None:
            yield "source of a marked socket"
        if not call.port_known and self._asks_for_port(call):
            yield "source port not chosen yet"
        if any(p.sel.ifindex for p in self._near(call)):
            yield "policy for an interface"
        if len(set().union(*each)) > 1 and len(tied) > 1:
            yield "ties that disagree"
        elif len(tied) > 1:
            yield "ties, live in part"
        if {COVERED, REFUSED} <= set().union(*each) and len(tied) == 1:
            yield "state of another source, by the kernel's hash"
        for policy in tied:
            yield from self._of_policy(policy)

    def _of_policy(self, policy: Policy) -> Iterator[str]:
        if all(t.optional for t in policy.tmpls if t.proto in (ESP, AH)):
            yield "protected by an optional template"
        if any(t.mode in (TUNNEL, BEET) and t.src is None for t in policy.tmpls):
            yield "tunnel from any address"
        reqids = {t.reqid for t in policy.tmpls}
        states = [s for s in self.world.states if s.reqid in reqids]
        if any(is_any(s.src) for s in states):
            yield "state from any address"
        if any(not s.spi for s in states):
            yield "state with SPI 0"
        if len({(s.dst, s.spi, s.proto) for s in states}) < len(states):
            yield "states that share an SPI"
        if any(s.sel is not None and s.sel.ifindex for s in states):
            yield "state for an interface"

    def _near(self, call: Call) -> list[Policy]:
        """Return the policies whose networks match."""
        packet = self.packet(call, call.sport or self.world.port)
        return [
            p for p in self.world.policies
            if p.sel.src.version == packet.dst.version
            and packet.src in p.sel.src.network
            and packet.dst in p.sel.dst.network
        ]  # fmt: skip

    def _asks_for_port(self, call: Call) -> bool:
        near = self._near(call)
        reqids = {t.reqid for p in near for t in p.tmpls}
        return any(p.sel.sport[1] for p in near) or any(
            s.sel is not None and s.sel.sport[1] for s in self.world.states if s.reqid in reqids
        )
