"""A host with two addresses and a tunnel from each to the same networks.

The routes decide which tunnel an unbound socket uses: strongSwan's own routes with a preferred
source (table 220), which come and go with the tunnels, and any others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.connections import End, connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.recorder import Recorder
from ipsecgate.lab.xfrm_events import XfrmEvent
from tests.system.observation import REFUSALS, Observation, Wanted
from tests.system.prober import KINDS, Target
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT, CLOSED_PORT = 7300, 7301
REMOTE, THERE = "203.0.113.0/24", "203.0.113.1"
NETWORKS = {"one": "198.51.100.0/25", "two": "198.51.100.128/25"}
SOURCES = {"one": "198.51.100.1", "two": "198.51.100.129"}
PERIOD = 0.02  # seconds between rounds of nine targets
ROUNDS = 30


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-sources") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.b.serve("udp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache) as gate:
        load(module_lab, "one")
        gate.wait_policy("one")
        yield gate


@pytest.fixture(scope="module")
def recorder(module_lab: Lab) -> Iterator[Recorder]:
    with Recorder(module_lab.a.namespace, outer(module_lab).values()) as recorder:
        yield recorder


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.reset()
    ip(module_lab, f"address replace {SOURCES['two']}/32 dev lo")
    ip(module_lab, "route flush table 220")
    return module_lab


Begin = Callable[..., Observation]


@pytest.fixture
def observe(lab: Lab, gate: Gated, recorder: Recorder, request: pytest.FixtureRequest) -> Begin:
    """Observe the named tunnels; the process calls from each tunnel's source, and unbound."""

    def begin(*names: str, start_action: str = "trap") -> Observation:
        def start() -> None:
            for name in names:
                load(lab, name, start_action)

        to = [target for name in names for target in targets(name)] + targets()
        return Observation(lab, gate, recorder, request.node.name, to, start, PERIOD)

    return begin


def outer(lab: Lab) -> dict[str, Address]:
    return {"one": lab.a.outer[4], "two": lab.a.bare[4]}


def load(lab: Lab, name: str, start_action: str = "trap") -> None:
    spec = ConnSpec(name, "tunnel", 4)
    here = End(f"{name}@a.example", outer(lab)[name], (NETWORKS[name],))
    there = End(f"{name}@b.example", lab.b.outer[4], (REMOTE,))
    lab.b.charon.load(connection(spec, there, here, "none"))
    lab.a.charon.load(connection(spec, here, there, start_action))


def targets(name: str = "") -> list[Target]:
    source = SOURCES.get(name, "")
    return [(kind, THERE, CLOSED_PORT if kind == "tcp" else PORT, source) for kind in KINDS]


def ip(lab: Lab, command: str) -> None:
    lab.a.run(["ip", *command.split()])


def of_tunnel(lab: Lab, name: str) -> Wanted:
    """Match a tunnel's SAs (by outer source) and policies (by inner network)."""
    mine = {outer(lab)[name], type(outer(lab)[name])(NETWORKS[name].split("/")[0])}

    def wanted(event: XfrmEvent) -> bool:
        return event.saddr in mine

    return wanted


def hint(lab: Lab, source: str) -> float:
    """Set the preferred source in strongSwan's table; return a time just before that."""
    with lab.a.namespace.route() as route:
        began = time.monotonic()
        route.route("replace", dst=REMOTE, gateway="192.0.2.2", prefsrc=source, table=220)
    return began


def unbound_source(lab: Lab) -> str:
    words = lab.a.run(["ip", "route", "get", THERE]).stdout.split()
    return words[words.index("src") + 1]


def both_up(lab: Lab) -> None:
    wait_until(lambda: set(lab.a.established()) == {"one", "two"}, "not both are up")
    time.sleep(0.1)


def test_each_source_depends_on_its_own_tunnel(lab: Lab, observe: Begin) -> None:
    with observe("one", "two") as observed:
        both_up(lab)
        for name in SOURCES:
            since = time.monotonic()
            lab.b.charon.terminate(name)
            observed.wait_sa(observed.wait("DELSA", since=since))
    gaps, uncertain = [], []
    for name in SOURCES:
        record = observed.record_of(targets(name), of_tunnel(lab, name))
        record.judge(1)
        gaps += record.gaps
        uncertain += record.uncertain
    # The tunnel that came up last has strongSwan's route.
    attempts = observed.record_of(targets()).attempts
    assert attempts
    unbound = replace(record, attempts=attempts, gaps=gaps, uncertain=uncertain)
    assert unbound.wrongly_refused() == []


def answers(gate: Gated) -> int:
    """Return how many calls the hooks have decided."""
    return sum(gate.reasons().values())


def test_routes_may_change_between_two_tunnels(lab: Lab, gate: Gated, observe: Begin) -> None:
    with observe("one", "two") as observed:
        both_up(lab)
        since, enough = time.monotonic(), answers(gate) + ROUNDS * 3 * len(KINDS)

        def swapped() -> bool:
            for source in SOURCES.values():
                hint(lab, source)
                time.sleep(0.05)
            return answers(gate) > enough

        wait_until(swapped, "too few attempts")
        # The route in table 220 stays, and the kernel keeps using the address.
        ip(lab, f"address del {SOURCES['two']}/32 dev lo")
        time.sleep(0.1)
        ended = time.monotonic()
        ip(lab, f"address add {SOURCES['two']}/32 dev lo")
    unbound = observed.record_of(targets(), of_tunnel(lab, "one"))
    changing = [a for a in unbound.attempts if since < a.began < ended]
    assert len(changing) > 50
    assert {a.error for a in changing}.isdisjoint(REFUSALS)
    assert unbound.in_clear() == []
    observed.record_of(targets("one"), of_tunnel(lab, "one")).judge()


def test_a_route_to_an_unprotected_source_refuses_the_flow(lab: Lab, observe: Begin) -> None:
    with observe("one", "two") as observed:
        both_up(lab)
        changes = []
        for source in ("192.0.2.1", SOURCES["one"]) * 3:
            changes.append(hint(lab, source))
            time.sleep(0.3)
    changed = [observed.routed(when)[0] for when in changes]
    observed.uncovered += zip(changed[::2], changed[1::2], strict=True)
    record = observed.record_of(targets(), of_tunnel(lab, "one"))
    # Before that, the route may have belonged to the other tunnel.
    since = [a for a in record.attempts if a.began > changes[0]]
    replace(record, attempts=since).judge(3)


def test_the_route_of_a_tunnel_comes_and_goes_with_it(lab: Lab, observe: Begin) -> None:
    """Without the tunnel the route in the main table gives an unprotected source."""
    with observe("two", start_action="none") as observed:
        wait_until(lambda: unbound_source(lab) == SOURCES["two"], "no route of its own")
        since = time.monotonic()
        lab.b.charon.terminate("two")
        observed.wait_sa(observed.wait("DELSA"))
    observed.record_of(targets("two"), of_tunnel(lab, "two")).judge(1)
    changed = observed.routed(since)
    observed.uncovered.append((changed[0], changed[-1]))
    observed.record_of(targets(), of_tunnel(lab, "two")).judge(2)
