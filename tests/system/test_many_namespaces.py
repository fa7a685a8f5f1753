"""Containers that come and go, on real ESP: none escapes, none is stuck, and nothing is left over.

Each has a namespace of its own behind one masqueraded bridge, and a cgroup of its own in a gated
slice, and connects at once. Nothing holds its calls, so the first ones may be refused.

CONTAINERS=200 makes more of them than `make test` does.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.boxes import BRIDGE, box, masquerade
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7600
COUNT = int(os.environ.get("CONTAINERS", "40"))
AT_ONCE = 8
SPEC = ConnSpec("many", "transport", 4, start_action="trap")


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-many") as lab:
        lab.warm_up(("transport",), (4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


# What a container does: it configures its device, connects until that succeeds, and reports how
# often it was refused, what the server echoed, and the kernel's counters.
INSIDE = """
b=/bin/busybox
$b ip link set lo up; $b ip link set eth0 up; $b ip address add $0/24 dev eth0
$b ip route add default via 10.88.0.1
refused=0
until said=$(echo hello | $b nc -w 60 $1 $2 2>/tmp/error-$0); do
    $b grep -q "not permitted" /tmp/error-$0 || { $b cat /tmp/error-$0; exit 1; }
    refused=$((refused + 1)); $b usleep 20000
done
echo "refused $refused"; echo "= $said"; $b cat /proc/net/netstat; $b rm /tmp/error-$0
"""


@dataclass(frozen=True)
class Ended:
    """A container that has ended: whether it connected, and how often it had been refused."""

    output: str
    connected: bool
    refused: int
    syns_again: int


class Containers:
    """Makes containers behind the bridge of a box, and removes them when they have connected."""

    def __init__(self, lab: Lab, gate: Gated) -> None:
        self.lab, self.gate = lab, gate

    def run(self, number: int) -> Ended:
        name = f"many-{os.getpid()}-{number}"
        host = self.lab.a.namespace.name
        links = f"link add v{number} up master {BRIDGE} type veth peer eth0 netns {name}"
        cgroup = self.gate.cgroup / f"container-{number}"
        cgroup.mkdir()
        subprocess.run(["ip", "netns", "add", name], check=True)
        try:
            subprocess.run(["ip", "-n", host, *links.split()], check=True)
            join = ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(cgroup / "cgroup.procs")]
            enter = ["nsenter", f"--net=/run/netns/{name}", "--", "busybox", "sh", "-c", INSIDE]
            words = f"10.88.0.{number + 6}", str(self.lab.b.outer[4]), str(PORT)
            done = subprocess.run(
                [*join, *enter, *words], capture_output=True, text=True, timeout=300, check=False
            )
        finally:
            subprocess.run(["ip", "netns", "del", name], check=False)
            cgroup.rmdir()
        output = done.stdout + done.stderr
        if done.returncode:
            return Ended(output, connected=False, refused=0, syns_again=0)
        heads, values = (row.split() for row in output.splitlines() if row.startswith("TcpExt:"))
        again = dict(zip(heads, values, strict=True))["TCPSynRetrans"]
        (refused,) = re.findall(r"^refused (\d+)$", output, re.MULTILINE)
        return Ended(output, "= hello" in output, int(refused), int(again))


def test_containers_come_and_go(lab: Lab, gate: Gated) -> None:
    lab.load(SPEC)
    gate.wait_policy(SPEC.name)
    containers = Containers(lab, gate)
    with (
        box(lab.a.namespace, "bridge"),
        masquerade(lab.a.namespace),
        lab.capture() as capture,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        ended = list(pool.map(containers.run, range(COUNT)))
        seen = capture.stop()
    stuck = [one.output for one in ended if not one.connected]
    assert not stuck, (len(stuck), stuck[:3], gate.log.read_text()[-3000:])
    assert not seen.clear
    assert len(seen.esp) > COUNT
    assert sum(one.syns_again for one in ended) == 0
    wait_until(lambda: gate.ask()["namespaces"] == [], "some namespaces are still followed")
