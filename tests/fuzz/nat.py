"""Decoders of the kernel's NAT rules, and the evaluator that is fed with them."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from random import Random
from typing import Any

from ipsecgate.core.codec import iptables, netlink, nftables
from ipsecgate.core.model.flow import TCP
from ipsecgate.core.model.nat import (
    BaseChain,
    Code,
    Device,
    Field,
    Hook,
    Kind,
    Load,
    Packet,
    Rule,
    Ruleset,
    Set,
    Translate,
    Verdict,
    Within,
)
from ipsecgate.core.nat.mentions import Mentions
from ipsecgate.core.nat.translation import Nat
from tests import nat_rules
from tests.fuzz.engine import Target
from tests.unit import xfrm_bytes as raw

PACKET = Packet(
    ip_address("10.2.0.9"), TCP, ip_address("10.1.0.5"), 0, 443, oif=Device(2, "eth0"),
    masquerade=ip_address("192.0.2.1"),
)  # fmt: skip
TABLE = (2, "nat")
KINDS = (nftables.NEWCHAIN, nftables.NEWRULE, nftables.NEWSET, nftables.NEWSETELEM)


def evaluate(ruleset: Ruleset) -> None:
    """Ask the evaluator about a packet: whatever the rules are, it answers."""
    nat = Nat(ruleset)
    nat.destinations(PACKET)
    nat.sources(PACKET)
    for hook in (Hook.OUTPUT, Hook.POSTROUTING):
        found = Mentions(ruleset, hook, 4)
        assert found.networks is None or found.services is not None


def number(kind: int, value: int) -> bytes:
    return raw.attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def text(kind: int, value: str) -> bytes:
    return raw.attribute(kind, value.encode() + b"\0")


def expression(name: str, data: bytes) -> bytes:
    return raw.attribute(1, text(1, name) + raw.attribute(2, data))


def message(kind: int, body: bytes) -> bytes:
    return raw.message(kind, struct.pack("=BBH", 2, 0, 0) + body)


class Nftables(Target):
    """Chains, rules, sets and elements of nftables."""

    name = "nftables"
    refusals = (netlink.DecodeError,)
    words = (
        *(b"masq\0", b"nat\0", b"lookup\0", b"immediate\0", b"match\0", b"target\0", b"bitwise\0"),
        *(struct.pack("=H", kind) for kind in KINDS),
    )

    def __init__(self) -> None:
        self._kept = [
            datagram
            for parts in nat_rules.recorded().values()
            for kind, datagrams in parts.items()
            if kind != "legacy"
            for datagram in datagrams
        ]

    def real(self, random: Random) -> tuple[bytes, Any]:
        match random.randrange(3):
            case 0:
                hook, priority = random.choice(list(Hook)), random.choice((-100, 0, 100))
                kind, drops = random.choice(("nat", "filter")), random.random() < 0.5
                body = text(1, "nat") + text(3, "c") + text(7, kind) + number(5, int(not drops))
                body += raw.attribute(4, number(1, hook) + number(2, priority))
                base = BaseChain(TABLE, "c", hook, priority, kind == "nat", drops)
                return message(nftables.NEWCHAIN, body), ([base], [], [], [])
            case 1:
                return self._rule(random)
        flags, size = random.choice((0, 4, 8)), random.choice((2, 4, 16))
        body = text(1, "nat") + text(2, "s") + number(3, flags) + number(5, size)
        header = nftables.SetHeader((TABLE, "s"), flags, size)
        return message(nftables.NEWSET, body), ([], [], [header], [])

    def _rule(self, random: Random) -> tuple[bytes, Any]:
        port, handle = random.randrange(65536), random.randrange(1, 1 << 32)
        data = raw.attribute(1, struct.pack(">H", port))
        loaded = number(1, 8) + number(2, 2) + number(3, 2) + number(4, 2)
        compared = number(1, 8) + number(2, 0) + raw.attribute(3, data)
        meant: tuple[Any, ...] = (Load(0, Field.TRANSPORT, 2, 2), Within(0, 2, ((port, port),)))
        listed = expression("payload", loaded) + expression("cmp", compared)
        if random.random() < 0.5:
            listed += expression("masq", b"")
            meant = (*meant, Translate(Kind.MASQUERADE))
        else:
            verdict = raw.attribute(2, number(1, Code.JUMP) + text(2, "other"))
            listed += expression("immediate", number(1, 0) + raw.attribute(2, verdict))
            meant = (*meant, Verdict(Code.JUMP, "other"))
        body = text(1, "nat") + text(2, "c") + raw.attribute(3, struct.pack(">Q", handle))
        body += raw.attribute(4, listed)
        return message(nftables.NEWRULE, body), ([], [((TABLE, "c"), Rule(meant))], [], [])

    def damaged(self, random: Random) -> bytes:
        if random.random() < 0.5:
            return random.choice(self._kept)
        return self.real(random)[0]

    def feed(self, data: bytes) -> Any:
        bases = list(nftables.decode_bases(data))
        rules = list(nftables.decode_rules(data))
        headers = list(nftables.decode_sets(data))
        items = list(nftables.decode_elements(data))
        list(nftables.decode_generation(data))
        list(nftables.decode_dormant(data))
        sets = {one.name: Set(one.size, nftables.elements_of(one, items)) for one in headers}
        chains: dict[Any, list[Rule]] = {}
        for name, rule in rules:
            chains.setdefault(name, []).append(rule)
        also = {BaseChain(table, chain, Hook.POSTROUTING, 100, nat=True) for table, chain in chains}
        made = {name: tuple(its) for name, its in chains.items()}
        evaluate(Ruleset((*bases, *also), made, sets))
        return bases, rules, headers, items


class Iptables(Target):
    """A table of iptables-legacy."""

    name = "iptables"
    refusals = (iptables.TableError,)
    words = (b"MASQUERADE\0", b"DNAT\0", b"ERROR\0", b"conntrack\0", b"policy\0", b"multiport\0",
             struct.pack("=i", -2), struct.pack("=i", -5))  # fmt: skip

    def __init__(self) -> None:
        self._kept = [parts["legacy"] for parts in nat_rules.recorded().values()
                      if "legacy" in parts]  # fmt: skip

    def real(self, random: Random) -> tuple[bytes, Any]:
        counts, blob, starts = [random.randrange(4) for _ in range(4)], b"", []
        for count in counts:
            starts.append(len(blob))
            for _ in range(count):
                blob += _entry(random.choice((-1, -2, -5)))
            blob += _entry(-2)
        blob += _entry(0, b"ERROR")
        info = iptables.INFO.pack(b"nat", 0b11011, starts[0], starts[1], 0, starts[2], starts[3],
                                  *[0] * 5, 1, len(blob))  # fmt: skip
        return info + blob, sorted(count + 1 for count in counts)

    def damaged(self, random: Random) -> bytes:
        if random.random() < 0.5:
            return b"".join(random.choice(self._kept))
        return self.real(random)[0]

    def feed(self, data: bytes) -> Any:
        info = iptables.decode_info(data[: iptables.INFO.size])
        found = iptables.decode_table("nat", 4, info, data[iptables.INFO.size :])
        evaluate(found)
        return sorted(len(rules) for rules in found.chains.values())


def _entry(verdict: int, name: bytes = b"") -> bytes:
    """Return struct ipt_entry that matches everything, with a standard target or an error's."""
    data = struct.pack("=i4x", verdict) if not name else b"end".ljust(32, b"\0")
    target = struct.pack("=H29sB", 32 + len(data), name, 0) + data
    size = 112
    head = bytes(84) + struct.pack("=IHHI", 0, size, size + len(target), 0) + bytes(16)
    return head + target
