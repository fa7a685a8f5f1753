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

from ipsecgate.core import layout
from ipsecgate.core.layout import INDEX, Entry, Reason, Setting, State, TableId
from ipsecgate.core.table import EMPTY, Rule, compile_table, ternary
from ipsecgate.edges import bytecode, libbpf
from ipsecgate.edges.maps import Maps
from ipsecgate.edges.objects import HOOKS, opened
from ipsecgate.edges.pins import Pins
from tests.system.bed import HERE, OTHER, PEER, THERE, Bed, live, protect, went_out

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
def test_every_call_is_gated(bed: Bed, call: str, form: str) -> None:
    family, text = FORMS[form]
    peer, other = text.format(PEER[family]), text.format(OTHER[family])

    assert bed.gated(call, peer) == "EPERM"
    assert bed.counted(Reason.REFUSE_UNCOVERED) == 1
    assert went_out(bed.free(call, peer)), "outside the cgroup nothing is refused"
    assert went_out(bed.gated(call, other)), "no policy names it"
    assert bed.counted(Reason.ALLOW_DEFAULT) == 1

    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated(call, peer))
    assert bed.counted(Reason.ALLOW_COVERED) == 1
    bed.publish(TableId.SPD)
    assert bed.gated(call, peer) == "EPERM"


def test_refusals_are_told_with_the_flow(bed: Bed) -> None:
    began = time.monotonic()
    for _ in range(5):
        bed.gated("tcp", "::ffff:" + PEER[4], 443)
    again = (time.monotonic() - began) // AGAIN
    bed.gated("tcp", PEER[6], 443)
    bed.data.drain()
    flows = [str(r.flow) for r in bed.refusals]
    assert 1 <= flows.count(f"tcp {PEER[4]}:443") <= 1 + again, "once a flow"
    assert flows[-1] == f"tcp [{PEER[6]}]:443"
    first = bed.refusals[0]
    assert (first.reason, first.policy, first.flow.saddr) == (Reason.REFUSE_UNCOVERED, 4, None)
    assert first.cgroup == bed.cgroup.stat().st_ino
    assert first.pid == bed.gated.process.pid
    assert first.comm.startswith("python")


LOOPBACK = ("127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::")
BESIDE_LOOPBACK = ("126.255.255.255", "128.0.0.0", "255.0.0.1", "::2", "::ffff:128.0.0.1")


def test_loopback_is_exempt_and_its_neighbours_are_not(bed: Bed) -> None:
    bed.data.set(Setting.DENY, 1)
    for address in LOOPBACK:
        assert bed.gated("tcp", address) in ("EINPROGRESS", "ECONNREFUSED"), address
    assert bed.counted(Reason.ALLOW_EXEMPT) == len(LOOPBACK)
    for address in (*BESIDE_LOOPBACK, *OTHER.values()):
        assert bed.gated("tcp", address) == "EPERM", address
    assert bed.counted(Reason.REFUSE_DEFAULT) == len(BESIDE_LOOPBACK) + len(OTHER)


def test_new_pins_refuse_all_but_loopback(bed: Bed, cache: Path, unique: str) -> None:
    pins = Pins(Path("/sys/fs/bpf"), unique)
    try:
        pins.load(bytecode.get(cache))
        pins.attach(bed.cgroup)
        for address in (*OTHER.values(), *PEER.values()):
            assert bed.gated("tcp", address) == "EPERM"
        assert bed.gated("tcp", "127.0.0.1") in ("EINPROGRESS", "ECONNREFUSED")
        with Maps(pins) as maps:
            assert maps.table(TableId.POLICY) is None
            # the first program to refuse does not keep the others from running
            assert maps.counters()[Reason.REFUSE_NOT_READY] == len(OTHER) + len(PEER)
    finally:
        pins.unload()
    assert went_out(bed.gated("tcp", OTHER[4]))


def test_the_source_decides(bed: Bed) -> None:
    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated("tcp", PEER[4], bind=str(HERE[4])))
    assert bed.gated("tcp", PEER[4], bind="198.51.100.77") == "EPERM"
    bed.data.set_sources([])
    assert bed.gated("tcp", PEER[4]) == "EPERM"
    assert bed.counted(Reason.REFUSE_NO_SOURCE) == 1
    assert went_out(bed.gated("tcp", PEER[4], bind=str(HERE[4])))


def test_a_mark_is_matched_and_leaves_the_source_open(bed: Bed) -> None:
    mark = [(socket.SOL_SOCKET, socket.SO_MARK, 5)]
    source = str(HERE[4])
    marked = ternary(THERE[4], src=ip_network(source), mark=(5, 0xFF))
    bed.publish(TableId.SPD, Rule(marked, Entry(State.DEAD)), *live())
    assert went_out(bed.gated("tcp", PEER[4], bind=source))
    assert bed.gated("tcp", PEER[4], bind=source, options=mark) == "EPERM"
    assert bed.counted(Reason.REFUSE_UNCOVERED) == 1
    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated("tcp", PEER[4], bind=source, options=mark))
    # Routing may choose another source for it, and the table cannot tell.
    assert bed.gated("tcp", PEER[4], options=mark) == "EPERM"
    assert bed.counted(Reason.REFUSE_NO_SOURCE) == 1


def test_another_namespace_is_not_judged_by_this_ones_tables(bed: Bed) -> None:
    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated("tcp", PEER[4]))
    bed.data.set(Setting.NETNS, bed.netns + 1)
    assert bed.gated("tcp", PEER[4]) == "EPERM"
    assert bed.counted(Reason.REFUSE_NETNS) == 1
    assert went_out(bed.gated("tcp", OTHER[4]))


def test_the_hosts_own_address_never_leaves_it(bed: Bed) -> None:
    own = ip_network(HERE[4])
    bed.data.set_sources([(own, HERE[4]), (THERE[4], HERE[4])])
    bed.publish(TableId.POLICY, Rule(ternary(ip_network("0.0.0.0/0")), Entry(State.PROTECT)))
    assert bed.gated("tcp", str(HERE[4])) in ("EINPROGRESS", "ECONNREFUSED")
    assert bed.counted(Reason.ALLOW_EXEMPT) == 1
    assert bed.gated("tcp", PEER[4]) == "EPERM"


def test_a_udp_socket_remembers_that_it_was_covered(bed: Bed) -> None:
    """And is asked anew when anything changed, or when it sends somewhere else."""
    bed.publish(TableId.SPD, *live())
    other = THERE[4][7]

    def counts() -> tuple[int, int]:
        return bed.counted(Reason.ALLOW_COVERED), bed.counted(Reason.ALLOW_ASSOCIATED)

    for call, expected in (("kept sendto", (1, 4)), ("kept sendmsg", (2, 8))):
        for _ in range(5):
            assert bed.gated(call, PEER[4]) == ""
        assert counts() == expected, "each call keeps a socket of its own"
    assert bed.gated("kept sendto", str(other)) == ""
    assert counts() == (3, 8)
    assert bed.gated("kept sendto", str(other), 54) == ""
    assert counts() == (4, 8)
    device = [(socket.SOL_SOCKET, SO_BINDTOIFINDEX, bed.link)]
    assert bed.gated("kept sendto", str(other), 54, options=device) == "EPERM"
    assert bed.gated("kept sendto", str(other), 54, options=[(*device[0][:2], 0)]) == ""
    ((index, key),) = [at for at in compile_table(live()).entries if at[1].family == 4]
    bed.data.set_entry(TableId.SPD, index, key, Entry(State.DEAD))
    assert bed.gated("kept sendto", str(other), 54) == "EPERM"
    bed.data.set_entry(TableId.SPD, index, key, Entry(State.LIVE))
    assert bed.gated("kept sendto", str(other), 54) == ""
    closings: list[Callable[[], None]] = [
        lambda: bed.publish(TableId.SPD),
        lambda: bed.publish(TableId.POLICY, Rule(ternary(THERE[4]), Entry(State.DISCARD))),
        lambda: bed.data.set_sources([]),
    ]
    for close in closings:
        bed.publish(TableId.POLICY, *protect())
        bed.publish(TableId.SPD, *live())
        bed.data.set_sources([(THERE[4], HERE[4])])
        assert [bed.gated("kept sendto", PEER[4]) for _ in range(2)] == ["", ""]
        close()
        assert bed.gated("kept sendto", PEER[4]) == "EPERM"


def test_dhcp_is_exempt_and_its_neighbours_are_not(bed: Bed) -> None:
    """A client's ports are privileged: nobody without that privilege can pose as one."""
    bed.data.set(Setting.DENY, 1)
    broadcast = [(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)]
    link = [(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, bed.link)]

    def told(address: str, port: int, source: int) -> str:
        six = ":" in address
        bind, options = ("::" if six else "0.0.0.0", link if six else broadcast)
        return bed.gated("sendto", address, port, bind=f"{bind}#{source}", options=options)

    assert told("255.255.255.255", 67, 68) == ""
    assert told("ff02::1:2", 547, 546) == ""
    assert bed.counted(Reason.ALLOW_EXEMPT) == 2
    assert sum(bed.counted(reason) for reason in Reason if reason.name.startswith("BLOCK")) == 0
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


def test_actions_come_before_coverage(bed: Bed) -> None:
    narrow = ternary(ip_network("203.0.113.9/32"), proto=6, dport=(80, 0xFFFF))
    bed.publish(TableId.POLICY, Rule(narrow, Entry(State.BYPASS)), *protect())
    assert bed.gated("tcp", PEER[4], 80) == "EINPROGRESS"
    assert bed.gated("tcp", PEER[4], 81) == "EPERM"
    bed.publish(TableId.POLICY, Rule(narrow, Entry(State.DISCARD)), *protect())
    bed.publish(TableId.SPD, *live())
    assert bed.gated("tcp", PEER[4], 80) == "EPERM"
    assert bed.gated("tcp", PEER[4], 81) == "EINPROGRESS"


@pytest.mark.parametrize("name", ["EHOSTUNREACH", "ETIMEDOUT", "EACCES"])
@pytest.mark.parametrize("call", CALLS)
def test_a_policys_errno_is_what_the_caller_gets(bed: Bed, call: str, name: str) -> None:
    entry = Entry(State.PROTECT, getattr(errno, name))
    bed.publish(TableId.POLICY, *(Rule(ternary(THERE[f]), entry) for f in (4, 6)))
    for address in PEER.values():
        assert bed.gated(call, address) == name


def test_audit_counts_and_refuses_nothing(bed: Bed) -> None:
    bed.data.set(Setting.AUDIT, 1)
    assert went_out(bed.gated("tcp", PEER[4]))
    assert bed.counted(Reason.REFUSE_UNCOVERED) == bed.counted(Reason.AUDITED) == 1
    bed.data.set(Setting.AUDIT, 0)
    assert bed.gated("tcp", PEER[4]) == "EPERM"


def test_the_ike_daemon_is_exempt_and_nobody_else(bed: Bed) -> None:
    bed.data.set(Setting.IKE_CGROUP, bed.cgroup.stat().st_ino)
    bed.data.set(Setting.IKE, bed.gated.process.pid)
    assert bed.gated("sendto", PEER[4], 500) == ""
    assert bed.counted(Reason.ALLOW_EXEMPT) == 1
    bed.data.set(Setting.IKE, bed.gated.process.pid + 1)
    assert bed.gated("sendto", PEER[4], 500) == "EPERM"


def test_a_table_in_force_can_be_read_back(bed: Bed) -> None:
    assert bed.data.table(TableId.POLICY) == compile_table(protect())
    assert bed.data.table(TableId.SPD) == EMPTY


def test_republishing_leaves_no_entry_behind(bed: Bed) -> None:
    async def many() -> None:
        for _ in range(20):
            await bed.data.publish(TableId.POLICY, compile_table(protect()))
        while bed.data.clearing:
            await asyncio.sleep(0.01)

    asyncio.run(many())
    assert bed.data.entry_count() == len(protect())


def test_a_single_entry_changes_at_once(bed: Bed) -> None:
    bed.publish(TableId.SPD, *live())
    ((index, key),) = [at for at in compile_table(live()).entries if at[1].family == 4]
    bed.data.set_entry(TableId.SPD, index, key, Entry(State.DEAD))
    assert bed.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(bed.gated("tcp", PEER[6]))


def test_load_again_replaces_the_programs_under_the_links(bed: Bed, cache: Path) -> None:
    before = {a.hook: a.prog_id for a in bed.pins.attachments()}
    bed.pins.load(bytecode.get(cache))
    after = {a.hook: a.prog_id for a in bed.pins.attachments()}
    assert before.keys() == after.keys() == HOOKS.keys()
    assert all(before[hook] != after[hook] for hook in HOOKS)
    assert bed.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(bed.gated("tcp", OTHER[4]))


def test_detach_opens_and_attach_closes(bed: Bed) -> None:
    assert bed.pins.detach(bed.cgroup.stat().st_ino) == len(HOOKS)
    assert went_out(bed.gated("tcp", PEER[4]))
    bed.pins.attach(bed.cgroup)
    bed.pins.attach(bed.cgroup)
    assert len(bed.pins.attachments()) == len(HOOKS)
    assert bed.gated("tcp", PEER[4]) == "EPERM"


def test_a_table_that_somebody_changed_is_mended_and_counted(bed: Bed) -> None:
    """As a check does it every minute: an entry altered, one added, one gone, masks gone."""
    wanted = compile_table([*protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS))])
    bed.publish(TableId.POLICY, *protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS)))

    def verify() -> int:
        return asyncio.run(bed.data.verify(TableId.POLICY, wanted))

    assert verify() == 0
    space = layout.space(TableId.POLICY, bed.data.setting(Setting.POLICY_EPOCH))
    (at, key), *_ = wanted.entries
    raw = layout.pack_key(key, space, at)
    with opened(bed.pins.objects.open_map("entries")) as fd:
        libbpf.update(fd, raw, layout.pack_entry(Entry(State.BYPASS)))
        libbpf.update(fd, layout.pack_key(replace(key, proto=9), space, 3), b"\xff" * 24)
    assert verify() == 2
    with opened(bed.pins.objects.open_map("entries")) as fd:
        libbpf.delete(fd, raw)
    with opened(bed.pins.objects.open_map("masks")) as fd:
        libbpf.update(fd, INDEX.pack(space), bytes(layout.MASKS_SIZE))
    assert went_out(bed.gated("tcp", PEER[4])), "opened by whoever may write the maps"
    assert verify() == 2
    assert verify() == 0
    assert bed.gated("tcp", PEER[4]) == "EPERM"
    assert bed.data.table(TableId.POLICY) == wanted


def test_a_cgroup_that_was_removed_is_in_no_ones_way(bed: Bed, cache: Path) -> None:
    """Its severed links made every later load fail, hence every start. Found by chaos."""
    gone = bed.cgroup.with_name(f"{bed.cgroup.name}-gone")
    gone.mkdir()
    number = gone.stat().st_ino
    bed.pins.attach(gone)
    assert number in {a.cgroup_id for a in bed.pins.attachments()}
    gone.rmdir()
    deadline = time.monotonic() + 10
    while number in {a.cgroup_id for a in bed.pins.attachments()}:
        assert time.monotonic() < deadline
        bed.pins.load(bytecode.get(cache))
        time.sleep(0.01)
    assert bed.gated("tcp", PEER[4]) == "EPERM"


def test_a_flood_of_refusals_does_not_keep_its_reader(bed: Bed) -> None:
    """So many are read at a time, and none is lost."""
    hosts = [str(ip_address("2001:db8:b::") + number) for number in range(1, 301)]
    assert {bed.gated("sendto", host) for host in hosts} == {"EPERM"}
    bed.data.drain()
    assert len(bed.refusals) == libbpf.AT_ONCE
    bed.data.drain()
    assert [str(told.flow.daddr) for told in bed.refusals] == hosts


def test_sources_that_do_not_fit_beside_the_old_ones_replace_them(bed: Bed) -> None:
    def sources(first: str) -> list[tuple[IPv4Network, IPv4Address]]:
        start = int(IPv4Address(first))
        count = layout.SOURCES - 1
        here = IPv4Address(str(HERE[4]))
        return [(IPv4Network((start + number, 32)), here) for number in range(count)]

    bed.data.set_sources(sources("10.0.0.0"))
    bed.data.set_sources([*sources("10.64.0.0"), (THERE[4], HERE[4])])
    bed.publish(TableId.SPD, *live())
    assert went_out(bed.gated("tcp", PEER[4]))
