"""The hooks against real system calls in a real cgroup, tables written by hand.

Every refusal has a neighbour that must pass, and the kernel's counters are read
from the pinned map. BPF_PROG_TEST_RUN does not exist for these programs.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

import pytest

from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import INDEX, Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import EMPTY, Rule, compile_table, ternary
from ipsecgate.edges.bpf import bytecode, libbpf, ring
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.objects import HOOKS, opened
from ipsecgate.edges.bpf.pins import Pins
from tests.system.hooked_cgroup import (
    HERE,
    OTHER,
    PEER,
    THERE,
    HookedCgroup,
    live,
    protect,
    went_out,
)

CALLS = ("tcp", "udp connect", "sendto", "sendmsg")
SO_BINDTOIFINDEX = 62
AGAIN = 0.1  # seconds after which a flow is told again: GATE_EVENT_INTERVAL_NS
FORMS = {
    "v4": (4, "{}"),
    "v6": (6, "{}"),
    "v4-mapped": (4, "::ffff:{}"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_is_gated(hooked: HookedCgroup, call: str, form: str) -> None:
    family, text = FORMS[form]
    peer, other = text.format(PEER[family]), text.format(OTHER[family])

    assert hooked.gated(call, peer) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    assert went_out(hooked.free(call, peer)), "outside the cgroup nothing is refused"
    assert went_out(hooked.gated(call, other)), "no policy names it"
    assert hooked.counted(Reason.ALLOW_DEFAULT) == 1

    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated(call, peer))
    assert hooked.counted(Reason.ALLOW_COVERED) == 1
    hooked.publish(TableId.SPD)
    assert hooked.gated(call, peer) == "EPERM"


def test_a_refusal_is_reported_with_its_flow(hooked: HookedCgroup) -> None:
    began = time.monotonic()
    for _ in range(5):
        hooked.gated("tcp", "::ffff:" + PEER[4], 443)
    again = (time.monotonic() - began) // AGAIN
    hooked.gated("tcp", PEER[6], 443)
    hooked.data.drain()
    flows = [str(r.flow) for r in hooked.refusals]
    assert 1 <= flows.count(f"tcp {PEER[4]}:443") <= 1 + again, "once a flow"
    assert flows[-1] == f"tcp [{PEER[6]}]:443"
    first = hooked.refusals[0]
    assert (first.reason, first.policy, first.flow.saddr) == (Reason.REFUSE_UNCOVERED, 4, None)
    assert first.cgroup == hooked.cgroup.stat().st_ino
    assert first.pid == hooked.gated.process.pid
    assert first.comm.startswith("python")


LOOPBACK = ("127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")
BESIDE_LOOPBACK = ("126.255.255.255", "128.0.0.0", "255.0.0.1", "::2", "::ffff:128.0.0.1")


def test_only_loopback_is_exempt(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.DENY, 1)
    for address in LOOPBACK:
        assert hooked.gated("tcp", address) in ("EINPROGRESS", "ECONNREFUSED"), address
    assert hooked.counted(Reason.ALLOW_EXEMPT) == len(LOOPBACK)
    for address in (*BESIDE_LOOPBACK, *OTHER.values()):
        assert hooked.gated("tcp", address) == "EPERM", address
    assert hooked.counted(Reason.REFUSE_DEFAULT) == len(BESIDE_LOOPBACK) + len(OTHER)


def test_new_pins_refuse_all_but_loopback(hooked: HookedCgroup, cache: Path, unique: str) -> None:
    pins = Pins(Path("/sys/fs/bpf"), unique)
    try:
        pins.load(bytecode.get(cache))
        pins.attach(hooked.cgroup)
        for address in (*OTHER.values(), *PEER.values()):
            assert hooked.gated("tcp", address) == "EPERM"
        assert hooked.gated("tcp", "127.0.0.1") in ("EINPROGRESS", "ECONNREFUSED")
        with Maps(pins) as maps:
            assert maps.table(TableId.POLICY) is None
            # the first program to refuse does not keep the others from running
            assert maps.counters()[Reason.REFUSE_NOT_READY] == len(OTHER) + len(PEER)
    finally:
        pins.unload()
    assert went_out(hooked.gated("tcp", OTHER[4]))


def test_the_source_address_decides(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=str(HERE[4])))
    assert hooked.gated("tcp", PEER[4], bind="198.51.100.77") == "EPERM"
    hooked.data.set_sources([])
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NO_SOURCE) == 1
    assert went_out(hooked.gated("tcp", PEER[4], bind=str(HERE[4])))


def test_a_marked_flow_is_matched_and_has_no_known_source(hooked: HookedCgroup) -> None:
    mark = [(socket.SOL_SOCKET, socket.SO_MARK, 5)]
    source = str(HERE[4])
    marked = ternary(THERE[4], src=ip_network(source), mark=(5, 0xFF))
    hooked.publish(TableId.SPD, Rule(marked, Entry(State.DEAD)), *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=source))
    assert hooked.gated("tcp", PEER[4], bind=source, options=mark) == "EPERM"
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == 1
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4], bind=source, options=mark))
    # Routing may choose another source for it, and the table cannot tell.
    assert hooked.gated("tcp", PEER[4], options=mark) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NO_SOURCE) == 1


def test_a_flow_in_another_network_namespace_is_refused(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    hooked.data.set(Setting.NETNS, hooked.netns + 1)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.counted(Reason.REFUSE_NETNS) == 1
    assert went_out(hooked.gated("tcp", OTHER[4]))


def test_an_own_address_is_exempt(hooked: HookedCgroup) -> None:
    own = ip_network(HERE[4])
    hooked.data.set_sources([(own, HERE[4]), (THERE[4], HERE[4])])
    hooked.publish(TableId.POLICY, Rule(ternary(ip_network("0.0.0.0/0")), Entry(State.PROTECT)))
    assert hooked.gated("tcp", str(HERE[4])) in ("EINPROGRESS", "ECONNREFUSED")
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 1
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_a_udp_socket_is_checked_again_only_after_a_change(hooked: HookedCgroup) -> None:
    """And is asked anew when anything changed, or when it sends somewhere else."""
    hooked.publish(TableId.SPD, *live())
    other = THERE[4][7]

    def counts() -> tuple[int, int]:
        return hooked.counted(Reason.ALLOW_COVERED), hooked.counted(Reason.ALLOW_ASSOCIATED)

    for call, expected in (("kept sendto", (1, 4)), ("kept sendmsg", (2, 8))):
        for _ in range(5):
            assert hooked.gated(call, PEER[4]) == ""
        assert counts() == expected, "each call keeps a socket of its own"
    assert hooked.gated("kept sendto", str(other)) == ""
    assert counts() == (3, 8)
    assert hooked.gated("kept sendto", str(other), 54) == ""
    assert counts() == (4, 8)
    device = [(socket.SOL_SOCKET, SO_BINDTOIFINDEX, hooked.link)]
    assert hooked.gated("kept sendto", str(other), 54, options=device) == "EPERM"
    assert hooked.gated("kept sendto", str(other), 54, options=[(*device[0][:2], 0)]) == ""
    ((index, key),) = [at for at in compile_table(live()).entries if at[1].family == 4]
    hooked.data.set_entry(TableId.SPD, index, key, Entry(State.DEAD))
    assert hooked.gated("kept sendto", str(other), 54) == "EPERM"
    hooked.data.set_entry(TableId.SPD, index, key, Entry(State.LIVE))
    assert hooked.gated("kept sendto", str(other), 54) == ""
    closings: list[Callable[[], None]] = [
        lambda: hooked.publish(TableId.SPD),
        lambda: hooked.publish(TableId.POLICY, Rule(ternary(THERE[4]), Entry(State.DISCARD))),
        lambda: hooked.data.set_sources([]),
    ]
    for close in closings:
        hooked.publish(TableId.POLICY, *protect())
        hooked.publish(TableId.SPD, *live())
        hooked.data.set_sources([(THERE[4], HERE[4])])
        assert [hooked.gated("kept sendto", PEER[4]) for _ in range(2)] == ["", ""]
        close()
        assert hooked.gated("kept sendto", PEER[4]) == "EPERM"


def test_only_dhcp_clients_are_exempt(hooked: HookedCgroup) -> None:
    """A client's ports are privileged: nobody without that privilege can pose as one."""
    hooked.data.set(Setting.DENY, 1)
    broadcast = [(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)]
    link = [(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, hooked.link)]

    def told(address: str, port: int, source: int) -> str:
        six = ":" in address
        bind, options = ("::" if six else "0.0.0.0", link if six else broadcast)
        return hooked.gated("sendto", address, port, bind=f"{bind}#{source}", options=options)

    assert told("255.255.255.255", 67, 68) == ""
    assert told("ff02::1:2", 547, 546) == ""
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 2
    assert sum(hooked.counted(reason) for reason in Reason if reason.name.startswith("BLOCK")) == 0
    for neighbour in (
        ("255.255.255.255", 68, 68),
        ("255.255.255.254", 67, 68),
        ("255.255.255.255", 67, 0),
        ("255.255.255.255", 67, 67),
        ("ff02::1:3", 547, 546),
        ("ff05::1:2", 547, 546),
        ("ff02::1:2", 547, 0),
        ("ff02::1:2", 547, 547),
    ):
        assert told(*neighbour) == "EPERM", neighbour


def test_bypass_and_discard_apply_whatever_the_coverage(hooked: HookedCgroup) -> None:
    narrow = ternary(ip_network("203.0.113.9/32"), proto=6, dport=(80, 0xFFFF))
    hooked.publish(TableId.POLICY, Rule(narrow, Entry(State.BYPASS)), *protect())
    assert hooked.gated("tcp", PEER[4], 80) == "EINPROGRESS"
    assert hooked.gated("tcp", PEER[4], 81) == "EPERM"
    hooked.publish(TableId.POLICY, Rule(narrow, Entry(State.DISCARD)), *protect())
    hooked.publish(TableId.SPD, *live())
    assert hooked.gated("tcp", PEER[4], 80) == "EPERM"
    assert hooked.gated("tcp", PEER[4], 81) == "EINPROGRESS"


@pytest.mark.parametrize("name", ["EHOSTUNREACH", "ETIMEDOUT", "EACCES"])
@pytest.mark.parametrize("call", CALLS)
def test_the_caller_gets_the_errno_of_the_policy(
    hooked: HookedCgroup, call: str, name: str
) -> None:
    entry = Entry(State.PROTECT, getattr(errno, name))
    hooked.publish(TableId.POLICY, *(Rule(ternary(THERE[f]), entry) for f in (4, 6)))
    for address in PEER.values():
        assert hooked.gated(call, address) == name


def test_audit_mode_counts_and_refuses_nothing(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.AUDIT, 1)
    assert went_out(hooked.gated("tcp", PEER[4]))
    assert hooked.counted(Reason.REFUSE_UNCOVERED) == hooked.counted(Reason.AUDITED) == 1
    hooked.data.set(Setting.AUDIT, 0)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_only_the_ike_daemon_is_exempt(hooked: HookedCgroup) -> None:
    hooked.data.set(Setting.IKE, hooked.gated.process.pid)
    assert hooked.gated("sendto", PEER[4], 500) == ""
    assert hooked.counted(Reason.ALLOW_EXEMPT) == 1
    hooked.data.set(Setting.IKE, hooked.gated.process.pid + 1)
    assert hooked.gated("sendto", PEER[4], 500) == "EPERM"


def test_a_published_table_can_be_read_back(hooked: HookedCgroup) -> None:
    assert hooked.data.table(TableId.POLICY) == compile_table(protect())
    assert hooked.data.table(TableId.SPD) == EMPTY


def test_republishing_leaves_no_entry_behind(hooked: HookedCgroup) -> None:
    async def many() -> None:
        for _ in range(20):
            await hooked.data.publish(TableId.POLICY, compile_table(protect()))
        while hooked.data.clearing:
            await asyncio.sleep(0.01)

    asyncio.run(many())
    assert hooked.data.entry_count() == len(protect())


def test_setting_one_entry_takes_effect_at_once(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    ((index, key),) = [at for at in compile_table(live()).entries if at[1].family == 4]
    hooked.data.set_entry(TableId.SPD, index, key, Entry(State.DEAD))
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", PEER[6]))


def test_loading_again_replaces_the_programs_of_the_links(
    hooked: HookedCgroup, cache: Path
) -> None:
    before = {a.hook: a.prog_id for a in hooked.pins.attachments()}
    hooked.pins.load(bytecode.get(cache))
    after = {a.hook: a.prog_id for a in hooked.pins.attachments()}
    assert before.keys() == after.keys() == HOOKS.keys()
    assert all(before[hook] != after[hook] for hook in HOOKS)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", OTHER[4]))


def test_detach_opens_and_attach_closes(hooked: HookedCgroup) -> None:
    assert hooked.pins.detach(hooked.cgroup.stat().st_ino) == len(HOOKS)
    assert went_out(hooked.gated("tcp", PEER[4]))
    hooked.pins.attach(hooked.cgroup)
    hooked.pins.attach(hooked.cgroup)
    assert len(hooked.pins.attachments()) == len(HOOKS)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_a_table_changed_by_others_is_repaired_and_counted(hooked: HookedCgroup) -> None:
    """As a check does it every minute: an entry altered, one added, one gone, masks gone."""
    wanted = compile_table([*protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS))])
    hooked.publish(
        TableId.POLICY, *protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS))
    )

    def verify() -> int:
        return asyncio.run(hooked.data.repair(TableId.POLICY, wanted))

    assert verify() == 0
    space = layout.space(TableId.POLICY, hooked.data.setting(Setting.POLICY_EPOCH))
    (at, key), *_ = wanted.entries
    raw = layout.pack_key(key, space, at)
    with opened(hooked.pins.objects.open_map("entries")) as fd:
        libbpf.update(fd, raw, layout.pack_entry(Entry(State.BYPASS)))
        libbpf.update(fd, layout.pack_key(replace(key, proto=9), space, 3), b"\xff" * 24)
    assert verify() == 2
    with opened(hooked.pins.objects.open_map("entries")) as fd:
        libbpf.delete(fd, raw)
    with opened(hooked.pins.objects.open_map("masks")) as fd:
        libbpf.update(fd, INDEX.pack(space), bytes(layout.MASKS_SIZE))
    assert went_out(hooked.gated("tcp", PEER[4])), "opened by whoever may write the maps"
    assert verify() == 2
    assert verify() == 0
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.data.table(TableId.POLICY) == wanted


def test_a_removed_cgroup_does_not_prevent_loading(hooked: HookedCgroup, cache: Path) -> None:
    """Its severed links made every later load fail, hence every start. Found by chaos."""
    gone = hooked.cgroup.with_name(f"{hooked.cgroup.name}-gone")
    gone.mkdir()
    number = gone.stat().st_ino
    hooked.pins.attach(gone)
    assert number in {a.cgroup_id for a in hooked.pins.attachments()}
    gone.rmdir()
    deadline = time.monotonic() + 10
    while number in {a.cgroup_id for a in hooked.pins.attachments()}:
        assert time.monotonic() < deadline
        hooked.pins.load(bytecode.get(cache))
        time.sleep(0.01)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_a_flood_of_refusals_is_read_in_batches(hooked: HookedCgroup) -> None:
    """So many are read at a time, and none is lost."""
    hosts = [str(ip_address("2001:db8:b::") + number) for number in range(1, 301)]
    assert {hooked.gated("sendto", host) for host in hosts} == {"EPERM"}
    hooked.data.drain()
    assert len(hooked.refusals) == ring.BATCH
    hooked.data.drain()
    assert [str(told.flow.daddr) for told in hooked.refusals] == hosts


def test_sources_that_do_not_fit_beside_the_old_ones_replace_them(hooked: HookedCgroup) -> None:
    def sources(first: str) -> list[tuple[IPv4Network, IPv4Address]]:
        start = int(IPv4Address(first))
        count = layout.SOURCES - 1
        here = IPv4Address(str(HERE[4]))
        return [(IPv4Network((start + number, 32)), here) for number in range(count)]

    hooked.data.set_sources(sources("10.0.0.0"))
    hooked.data.set_sources([*sources("10.64.0.0"), (THERE[4], HERE[4])])
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
