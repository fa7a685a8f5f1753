"""The image on this machine's own kernel, in a room: it gates a cgroup outside the container.

`make image-test` runs it. The pod's privileges are those of the DaemonSet, and the cgroup is named
as the kubelet names those of pods.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from tests.image.pod import Pod
from tests.system.caller import Caller
from tests.until import wait_until

BPFFS = Path("/sys/fs/bpf")
PROTECTED, OTHER, PORT = "203.0.113.9", "192.0.2.9", 9
CONFIG = """
[gate]
vici = "/run/strongswan/charon.vici"
cgroups = ["/sys/fs/cgroup/kubepods.slice"]
[[policy]]
name = "db"
remote = ["203.0.113.0/24"]
"""
UID = "0b5a4c2e_8f1d_4c3a_9d55_6e7f8a9b0c1d"
CONTAINER = "a" * 64
BURSTABLE = f"kubepods-burstable.slice/kubepods-burstable-pod{UID}.slice"


@pytest.fixture(scope="module")
def image() -> Pod:
    pod = Pod()
    pod.load()
    return pod


@pytest.fixture(scope="module")
def network() -> None:
    """A link that leads nowhere, and a way to everything."""
    for command in (
        "link set lo up",
        "link add out0 type veth peer name out1",
        "addr add 198.51.100.1/24 dev out0",
        "link set out0 up",
        "link set out1 up",
        "route add default via 198.51.100.2",
    ):
        subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture(scope="module")
def kubepods(network: None) -> Path:
    """The cgroup of a container, as the kubelet and containerd make it with the systemd driver."""
    path = cgroups.root() / "kubepods.slice" / BURSTABLE / f"cri-containerd-{CONTAINER}.scope"
    path.mkdir(parents=True)
    Path("/etc/ipsecgate").mkdir(exist_ok=True)
    Path("/etc/ipsecgate/ipsecgate.toml").write_text(CONFIG)
    return path


@pytest.fixture
def loaded(image: Pod, kubepods: Path) -> Iterator[Pod]:
    assert image.once("load").stdout.splitlines() == [
        "loaded: /sys/fs/bpf/ipsecgate/default",
        "gated: /sys/fs/cgroup/kubepods.slice",
    ]
    yield image
    image.once("load", ["unload", "--force"])
    assert not list((BPFFS / "ipsecgate").glob("default*"))


@pytest.fixture
def gated(kubepods: Path) -> Iterator[Caller]:
    caller = Caller(Path("/proc/self/ns/net"), kubepods)
    yield caller
    caller.close()


@pytest.fixture
def free(kubepods: Path) -> Iterator[Caller]:
    outside = cgroups.root() / "system.slice"
    outside.mkdir(exist_ok=True)
    caller = Caller(Path("/proc/self/ns/net"), outside)
    yield caller
    caller.close()


def refused() -> int:
    with Maps(Pins(BPFFS, "default")) as maps:
        return sum(n for reason, n in maps.counters().items() if reason.name.startswith("REFUSE"))


def test_before_there_is_a_gate_nothing_is_refused(gated: Caller) -> None:
    assert gated("tcp", PROTECTED, PORT) == "EINPROGRESS"


def test_the_image_gates_a_pod_from_outside(loaded: Pod, gated: Caller, free: Caller) -> None:
    before = refused()
    assert gated("tcp", PROTECTED, PORT) == "EPERM"
    assert refused() == before + 1
    assert free("tcp", PROTECTED, PORT) == "EINPROGRESS"
    assert refused() == before + 1


def test_the_probes_tell_alive_from_ready(loaded: Pod, gated: Caller) -> None:
    loaded.start("controller")
    try:
        wait_until(lambda: loaded.probe("startupProbe").returncode == 0, "it does not start")
        assert gated("tcp", PROTECTED, PORT) == "EPERM"
        assert gated("tcp", OTHER, PORT) == "EINPROGRESS", "no policy names it"
        assert loaded.probe("livenessProbe").returncode == 0
        assert re.search(r"\bvici \d", loaded.cli("--version").stdout)
        ready = loaded.probe("readinessProbe")
        assert ready.returncode == 1
        assert "strongSwan is not running (/run/strongswan/charon.vici" in ready.stdout
        document = json.loads(loaded.cli("--json", "status", check=False).stdout)
        assert document["controller"]["alive"]
        assert {hook["cgroup"] for hook in document["hooks"]} == {"/sys/fs/cgroup/kubepods.slice"}
    finally:
        loaded.stop("controller")
    assert gated("tcp", PROTECTED, PORT) == "EPERM", "the pod is gone, the gate is not"


@pytest.mark.parametrize("capability", ["BPF", "NET_ADMIN", "PERFMON"])
def test_the_loader_needs_each_capability(
    image: Pod, kubepods: Path, gated: Caller, capability: str
) -> None:
    done = image.once("load", without=capability, check=False)
    assert done.returncode not in (0, 2), done.stderr
    assert gated("tcp", PROTECTED, PORT) == "EINPROGRESS"


def test_a_broken_configuration_gates_what_was_gated_last(image: Pod, gated: Caller) -> None:
    config = Path("/etc/ipsecgate/ipsecgate.toml")
    image.once("load")
    image.start("controller")
    try:
        wait_until(lambda: image.probe("startupProbe").returncode == 0, "it does not start")
    finally:
        image.stop("controller")
    image.once("load", ["unload", "--force"])  # as after a boot
    assert gated("tcp", PROTECTED, PORT) == "EINPROGRESS"
    config.write_text("[gate")
    try:
        done = image.once("load", check=False)
        assert done.returncode == 2
        assert gated("tcp", PROTECTED, PORT) == "EPERM"
    finally:
        config.write_text(CONFIG)
        image.once("load", ["unload", "--force"])


def test_the_image_is_small_and_has_no_shell(image: Pod) -> None:
    size = int(image.run("image", "inspect", "--format", "{{.Size}}", image.image).stdout)
    assert size < 90 << 20
    for program in ("/bin/sh", "/usr/bin/dpkg", "/usr/bin/apt"):
        done = image.run("run", "--rm", "--entrypoint", program, *image.options("load"),
                         image.image, check=False)  # fmt: skip
        assert done.returncode == 127, (program, done.stderr)
