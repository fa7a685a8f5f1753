"""The tables and programs of the hooks: published, changed, replaced, repaired.

The verdicts are real system calls in a real cgroup; the tables are written by hand.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path

from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import INDEX, Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from ipsecgate.edges.bpf import bytecode, libbpf, ring
from ipsecgate.edges.bpf.datapath import Datapath
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
from tests.system.test_libbpf import EXIT, MOVE, instruction

SO_BINDTOIFINDEX = 62


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


def test_a_udp_socket_is_checked_again_only_after_a_change(hooked: HookedCgroup) -> None:
    """A change of the tables, of the destination or of the device makes the hook check again."""
    hooked.publish(TableId.SPD, *live())
    other = THERE[4][7]

    def counts() -> tuple[int, int]:
        return hooked.counted(Reason.ALLOW_COVERED), hooked.counted(Reason.ALLOW_ASSOCIATED)

    for call, expected in (("kept sendto", (1, 4)), ("kept sendmsg", (2, 8))):
        for _ in range(5):
            assert hooked.gated(call, PEER[4]) == ""
        assert counts() == expected, "each kind of call has its own socket"
    assert hooked.gated("kept sendto", str(other)) == ""
    assert counts() == (3, 8)
    assert hooked.gated("kept sendto", str(other), 54) == ""
    assert counts() == (4, 8)
    device = [(socket.SOL_SOCKET, SO_BINDTOIFINDEX, hooked.link)]
    assert hooked.gated("kept sendto", str(other), 54, options=device) == "EPERM"
    assert hooked.gated("kept sendto", str(other), 54, options=[(*device[0][:2], 0)]) == ""
    (four,) = [rule.match for rule in live() if rule.match.value.family == 4]
    hooked.data.change(TableId.SPD, [(four, Entry(State.DEAD))])
    assert hooked.gated("kept sendto", str(other), 54) == "EPERM"
    hooked.data.change(TableId.SPD, [(four, Entry(State.LIVE))])
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


def test_a_published_table_can_be_read_back(hooked: HookedCgroup) -> None:
    assert hooked.data.table(TableId.POLICY) == compile_table(protect())
    assert hooked.data.table(TableId.SPD) == Table()


def test_republishing_leaves_no_entry_behind(hooked: HookedCgroup) -> None:
    async def many() -> None:
        for _ in range(20):
            await hooked.data.publish(TableId.POLICY, compile_table(protect()))

    asyncio.run(many())
    assert hooked.data.entry_count() == len(protect())


def test_setting_one_entry_takes_effect_at_once(hooked: HookedCgroup) -> None:
    hooked.publish(TableId.SPD, *live())
    (four,) = [rule.match for rule in live() if rule.match.value.family == 4]
    hooked.data.change(TableId.SPD, [(four, Entry(State.DEAD))])
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", PEER[6]))


def test_loading_again_replaces_the_programs_that_are_not_the_same(
    hooked: HookedCgroup, cache: Path
) -> None:
    """A program is the same if it has the same instructions and uses the maps that are pinned."""
    before = {a.hook: a.prog_id for a in hooked.pins.attachments()}
    code = bytecode.get(cache)
    hooked.pins.load(code)
    assert {a.hook: a.prog_id for a in hooked.pins.attachments()} == before
    allow = instruction(MOVE, 1) + instruction(EXIT)
    for hook, name in (("connect4", "connect4_000000"), ("sendmsg4", "same")):
        same = f"{hook}_{code.programs[hook].digest}"
        path = hooked.pins.objects.folder / "progs" / hook
        path.unlink()
        # One with another name, and one with the right name but without the maps.
        program = libbpf.load_program(name if name != "same" else same, allow, *HOOKS[hook])
        with opened(program) as fd:
            libbpf.pin(fd, path)
    hooked.pins.load(code)
    after = {a.hook: a.prog_id for a in hooked.pins.attachments()}
    assert before.keys() == after.keys() == HOOKS.keys()
    assert {hook for hook in HOOKS if before[hook] != after[hook]} == {"connect4", "sendmsg4"}
    assert hooked.gated("sendto", PEER[4]) == "EPERM"
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
    """As the check every minute does: an entry changed, one added, one deleted, masks deleted."""
    wanted = compile_table([*protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS))])
    hooked.publish(
        TableId.POLICY, *protect(), Rule(ternary(THERE[4], proto=6), Entry(State.BYPASS))
    )

    def verify() -> int:
        return asyncio.run(hooked.data.repair(TableId.POLICY, wanted))

    assert verify() == 0
    with opened(hooked.pins.objects.open_map("entries")) as fd:
        raw = next(iter(libbpf.keys(fd, layout.KEY_SIZE)))
        _, number, key = layout.unpack_key(raw)
        other = layout.pack_key(key.replaced(proto=9), TableId.POLICY, number)
        libbpf.update(fd, raw, layout.pack_entry(raw, 0, layout.pack_answer(Entry(State.BYPASS))))
        libbpf.update(fd, other, b"\xff" * layout.ENTRY_SIZE)
    assert verify() == 2
    with opened(hooked.pins.objects.open_map("entries")) as fd:
        libbpf.delete(fd, raw)
    with opened(hooked.pins.objects.open_map("masks")) as fd:
        for part in range(2 * layout.PARTS):
            libbpf.update(fd, INDEX.pack(part), b"\xff" * layout.PART_SIZE)
    assert went_out(hooked.gated("tcp", PEER[4])), "the changed map opens the flow"
    assert verify() == 2
    assert verify() == 0
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.data.table(TableId.POLICY) == wanted


def test_a_damaged_check_and_a_cleared_filter_are_repaired(hooked: HookedCgroup) -> None:
    """Either makes the hooks find nothing: a covered flow is refused, or no policy applies."""
    hooked.publish(TableId.SPD, *live())
    wanted = hooked.data.table(TableId.SPD)
    assert wanted is not None

    def verify() -> int:
        return asyncio.run(hooked.data.repair(TableId.SPD, wanted))

    assert verify() == 0
    with opened(hooked.pins.objects.open_map("entries")) as fd:
        for raw in list(libbpf.keys(fd, layout.KEY_SIZE)):
            if layout.unpack_key(raw)[0] == TableId.SPD:
                value = libbpf.lookup(fd, raw, layout.ENTRY_SIZE)
                assert value is not None
                libbpf.update(fd, raw, value[:36] + bytes(4) + value[40:])
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert verify() == len(live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    with opened(hooked.pins.objects.open_map("filter")) as fd:
        for half in range(2):
            for word in range(1 << 6):
                index = INDEX.pack(half * layout.FILTER_WORDS + word)
                libbpf.update(fd, index, bytes(8))
    hooked.data.set(Setting.DENY, 0)  # so that no processor remembers what it let pass
    assert hooked.gated("tcp", PEER[4]) != "EPERM", "the policy is not found either"
    assert verify() == 1
    assert verify() == 0
    assert went_out(hooked.gated("tcp", PEER[4]))


def test_a_removed_cgroup_does_not_prevent_loading(hooked: HookedCgroup, cache: Path) -> None:
    """Its severed links once made every later load and start fail. Found by chaos tests."""
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
    """A fixed number is read at a time, and none is lost."""
    hosts = [str(ip_address("2001:db8:b::") + number) for number in range(1, 301)]
    assert {hooked.gated("sendto", host) for host in hosts} == {"EPERM"}
    hooked.data.drain()
    assert len(hooked.refusals) == ring.RECORDS_PER_CALL
    hooked.data.drain()
    assert [str(refusal.flow.daddr) for refusal in hooked.refusals] == hosts


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


def test_a_withdrawn_table_closes_its_flows_and_the_next_controller_starts_clean(
    hooked: HookedCgroup,
) -> None:
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    hooked.data.withdraw(TableId.SPD)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("tcp", OTHER[4]))
    hooked.data.close()
    hooked.data = Datapath(hooked.pins)
    assert hooked.data.entry_count() == len(protect())
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
