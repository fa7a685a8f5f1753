"""The tables and programs of the hooks: published, changed, replaced, repaired.

The verdicts are real system calls in a real cgroup; the tables are written by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path

from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.layout import INDEX, Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from ipsecgate.edges.bpf import bytecode, elements, libbpf, ring
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.parts import let_others_run
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.store import Store
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
    hooked.change(TableId.SPD, [(four, Entry(State.DEAD))])
    assert hooked.gated("kept sendto", str(other), 54) == "EPERM"
    hooked.change(TableId.SPD, [(four, Entry(State.LIVE))])
    assert hooked.gated("kept sendto", str(other), 54) == ""
    closings: list[Callable[[], None]] = [
        lambda: hooked.publish(TableId.SPD),
        lambda: hooked.publish(TableId.POLICY, Rule(ternary(THERE[4]), Entry(State.DISCARD))),
        lambda: hooked.data.set_paths(HOST, []),
    ]
    for close in closings:
        hooked.publish(TableId.POLICY, *protect())
        hooked.publish(TableId.SPD, *live())
        hooked.data.set_paths(HOST, [(THERE[4], FlowPath(HERE[4]))])
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
    hooked.change(TableId.SPD, [(four, Entry(State.DEAD))])
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
        with closing_fd(program) as fd:
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
    with foreign(hooked) as store:
        some = next(store.entries())
        raw = next(one.raw for one in some if layout.unpack_key(one.raw[: layout.KEY_SIZE])[1] == 0)
        key = packed.key_of_entry(raw)
        other = layout.unpack_key(key)[2].replaced(proto=9)
        bypass = packed.pack_answer(Entry(State.BYPASS))
        store.put(packed.pack_entry(key, 0, bypass))
        store.put(packed.pack_entry(layout.pack_key(other, TableId.POLICY), 0, b"\xff" * 32))
    assert verify() == 2
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    with foreign(hooked) as store:
        store.remove(key)
    with closing_fd(hooked.pins.objects.open_map("masks")) as fd:
        for number in range(2):
            elements.update(fd, INDEX.pack(number), b"\xff" * packed.MASK_SIZE)
    assert went_out(hooked.gated("tcp", PEER[4])), "the changed map opens the flow"
    assert verify() == 3
    assert verify() == 0
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert hooked.data.table(TableId.POLICY) == wanted


def test_a_damaged_check_and_a_cleared_index_are_repaired(hooked: HookedCgroup) -> None:
    """Either makes the hooks find nothing: a covered flow is refused, or no policy applies."""
    hooked.publish(TableId.SPD, *live())
    wanted = hooked.data.table(TableId.SPD)
    assert wanted is not None

    def verify() -> int:
        return asyncio.run(hooked.data.repair(TableId.SPD, wanted))

    assert verify() == 0
    check = layout.KEY_SIZE + 8 + 8 + 28  # of what the entry says now
    with foreign(hooked) as store:
        for one in [one for some in store.entries() for one in some]:
            if layout.unpack_key(packed.key_of_entry(one.raw))[0] == TableId.SPD:
                store.correct(one.place, one.raw[:check] + bytes(4) + one.raw[check + 4 :])
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert verify() == len(live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    with foreign(hooked) as store:
        index = store._slots._index.slots
        for at in range(len(index)):
            index[at] = 0
        del index
    hooked.data.set(Setting.DENY, 0)  # so that no processor remembers what it let pass
    assert hooked.gated("tcp", PEER[4]) != "EPERM", "the policy is not found either"
    assert verify() == 1
    assert verify() == 0
    assert went_out(hooked.gated("tcp", PEER[4]))


def test_maps_grow_with_their_content(hooked: HookedCgroup) -> None:
    first = int(IPv4Address("10.0.0.0"))
    many = [
        Rule(ternary(IPv4Network((first + n, 32))), Entry(State.LIVE, rank=n)) for n in range(5000)
    ]
    before = hooked.data.memory()
    for rules in ([*live(), *many[:40]], [*many, *live()], [*live(), *many[2500:]]):
        hooked.publish(TableId.SPD, *rules)
        assert hooked.data.entry_count() == len(protect()) + len(rules)
        assert hooked.data.table(TableId.SPD) == compile_table(rules)
        assert went_out(hooked.gated("tcp", PEER[4]))
    assert before + 5000 * 128 < hooked.data.memory() < before + 5000 * 512
    hooked.take_over()
    hooked.data.open_ring(hooked.refusals.append)
    assert hooked.data.table(TableId.SPD) == compile_table([*live(), *many[2500:]])
    hooked.publish(TableId.SPD, *many)
    assert hooked.gated("tcp", PEER[4]) == "EPERM"


def test_all_masks_of_one_destination_are_tried(hooked: HookedCgroup) -> None:
    """More than a hook goes through in one part of a search."""
    others = [
        Rule(ternary(THERE[4], mark=(bits, bits)), Entry(State.DEAD)) for bits in range(1, 400)
    ]
    hooked.publish(TableId.SPD, *others, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
    hooked.publish(
        TableId.SPD, *others, Rule(ternary(THERE[4], proto=6), Entry(State.DEAD)), *live()
    )
    assert hooked.gated("tcp", PEER[4]) == "EPERM"
    assert went_out(hooked.gated("sendto", PEER[4]))


@contextlib.contextmanager
def foreign(hooked: HookedCgroup) -> Iterator[Store]:
    """Another writer of the entries, whose places are not in order with the controller's."""
    with Maps(hooked.pins) as maps:
        entries, slots = (maps._nests[name] for name in ("entries", "slots"))
        used = maps.setting(Setting.SLOTS)
        with contextlib.closing(Store(entries, slots, used, lambda _: None, lambda *_: 0)) as store:
            asyncio.run(store.count(let_others_run))
            yield store


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


def test_paths_that_do_not_fit_beside_the_old_ones_replace_them(hooked: HookedCgroup) -> None:
    def paths(first: str) -> list[tuple[IPv4Network, FlowPath]]:
        start = int(IPv4Address(first))
        count = layout.ROUTES - 1
        here = FlowPath(IPv4Address(str(HERE[4])))
        return [(IPv4Network((start + number, 32)), here) for number in range(count)]

    hooked.data.set_paths(HOST, paths("10.0.0.0"))
    hooked.data.set_paths(HOST, [*paths("10.64.0.0"), (THERE[4], FlowPath(HERE[4]))])
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
    hooked.take_over()
    assert hooked.data.entry_count() == len(protect())
    hooked.publish(TableId.SPD, *live())
    assert went_out(hooked.gated("tcp", PEER[4]))
