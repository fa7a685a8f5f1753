"""Input from the kernel: XFRM and route messages, records of the hooks, map values."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from random import Random
from typing import Any

from ipsecgate.core.codec import netlink, rtnetlink, xfrm
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Address, Flow, Network, Selector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    Direction,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.tables import layout, packed
from tests.fuzz import fed_gate as gates
from tests.fuzz.engine import Target
from tests.unit import xfrm_bytes as raw

TYPES = tuple(struct.pack("=H", kind) for kind in (*range(0x10, 0x28), 2, 3))
FAMILIES = (b"\2\0", b"\x0a\0", b"\1\0", b"\x1c\0")


def address(random: Random, version: int) -> Address:
    if version == 4:
        return IPv4Address(
            random.choice((0x0A010001, 0x0A020001, 0xC0000202, random.getrandbits(32)))
        )
    return IPv6Address(random.choice((1, 0x20010DB8 << 96, random.getrandbits(128))))


def network(random: Random, version: int) -> Network:
    width = 32 if version == 4 else 128
    bits = random.choice((0, 8, 16, width, random.randrange(width + 1)))
    return ip_network((address(random, version), bits), strict=False)


def _attributes(random: Random) -> tuple[bytes, Mark, int]:
    mark, if_id, data = Mark(), 0, b""
    if random.random() < 0.3:
        mark = Mark(random.getrandbits(32), random.choice((0, 0xFF, 0xFFFFFFFF)))
        data += raw.attribute(raw.MARK, struct.pack("=II", mark.value, mark.mask))
    if random.random() < 0.1:
        if_id = random.randrange(1, 9)
        data += raw.attribute(raw.IF_ID, struct.pack("=I", if_id))
    return data, mark, if_id


def _policy(random: Random) -> tuple[bytes, on.XfrmEvent]:
    version = random.choice((4, 6))
    ports = tuple(random.choice((0, 80, 0xFFFF, random.getrandbits(16))) for _ in range(4))
    proto = random.choice((0, 1, 6, 17, 58, random.randrange(256)))
    src, dst = network(random, version), network(random, version)
    sel = raw.selector(str(src), str(dst), proto=proto, ports=ports)  # type: ignore[arg-type]
    dport, dport_mask, sport, sport_mask = ports
    more, mark, if_id = _attributes(random)
    direction = random.choice((Direction.OUT, Direction.OUT, *Direction))
    chosen = Selector(src, dst, proto, sport, sport_mask, dport, dport_mask)
    key = SpdKey(chosen, mark, if_id, direction=direction)
    needs: tuple[Template, ...] = ()
    if random.random() < 0.8:
        mode = random.choice((Mode.TRANSPORT, Mode.TUNNEL))
        here, there = address(random, version), address(random, version)
        reqid, spi = random.choice((1, 2)), random.choice((0, 0xC0FFEE01))
        more += raw.attribute(
            raw.TMPL,
            raw.template(str(here), str(there), raw.FAMILY[version], reqid, mode, spi=spi),
        )
        unset = (0).__eq__
        needs = (Template(ESP, mode, reqid, spi, None if unset(int(here)) else here,
                          None if unset(int(there)) else there),)  # fmt: skip
    action = random.choice((0, 0, 0, 1))
    meaning = Action.DISCARD if action else Action.PROTECT if needs else Action.BYPASS
    priority = random.choice((0, 100, 383615, random.getrandbits(32)))
    body = raw.policy(sel, priority, 9, direction, action)
    if random.random() < 0.3:
        gone = sel + bytes(8) + raw.attribute(raw.POLICY, body) + more
        return raw.message(raw.DELPOLICY, gone), on.PolicyGone(key)
    kind = random.choice((raw.NEWPOLICY, raw.UPDPOLICY))
    return raw.message(kind, body + more), on.PolicySet(SpdEntry(key, priority, meaning, needs, 9))


def _state(random: Random) -> tuple[bytes, on.XfrmEvent]:
    version = random.choice((4, 6))
    here, there = address(random, version), address(random, version)
    spi = random.choice((0, 0xC0FFEE01, random.getrandbits(32)))
    reqid, mode = random.choice((0, 1, 2)), random.choice((Mode.TRANSPORT, Mode.TUNNEL))
    hard, algorithm = random.choice((0, 3600)), random.random() < 0.8
    body = raw.state(str(here), str(there), spi, reqid=reqid, mode=mode, hard=hard)
    identity = SaId(there, spi, ESP)
    if random.random() < 0.2:
        return raw.message(raw.EXPIRE, body + b"\1" + bytes(7)), on.SaGone(identity)
    more, mark, if_id = _attributes(random)
    cpu = random.choice((None, None, 0, 1))
    if cpu is not None:
        more += raw.attribute(raw.SA_PCPU, struct.pack("=I", cpu))
    sa = Sa(
        identity, here, reqid, mode, None, mark, if_id, cpu, not (algorithm and spi),
        hard or None, 1_700_000_000,
    )  # fmt: skip
    return raw.message(raw.NEWSA, body + more + (raw.CIPHER if algorithm else b"")), on.SaSet(sa)


class Xfrm(Target):
    """XFRM notifications, and the gate that is fed with them."""

    name = "xfrm"
    refusals = (netlink.DecodeError,)
    words = (*TYPES, *FAMILIES)

    def __init__(self) -> None:
        self._gate = gates.settled()
        self._kept = list(raw.TYPES.values())

    def real(self, random: Random) -> tuple[bytes, Any]:
        parts = [
            random.choice(self._kept) if random.random() < 0.2
            else random.choice((_policy, _state))(random)
            for _ in range(random.choice((1, 1, 1, 2, 3)))
        ]  # fmt: skip
        return b"".join(data for data, _ in parts), [event for _, event in parts]

    def feed(self, data: bytes) -> Any:
        events = list(xfrm.decode(data))
        list(xfrm.packets_of_sas(data))
        if events:
            gates.feed_kernel_events(self._gate, events)
        return events

    def state(self) -> object:
        return gates.fingerprint(self._gate)


class Framing(Target):
    """The end of a dump."""

    name = "netlink"
    refusals = (netlink.DecodeError,)
    words = TYPES

    def real(self, random: Random) -> tuple[bytes, Any]:
        before = raw.message(raw.NEWSA, raw.state(), flags=2) if random.random() < 0.5 else b""
        kind, flags = random.choice((2, 3)), random.choice((2, 0x12))
        code = random.choice((0, 1, 13, 105))
        end = raw.message(kind, struct.pack("=i", -code) + bytes(16), flags)
        return before + end, netlink.DumpEnd(code, flags == 0x12)

    def feed(self, data: bytes) -> Any:
        end = netlink.dump_end(data, 7)
        if end is not None and not 0 <= end.error < 4096:
            raise AssertionError(f"errno {end.error}")
        return end


class Routes(Target):
    """Routes, rules and links: answers and notifications."""

    name = "rtnetlink"
    refusals = (netlink.DecodeError,)
    words = (*FAMILIES, b"tun\0", b"ipsec0\0",
             *(struct.pack("=H", kind) for kind in (16, 17, 24, 25, 32, 33)))  # fmt: skip

    def real(self, random: Random) -> tuple[bytes, Any]:
        if random.random() < 0.3:
            return self._link(random)
        version = random.choice((4, 6))
        where, source = network(random, version), address(random, version)
        link = random.randrange(1, 9)
        kind = random.choice((24, 25, 32, 33))
        source_bits, mask = random.choice((0, 32)), random.choice((0, 7, 0xFFFFFFFF))
        header = struct.pack(
            "=BBBBBBBBI", raw.FAMILY[version], where.prefixlen, source_bits, 0, 254, 0, 0, 1, 0
        )
        body = header + raw.attribute(1, where.network_address.packed)
        body += raw.attribute(4, struct.pack("=I", link)) + raw.attribute(7, source.packed)
        body += raw.attribute(16, struct.pack("=I", mask))
        prefix = version, int(where.network_address), where.prefixlen
        meant: Any = (
            [prefix],
            [(source, link)] if kind == 24 else [],
            [],
            [(link, prefix)] if kind == 25 else [],
            kind in (24, 25),
            [(source_bits > 0, mask)] if kind == 32 else [],
        )
        return raw.message(kind, body), meant

    def _link(self, random: Random) -> tuple[bytes, Any]:
        index, up, kind = random.randrange(1, 9), random.random() < 0.5, random.choice((16, 17))
        name, driver = f"ipsec{index}", random.choice(("tun", "veth", "xfrm", "vti"))
        number = random.getrandbits(32)
        body = struct.pack("=BxHiII", 0, 1, index, int(up), 0)
        body += raw.attribute(3, name.encode() + b"\0")
        data = raw.attribute(2, struct.pack("=I", number)) if driver == "xfrm" else b""
        data += raw.attribute(3, struct.pack("!I", number)) if driver == "vti" else b""
        info = raw.attribute(1, driver.encode() + b"\0") + raw.attribute(2, data)
        body += raw.attribute(18, info)
        meant = rtnetlink.Link(
            name,
            driver,
            number if driver == "xfrm" else None,
            number if driver == "vti" else 0,
        )
        lost = [(index, None)] if kind == 17 or not up else []
        return raw.message(kind, body), (
            [],
            [],
            [meant] if kind == 16 else [],
            lost,
            False,
            [],
        )

    def feed(self, data: bytes) -> Any:
        return (
            list(rtnetlink.decode_prefixes(data)),
            list(rtnetlink.decode_route(data)),
            list(rtnetlink.decode_link(data)),
            list(rtnetlink.decode_removed_routes(data)),
            rtnetlink.only_routes(data),
            list(rtnetlink.rule_conditions(data)),
        )


class Ring(Target):
    """Records of the hooks, and the gate that is fed with them."""

    name = "ring"
    refusals = (layout.LayoutError,)
    words = (struct.pack("=I", layout.NO_POLICY), struct.pack("=I", 1))

    def __init__(self) -> None:
        self._gate = gates.settled()

    def real(self, random: Random) -> tuple[bytes, Any]:
        version = random.choice((4, 6))
        daddr, saddr = address(random, version), address(random, version)
        flow = Flow(daddr, random.randrange(256), random.getrandbits(16),
                    None if int(saddr) == 0 else saddr, random.getrandbits(16),
                    *map(random.getrandbits, (32, 32, 64)))  # fmt: skip
        key = layout.Key(layout.address_bits(flow.saddr, version),
                         layout.address_bits(daddr, version), flow.sport, flow.dport, flow.proto,
                         version, flow.mark)  # fmt: skip
        reason, policy = random.choice(list(layout.EXPLAINED)), random.choice((None, 0, 1, 5))
        number = layout.NO_POLICY if policy is None else policy
        pid, cgroup = random.getrandbits(32), random.getrandbits(64)
        comm = random.choice(("curl", "", "Ω", "fifteen letters"))
        ns, untold = random.getrandbits(63), random.getrandbits(32)
        record = struct.pack("=QQQ", ns, cgroup, flow.netns)
        record += layout.pack_key(key)
        record += struct.pack(
            "=IIIIII16s", reason, number, pid, 1, flow.device, untold, comm.encode()
        )
        refused = on.FlowRefused(
            flow, reason, policy, pid, comm, cgroup, at=ns / layout.NS, untold=untold
        )
        return record, refused

    def feed(self, data: bytes) -> Any:
        event = packed.unpack_event(data)
        if event.flow.daddr not in gates.POLICY.remote[0]:
            gates.step(self._gate, event)  # a real one would start a negotiation
        return event

    def state(self) -> object:
        return gates.fingerprint(self._gate)


class Maps(Target):
    """Values of the hooks' maps; the first byte chooses the kind."""

    name = "maps"
    refusals = (layout.LayoutError,)

    def _key(self, random: Random) -> layout.Key:
        return layout.Key(
            random.getrandbits(128), random.getrandbits(128), random.getrandbits(16),
            random.getrandbits(16), random.getrandbits(8), random.getrandbits(8),
            random.getrandbits(32),
        )  # fmt: skip

    def real(self, random: Random) -> tuple[bytes, Any]:
        match random.randrange(3):
            case 0:
                key, number = self._key(random), random.randrange(layout.MASKS)
                return b"\0" + layout.pack_key(key, 1, number), (1, number, key)
            case 1:
                mask = self._key(random)
                return b"\1" + packed.pack_mask(mask, 1, random.randrange(layout.MASKS)), mask
        entry = layout.Entry(random.choice(list(layout.State)), 1, random.getrandbits(32))
        return b"\2" + packed.pack_answer(entry), entry

    def feed(self, data: bytes) -> Any:
        decoders: tuple[Callable[[bytes], Any], ...] = (
            layout.unpack_key,
            packed.unpack_mask,
            packed.unpack_answer,
        )
        return decoders[data[0] % 3 if data else 0](data[1:])
