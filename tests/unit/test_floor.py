"""The host floor: its XFRM policies, their encoding, and when they are set."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.codec.xfrm import NEWPOLICY, decode
from ipsecgate.core.codec.xfrm_floor import decode_late, encode_delete, encode_set
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, TCP, FlowPath
from ipsecgate.core.model.ipsec import Action, Direction, SpdEntry
from ipsecgate.core.model.policy import FLOOR_PRIORITY, FloorPolicy, Policy, Settings
from ipsecgate.core.state.floor import (
    floor_policies,
    instance_tag,
    is_floor,
    parse_own,
)  # fmt: skip
from ipsecgate.core.tables.layout import TableId
from tests.unit import xfrm_bytes
from tests.unit.transcript import REFUSED, SOURCES, THERE, TRAP, UP, Transcript, connected

TAG = instance_tag("default")
PROTECT = Policy("db", (THERE,))
SIX = ip_network("2001:db8:2::/48")
BLOCK = FloorPolicy(1, True, THERE)


def test_the_floor_blocks_protected_networks_and_allows_earlier_bypasses() -> None:
    away = Policy("away", (ip_network("10.2.9.0/24"),), action=Action.BYPASS)
    never = Policy("never", (ip_network("10.4.0.0/16"),), action=Action.DISCARD)
    web = Policy("web", (ip_network("10.5.0.0/16"),), proto=TCP, ports=(80, 81))
    assert floor_policies((away, never, PROTECT, web)) == (
        FloorPolicy(1, False, ip_network("10.2.9.0/24")),
        FloorPolicy(3, True, THERE),
        FloorPolicy(4, True, ip_network("10.5.0.0/16"), TCP, dport=(80, 0xFFFE)),
    )
    assert floor_policies((away, never)) == ()


def test_an_ipv6_floor_allows_loopback_and_neighbour_discovery() -> None:
    *types, block = floor_policies((Policy("six", (SIX,)),))
    assert block == FloorPolicy(1, True, SIX)
    covered = {n for n in range(256) for t in types if n & t.sport[1] == t.sport[0]}
    assert covered == {132, 133, 134, 135, 136}
    assert all(t.proto == 58 and not t.block for t in types)
    assert FloorPolicy(0, False, ip_network("::1/128")) in floor_policies((Policy("6", (ANY_V6,)),))


def test_the_floor_allows_what_the_hooks_exempt_within_a_protected_network() -> None:
    own = [ip_address(address) for address in ("2001:db8:2::7", "2001:db8:9::7", "10.2.0.1")]
    found = floor_policies((Policy("six", (SIX,)),), own)
    assert FloorPolicy(0, False, ip_network("2001:db8:2::7/128")) in found
    assert not [one for one in found if one.dst in map(ip_network, own[1:])]
    (dhcp, block) = floor_policies((Policy("all", (ANY_V4,)),))
    assert dhcp == FloorPolicy(
        0, False, ip_network("255.255.255.255/32"), 17, (68, 0xFFFF), (67, 0xFFFF)
    )
    assert block.block


def test_the_floor_keeps_local_ports() -> None:
    mirror = Policy("in", (THERE,), proto=17, local_ports=(6081, 6081))
    assert floor_policies((mirror,)) == (FloorPolicy(1, True, THERE, 17, sport=(6081, 0xFFFF)),)


@pytest.mark.parametrize(
    "one",
    [
        BLOCK,
        FloorPolicy(0xFFFF, False, SIX, 58, sport=(136, 0xFFFF)),
        FloorPolicy(7, True, SIX, TCP, dport=(5432, 0xFFF0 | 0xF)),
    ],
)
def test_an_encoded_floor_policy_decodes_to_itself(one: FloorPolicy) -> None:
    request = encode_set(one, TAG, 3)
    (event,) = decode(request[:4] + NEWPOLICY.to_bytes(2, "little") + request[6:])
    assert isinstance(event, on.PolicySet)
    assert event.entry.priority == FLOOR_PRIORITY + one.place
    assert event.entry.action is (Action.DISCARD if one.block else Action.BYPASS)
    assert event.entry.key.selector.dst == one.dst
    assert event.entry.key.selector.src.prefixlen == 0
    assert is_floor(event.entry)
    assert parse_own(event.entry, TAG) == one
    assert parse_own(event.entry, instance_tag("another")) is None


def test_the_requests_match_the_layout_of_the_kernel_headers() -> None:
    source = ".".join(str(byte) for byte in TAG.to_bytes(4))
    selector = xfrm_bytes.selector(f"{source}/0", "10.2.0.0/16")
    lifetime = xfrm_bytes.LIFETIME.pack(*([xfrm_bytes.FOREVER] * 4), 0, 0, 0, 0)
    body = xfrm_bytes.policy(selector, priority=FLOOR_PRIORITY + 1, index=0, action=1)
    body = body[:56] + lifetime + body[120:]
    assert encode_set(BLOCK, TAG, 7) == xfrm_bytes.message(0x19, body, flags=5)
    identity = selector + (0).to_bytes(4) + b"\1\0\0\0"
    assert encode_delete(BLOCK, TAG, 7) == xfrm_bytes.message(0x14, identity, flags=5)


def entry_of(one: FloorPolicy) -> SpdEntry:
    request = encode_set(one, TAG, 3)
    (event,) = decode(request)
    assert isinstance(event, on.PolicySet)
    return event.entry


def floors(commands: list[do.Command]) -> list[do.SetFloor]:
    return [command for command in commands if isinstance(command, do.SetFloor)]


def test_the_floor_changes_no_verdict_and_no_table() -> None:
    transcript = Transcript(Settings((PROTECT,), floor=True))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    before = transcript.gate.tables[TableId.SPD]
    assert not transcript.after(on.PolicySet(entry_of(BLOCK)))
    assert transcript.gate.tables[TableId.SPD] == before
    transcript.after(REFUSED, *UP)
    assert transcript.is_open()
    # The floor hides a policy of even worse priority.
    transcript.after(on.PolicyGone(TRAP.key))
    assert not transcript.is_open()
    transcript.after(on.PolicySet(replace(UP[1].entry, priority=2**32 - 1)))
    assert not transcript.is_open()


def test_the_floor_follows_the_policies_and_is_restored_after_a_flush() -> None:
    transcript = Transcript(Settings((PROTECT,), floor=True))
    commands = floors(transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES))
    assert commands
    assert {one.policies for one in commands} == {(BLOCK,)}
    assert not floors(transcript.after(connected(), SOURCES)), "nothing has changed"
    assert floors(transcript.after(on.KernelSnapshot((), ()))), "after a flush"
    more = Settings((PROTECT, Policy("six", (SIX,))), floor=True)
    there = on.PathsResolved((*SOURCES.paths, (SIX, FlowPath(None))))
    assert len(floors(transcript.after(on.Reconfigured(more), there))[-1].policies) == 4
    here = ip_address("2001:db8:2::7")
    arrived = on.PathsResolved((*SOURCES.paths, (SIX, FlowPath(here))))
    assert ip_network(here) in {one.dst for one in floors(transcript.after(arrived))[-1].policies}
    assert floors(transcript.after(on.Reconfigured(Settings((PROTECT,)))))[-1].policies == ()
    assert floors(transcript.after(on.Reconfigured(Settings((PROTECT,), floor=True))))
    audit = Settings((PROTECT,), floor=True, audit=True)
    assert floors(transcript.after(on.Reconfigured(audit)))[-1].policies == (), "nothing is refused"


def test_with_userspace_esp_there_is_no_floor() -> None:
    transcript = Transcript(Settings((PROTECT,), floor=True))
    transcript.after(on.KernelSnapshot((), ()), SOURCES)
    commands = floors(transcript.after(on.IkeConnected((), (), pid=42, userspace_esp=True)))
    assert commands[-1].policies == ()
    assert any("gate.floor" in error.text for error in transcript.gate.errors)


def test_an_inbound_policy_is_never_taken_for_the_floor() -> None:
    entry = entry_of(BLOCK)
    assert is_floor(entry)
    assert not is_floor(replace(entry, key=replace(entry.key, direction=Direction.IN)))


def test_a_dump_is_decoded_only_where_a_floor_may_be() -> None:
    selector = xfrm_bytes.selector("10.1.0.0/16", "10.2.0.0/16")
    datagram = b"".join(
        xfrm_bytes.message(NEWPOLICY, xfrm_bytes.policy(selector, priority=priority, index=0))
        for priority in (100, FLOOR_PRIORITY - 1, FLOOR_PRIORITY, FLOOR_PRIORITY + 1)
    )
    late = [entry.priority for entry in decode_late(datagram)]
    assert late == [FLOOR_PRIORITY, FLOOR_PRIORITY + 1]
    everything = [event.entry for event in decode(datagram) if isinstance(event, on.PolicySet)]
    assert list(decode_late(datagram)) == everything[2:]
