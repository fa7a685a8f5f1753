"""Two instances on one host, one for each network namespace, under one cgroup tree, on real ESP.

Both hosts of the lab are namespaces with a strongSwan of their own, so each gets an instance. Their
policies name all of both networks: only the namespace says who judges a flow.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7500
POLICIES = '[[policy]]\nname = "all"\nremote = ["192.0.2.0/24"]\n'
SPEC = ConnSpec("both", "transport", 4, start_action="trap")


@dataclass(frozen=True)
class Other:
    """The lab as its host b sees it, for `Gated`."""

    lab: Lab

    @property
    def name(self) -> str:
        return f"{self.lab.name}-other"

    @property
    def a(self) -> Host:
        return self.lab.b

    @property
    def cgroup(self) -> Callable[[str], Path]:
        return self.lab.cgroup


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-instances") as lab:
        lab.warm_up(("transport",), (4,))
        for host in (lab.a, lab.b):
            host.serve("tcp-server", PORT)
        yield lab


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.reset()
    module_lab.load(SPEC)
    return module_lab


@pytest.fixture
def both(lab: Lab, cache: Path) -> Iterator[tuple[Gated, Gated]]:
    """The instances of host a and host b; the cgroup of the first is gated by both."""
    other: Any = Other(lab)
    with (
        Gated(lab, policies=POLICIES, cache=cache) as one,
        Gated(other, policies=POLICIES, cache=cache) as two,
    ):
        two.cli("detach", str(two.cgroup))
        for gate in (one, two):
            gate.wait_policy(SPEC.name)
        yield one, two


def call(lab: Lab, host: Host, cgroup: Path, *options: str) -> Report:
    """Connect to the other host from the gated cgroup; retry while it is refused."""
    to = str(lab.peer(host).outer[4])
    command = traffic.command("tcp-client", "--to", to, "--port", str(PORT), *options)
    return Client(host.popen(command, cgroup=cgroup, stdout=subprocess.PIPE)).result()


def judges(gate: Gated) -> list[str | None]:
    """Return which instances judge other namespaces, according to one of them."""
    return [item["instance"] for item in gate.ask()["namespaces"] if item["instance"]]


def left(one: Gated, two: Gated) -> bool:
    return judges(one) == [two.instance] and judges(two) == [one.instance]


def refused(report: Report) -> bool:
    """Tell whether every attempt was refused until the limit."""
    errors: dict[str, int] = report["errnos"]
    return report["error"] == "limit" and errors.keys() == {"EPERM"}


def connected(report: Report) -> bool:
    return report["error"] is None and bool(report["echoed"])


def test_each_instance_judges_its_own_namespace(lab: Lab, both: tuple[Gated, Gated]) -> None:
    one, two = both
    assert refused(call(lab, lab.b, one.cgroup, "--limit", "0.5")), "only `one` is there"
    two.cli("attach", str(one.cgroup))
    wait_until(lambda: left(one, two), "they do not notice each other")
    before = [gate.reasons()["allow_other"] for gate in both]
    for host in (lab.a, lab.b):
        with lab.capture() as capture:
            report = call(lab, host, one.cgroup)
            seen = capture.stop()
        assert connected(report), (one.log.read_text(), two.log.read_text())
        assert not seen.clear
        assert seen.esp
        assert host.counters()["TcpExtTCPSynRetrans"] == 0
    assert all(
        gate.reasons()["allow_other"] > count for gate, count in zip(both, before, strict=True)
    )
    lab.drop_ike()
    for host in (lab.a, lab.b):
        host.charon.drop_all()
    for host in (lab.a, lab.b):
        with lab.capture() as capture:
            assert refused(call(lab, host, one.cgroup, "--limit", "0.5"))
            seen = capture.stop()
        assert not seen.clear
        assert not seen.esp


@pytest.mark.parametrize("verb", ["detach", "unload"])
def test_an_instance_that_goes_leaves_nothing_open(
    lab: Lab, both: tuple[Gated, Gated], verb: str
) -> None:
    """From the moment on in which its hooks are not asked any more."""
    one, two = both
    two.cli("attach", str(one.cgroup))
    wait_until(lambda: left(one, two), "they do not notice each other")
    assert connected(call(lab, lab.b, one.cgroup))
    one.kill()  # the hooks alone must refuse
    two.kill()
    two.cli(*{"detach": ("detach", str(one.cgroup)), "unload": ("unload", "--force")}[verb])
    with lab.capture() as capture:
        assert refused(call(lab, lab.b, one.cgroup, "--limit", "0.5"))
        seen = capture.stop()
    assert not seen.clear


def test_a_cgroup_that_only_one_of_them_gates(lab: Lab, both: tuple[Gated, Gated]) -> None:
    """The other's hooks are not asked there, so this one judges every namespace."""
    one, two = both
    two.cli("attach", str(one.cgroup))
    wait_until(lambda: left(one, two), "they do not notice each other")
    assert connected(call(lab, lab.b, one.cgroup))
    alone = lab.cgroup(f"{one.instance}/alone")
    one.cli("attach", str(alone))
    for cgroup in (alone, one.cgroup):
        assert refused(call(lab, lab.b, cgroup, "--limit", "0.5"))
        assert connected(call(lab, lab.a, cgroup))
    one.cli("detach", str(alone))
    wait_until(lambda: judges(one) == [two.instance], "it does not notice")
    assert connected(call(lab, lab.b, one.cgroup))


def test_below_a_cgroup_that_the_other_gates(lab: Lab, both: tuple[Gated, Gated]) -> None:
    one, two = both
    two.cli("attach", str(one.cgroup.parent))
    wait_until(lambda: judges(one) == [two.instance], "it does not notice")
    time.sleep(0.1)
    assert judges(two) == [], "the other is attached in more places"
    assert connected(call(lab, lab.b, one.cgroup))
    assert refused(call(lab, lab.a, one.cgroup, "--limit", "0.5"))
