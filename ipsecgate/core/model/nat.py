"""The rules by which netfilter translates addresses, in a form that nftables and iptables share.

A rule is a short program over registers. Each expression may end it without a match; a verdict or a
translation ends it with one. Registers are numbered from 0, 4 bytes each, and a longer value fills
several. Values are in the byte order in which netfilter compares them.

An expression that is not understood becomes `Unclear`: it may match or not.

Source: nf_tables(8): "expressions"; net/netfilter/nf_tables_core.c: nft_do_chain().
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum, IntEnum

from ipsecgate.core.model.flow import PORT_MASK, Address
from ipsecgate.core.model.value import value


class Hook(IntEnum):
    """NF_INET_* of linux/netfilter.h."""

    PREROUTING = 0
    INPUT = 1
    FORWARD = 2
    OUTPUT = 3
    POSTROUTING = 4


class AddressType(IntEnum):
    """RTN_* of linux/rtnetlink.h: what the routing tables say of an address."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    MULTICAST = 5


@value
class Device:
    """A network device. `group` None: unknown."""

    index: int
    name: str
    group: int | None = None


@value
class Packet:
    """The first packet of a connection, as a NAT rule sees it.

    None is unknown, and so are protocol 0 and port 0. Of the destination only the first `bits` are
    known (None: all), so a packet may stand for all those to a network. `local`: a process of this
    network namespace sends it; otherwise it came in through `iif` and is forwarded. `ipsec`: the
    kernel's policy for it asks for ESP or AH, and the SA exists. `masquerade`: the address that
    MASQUERADE would use, that of the output device.
    Source: inet_select_addr(), ipv6_dev_get_saddr().
    """

    daddr: Address
    proto: int = 0
    saddr: Address | None = None
    sport: int = 0
    dport: int = 0
    bits: int | None = None
    local: bool = True
    iif: Device | None = None
    oif: Device | None = None
    mark: int | None = 0
    ipsec: bool | None = None
    saddr_type: AddressType | None = None
    daddr_type: AddressType | None = None
    masquerade: Address | None = None


@value
class Translation:
    """What one end of a connection may become: an address in a range, a port in a range.

    `ports` is (0, 65535) where netfilter may choose any. `mark`: the packet's, afterwards; None:
    unknown. `rule` says which rule does it; "" if no rule does, and the end stays as it is.
    """

    low: Address
    high: Address
    ports: tuple[int, int] = (0, PORT_MASK)
    mark: int | None = 0
    rule: str = field(default="", compare=False)


@value
class Service:
    """Flows to an address and a range of ports that the host's NAT rules lead to backends.

    `backends`: every possible one, with its port; 0: the flow's own. `rule` says which rules do it.
    """

    daddr: Address
    proto: int
    ports: tuple[int, int]
    backends: tuple[tuple[Address, int], ...]
    rule: str = field(default="", compare=False)


# --- expressions ---------------------------------------------------------------------------------


class Field(Enum):
    """What a rule can load from a packet."""

    NETWORK = "network header"
    TRANSPORT = "transport header"
    PROTO = "l4proto"
    NFPROTO = "nfproto"
    ETHERTYPE = "protocol"
    MARK = "mark"
    IIF = "iif"
    OIF = "oif"
    IIF_NAME = "iifname"
    OIF_NAME = "oifname"
    IIF_GROUP = "iifgroup"
    OIF_GROUP = "oifgroup"
    STATE = "ct state"
    IPSEC = "rt ipsec"
    SECPATH = "meta secpath"
    SADDR_TYPE = "type of the source"
    DADDR_TYPE = "type of the destination"


@value
class Load:
    """Load `size` bytes of a field, from its byte `at` on."""

    to: int
    source: Field
    size: int
    at: int = 0


@value
class Constant:
    """Load a constant."""

    to: int
    data: bytes


@value
class Choice:
    """Load one of several constants of one size, nobody knows which."""

    to: int
    values: tuple[bytes, ...]


@value
class Bits:
    """to = (from & mask) ^ xor, all of the mask's length."""

    to: int
    register: int
    mask: bytes
    xor: bytes


@value
class Swap:
    """Reverse the bytes of each unit of `unit` bytes."""

    to: int
    register: int
    size: int
    unit: int


@value
class Within:
    """Match if a value, as a big-endian number, is in one of the ranges; inverted, if in none."""

    register: int
    size: int
    ranges: tuple[tuple[int, int], ...]
    invert: bool = False


@value
class Lookup:
    """Match if the value is in a set of the table; `to` receives what the set maps it to.

    `verdict`: it maps it to a verdict, which applies.
    """

    set: str
    register: int
    to: int | None = None
    invert: bool = False
    verdict: bool = False


@value
class SetMark:
    """Set the packet's mark; None: to something unknown."""

    register: int | None


@value
class Untrack:
    """The packet's connection is not tracked, so nothing translates it."""


@value
class Unclear:
    """An expression that may match or not, and after which no register is known."""

    what: str


class Code(IntEnum):
    """NF_* and NFT_* verdicts of linux/netfilter.h and nf_tables.h."""

    DROP = 0
    ACCEPT = 1
    QUEUE = 3
    CONTINUE = -1
    BREAK = -2
    JUMP = -3
    GOTO = -4
    RETURN = -5


@value
class Verdict:
    """A verdict; `chain` for JUMP and GOTO."""

    code: Code
    chain: str = ""


class Kind(Enum):
    """The kinds of translation."""

    SNAT = "snat"
    DNAT = "dnat"
    MASQUERADE = "masquerade"
    REDIRECT = "redirect"
    REWRITE = "rewrite"  # of the header, in no way that is modelled


@value
class Translate:
    """Translate. `addresses` and `ports` are registers of the range's ends; None: unchanged."""

    kind: Kind
    addresses: tuple[int, int] | None = None
    ports: tuple[int, int] | None = None


@value
class Anything:
    """An unknown target, which may do anything to the packet."""

    what: str


Expression = (
    Load
    | Constant
    | Choice
    | Bits
    | Swap
    | Within
    | Lookup
    | SetMark
    | Untrack
    | Unclear
    | Verdict
    | Translate
    | Anything
)


@value
class Rule:
    """A rule; `label` names it to the operator."""

    expressions: tuple[Expression, ...]
    label: str = field(default="", compare=False)


@value
class Element:
    """The elements of a set whose keys lie in [low, high], and what they map to.

    Of a key that is a concatenation, each field lies in its own range: `widths` are their lengths.
    """

    low: bytes
    high: bytes
    data: bytes | Verdict | None = None
    widths: tuple[int, ...] = ()


@value
class Set:
    """A set or a map with keys of `size` bytes; the first element that matches counts.

    `elements` None: they are not understood, or change by themselves.
    """

    size: int
    elements: tuple[Element, ...] | None = None


TableName = tuple[int, str]
"""Family (NFPROTO_*) and name of a table."""
ChainName = tuple[TableName, str]
"""The table and the name of a chain."""
SetName = tuple[TableName, str]
"""The table and the name of a set."""


@value
class BaseChain:
    """A chain that netfilter calls: the lowest priority first.

    `nat`: of type nat, so it sees the first packet of a connection only.
    """

    table: TableName
    name: str
    hook: Hook
    priority: int
    nat: bool
    drops: bool = False  # its policy


@value
class Ruleset:
    """All rules of a network namespace that can matter to the translation of addresses."""

    bases: tuple[BaseChain, ...] = ()
    chains: dict[ChainName, tuple[Rule, ...]] = field(default_factory=dict, hash=False)
    sets: dict[SetName, Set] = field(default_factory=dict, hash=False)

    @property
    def translates(self) -> bool:
        """Tell whether any rule may translate addresses."""
        return any(base.nat for base in self.bases)
