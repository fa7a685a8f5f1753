"""What a step closes while a large change is being written goes before all that waits."""

from __future__ import annotations

from ipaddress import ip_network

from ipsecgate.controller.command_queue import CommandQueue, Entries
from ipsecgate.core.gate import commands as do
from ipsecgate.core.tables.layout import Entry, State, TableId
from ipsecgate.core.tables.table import Table, Ternary, ternary

LIVE, DEAD = Entry(State.LIVE), Entry(State.DEAD)
A, B, C = (ternary(ip_network(f"10.0.0.{n}/32")) for n in range(3))
LOG, INITIATE = do.Log("info", "text"), do.ExemptIke(1)


class Cut:
    """Cuts what is live in a table, as `Tables.cut` does."""

    def __init__(self, *live: Ternary) -> None:
        self.live = {*live}

    def __call__(self, _table: TableId, entries: Entries) -> dict[Ternary, Entry | None]:
        done = self.live & entries.keys()
        self.live -= done
        return {match: now for match, now in entries.items() if match not in done}


def taken(queue: CommandQueue) -> list[do.Command]:
    found = []
    while (command := queue.take()) is not None:
        found.append(command)
    return found


def change(entries: dict[Ternary, Entry | None], table: TableId = TableId.SPD) -> do.Change:
    return do.Change(table, entries)


def test_log_messages_of_a_step_come_after_its_other_commands() -> None:
    queue = CommandQueue(Cut())
    queue.put([LOG, INITIATE, change({A: LIVE})])
    queue.put([INITIATE])
    assert taken(queue) == [INITIATE, change({A: LIVE}), LOG, INITIATE]


def test_what_closes_is_done_at_once_and_the_rest_of_its_step_after_what_waits() -> None:
    cut = Cut(A)
    queue = CommandQueue(cut)
    queue.put([do.SetTunnels(frozenset({1}))])
    assert queue.overtake([change({A: DEAD, C: DEAD}), LOG, INITIATE])
    assert not cut.live
    assert taken(queue) == [do.SetTunnels(frozenset({1})), change({C: DEAD}), INITIATE, LOG]


def test_what_waits_does_not_open_again_what_was_closed() -> None:
    queue = CommandQueue(Cut(A))
    publish = do.Publish(TableId.SPD, Table())
    queue.put([publish, change({A: LIVE, B: LIVE, C: LIVE}), change({A: LIVE}, TableId.POLICY)])
    assert queue.overtake([change({A: None, C: DEAD})])
    assert taken(queue) == [
        publish,
        change({A: None, B: LIVE, C: DEAD}),
        change({A: LIVE}, TableId.POLICY),
        change({C: DEAD}),
    ]


def test_no_table_is_restored_to_what_it_was_before_something_was_closed() -> None:
    queue = CommandQueue(Cut(A))
    other = do.Verify(TableId.POLICY, Table())
    queue.put([do.Verify(TableId.SPD, Table()), other])
    assert queue.overtake([change({A: DEAD})])
    assert taken(queue) == [other]


def test_a_step_that_closes_nothing_waits() -> None:
    queue = CommandQueue(Cut(A))
    queue.put([do.SetTunnels(frozenset({1}))])
    assert not queue.overtake([INITIATE])
    assert taken(queue) == [do.SetTunnels(frozenset({1})), INITIATE]
