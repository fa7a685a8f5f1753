"""Input from strongSwan: VICI packets, and the meaning of their messages."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

from vici.protocol import Message

from ipsecgate.core.codec import vici as meaning
from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.codec.vici_wire import parse
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa, Mode
from ipsecgate.edges.strongswan.events import LogLine, log_line
from ipsecgate.edges.strongswan.vici import refusal
from tests.fuzz import fed_gate as gates
from tests.fuzz.engine import Target, mutate_tree
from tests.unit.vici_messages import NAMES

EVENT, RESPONSE = 7, 1
SELECTORS = (
    ("10.2.0.0/16", "10.2.0.0/16", 0, (0, 65535)),
    ("192.0.2.2/32[tcp/https]", "192.0.2.2/32", 6, (443, 443)),
    ("192.0.2.2/32[udp/5300-5307]", "192.0.2.2/32", 17, (5300, 5307)),
    ("10.0.0.0/8[17]", "10.0.0.0/8", 17, (0, 65535)),
    ("10.0.0.0/8[tcp/OPAQUE]", "10.0.0.0/8", 6, (65535, 0)),
    ("10.0.0.0/8[icmp/3(4)]", "10.0.0.0/8", 1, (0x304, 0x304)),
    ("::/0[ipv6-icmp/1-4(255)]", "::/0", 58, (0x100, 0x4FF)),
    ("2001:db8::..2001:db8::3[tcp]", "2001:db8::/126", 6, (0, 65535)),
)
TEXTS = (
    b"", b"0", b"-1", b"65535", b"65536", b"99999999999999999999", b"9" * 5000, b"dynamic", b"\xff",
    b"10.2.0.0/16[tcp/90-80]", b"10.2.0.0/16[999]", b"10.0.0.1..10.0.0.0", b"::1%x", b"[", b"\0",
    b"10.2.0.0/16[tcp/70000]", b"10.0.0.0/8[icmp/999(9)]", b"0x10", b"1_0", b"INSTALLED",
    b"::ffff:10.0.0.0/104", b"10.0.0.1..2001:db8::1", b"yes", b"\xc2\xb2",
)  # fmt: skip
# Valid and invalid elements for any place in a message.
OTHERS: tuple[Any, ...] = (*TEXTS, [b""], [b"x", b"dynamic"], {}, {"x": {}}, {"x": b""}, [])


def pack(kind: int, name: str, message: dict[str, Any]) -> bytes:
    head = bytes([kind]) + (bytes([len(name)]) + name.encode() if kind == EVENT else b"")
    return head + bytes(Message.serialize(message))


def selectors(random: Random) -> tuple[list[str], tuple[TrafficSelector, ...]]:
    chosen = random.choices(SELECTORS, k=random.choice((1, 1, 2)))
    return [one[0] for one in chosen], tuple(
        TrafficSelector(ip_network(network), proto, ports) for _, network, proto, ports in chosen
    )


def child_sa(random: Random, ike: str) -> tuple[dict[str, Any], ChildSa]:
    spi_in, spi_out = random.randrange(1, 1 << 32), random.randrange(1, 1 << 32)
    reqid, name = random.randrange(1, 100), random.choice(("net", "host"))
    (here, local), (there, remote) = selectors(random), selectors(random)
    body = {
        "name": name, "uniqueid": "3", "reqid": str(reqid), "state": "INSTALLED",
        "mode": "TUNNEL", "protocol": "ESP", "spi-in": f"{spi_in:08x}",
        "spi-out": f"{spi_out:08x}", "local-ts": here, "remote-ts": there,
    }  # fmt: skip
    host, peer = ip_address("192.0.2.1"), ip_address("192.0.2.2")
    names = ChildName(ike, name), reqid, spi_in, spi_out, peer, local, remote
    return body, ChildSa(*names, unique=3, local_host=host)


def conn(random: Random) -> tuple[str, dict[str, Any], list[Any]]:
    (here, local), (there, remote) = selectors(random), selectors(random)
    mode = random.choice(("TUNNEL", "TRANSPORT"))
    children = {
        "net": {"mode": mode, "local-ts": here, "remote-ts": there},
        "shunt": {"mode": "PASS", "local-ts": ["::/0"], "remote-ts": ["::/0"]},
    }
    body = {
        "local_addrs": ["192.0.2.1"], "remote_addrs": ["%any"], "version": "IKEv2",
        "children": children,
    }  # fmt: skip
    return (
        "list-conn",
        {"gw": body},
        [
            ChildConfig(
                ChildName("gw", "net"), Mode[mode], local, remote, wildcard=mode == "TRANSPORT"
            )
        ],
    )


def log(random: Random) -> tuple[str, dict[str, Any], list[Any]]:
    line = random.choice(("initiating IKE_SA gw[12] to 192.0.2.2", "received TS_UNACCEPTABLE"))
    about = {"ikesa-name": "gw", "ikesa-uniqueid": "12"}
    return "log", {"group": "IKE", "level": "1", **about, "msg": line}, [LogLine("gw", 12, line)]


def sas(random: Random) -> tuple[str, dict[str, Any], list[Any]]:
    event = random.choice(("list-sa", "child-updown", "child-rekey", "ike-updown"))
    up = random.random() < 0.5
    hosts = {"local-host": "192.0.2.1", "remote-host": "192.0.2.2"}
    ike = {"uniqueid": "12", **hosts, "state": "ESTABLISHED"}
    head = {"up": "yes"} if up and event.endswith("updown") else {}
    if event == "ike-updown":
        return event, {**head, "gw": ike}, [on.IkeUp("gw", 12) if up else on.IkeDown("gw", 12)]
    raw, sa = child_sa(random, "gw")
    if event == "child-rekey":
        old, gone = child_sa(random, "gw")
        both = {"net": {"new": raw, "old": old}}
        return event, {"gw": {**ike, "child-sas": both}}, [on.ChildUp(sa), on.ChildDown(gone)]
    message = {**head, "gw": {**ike, "child-sas": {"net-3": raw}}}
    if event == "list-sa":
        return event, message, [sa]
    return event, message, [on.ChildUp(sa) if up else on.ChildDown(sa)]


class Vici(Target):
    """Packets of every kind, their messages, and the gate that is fed with them."""

    name = "vici"
    shaped = True
    refusals = (ViciError,)
    words = (*TEXTS, *(bytes([n]) for n in range(9)), b"\1\1a" * 50, b"\1\0" * 5000, b"\3\1a\0\0")

    def __init__(self) -> None:
        self._gate = gates.settled()

    def _message(self, random: Random) -> tuple[str, dict[str, Any], list[Any]]:
        return random.choice((conn, sas, sas, log))(random)

    def real(self, random: Random) -> tuple[bytes, Any]:
        if random.random() < 0.2:
            refused = random.random() < 0.5
            answer = {"success": "no", "errmsg": "why"} if refused else {"success": "yes"}
            return pack(RESPONSE, "", answer), ["why" if refused else None, False]
        name, message, meant = self._message(random)
        return pack(EVENT, name, message), meant

    def damaged(self, random: Random) -> bytes:
        name, message, _ = self._message(random)
        kind = EVENT
        if random.random() < 0.2:
            kind, message = RESPONSE, {"success": "no", "errmsg": "x", "plugins": ["kernel-x"]}
        for _ in range(random.choice((0, 1, 1, 2))):
            mutate_tree(random, message, OTHERS)
        return pack(kind, name, message)

    def feed(self, data: bytes) -> Any:
        answer = parse(data)
        message = answer.message
        match answer.event:
            case "list-conn":
                children = tuple(meaning.child_configs(message, NAMES))
                fresh = gates.settled(configured=False)
                gates.step(fresh, on.IkeConnected(children, (), 7))
                return list(children)
            case "list-sa":
                sas = tuple(meaning.child_sas(message, NAMES))
                self._feed_gate(on.IkeConnected((gates.CHILD,), sas, 7))
                return list(sas)
            case "child-updown":
                return self._fed(list(meaning.child_updown(message, NAMES)))
            case "child-rekey":
                return self._fed(list(meaning.child_rekey(message, NAMES)))
            case "ike-updown":
                return self._fed(list(meaning.ike_updown(message)))
            case "log":
                return [line] if (line := log_line(answer)) else []
            case None:
                return [refusal(message), meaning.is_userspace_esp(message)]

    def _fed(self, events: list[Any]) -> list[Any]:
        self._feed_gate(*events)
        return events

    def _feed_gate(self, *events: on.Event) -> None:
        """Pass events to the gate, then restore its state as the next list from the daemon does."""
        gates.step(self._gate, *events)
        gates.step(self._gate, on.IkeConnected((gates.CHILD,), (gates.UP,), 7), gates.KERNEL)

    def state(self) -> object:
        return gates.fingerprint(self._gate)
