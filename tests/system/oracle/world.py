"""The oracle's types: policies, states and calls, printed in the syntax of ip(8).

Addresses of a selector keep the bits beyond their prefix, as the kernel does. A `None` address
is the wildcard. Everything is host order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Interface, IPv6Interface

from ipsecgate.core.model.flow import PROTOCOL_NAMES, Address, Network

Interface = IPv4Interface | IPv6Interface

ESP, AH, COMP = 50, 51, 108
TRANSPORT, TUNNEL, BEET = 0, 1, 4
PROTO_NAMES = {ESP: "esp", AH: "ah", COMP: "comp"}
MODE_NAMES = {TRANSPORT: "transport", TUNNEL: "tunnel", BEET: "beet"}
PORT_MASK = 0xFFFF
Masked = tuple[int, int]  # a port or a mark: (value, mask)


def _masked(name: str, masked: Masked) -> str:
    value, mask = masked
    return f" {name} {value}/{mask:#x}" if mask or value else ""


@dataclass(frozen=True, slots=True)
class Sel:
    """struct xfrm_selector."""

    src: Interface
    dst: Interface
    proto: int = 0
    sport: Masked = (0, 0)
    dport: Masked = (0, 0)
    ifindex: int = 0

    def __str__(self) -> str:
        ports = _masked("sport", self.sport) + _masked("dport", self.dport)
        proto = f" proto {PROTOCOL_NAMES[self.proto]}" if self.proto else ""
        dev = f" dev #{self.ifindex}" if self.ifindex else ""
        return f"src {self.src} dst {self.dst}{proto}{ports}{dev}"


@dataclass(frozen=True, slots=True)
class Tmpl:
    """struct xfrm_user_tmpl; `family` is that of the SA's addresses."""

    mode: int
    reqid: int
    family: int
    proto: int = ESP
    spi: int = 0
    src: Address | None = None
    dst: Address | None = None
    optional: bool = False

    def __str__(self) -> str:
        src, dst = (address or "any" for address in (self.src, self.dst))
        spi = f" spi {self.spi:#x}" if self.spi else ""
        level = " level use" if self.optional else ""
        name, mode = PROTO_NAMES[self.proto], MODE_NAMES[self.mode]
        return f"tmpl src {src} dst {dst} proto {name}{spi} reqid {self.reqid} mode {mode}{level}"


@dataclass(frozen=True, slots=True)
class Policy:
    """An outbound policy; without `block` and `tmpls` it is a bypass."""

    sel: Sel
    priority: int
    block: bool = False
    tmpls: tuple[Tmpl, ...] = ()
    mark: Masked = (0, 0)
    if_id: int = 0

    def __str__(self) -> str:
        words = [f"policy {self.sel} priority {self.priority}{_masked('mark', self.mark)}"]
        words += [f"if_id {self.if_id}"] if self.if_id else []
        words += ["action block"] if self.block else []
        return " ".join([*words, *map(str, self.tmpls)])


class Life(Enum):
    """The stage of a state's lifetime."""

    VALID = "valid"
    LARVAL = "larval"  # made by XFRM_MSG_ALLOCSPI
    EXPIRED = "expired"  # by XFRM_MSG_EXPIRE, hard: it is gone
    DYING = "dying"  # past its soft limit


@dataclass(frozen=True, slots=True)
class State:
    """A state. `sel` None and not `unspec`: the kernel gives it the addresses' family.

    `encap`: ESP in UDP port 4500.
    """

    src: Address
    dst: Address
    spi: int
    reqid: int
    mode: int
    proto: int = ESP
    sel: Sel | None = None
    unspec: bool = False
    mark: Masked = (0, 0)
    if_id: int = 0
    life: Life = Life.VALID
    encap: bool = False

    def __str__(self) -> str:
        words = [f"state src {self.src} dst {self.dst} proto {PROTO_NAMES[self.proto]}"]
        words += [f"spi {self.spi:#x} reqid {self.reqid} mode {MODE_NAMES[self.mode]}"]
        words += [f"({self.life.value})"] if self.life is not Life.VALID else []
        words += ["flag af-unspec"] if self.unspec else []
        words += [f"sel {self.sel}"] if self.sel else []
        words += [_masked("mark", self.mark).strip()] if self.mark != (0, 0) else []
        words += [f"if_id {self.if_id}"] if self.if_id else []
        words += ["encap espinudp"] if self.encap else []
        return " ".join(words)


class Kind(Enum):
    """How a call is made."""

    TCP = "tcp"
    UDP_CONNECT = "udp connect"
    SENDTO = "sendto"
    PKTINFO = "pktinfo"  # sendmsg() with the source as ancillary data


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `src` None and `sport` 0: the kernel chooses.

    `mapped`: from an IPv6 socket, to ::ffff:a.b.c.d. `late`: the address is bound, the port
    left to connect() (IP_BIND_ADDRESS_NO_PORT). `mark`: SO_MARK. `device`: SO_BINDTODEVICE.
    `inside`: in the container.
    """

    kind: Kind
    dst: Address
    dport: int
    src: Address | None = None
    sport: int = 0
    mapped: bool = False
    late: bool = False
    mark: int = 0
    device: str = ""
    inside: bool = False

    @property
    def proto(self) -> int:
        """TCP or UDP."""
        return 6 if self.kind is Kind.TCP else 17

    @property
    def port_known(self) -> bool:
        """Return whether the socket has a source port when the hook sees it."""
        if self.sport or self.kind in (Kind.SENDTO, Kind.PKTINFO):
            return True
        return self.src is not None and not self.late

    def __str__(self) -> str:
        source = f" from {self.src or 'any'}:{self.sport}" if self.src or self.sport else ""
        extra = " (v4-mapped)" * self.mapped + " (late port)" * self.late
        mark = f" mark {self.mark}" if self.mark else ""
        mark += f" dev {self.device}" if self.device else ""
        mark += " in the container" * self.inside
        return f"{self.kind.value} to {self.dst} port {self.dport}{source}{mark}{extra}"


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a world. `device` "": unreachable. `table`: of the routing policy database."""

    network: Network
    device: str
    src: Address | None
    table: int

    def __str__(self) -> str:
        if not self.device:
            return f"route unreachable {self.network} table {self.table}"
        src = f" src {self.src}" if self.src else ""
        return f"route {self.network} dev {self.device}{src} table {self.table}"


@dataclass(frozen=True, slots=True)
class Nat:
    """A rule that gives the container's packets another source, printed as iptables(8) has it.

    `network`: only of packets to it. `to` None: masquerade. `unprotected`: only of packets that
    IPsec does not protect.
    """

    source: Address
    network: Network | None
    to: Address | None
    unprotected: bool

    @property
    def family(self) -> int:
        return self.source.version

    def __str__(self) -> str:
        to = f" -d {self.network}" if self.network else ""
        policy = " -m policy --dir out --pol none" if self.unprotected else ""
        target = f"SNAT --to-source {self.to}" if self.to else "MASQUERADE"
        return f"-s {self.source}{to} -o eth0{policy} -j {target}"


@dataclass(frozen=True, slots=True)
class World:
    """One test case. `port`: the source port that the kernel assigns to unbound sockets.

    `derived`: the gate's policies are derived from connections, so exceptions in the SPD count.
    """

    seed: int
    policies: tuple[Policy, ...]
    states: tuple[State, ...]
    calls: tuple[Call, ...] = field(repr=False)
    port: int = 40000
    routes: tuple[Route, ...] = ()
    nat: tuple[Nat, ...] = ()
    derived: bool = False

    def __str__(self) -> str:
        head = ["derived policies"] if self.derived else []
        return "\n".join(map(str, (*head, *self.routes, *self.nat, *self.policies, *self.states)))
