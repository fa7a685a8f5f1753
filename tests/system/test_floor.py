"""The host floor on two hosts with real IKE and ESP: it covers processes that are not gated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipsecgate.core.model.policy import FLOOR_PRIORITY
from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, MODES, ConnSpec, Lab

PORT = 7150


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-floor") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


def connect(lab: Lab, spec: ConnSpec, gate: Gated | None, *options: str) -> Report:
    """Connect from the gated cgroup, or from none."""
    cgroup = gate.cgroup if gate else None
    return lab.a.client("tcp-client", lab.b.address(spec), PORT, *options, cgroup=cgroup).result()


def connected(report: Report) -> bool:
    return report["error"] is None and report["echoed"]


def floor_policies(lab: Lab) -> list[str]:
    """Return the priorities of the floor policies, as iproute2 shows them."""
    shown = lab.a.run(["ip", "xfrm", "policy", "list", "dir", "out"]).stdout
    words = shown.split()
    priorities = [words[at + 1] for at, word in enumerate(words) if word == "priority"]
    return [priority for priority in priorities if int(priority) >= FLOOR_PRIORITY]


def wait_for(lab: Lab, *, floor: bool) -> None:
    deadline = time.monotonic() + 60
    while bool(floor_policies(lab)) is not floor:
        assert time.monotonic() < deadline, floor_policies(lab)
        time.sleep(0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ungated_processes_send_protected_or_not_at_all(
    lab: Lab, cache: Path, mode: str, family: int
) -> None:
    """Without a trap, so that strongSwan has no policy in the kernel."""
    lab.reset()
    spec = ConnSpec(f"floor-{mode}-{family}", mode, family, start_action="none")
    with Gated(lab, policies='floor = "xfrm-block"\n', cache=cache) as gate:
        lab.load(spec)
        gate.wait_policy(spec.name)
        wait_for(lab, floor=True)
        with lab.capture() as capture:
            blocked = connect(lab, spec, None, "--limit", "0.5")
            assert not connected(blocked)
            assert not capture.stop().syns
        elsewhere = lab.a.client("tcp-client", lab.b.bare[family], PORT)
        assert connected(elsewhere.result()), "no policy names it"

        with lab.capture() as capture:
            assert connected(connect(lab, spec, gate)), gate.log.read_text()
            assert connected(connect(lab, spec, None)), "an SA protects it now"
            seen = capture.stop()
        assert seen.esp
        unnamed = lab.b.bare[family]  # the end of that connection may arrive this late
        assert not [p for p in seen.clear if unnamed not in (p.saddr, p.daddr)]

        lab.a.run(["ip", "xfrm", "policy", "flush"])
        wait_for(lab, floor=True)
        gate.kill()
        assert floor_policies(lab), "a dead controller opens nothing"
        lab.a.run(["ip", "xfrm", "state", "flush"])
        assert not connected(connect(lab, spec, None, "--limit", "0.5"))
        gate.cli("unload", "--force")
        assert floor_policies(lab) == []
    lab.reset()  # the peer still protects its side
    assert connected(connect(lab, spec, None)), "in clear, as before there was a gate"


def test_the_floor_follows_the_configuration(lab: Lab, cache: Path) -> None:
    lab.reset()
    floor = 'floor = "xfrm-block"\n'
    policy = '[[policy]]\nname = "x"\nremote = ["10.99.0.0/16"]\n'
    with Gated(lab, policies=floor + policy, cache=cache) as gate:
        wait_for(lab, floor=True)
        text = gate.config.read_text()
        for there in (False, True, False):
            gate.config.write_text(text if there else text.replace(floor, ""))
            gate.ask("reload")
            wait_for(lab, floor=there)


def test_the_host_reaches_its_own_addresses_in_a_protected_network(lab: Lab, cache: Path) -> None:
    """XFRM looks up policies for packets to an IPv6 address of the host's own."""
    lab.reset()
    policy = '[[policy]]\nname = "x"\nremote = ["2001:db8::/32"]\n'
    later = "2001:db8:a::9"
    with (
        Gated(lab, policies=f'floor = "xfrm-block"\n{policy}', cache=cache),
        lab.a.serve("tcp-server", PORT),
    ):
        wait_for(lab, floor=True)
        own = lab.a.client("tcp-client", lab.a.inner[6], PORT, "--limit", "5").result()
        assert connected(own)
        lab.a.run(["ip", "addr", "add", later, "dev", "lo", "nodad"])
        new = lab.a.client(
            "tcp-client", ip_address(later), PORT, "--limit", "20", "--retry", "EPERM"
        )
        assert connected(new.result())
        lab.a.run(["ip", "addr", "del", later, "dev", "lo"])
        there = lab.a.client("tcp-client", lab.b.outer[6], PORT, "--limit", "0.5").result()
        assert not connected(there)
