"""The gate's decisions as transcripts: events in, commands out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from errno import EHOSTUNREACH, EPERM
from ipaddress import ip_address, ip_network
from random import Random

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.negotiations import Negotiations
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, Flow, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    ChildConfig,
    ChildName,
    ChildSa,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables.layout import Entry, Key, Reason, State, TableId, flow_key

LOCAL, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
HERE, THERE = ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")
FLOW = Flow(ip_address("10.2.0.9"), TCP, 80)
ROUTED = replace(FLOW, saddr=ip_address("10.1.0.1"))

NAME = ChildName("peer", "net")
NET = ChildConfig(NAME, Mode.TUNNEL, (TrafficSelector(HERE),), (TrafficSelector(THERE),))
TRAP = SpdEntry(
    SpdKey(Selector(HERE, THERE)),
    priority=383616,
    action=Action.PROTECT,
    templates=(Template(ESP, Mode.TUNNEL, reqid=1, saddr=LOCAL, daddr=PEER),),
)
SA = Sa(SaId(PEER, 0xC0FFEE01, ESP), LOCAL, reqid=1, mode=Mode.TUNNEL)
# The policy that comes with the SA: it names the SPI, and takes the place of the trap.
PINNED = replace(TRAP, templates=(replace(TRAP.templates[0], spi=SA.id.spi),))
UP = (on.SaSet(SA), on.PolicySet(PINNED))
LISTED = ChildSa(
    NAME,
    1,
    0x11,
    0xC0FFEE01,
    PEER,
    (TrafficSelector(HERE),),
    (TrafficSelector(THERE),),
    local_host=LOCAL,
)

REFUSED = on.FlowRefused(FLOW, Reason.REFUSE_UNCOVERED, policy=0, pid=9, comm="curl", cgroup=1)
SOURCES = on.SourcesResolved(((THERE, ip_address("10.1.0.1")),))


class Transcript:
    """A gate, and the hooks' tables as its commands made them."""

    def __init__(
        self, settings: Settings | None = None, remembered: Iterable[ChildConfig] = ()
    ) -> None:
        self.gate = Gate(settings or Settings(), tuple(remembered), Negotiations(Random(1)))
        self.tables: dict[TableId, dict[tuple[int, Key], Entry]] = {}
        self.take(self.gate.start())

    def take(self, commands: Iterable[do.Command]) -> list[do.Command]:
        taken = list(commands)
        for command in taken:
            if isinstance(command, do.Publish):
                self.tables[command.table] = dict(command.content.entries)
            elif isinstance(command, do.SetEntry):
                assert (command.index, command.key) in self.tables[command.table]
                self.tables[command.table][command.index, command.key] = command.entry
        return taken

    def after(self, *events: on.Event) -> list[do.Command]:
        return [c for event in events for c in self.take(self.gate.step(event))]

    def entry(self, table: TableId, flow: Flow) -> Entry | None:
        """Answer as the hook would, from what the commands wrote."""
        masks = self.gate.hook_tables.tables[table].masks
        for index, mask in enumerate(masks):
            found = self.tables[table].get((index, flow_key(flow).masked(mask)))
            if found is not None:
                return found
        return None

    def is_open(self) -> bool:
        entry = self.entry(TableId.SPD, ROUTED)
        return entry is not None and entry.state is State.LIVE

    @property
    def errno(self) -> int:
        entry = self.entry(TableId.POLICY, ROUTED)
        assert entry is not None
        assert entry.state is State.PROTECT
        return entry.error


def connected(*established: ChildSa) -> on.IkeConnected:
    return on.IkeConnected((NET,), established, pid=42)


@pytest.fixture
def trapped() -> Transcript:
    """IKE connected, its trap in the kernel, no SA."""
    story = Transcript()
    story.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    return story


def initiated(commands: Iterable[do.Command]) -> list[ChildName]:
    return [c.name for c in commands if isinstance(c, do.Initiate)]


def test_first_connection(trapped: Transcript) -> None:
    assert not trapped.is_open()
    assert initiated(trapped.after(REFUSED)) == [NAME]
    assert trapped.gate.negotiations.of[NAME].coverage is Coverage.NEGOTIATING

    assert not trapped.after(on.SaSet(SA)), "the trap says nothing of what the peer agreed to"
    opened = trapped.after(on.PolicySet(PINNED))
    assert isinstance(opened[0], do.SetEntry), "the first command opens, in one write"
    assert trapped.is_open()
    assert trapped.gate.negotiations.of[NAME].coverage is Coverage.COVERED


def test_one_negotiation_however_many_flows_ask(trapped: Transcript) -> None:
    flows = [replace(FLOW, daddr=ip_address(f"10.2.{i}.1"), dport=i + 1) for i in range(100)]
    commands = trapped.after(*(replace(REFUSED, flow=flow) for flow in flows))
    assert initiated(commands) == [NAME]


def test_what_the_kernel_told_at_one_go_is_answered_once(trapped: Transcript) -> None:
    trapped.after(REFUSED)
    inbound = replace(SA, id=SaId(LOCAL, 0x11, ESP), saddr=PEER)
    commands = trapped.take(trapped.gate.step(on.SaSet(inbound), *UP))
    assert [type(c) for c in commands].count(do.SetEntry) == 1
    assert trapped.is_open()
    commands = trapped.take(trapped.gate.step(on.SaGone(SA.id), REFUSED, on.SaSet(SA)))
    assert trapped.is_open()


def test_without_a_trap_the_sa_alone_does_not_open() -> None:
    story = Transcript()
    story.after(on.KernelSnapshot((), ()), connected(), SOURCES, REFUSED)
    story.after(on.SaSet(SA))
    assert not story.is_open()
    story.after(on.PolicySet(PINNED))
    assert story.is_open()


@pytest.mark.parametrize(
    "closing",
    [
        on.SaGone(SA.id),
        on.SasFlushed(),
        on.PolicyGone(TRAP.key),
        on.PoliciesFlushed(),
        on.PolicySet(replace(TRAP, action=Action.DISCARD, templates=())),
        on.PolicySet(replace(TRAP, templates=(replace(TRAP.templates[0], reqid=9),))),
        on.KernelSnapshot((TRAP,), ()),
        on.IkeGone("connection closed"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_closes_a_flow(trapped: Transcript, closing: on.Event) -> None:
    trapped.after(REFUSED, *UP)
    assert trapped.is_open()
    first = trapped.after(closing)[0]
    assert isinstance(first, do.SetEntry | do.Publish), "closing comes before all else"
    assert not trapped.is_open()
    assert trapped.gate.negotiations.of[NAME].coverage is Coverage.UNCOVERED


def test_a_higher_priority_policy_takes_over(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    bypass = replace(TRAP, key=SpdKey(Selector(HERE, ip_network("10.2.0.0/24"))), priority=1,
                     action=Action.BYPASS, templates=())  # fmt: skip
    trapped.after(on.PolicySet(bypass))
    assert not trapped.is_open(), "the kernel would send it in clear now"
    trapped.after(on.PolicyGone(bypass.key))
    assert trapped.is_open()


def test_rekeying_has_no_gap(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    new = replace(SA, id=SaId(PEER, 0xC0FFEE02, ESP))
    named = replace(TRAP, templates=(replace(TRAP.templates[0], spi=new.id.spi),))
    for event in (on.SaSet(new), on.PolicySet(named), on.SaGone(SA.id)):
        trapped.after(event)
        assert trapped.is_open()


def test_an_sa_that_the_daemon_does_not_know_is_not_trusted() -> None:
    story = Transcript()
    story.after(on.KernelSnapshot((TRAP,), (SA,)), connected(), SOURCES)
    assert not story.is_open(), "left by a daemon that was killed"
    story.after(connected(LISTED))
    assert story.is_open()


def test_a_restarted_controller_waits_for_both_truths() -> None:
    """Half the truth would refuse what a predecessor's table rightly lets go."""
    for first, second in ((0, 1), (1, 0)):
        story = Transcript()
        events = (on.KernelSnapshot((TRAP,), (SA,)), connected(LISTED))
        assert not any(
            isinstance(c, do.Publish) and c.table is TableId.SPD for c in story.after(events[first])
        )
        story.after(events[second])
        assert story.is_open()


def test_failure_backs_off_and_tells_the_errno(trapped: Transcript) -> None:
    assert trapped.errno == EPERM
    trapped.after(REFUSED)
    commands = trapped.after(on.NegotiationFailed(NAME, "AUTHENTICATION_FAILED"))
    pauses = [c.seconds for c in commands if isinstance(c, do.StartTimer)]
    assert len(pauses) == 1
    assert 0.75 <= pauses[0] <= 1.25
    assert trapped.errno == EHOSTUNREACH
    assert trapped.gate.negotiations.of[NAME].last_error == "AUTHENTICATION_FAILED"
    assert initiated(trapped.after(REFUSED)) == []

    trapped.after(on.TimerFired(on.Timer("retry", NAME)))
    assert trapped.errno == EPERM
    assert initiated(trapped.after(REFUSED)) == [NAME]


def test_a_silent_peer_runs_into_the_limit(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.TimerFired(on.Timer("limit", NAME)))
    item = trapped.gate.negotiations.of[NAME]
    assert item.coverage is Coverage.BACK_OFF
    assert "no answer from IKE" in item.last_error


@pytest.mark.parametrize("within", [True, False])
def test_a_child_that_is_up_for_ike_only_is_deleted(trapped: Transcript, within: bool) -> None:
    """Somebody flushed the kernel's databases; IKE would answer "up" for ever."""
    remote = THERE if within else ip_network("10.2.7.0/24")
    listed = replace(LISTED, remote=(TrafficSelector(remote),))
    commands = trapped.after(REFUSED, on.NegotiationDone(NAME))
    assert do.AskIke() in commands
    commands = trapped.after(connected(listed), on.TimerFired(on.Timer("limit", NAME)))
    assert (do.Terminate(NAME) in commands) == within
    item = trapped.gate.negotiations.of[NAME]
    assert item.coverage is Coverage.BACK_OFF
    assert "up, says IKE" in item.last_error


def test_done_before_the_kernel_shows_it_is_not_a_failure(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.NegotiationDone(NAME), *UP)
    trapped.after(on.TimerFired(on.Timer("limit", NAME)))
    assert trapped.gate.negotiations.of[NAME].coverage is Coverage.COVERED


def test_back_off_grows_to_its_limit(trapped: Transcript) -> None:
    pauses = []
    for _ in range(10):
        trapped.after(REFUSED)
        commands = trapped.after(on.NegotiationFailed(NAME, "no"))
        pauses += [c.seconds for c in commands if isinstance(c, do.StartTimer)]
        trapped.after(on.TimerFired(on.Timer("retry", NAME)))
    assert pauses[0] < pauses[3] < pauses[5]
    assert max(pauses) <= 75


def test_the_route_that_comes_with_the_sa_decides_the_source() -> None:
    """Tunnel mode: the unbound source is in the policy only once strongSwan's route is."""
    story = Transcript()
    outer = on.SourcesResolved(((THERE, LOCAL),))
    story.after(on.KernelSnapshot((), ()), connected(), outer)
    assert initiated(story.after(REFUSED)) == [NAME]
    story.after(*UP)
    assert story.gate.negotiations.of[NAME].coverage is Coverage.NEGOTIATING
    story.after(SOURCES)
    assert story.gate.negotiations.of[NAME].coverage is Coverage.COVERED


def test_what_ike_told_is_remembered_and_protected_without_it() -> None:
    first = Transcript()
    (kept,) = [c for c in first.after(connected()) if isinstance(c, do.Remember)]
    later = Transcript(remembered=kept.children)
    assert later.errno == EPERM
    later.after(on.IkeConnected((), (), pid=7))
    assert later.errno == EPERM, "a daemon that lost its connections opens nothing"


def test_configured_policies_hide_the_derived_ones() -> None:
    policy = Policy("db", (ip_network("10.2.0.0/24"),), proto=TCP, ports=(5432, 5432), child="net")
    story = Transcript(Settings(policies=(policy,)))
    story.after(on.KernelSnapshot((TRAP,), ()), connected())
    assert story.entry(TableId.POLICY, ROUTED) is None
    database = replace(FLOW, dport=5432)
    assert story.entry(TableId.POLICY, replace(ROUTED, dport=5432)) == Entry(State.PROTECT, EPERM)
    assert initiated(story.after(replace(REFUSED, flow=database))) == [NAME]


def test_a_policy_to_start_negotiates_unasked() -> None:
    policy = Policy("net", (THERE,), child="net", start=True)
    story = Transcript(Settings(policies=(policy,)))
    story.after(on.KernelSnapshot((TRAP,), ()))
    assert initiated(story.after(connected())) == [NAME]
    assert initiated(story.after(connected())) == []


def test_a_flow_that_no_child_protects_is_told_not_negotiated(trapped: Transcript) -> None:
    bound_elsewhere = replace(FLOW, saddr=ip_address("172.16.0.1"))
    commands = trapped.after(replace(REFUSED, flow=bound_elsewhere))
    assert commands == [do.AskIke()]
    commands = trapped.after(connected())
    assert initiated(commands) == []
    assert [c.text for c in commands if isinstance(c, do.Log)] == [
        "no CHILD_SA that is loaded would protect tcp 10.2.0.9:80"
    ]
    assert trapped.after(connected()) == [], "told once"


def test_a_connection_loaded_a_moment_ago_is_looked_for_at_once(trapped: Transcript) -> None:
    trapped.after(on.IkeConnected((), (), pid=42))
    assert trapped.after(REFUSED) == [do.AskIke()]
    assert initiated(trapped.after(connected())) == [NAME]


def test_ike_is_exempt_while_it_is_there(trapped: Transcript) -> None:
    story = Transcript()
    assert do.ExemptIke(42) in story.after(connected())
    assert do.ExemptIke(0) in story.after(on.IkeGone("connection closed"))


def test_tables_that_do_not_fit_refuse() -> None:
    story = Transcript()
    many = tuple(
        replace(TRAP, key=SpdKey(Selector(HERE, ip_network(f"10.2.0.0/{n}"))), priority=99 - n)
        for n in range(15, 33)
    ) + tuple(
        replace(TRAP, key=SpdKey(Selector(ip_network(f"10.1.0.0/{n}"), THERE)), priority=99 - n)
        for n in range(17, 33)
    )
    story.after(on.KernelSnapshot(many, (SA,)), connected(LISTED), SOURCES)
    ends = [(near, far) for near in range(16) for far in range(16)]
    flows = [replace(ROUTED, saddr=HERE[1 << near], daddr=THERE[1 << far]) for near, far in ends]
    entries = [story.entry(TableId.SPD, flow) for flow in flows]
    closed = [entry is None or entry.state is not State.LIVE for entry in entries]
    assert any(closed)
    assert any("SPD table" in error for error in story.gate.policy_table.errors)
    story.after(on.KernelSnapshot((TRAP,), (SA,)))
    assert story.is_open()
    assert story.gate.policy_table.errors == []


def test_a_policy_to_start_without_its_child_asks_no_more_than_it_is_told() -> None:
    story = Transcript(Settings(policies=(Policy("net", (THERE,), child="net", start=True),)))
    story.after(on.KernelSnapshot((TRAP,), ()))
    nothing = on.IkeConnected((), (), pid=42)
    for _ in range(3):
        commands = story.after(nothing)
        assert do.AskIke() not in commands
    assert initiated(story.after(connected())) == [NAME]


def test_what_must_be_protected_only_grows() -> None:
    story = Transcript()
    story.after(connected())
    narrower = replace(NET, remote=(TrafficSelector(ip_network("10.2.3.0/24")),))
    story.after(on.IkeConnected((narrower,), (), pid=42))
    assert story.errno == EPERM


def test_a_connection_whose_peer_is_not_known_is_told(trapped: Transcript) -> None:
    trapped.after(
        on.IkeConnected((NET, replace(NET, name=ChildName("peer", "any"), remote=())), (), pid=42)
    )
    assert any("connection peer/any" in error for error in trapped.gate.policy_table.errors)
    trapped.after(connected())
    assert trapped.gate.policy_table.errors == []


def test_a_kernel_policy_of_an_unknown_connection_has_ike_looked_at(trapped: Transcript) -> None:
    news = replace(TRAP, key=SpdKey(Selector(HERE, ip_network("10.3.0.0/16"))))
    assert do.AskIke() in trapped.after(on.PolicySet(news))
    assert do.AskIke() not in trapped.after(on.PolicySet(PINNED))


def test_refusals_do_not_hold_up_what_closes(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    commands = trapped.take(trapped.gate.step(*[REFUSED] * 1000, on.SaGone(SA.id)))
    assert isinstance(commands[0], do.SetEntry)
    assert not trapped.is_open()


def test_policies_that_do_not_fit_protect_their_networks_whole() -> None:
    wide = tuple(
        Policy(f"p{n}", (ip_network(f"10.0.0.0/{n}"),), proto=TCP, ports=(1, 65534))
        for n in (24, 16, 8)
    )
    story = Transcript(Settings(policies=wide))
    assert any("POLICY table" in error for error in story.gate.policy_table.errors)
    inside = Flow(ip_address("10.9.9.9"), 17, 53, ip_address("10.1.0.1"))
    entry = story.entry(TableId.POLICY, inside)
    assert entry is not None
    assert entry.state is State.PROTECT
    assert story.entry(TableId.POLICY, replace(inside, daddr=ip_address("8.8.8.8"))) is None


def test_a_check_that_tells_news_is_counted_and_mended(trapped: Transcript) -> None:
    trapped.after(*UP)
    assert trapped.is_open()
    same = on.KernelSnapshot((PINNED,), (SA,), check=True)
    assert [c for c in trapped.after(same) if isinstance(c, do.Log)] == []
    assert trapped.gate.protection.drift == 0
    told = trapped.after(on.KernelSnapshot((PINNED,), (), check=True))
    assert told[0] == do.Log("error", "1 policies or SAs were not as the kernel has them: mended")
    assert trapped.gate.protection.drift == 1
    assert not trapped.is_open()


def test_a_check_compares_every_table(trapped: Transcript) -> None:
    tables = trapped.gate.hook_tables.tables
    assert tables.keys() == set(TableId)
    assert trapped.after(on.CheckDue()) == [do.Verify(*item) for item in tables.items()]


def test_where_sockets_are_to_be_ended_a_lost_sa_says_so_and_whose() -> None:
    story = Transcript(Settings(destroy=True))
    story.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES, *UP)
    assert story.is_open()
    assert not story.gate.is_cut_off(ROUTED)
    renewed = replace(SA, id=replace(SA.id, spi=0xC0FFEE02))
    pinned = replace(TRAP, templates=(replace(TRAP.templates[0], spi=0xC0FFEE02),))
    rekeyed = story.after(on.SaSet(renewed), on.PolicySet(pinned), on.SaGone(SA.id))
    assert do.CutOff() not in rekeyed, "make before break"
    assert do.CutOff() in story.after(on.PolicySet(TRAP), on.SaGone(renewed.id))
    assert story.gate.is_cut_off(ROUTED)
    assert not story.gate.is_cut_off(replace(ROUTED, daddr=ip_address("192.0.2.77")))


def test_where_they_are_only_blocked_nothing_is_ended(trapped: Transcript) -> None:
    trapped.after(*UP)
    assert do.CutOff() not in trapped.after(on.PolicySet(TRAP), on.SaGone(SA.id))


def test_policies_that_do_not_fit_even_as_networks_protect_everything() -> None:
    networks = tuple(ip_network((number << 8, 24)) for number in range(1 << 16, (1 << 16) + 17_000))
    one = Policy("all", networks, proto=TCP, ports=(1, 7))
    bypass = Policy("first", (ip_network("192.0.2.0/24"),), Action.BYPASS)
    story = Transcript(Settings(policies=(bypass, one)))
    entry = story.entry(TableId.POLICY, replace(FLOW, daddr=ip_address("198.51.100.1")))
    assert entry is not None
    assert (entry.state, entry.id) == (State.PROTECT, 1)
    assert "entries" in story.gate.policy_table.errors[0]
