"""The DaemonSet's pod on a node with ESP: pods in the kubelet's cgroups are gated by path and name.

`make image-test` runs it. The cgroups are named as the kubelet names them with either driver, and
described as containerd and CRI-O do; neither runs. strongSwan runs on the node, and a capture
between the hosts shows the packets.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.host import cgroups
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.image.api_server import OTHER, ApiServer, serving
from tests.image.pod import Pod
from tests.system.caller import Caller
from tests.system.under_exec import PORT, nothing_in_clear
from tests.until import wait_until

SPEC = ConnSpec("net", "transport", 4)
PLACE = Path("/run/image-test")
UID = "0b5a4c2e-8f1d-4c3a-9d55-6e7f8a9b0c1d"
CONTAINER = "c0ffee" * 10 + "0123"
ESCAPED = UID.replace("-", "_")
LAYOUTS = {
    "systemd": f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{ESCAPED}.slice/"
    f"cri-containerd-{CONTAINER}.scope",
    "systemd guaranteed": f"kubepods.slice/kubepods-pod{ESCAPED}.slice/crio-{CONTAINER}.scope",
    "cgroupfs": f"kubepods/besteffort/pod{UID}/{CONTAINER}",
}
RUNTIMES = {
    f"/run/containers/storage/overlay-containers/{CONTAINER}/userdata": (
        f"kubepods-pod{ESCAPED}.slice:crio:{CONTAINER}",
        {"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "db-0"},
    ),
    f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{CONTAINER}": (
        f"/{LAYOUTS['cgroupfs']}",
        {"io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-name": "web-1"},
    ),
}
"""Where CRI-O and containerd describe the last two, with cgroupsPath and annotations."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-node") as made:
        made.warm_up(("transport",), (4,))
        made.b.serve("tcp-server", PORT)
        yield made


@pytest.fixture(scope="module")
def pods(lab: Lab) -> Iterator[dict[str, Caller]]:
    """A process in each layout's container, and one of the node's own."""
    made = {}
    for name, path in {**LAYOUTS, "node": "system.slice/sshd.service"}.items():
        cgroup = cgroups.root() / path
        cgroup.mkdir(parents=True)
        made[name] = Caller(lab.a.namespace.path, cgroup)
    for folder, (where, known) in RUNTIMES.items():
        Path(folder).mkdir(parents=True)
        document = {"annotations": known, "linux": {"cgroupsPath": where}}
        Path(folder, "config.json").write_text(json.dumps(document))
    yield made
    for caller in made.values():
        caller.close()


@pytest.fixture(scope="module")
def gate(lab: Lab, pods: dict[str, Caller]) -> Iterator[Pod]:
    """The pod: its init container, then the controller; two pods are gated by name."""
    names = ("config", "run", "cache", "vici")
    paths = {name: PLACE / name for name in names} | {"vici": lab.a.charon.vici_socket.parent}
    paths["config"].mkdir(parents=True)
    (paths["config"] / "ipsecgate.toml").write_text(f"""
[gate]
vici = "/run/strongswan/{lab.a.charon.vici_socket.name}"
cgroups = ["/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice", "pod:shop/db-0", "pod:shop/w*"]
[[policy]]
name = "net"
remote = ["{lab.b.address(SPEC)}"]
""")

    def launch(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return lab.a.run(argv, check=False, timeout=300)

    pod = Pod(paths=paths, launch=launch)
    pod.load()
    pod.once("load")
    pod.start("controller")
    wait_until(lambda: pod.probe("startupProbe").returncode == 0, "it does not start", 120)
    yield pod
    pod.stop("controller")
    pod.once("load", ["unload", "--force"])


def call(lab: Lab, caller: Caller) -> str:
    return caller("tcp", str(lab.b.address(SPEC)), PORT)


@pytest.fixture(scope="module")
def server(lab: Lab, gate: Pod) -> Iterator[ApiServer]:
    """A server in the pod's network, and the container that asks it."""
    gate.paths = {**gate.paths, "token": PLACE / "token"}
    with lab.a.namespace.inside(), serving(PLACE / "token") as made:
        where = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "NODE_NAME": "worker"}
        gate.start("node-taint", KUBERNETES_SERVICE_PORT=str(made.server_port), **where)
        yield made
        gate.stop("node-taint")


def test_every_layout_is_gated_until_its_peer_is_covered(
    lab: Lab, gate: Pod, pods: dict[str, Caller], server: ApiServer
) -> None:
    with nothing_in_clear(lab, esp=False):
        for layout in LAYOUTS:
            assert call(lab, pods[layout]) == "EPERM", layout
    tainted = [OTHER, {"key": "ipsecgate.example/not-protected", "effect": "NoSchedule"}]
    wait_until(lambda: server.taints == tainted, "the node is not tainted", 120)

    lab.load(SPEC)
    assert gate.cli("wait", "--all", "--timeout", "60s").returncode == 0
    with nothing_in_clear(lab, esp=True):
        for layout in LAYOUTS:
            assert call(lab, pods[layout]) == "EINPROGRESS", layout
        lab.let_tcp_close()
    wait_until(lambda: gate.probe("readinessProbe").returncode == 0, "it is not ready")
    assert gate.probe("livenessProbe").returncode == 0
    wait_until(lambda: server.taints == [OTHER], "the taint is not lifted", 120)


def test_the_nodes_own_processes_are_not_gated(lab: Lab, pods: dict[str, Caller]) -> None:
    assert call(lab, pods["node"]) == "EINPROGRESS"


def test_the_screens_name_pods(gate: Pod) -> None:
    """The pod has a cgroup namespace of its own, but sees the node's tree."""
    assert "kubepods.slice" in gate.cli("cgroups").stdout
    shown = gate.cli("events").stdout
    assert f"kubepods-burstable-pod{ESCAPED}" in shown or CONTAINER[:12] in shown, shown


def test_without_its_pod_the_gate_stays(lab: Lab, gate: Pod, pods: dict[str, Caller]) -> None:
    lab.reset()
    wait_until(lambda: call(lab, pods["systemd"]) == "EPERM", "the SA is gone, the flow is open")
    gate.stop("controller")
    with nothing_in_clear(lab, esp=False):
        for layout in LAYOUTS:
            assert call(lab, pods[layout]) == "EPERM", layout
    brief = gate.once("controller", ["status", "--brief"], check=False)
    assert brief.returncode == 1
    assert "the controller is not running" in brief.stdout
