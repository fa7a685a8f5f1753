"""A small SPD and SAD that change at random, in which everything overlaps."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random

from ipsecgate.core.model.events import (
    IkeEvent,
    KernelSnapshot,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    XfrmEvent,
)
from ipsecgate.core.model.flow import TCP, UDP, Flow, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    ChildName,
    ChildSa,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.rule_table import RuleTable

LOCAL = ip_address("192.0.2.1")
PEERS = [ip_address(f"192.0.2.{n}") for n in (2, 3)]
NEAR, FAR = ip_address("10.1.0.0"), ip_address("10.2.0.0")


class World:
    """Draws notifications about a small SPD and SAD, in which all overlap and share reqids."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.state = KernelState()
        self.state.ike_connected(())
        self.rules = RuleTable(lambda _rules: ())

    def selector(self) -> Selector:
        near, far = (
            ip_network(
                f"{base + self.random.randrange(8)}/{self.random.choice(bits)}", strict=False
            )
            for base, bits in ((NEAR, (16, 29, 32)), (FAR, (16, 29, 30, 32)))
        )
        proto = self.random.choice((0, 0, TCP, UDP))
        port = self.random.choice((0, 0, 80)) if proto else 0
        sport = self.random.choice((0, 0, 0, 40000)) if proto else 0
        return Selector(
            near, far, proto=proto, sport=sport, sport_mask=0xFFFF * bool(sport),
            dport=port, dport_mask=0xFFFF * bool(port),
        )  # fmt: skip

    def policy(self) -> SpdEntry:
        peer, reqid = self.random.choice(PEERS), self.random.randrange(1, 4)
        spi = self.random.choice((0, 0, 0x1000, 0x1001))
        template = Template(ESP, Mode.TUNNEL, reqid=reqid, saddr=LOCAL, daddr=peer, spi=spi)
        action = self.random.choice((Action.PROTECT, Action.PROTECT, Action.BYPASS))
        templates = (template,) if action is Action.PROTECT else ()
        priority = self.random.choice((100, 100, 200, 300))
        mark = self.random.choice((Mark(), Mark(), Mark(5, 0xFF)))
        return SpdEntry(SpdKey(self.selector(), mark), priority, action, templates)

    def sa(self) -> Sa:
        spi = self.random.choice((0x1000, 0x1001, 0x1002))
        return Sa(
            SaId(self.random.choice(PEERS), spi, ESP),
            LOCAL,
            reqid=self.random.randrange(1, 4),
            mode=Mode.TUNNEL,
            hard_lifetime=self.random.choice((None, 100, 200)),
        )

    def child(self) -> ChildSa:
        sa = self.sa()
        near, far = (
            TrafficSelector(ip_network(f"{base}/{self.random.choice((16, 29))}"))
            for base in (NEAR, FAR)
        )
        return ChildSa(
            ChildName("ike", "child"), sa.reqid, 1, sa.id.spi, sa.id.daddr, (near,), (far,)
        )

    def event(self) -> XfrmEvent | IkeEvent | KernelSnapshot | ChildSa | None:
        known = list(self.state.policies)
        sas = list(self.state.sas)
        match self.random.randrange(12):
            case 0 | 1 | 2 | 3:
                return PolicySet(self.policy())
            case 4 | 5 if known:
                return PolicyGone(self.random.choice(known))
            case 6 | 7 | 8:
                return SaSet(self.sa())
            case 9 if sas:
                return SaGone(self.random.choice(sas))
            case 10:
                return self.child()
            case 11 if self.random.random() < 0.2:
                some = [self.random.choice((sa, self.sa())) for sa in self.state.sas.values()]
                return KernelSnapshot(
                    tuple(self.state.policies.values())[::2],
                    tuple({sa.id: sa for sa in some}.values()),
                )
        return None

    def apply(self, event: XfrmEvent | IkeEvent | KernelSnapshot | ChildSa | None) -> None:
        """Apply what `event` drew; None sometimes restarts the daemon, with no CHILD_SA."""
        match event:
            case None:
                if self.random.random() < 0.1:
                    self.state.ike_gone()
                    self.state.ike_connected(())
            case ChildSa() as child:
                self.state.child_up(child)
            case KernelSnapshot() as snapshot:
                self.state.replace(snapshot)
            case PolicySet() | PolicyGone() | SaSet() | SaGone():
                self.state.apply(event)

    def take(self, limit: int) -> None:
        for owner, rules in self.state.changed_rules(limit):
            self.rules.assign(owner, rules)

    def flow(self) -> Flow:
        return Flow(
            FAR + self.random.randrange(10),
            self.random.choice((TCP, UDP)),
            self.random.choice((80, 81)),
            NEAR + self.random.randrange(10),
            self.random.choice((0, 40000, 40001)),
            self.random.choice((0, 0, 5)),
        )
