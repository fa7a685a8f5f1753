"""Real podman on its default network: a namespace of its own, a bridge, a masquerade; real ESP.

The tunnel is between this host's address and the network behind the peer. Nothing is configured for
the containers.

CONTAINERS=200 has more of them come and go than `make test` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ipsecgate.lab.capture import Captured
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.clients import daemons
from tests.clients.containers import Containers
from tests.clients.daemons import HTTP, PAGE
from tests.system.boxes import iptables
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

SPEC = ConnSpec("net", "tunnel", 4, start_action="trap", local_ts=("192.0.2.1/32",))
LIMIT = 300.0  # seconds for a container
COUNT = int(os.environ.get("CONTAINERS", "4"))
AT_ONCE = 4
NOTHING = Captured(())


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the iptables that this kernel supports, for podman's plugins."""
    folder = tmp_path_factory.mktemp("tools")
    for family, name in ((4, "iptables"), (6, "ip6tables")):
        found = shutil.which(iptables(family))
        assert found
        (folder / name).symlink_to(found)
    return folder


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-podman") as lab:
        lab.warm_up(("tunnel",), (4,))
        with daemons.serving(lab.b, (HTTP,)):
            yield lab


@pytest.fixture
def loaded(lab: Lab, gate: Gated) -> Gated:
    lab.load(SPEC)
    gate.wait_policy(SPEC.name)
    lab.set_delay(25)
    return gate


@dataclass(frozen=True)
class Ran:
    """A container that has ended: what it printed, SYNs that it sent again, and what was sent."""

    output: str
    code: int
    syns_again: int
    seen: Captured = NOTHING

    @property
    def served(self) -> bool:
        return PAGE in self.output


class Podman:
    """Runs wget in containers of podman's default network."""

    def __init__(self, lab: Lab, gate: Gated, folder: Path, tools: Path) -> None:
        self.lab, self.gate, self.folder = lab, gate, folder
        # Debian 13's podman prefers nftables, which user-mode-linux lacks.
        self.env = {"PATH": f"{tools}:{os.environ['PATH']}", "NETAVARK_FW": "iptables"}

    def argv(self, name: str, to: object, cgroup: Path, profile: bool) -> list[str]:
        url = f"http://{to}:{HTTP}/"
        words = f"wget -q -O - {url}; echo code $?; cat /proc/net/netstat"
        seccomp = json.loads(self.gate.cli("seccomp-profile").stdout) if profile else None
        (self.folder / name).mkdir()
        made = Containers(self.folder / name, cgroup)
        for applet in ("wget", "cat"):
            (made.root / "bin" / applet).symlink_to("busybox")
        command = ["/bin/busybox", "sh", "-c", words]
        return made.podman("crun", name, command, seccomp, network="podman")

    def run(self, argv: list[str]) -> Ran:
        with self.lab.capture() as capture:
            ended = self.start(argv)
            return replace(ended, seen=capture.stop())

    def start(self, argv: list[str]) -> Ran:
        """Run a container without a capture."""
        done = self.lab.a.run(argv, env=self.env, timeout=LIMIT, check=False)
        code = re.search(r"^code (\d+)$", done.stdout, re.MULTILINE)
        assert code, (done.stdout, done.stderr)
        heads, values = (
            line.split() for line in done.stdout.splitlines() if line.startswith("TcpExt:")
        )
        again = dict(zip(heads, values, strict=True))["TCPSynRetrans"]
        return Ran(done.stdout + done.stderr, int(code[1]), int(again))


@pytest.fixture
def podman(lab: Lab, gate: Gated, tools: Path) -> Iterator[Podman]:
    # podman accepts no path of more than 50 characters, so not tmp_path.
    with tempfile.TemporaryDirectory(prefix="box-", ignore_cleanup_errors=True) as folder:
        yield Podman(lab, gate, Path(folder), tools)


@pytest.fixture
def gated_slice(lab: Lab, gate: Gated) -> Path:
    return lab.cgroup(f"{gate.instance}/app/containers")


def refusals(gate: Gated) -> int:
    return sum(count for name, count in gate.reasons().items() if name.startswith("refuse"))


def assert_protected(ran: Ran, gate: Gated) -> None:
    assert ran.served, (ran.output, gate.log.read_text())
    assert ran.seen.esp
    assert not ran.seen.clear
    assert ran.syns_again == 0


def test_the_first_call_is_held(lab: Lab, loaded: Gated, podman: Podman, gated_slice: Path) -> None:
    """With the profile; there is no SA yet."""
    before, held = refusals(loaded), loaded.ask()["held"]
    ran = podman.run(podman.argv("held", lab.b.inner[4], gated_slice, profile=True))
    assert_protected(ran, loaded)
    assert ran.seen.ike
    assert loaded.ask()["held"] > held
    assert refusals(loaded) == before


def test_the_first_call_is_held_under_exec(
    lab: Lab, loaded: Gated, podman: Podman, gated_slice: Path
) -> None:
    argv = podman.argv("inherited", lab.b.inner[4], gated_slice, profile=False)
    beside = lab.cgroup(f"{loaded.instance}/app/podman")
    before = refusals(loaded)
    ran = podman.run(loaded.exec_argv(*argv, options=("--cgroup", str(beside), "--hold", "60s")))
    assert_protected(ran, loaded)
    assert ran.seen.ike
    assert refusals(loaded) == before


def test_without_holding_the_first_call_connects_once_the_sa_is_up(
    lab: Lab, loaded: Gated, podman: Podman, gated_slice: Path
) -> None:
    """The container's namespace is followed before it calls."""
    lab.a.charon.initiate(SPEC.child_name)
    wait_until(lambda: "covered" in states(loaded), "the SA covers nothing")
    before = refusals(loaded)
    ran = podman.run(podman.argv("plain", lab.b.inner[4], gated_slice, profile=False))
    assert_protected(ran, loaded)
    assert refusals(loaded) == before


def states(gate: Gated) -> set[str | None]:
    return {policy["coverage"] for policy in gate.status()["policies"]}


def test_without_an_sa_it_is_refused(
    lab: Lab, loaded: Gated, podman: Podman, gated_slice: Path
) -> None:
    lab.drop_ike()
    before = refusals(loaded)
    ran = podman.run(podman.argv("refused", lab.b.inner[4], gated_slice, profile=False))
    assert ran.code == 1
    assert "Operation not permitted" in ran.output
    assert refusals(loaded) > before
    assert not ran.seen.clear
    assert not ran.seen.esp


def test_a_container_in_another_slice_is_not_touched(
    lab: Lab, loaded: Gated, podman: Podman
) -> None:
    """The gate still wants the flow protected, but strongSwan has forgotten the connection."""
    lab.unload(SPEC.name)
    outside = lab.cgroup("outside")
    before = loaded.reasons()
    ran = podman.run(podman.argv("beside", lab.b.inner[4], outside, profile=False))
    assert ran.served
    assert ran.seen.clear
    assert loaded.reasons() == before


def test_containers_come_and_go(lab: Lab, loaded: Gated, podman: Podman, gated_slice: Path) -> None:
    """With the profile. There is no SA before the first ones, and none before the second half."""
    before = refusals(loaded)

    def run(number: int) -> Ran:
        return podman.start(podman.argv(f"n{number}", lab.b.inner[4], gated_slice, profile=True))

    ended: list[Ran] = []
    with lab.capture() as capture, ThreadPoolExecutor(AT_ONCE) as pool:
        for half in (range(COUNT // 2), range(COUNT // 2, COUNT)):
            ended += pool.map(run, half)
            lab.let_tcp_close()
            lab.a.charon.terminate(SPEC.child_name)
        seen = capture.stop()
    stuck = [ran.output for ran in ended if not ran.served]
    assert not stuck, (len(stuck), stuck[:3], loaded.log.read_text()[-3000:])
    assert not seen.clear
    assert len(seen.esp) > COUNT
    assert sum(ran.syns_again for ran in ended) == 0
    assert refusals(loaded) == before
    wait_until(lambda: loaded.ask()["namespaces"] == [], "some namespaces are still followed")
