"""Every transition in the life of an SA, under traffic from a gated process.

In each the kernel alone says when a flow was covered (`tests.system.life`): outside its gaps
nothing is refused, inside them everything, and nothing is ever in clear.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.holding import paused
from tests.system.life import Life, ask, ike_sas, until
from tests.system.pulse import KINDS, Target
from tests.system.witness import ProtectionSource

pytestmark = pytest.mark.second_guest

PORT, CLOSED_PORT = 7200, 7201
LONG = 100  # ms, one way: what an SA's absence must outlast is twice the tolerance
SPEC = ConnSpec("net", "tunnel", 4, start_action="trap")
TRANSPORT = ConnSpec("host", "transport", 6, start_action="trap")
Begin = Callable[..., Life]
HOSTS = pytest.mark.parametrize("side", ["a", "b"])


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-life") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        lab.b.serve("udp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache) as gate:
        for spec in (SPEC, TRANSPORT):
            module_lab.load(spec)
            gate.wait_policy(spec.name)
        yield gate


@pytest.fixture(scope="module")
def witness(module_lab: Lab) -> Iterator[ProtectionSource]:
    witness = ProtectionSource(module_lab.a.namespace, module_lab.a.outer.values())
    yield witness
    witness.close()


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.set_delay(0)
    module_lab.reset()
    return module_lab


def targets(lab: Lab, spec: ConnSpec = SPEC) -> list[Target]:
    """A port that nobody listens on answers a SYN with a RST, and host a with nothing more."""
    address = str(lab.b.address(spec))
    return [(kind, address, CLOSED_PORT if kind == "tcp" else PORT, "") for kind in KINDS]


@pytest.fixture
def life(lab: Lab, gate: Gated, witness: ProtectionSource, request: pytest.FixtureRequest) -> Begin:
    """Make a `Life` whose process speaks under the SA of a connection already."""

    def begin(
        spec: ConnSpec = SPEC,
        to: Sequence[Target] = (),
        load: Callable[[ConnSpec], object] = lab.load,
    ) -> Life:
        to = to or targets(lab, spec)
        return Life(lab, gate, witness, request.node.name, to, lambda: load(spec))

    return begin


def host(lab: Lab, side: str) -> Host:
    return lab.a if side == "a" else lab.b


@contextlib.contextmanager
def configured(one: Host, settings: str) -> Iterator[None]:
    """Have these settings of charon in force for the IKE_SAs that begin in the block."""
    one.charon.configure(settings)
    try:
        yield
    finally:
        one.charon.configure("")


# --- replaced by another -----------------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("spec", [SPEC, TRANSPORT], ids=lambda spec: spec.mode)
def test_child_rekeyed(lab: Lab, life: Begin, side: str, spec: ConnSpec) -> None:
    with life(spec) as story:
        host(lab, side).charon.rekey(spec.child_name)
        story.wait("DELSA")
    story.record.judge()


def test_child_rekeyed_by_both_at_once(lab: Lab, life: Begin) -> None:
    lab.set_delay(LONG)
    log = lab.a.charon.log
    with life() as story:
        before = len(log.read_text())

        def collided() -> bool:
            """One of them may be late, and the two requests not be under way at one time."""
            told = time.monotonic()
            both(lab, lambda one: one.charon.rekey(SPEC.child_name))
            story.wait("DELSA", since=told)
            time.sleep(0.5)
            return "collision" in log.read_text()[before:]

        until(collided, "never both at once")
    story.record.judge()


@HOSTS
def test_ike_rekeyed(lab: Lab, life: Begin, side: str) -> None:
    with life() as story:
        before = ike_sas(lab.a)
        ask(host(lab, side), "rekey", ike=SPEC.name)
        until(lambda: ike_sas(lab.a).isdisjoint(before), "no other IKE_SA")
    story.record.judge()


@HOSTS
def test_reauthenticated_make_before_break(lab: Lab, life: Begin, side: str) -> None:
    with configured(host(lab, side), "make_before_break = yes"), life() as story:
        before = ike_sas(lab.a)
        ask(host(lab, side), "rekey", ike=SPEC.name, reauth="yes")
        until(lambda: ike_sas(lab.a).isdisjoint(before), "no other IKE_SA")
        story.wait("DELSA")
    story.record.judge()


def stay_up(lab: Lab) -> None:
    """Wait until both sides have a child, and the same IKE_SA for a while."""

    def is_up() -> bool:
        before = ike_sas(lab.a)
        time.sleep(0.5)
        return all(one.established() for one in (lab.a, lab.b)) and ike_sas(lab.a) == before

    until(is_up, "they do not stay up")


@HOSTS
def test_reauthenticated_break_before_make(lab: Lab, life: Begin, side: str) -> None:
    lab.set_delay(10)
    with configured(host(lab, side), "make_before_break = no"), life() as story:
        ask(host(lab, side), "rekey", ike=SPEC.name, reauth="yes")
        story.wait_sa(story.wait("DELSA"))
        stay_up(lab)
    story.record.judge(None)
    assert story.record.inner_gaps, "two where both ends began anew, and one IKE_SA went again"


def both(lab: Lab, act: Callable[[Host], object]) -> None:
    threads = [threading.Thread(target=act, args=(one,)) for one in (lab.a, lab.b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_both_initiate_at_once(lab: Lab, life: Begin) -> None:
    lab.set_delay(1000)  # neither knows of the other's for three times that
    with life() as story:
        ask(lab.a, "terminate", ike=SPEC.name)
        lab.b.charon.initiate(SPEC.child_name)
        story.wait_sa(story.wait("DELSA"))
        until(lambda: len(lab.a.established()) == 2, "not two")
        assert len(ike_sas(lab.a)) == 2
    story.record.judge(1)


# --- taken away --------------------------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("what", ["child", "ike"])
def test_deleted(lab: Lab, life: Begin, side: str, what: str) -> None:
    lab.set_delay(LONG)
    with life() as story:
        ask(host(lab, side), "terminate", **{what: SPEC.name})
        story.wait_sa(story.wait("DELSA"))
    story.record.judge(1)


@pytest.mark.parametrize(
    ("spec", "lost"),
    [(SPEC, "state"), (SPEC, "policy in"), (TRANSPORT, "state")],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_the_half_that_comes_in_is_lost(
    lab: Lab, gate: Gated, life: Begin, spec: ConnSpec, lost: str
) -> None:
    """Nothing is refused, and every answer dropped: the gate has the child made anew."""
    what, *direction = lost.split()
    ends = [str(lab.b.outer[spec.family]), "dst", str(lab.a.outer[spec.family])]
    where = ["dir", *direction] if direction else ["src", *ends]
    told = f"{spec.name}/{spec.child_name}: the kernel has lost its inbound SA"
    before = gate.log.read_text().count(told)
    with life(spec) as story:
        assert inbound(lab, spec)
        assert gate.process is not None
        with paused(gate.process.pid):  # or it makes the child anew before we look
            lab.a.run(["ip", "xfrm", what, "deleteall", *where])
            assert not inbound(lab, spec)
            assert lab.a.established(), "IKE believes in it"
        story.wait_sa(story.wait("DELSA"))
        assert inbound(lab, spec)
    story.record.judge(1)
    assert gate.log.read_text().count(told) == before + 1


def inbound(lab: Lab, spec: ConnSpec) -> bool:
    """Tell whether the kernel has an inbound state, and an inbound policy."""
    state = f"src {lab.b.outer[spec.family]} dst {lab.a.outer[spec.family]}"
    policies = lab.a.run(["ip", "xfrm", "policy"]).stdout
    return state in lab.a.run(["ip", "xfrm", "state"]).stdout and "dir in " in policies


def test_hard_expiry(lab: Lab, life: Begin) -> None:
    spec = replace(SPEC, child_options={"rekey_time": "0", "life_time": "2", "rand_time": "0"})
    lab.set_delay(LONG)
    with life(spec) as story:
        story.wait_sa(story.wait("EXPIRE"))
    story.record.judge(None)
    assert story.record.inner_gaps


@pytest.mark.parametrize("action", ["clear", "trap"])
def test_dead_peer(lab: Lab, life: Begin, action: str) -> None:
    """Without TCP: an answer from the peer is a sign of life, and puts off the question."""
    spec = replace(SPEC, options={"dpd_delay": "1"}, child_options={"dpd_action": action})
    with configured(lab.a, HASTY), life(spec, targets(lab)[:2]) as story:
        lab.drop_ike()
        lost = story.wait("DELSA")
        lab.drop_ike(False)
        story.wait_sa(lost)
    story.record.judge(1)


def test_peer_crashes_and_returns(lab: Lab, life: Begin) -> None:
    spec = replace(SPEC, options={"dpd_delay": "1"})
    with configured(lab.a, HASTY), life(spec) as story:
        lab.b.charon.kill()
        lab.b.namespace.flush_xfrm()
        lab.restart(lab.b)
        lab.load(spec, lab.a)
        story.wait_sa(story.wait("DELSA"))
    story.record.judge(1)


def test_connection_unloaded_and_loaded(lab: Lab, life: Begin) -> None:
    with life() as story:
        lab.a.charon.unload(SPEC.name)
        ask(lab.a, "terminate", child=SPEC.child_name)
        lost = story.wait("DELSA")
        time.sleep(0.3)
        lab.load(SPEC)
        story.wait_sa(lost)
    story.record.judge(1)


def test_what_is_to_start_comes_back_unasked(lab: Lab, cache: Path) -> None:
    policy = 'name = "net"\nremote = ["203.0.113.0/24"]\ninitiate = "start"'
    lab.load(replace(SPEC, start_action="none"))
    gone: set[bytes] = set()

    def is_up() -> bool:
        both = all(host.established() for host in (lab.a, lab.b))
        return both and gone.isdisjoint(ike_sas(lab.a))

    with Gated(lab, policies=f"[[policy]]\n{policy}\n", cache=cache):
        until(is_up, "not started")
        for side in (lab.a, lab.b):
            gone |= ike_sas(lab.a)
            ask(side, "terminate", ike=SPEC.name)
            until(is_up, "not started again")


@HOSTS
def test_deleted_without_a_trap(lab: Lab, life: Begin, side: str) -> None:
    lab.set_delay(LONG)
    with life(replace(SPEC, start_action="none")) as story:
        ask(host(lab, side), "terminate", child=SPEC.name)
        story.wait_sa(story.wait("DELSA"))
    story.record.judge(1)


# --- the daemon -------------------------------------------------------------------------


def test_charon_ends_and_starts(lab: Lab, life: Begin) -> None:
    with life() as story:
        told = time.monotonic()
        lab.a.charon.stop()
        lab.restart(lab.a)
        lab.load(SPEC)
        # It ends when it gets to it, and the gate knows before the SAs go.
        story.uncertain.append((told, story.wait("DELSA")))
        story.wait_sa(told)
    story.record.judge(1)


def test_charon_killed_leaves_sas_that_nobody_trusts(lab: Lab, life: Begin) -> None:
    with life() as story:
        told = time.monotonic()
        lab.a.charon.kill()
        killed = time.monotonic()
        lab.restart(lab.a)
        lab.load(SPEC)
        story.uncertain.append((told, killed))
        story.uncovered.append((killed, story.wait_sa(killed)))
    story.record.judge(1)


# --- less than it seems --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reqid", "acquire"])
def test_the_peer_narrowed_what_the_trap_is_for(lab: Lab, life: Begin, how: str) -> None:
    """The trap and the SA share a reqid, so the kernel would send all of it; the peer drops it."""
    spec = replace(SPEC, child_options={"reqid": "7"} if how == "reqid" else {})
    inside = targets(lab)
    outside = [(kind, "203.0.113.77", port, source) for kind, _, port, source in inside]

    def load(spec: ConnSpec) -> None:
        here, there = lab.a.end(spec, ()), lab.b.end(spec, ())
        lab.b.charon.load(connection(spec, lab.b.end(spec, ("203.0.113.0/28",)), here, "none"))
        lab.a.charon.load(connection(spec, here, there, "trap"))
        if how == "acquire":
            lab.a.client("udp-client", lab.b.address(spec), PORT, "--count", "1").result()

    with life(spec, [*inside, *outside], load) as story:
        story.patience = 0
        time.sleep(0.3)
    story.record_of(inside).judge()
    assert {a.error for a in story.record_of(outside).attempts} == {"EPERM"}


def test_a_narrower_trap_takes_over(lab: Lab, life: Begin) -> None:
    narrow = replace(SPEC, name="narrow", remote_ts=("203.0.113.1/32",))
    with life() as story:
        told = time.monotonic()
        lab.load(narrow)
        began = story.wait("NEWPOLICY", since=told)
        story.uncovered.append((began, story.wait_sa(began)))
    story.record.judge(1)
