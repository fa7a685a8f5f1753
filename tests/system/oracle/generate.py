"""Random worlds in a small universe, so that selectors overlap, nest and tie.

Most states are made to fit a template and a call; many of those are then altered in one field.
States that almost fit find wrong rules best.

One world in `WIDE_EVERY` is wide: hundreds of policies with prefixes of every length, so that the
hooks search hundreds of masks. Most prefixes there miss the calls by one bit.
"""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface
from random import Random
from typing import Any, TypeVar

from ipsecgate.core.model.flow import Address
from tests.system.oracle.caller import DEVICE
from tests.system.oracle.container import random_nat
from tests.system.oracle.topology import TUNNELS, Tunnel, random_routes
from tests.system.oracle.universe import FAR, INSIDE, LOCAL, NEAR, REMOTE
from tests.system.oracle.world import (
    AH,
    BEET,
    COMP,
    ESP,
    PORT_MASK,
    TRANSPORT,
    TUNNEL,
    Call,
    Interface,
    Kind,
    Life,
    Masked,
    Policy,
    Sel,
    State,
    Tmpl,
    World,
)

T = TypeVar("T")

SOURCES = {family: [*LOCAL[family], INSIDE[family]] for family in (4, 6)}

WIDTH = {4: 32, 6: 128}
BITS_LEFT = (None, None, None, 8, 8, 3, 3, 3, 2, 2, 1, 0)  # None: /0
DPORTS = (80, 81, 82, 83, 5300, 5301)
SPORTS = (40000, 40001, 40002, 40003, 5000, 5001)
EPHEMERAL = SPORTS[:4]
REQIDS = (0, 1, 1, 1, 2, 3)
PRIORITIES = (10, 20, 20, 30, 40, 50, 60)
MARKS: tuple[Masked, ...] = ((0, 0xFF), (5, 0xFF), (1, 1), (1, 3), (0, 3))
CALL_MARKS = (0, 1, 5, 0x105)
CALLS = 60
WIDE_EVERY, WIDE_CALLS = 16, 240
WIDE_POLICIES = (60, 300)


class Maker:
    """Makes the parts of one world.

    `device`: the index of the outgoing interface. `names`: of the devices that there are.
    `translates`: whether the host can translate a container's addresses.
    """

    def __init__(self, seed: int, device: int, names: list[str], translates: bool) -> None:
        self.seed = seed
        self.dice = Random(seed)
        self.device = device
        self.spis = iter(range(0x1000, 0x10000))
        self.wide_policies, self.miss = 0, 0.0
        self.reqids: tuple[int, ...] = REQIDS
        self.priorities: tuple[int, ...] = PRIORITIES
        self.names = names
        self.routes = random_routes(seed, names)
        self.nat = random_nat(seed) if translates else ()
        used = {route.device for route in self.routes}
        self.tunnels = [tunnel for tunnel in TUNNELS if tunnel.name in used]
        self.derived = self.chance(0.3)
        # Policies of one family overlap more often.
        self.families = self.one((4,), (4,), (6,), (4, 4, 4, 6, 6))

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def one(self, *choices: T) -> T:
        return self.dice.choice(choices)

    def family(self) -> int:
        return self.one(*self.families)

    def world(self) -> World:
        if self.seed % WIDE_EVERY == 0:
            self.widen()
        calls = tuple(self.call() for _ in range(WIDE_CALLS if self.wide_policies else CALLS))
        count = self.wide_policies or self.one(1, 2, 3, 4, 5, 6, 6, 7, 8, 9)
        policies = tuple(self.policy() for _ in range(count))
        states = [s for p in policies for t in p.tmpls for s in self.states_for(p, t, calls)]
        port = self.one(*EPHEMERAL)
        rest = (self.routes, self.nat, self.derived)
        return World(self.seed, policies, tuple(states), calls, port, *rest)

    def widen(self) -> None:
        """Make this a wide world. Reqids are spread: with few, each policy would have every SA."""
        self.wide_policies = self.dice.randint(*WIDE_POLICIES)
        self.reqids = tuple(range(1, self.wide_policies))
        self.priorities = tuple(range(10, 10 + 2 * self.wide_policies))
        self.miss = self.one(0.5, 0.7, 0.85)

    # --- calls ------------------------------------------------------------------------

    def call(self) -> Call:
        if self.chance(0.2):
            return self.call_inside()
        family = self.family()
        kind = self.one(*Kind)
        src = self.one(*LOCAL[family]) if self.chance(0.6) or kind is Kind.PKTINFO else None
        sport = self.one(*SPORTS) if self.chance(0.5) and kind is not Kind.PKTINFO else 0
        return Call(
            kind,
            self.one(*REMOTE[family]),
            self.one(*DPORTS),
            src,
            sport,
            mapped=family == 4 and kind is not Kind.PKTINFO and self.chance(0.35),
            late=src is not None and not sport and kind is not Kind.PKTINFO and self.chance(0.3),
            mark=self.one(*CALL_MARKS) if self.chance(0.15) else 0,
            # An IPv6 source in ancillary data must be an address of the device that is bound to.
            device=""
            if (kind is Kind.PKTINFO and family == 6) or self.chance(0.88)
            else self.one(*self.names),
        )

    def call_inside(self) -> Call:
        """Return a call in the container."""
        family = self.family()
        kind = self.one(Kind.TCP, Kind.UDP_CONNECT, Kind.SENDTO)
        return Call(
            kind,
            self.one(*REMOTE[family]),
            self.one(*DPORTS),
            self.one(None, None, INSIDE[family]),
            self.one(0, 0, *SPORTS),
            mark=5 if self.chance(0.05) else 0,
            device=DEVICE if self.chance(0.1) else "",
            inside=True,
        )

    # --- policies ---------------------------------------------------------------------

    def prefix(self, pool: dict[int, list[Address]], family: int) -> Interface:
        address = self.one(*pool[family])
        if self.wide_policies:
            bits = self.dice.randint(0, WIDTH[family])
            if bits and self.chance(self.miss):
                address = type(address)(
                    int(address) ^ 1 << WIDTH[family] - self.dice.randint(1, bits)
                )
        else:
            left = self.one(*BITS_LEFT)
            bits = 0 if left is None else WIDTH[family] - left
        network = ip_interface(f"{address}/{bits}")
        return network if self.chance(0.05) else ip_interface(network.network)

    def port(self, pool: tuple[int, ...], likely: float) -> Masked:
        if not self.chance(likely):
            return 0, 0
        mask = self.one(PORT_MASK, PORT_MASK, 0xFFFE, 0xFFF8, 0xFF00, 0x0001, 0x8003)
        port = self.one(*pool)
        return (port if self.chance(0.1) else port & mask), mask

    def selector(self, family: int) -> Sel:
        return Sel(
            self.prefix(SOURCES, family),
            self.prefix(REMOTE, family),
            self.one(*[0] * 8, 6, 17, 17, 1),
            self.port(SPORTS, 0.12),
            self.port(DPORTS, 0.15),
            self.one(self.device, 1) if self.chance(0.03) else 0,
        )

    def policy(self) -> Policy:
        family = self.family()
        block, through = self.chance(0.1), self.chance(0.25 if self.derived else 0.12)
        tunnel = self.one(*self.tunnels) if self.tunnels and self.chance(0.6) else None
        templates = () if through else self.templates(family, tunnel)
        mark = self.one(*MARKS) if self.chance(0.1) else (0, 0)
        if_id = self.one(7, 9) if self.chance(0.04) else 0
        if tunnel and self.chance(0.9):
            mark = self.one((5, 0xFF), (1, 1), (tunnel.mark, 2**32 - 1)) if tunnel.mark else mark
            if_id = tunnel.if_id
        return Policy(
            self.selector(family), self.one(*self.priorities), block, templates, mark, if_id
        )

    def templates(self, family: int, tunnel: Tunnel | None) -> tuple[Tmpl, ...]:
        if tunnel and self.chance(0.6):
            return (self.template_for(tunnel),)
        found = []
        for _ in range(self.one(1, 1, 1, 1, 1, 1, 2, 2, 3)):
            found.append(self.template(family))
            family = found[-1].family
        return tuple(found)

    def template_for(self, tunnel: Tunnel) -> Tmpl:
        """Return a template that suits a tunnel device, mostly."""
        family = tunnel.near.version if tunnel.near else self.family()
        near, far = tunnel.near or self.one(*NEAR[family]), tunnel.far
        if far is None or self.chance(0.1):
            far = self.one(*FAR[family])
        return Tmpl(TUNNEL, self.one(*self.reqids), family, src=near, dst=far)

    def template(self, family: int) -> Tmpl:
        mode = self.one(TUNNEL, TUNNEL, TUNNEL, TRANSPORT, TRANSPORT, TRANSPORT, BEET)
        # BEET mode between families is broken: Linux 6.1 sends two bytes of AH, and panics in
        # esp6_output_tail() if a tunnel comes first.
        proto = ESP if mode == BEET else self.one(*[ESP] * 8, AH, AH, COMP)
        spi = next(self.spis) if self.chance(0.12) else 0
        if mode == TRANSPORT:
            src = self.one(*LOCAL[family]) if self.chance(0.2) else None
            dst = self.one(*REMOTE[family]) if self.chance(0.2) else None
            use = self.chance(0.2)
            return Tmpl(mode, self.one(*self.reqids), family, proto, spi, src, dst, use)
        outer = 10 - family if self.chance(0.15) and mode != BEET else family
        near = None if self.chance(0.06) else self.one(*NEAR[outer])
        return Tmpl(mode, self.one(*self.reqids), outer, proto, spi, near, self.one(*FAR[outer]))

    # --- states -----------------------------------------------------------------------

    def states_for(self, policy: Policy, tmpl: Tmpl, calls: tuple[Call, ...]) -> list[State]:
        return [
            self.spoilt(self.fitting(policy, tmpl, calls)) if self.chance(0.35)
            else self.fitting(policy, tmpl, calls)
            for _ in range(self.one(0, 1, 1, 2, 2, 3, 3))
        ]  # fmt: skip

    def fitting(self, policy: Policy, tmpl: Tmpl, calls: tuple[Call, ...]) -> State:
        src, dst = tmpl.src or self.one(*NEAR[tmpl.family]), tmpl.dst
        outer = [t for t in policy.tmpls[: policy.tmpls.index(tmpl)] if t.mode != TRANSPORT]
        if tmpl.mode == TRANSPORT and outer and self.chance(0.7):
            src, dst = outer[-1].src or self.one(*NEAR[tmpl.family]), outer[-1].dst
        elif tmpl.mode == TRANSPORT:
            within = [
                c for c in calls
                if c.dst.version == tmpl.family and c.dst in policy.sel.dst.network
            ]  # fmt: skip
            call = self.one(*within) if within else None
            src = (call and call.src) or self.one(*SOURCES[tmpl.family])
            dst = call.dst if call else self.one(*REMOTE[tmpl.family])
        assert dst is not None
        mark = self.one((0, 0), (0, 0), policy.mark, (0, policy.mark[1]))
        sel = None
        unspec = tmpl.mode == TUNNEL and self.chance(0.3)
        if not unspec and (self.chance(0.15) or policy.sel.src.version != dst.version):
            sel = self.wide(policy.sel.src.version)
        spi = tmpl.spi or next(self.spis)
        return State(
            *(src, dst, spi, tmpl.reqid, tmpl.mode, tmpl.proto, sel, unspec, mark),
            if_id=policy.if_id if self.chance(0.8) else 0,
            life=Life.DYING if self.chance(0.03) else Life.VALID,
            encap=tmpl.proto == ESP and tmpl.mode != BEET and self.chance(0.05),
        )

    def wide(self, family: int) -> Sel:
        everything = ip_interface("0.0.0.0/0" if family == 4 else "::/0")
        return Sel(everything, everything)

    def spoilt(self, one: State) -> State:
        family = one.dst.version
        others: dict[str, Any] = {
            "reqid": self.one(*self.reqids),
            "mode": self.one(TRANSPORT, TUNNEL, BEET),
            "proto": self.one(ESP, AH),
            "spi": 0 if self.chance(0.1) else next(self.spis),
            "life": self.one(Life.LARVAL, Life.LARVAL, Life.EXPIRED),
            "mark": self.one(*MARKS),
            "if_id": self.one(7, 9),
            "src": ip_address("0.0.0.0" if family == 4 else "::")
            if self.chance(0.3) else self.one(*NEAR[family], *LOCAL[family]),
            "dst": self.one(*FAR[family], *REMOTE[family]),
        }  # fmt: skip
        name = self.one(*others, "life", "sel", "sel", "sel")
        if name == "sel":
            sel = self.selector(self.family())
            if self.chance(0.2):
                sel = replace(sel, ifindex=self.one(self.device, 1))
            if self.chance(0.25):  # low ports, or only those of the first SPD lookup
                sport = self.one(self.port(SPORTS, 1), (0, 0x8000), (0, PORT_MASK))
                sel = replace(self.wide(one.dst.version), sport=sport)
            return replace(one, sel=sel, unspec=False)
        # UDP encapsulation fits only an ESP state that is not altered.
        return replace(one, **{name: others[name]}, encap=False)


def world(seed: int, device: int, names: list[str], translates: bool) -> World:
    """Return the world of a seed."""
    return Maker(seed, device, names, translates).world()
