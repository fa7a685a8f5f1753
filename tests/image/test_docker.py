"""Real dockerd and containerd: containers gated by name, label and pod when they start; real ESP.

`make image-test` runs it where there is ESP. The gate runs beside the runtimes, as a service would,
and is told the name before there is such a container. A pod is a cgroup as the kubelet makes it,
and containers with the annotations of containerd's CRI plugin.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.clients import daemons
from tests.clients.daemons import HTTP, PAGE
from tests.system.under_exec import nothing_in_clear
from tests.until import wait_until

SPEC = ConnSpec("net", "transport", 4)
PLACE = Path("/run/image-test")
POLICY = """
[[policy]]
name = "net"
remote = ["{peer}"]
"""
IDLE = ["/bin/busybox", "sleep", "1000"]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-docker") as made:
        made.warm_up(("transport",), (4,))
        with daemons.serving(made.b, (HTTP,)):
            yield made


@pytest.fixture(scope="module")
def root() -> Path:
    """A root with busybox, which the daemons' containers share."""
    folder = PLACE / "root"
    for name in ("bin", "dev", "proc", "sys", "etc", "run", "tmp"):
        (folder / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "bin/busybox")
    return folder


@dataclass
class Daemon:
    """A runtime's daemon in host a: `start` runs a container, `execute` a command in it.

    `cgroup`: what the container's path contains. `shown`: what `events` calls it.
    """

    lab: Lab
    start_words: list[str]
    execute_words: list[str]
    remove_words: list[list[str]]
    cgroup: str
    shown: str

    def start(self, *options: str) -> None:
        at = self.start_words.index("--detach")
        self.lab.a.run([*self.start_words[:at], *options, *self.start_words[at:]])

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.lab.a.run([*self.execute_words, *command], check=False)

    def remove(self) -> None:
        for words in self.remove_words:
            self.lab.a.run(words)


def serve(lab: Lab, argv: Sequence[str], ready: Sequence[str]) -> subprocess.Popen[str]:
    log = PLACE / f"{Path(argv[0]).name}.log"
    with log.open("w") as output:
        process = lab.a.popen(argv, stdout=output, stderr=output)

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        return lab.a.run(ready, check=False).returncode == 0

    wait_until(answers, f"no answer: {argv[0]}", 120)
    return process


@pytest.fixture(scope="module")
def containerd(lab: Lab, root: Path) -> Iterator[Daemon]:
    process = serve(lab, ["containerd"], ["ctr", "version"])
    ctr = ["ctr", "--namespace", "market"]
    run = [*ctr, "run", "--detach", "--net-host", "--rootfs", str(root), "shop", *IDLE]
    yield Daemon(
        lab, run, [*ctr, "task", "exec", "--exec-id", "one", "shop"],
        [[*ctr, "task", "kill", "--signal", "KILL", "shop"], [*ctr, "container", "rm", "shop"]],
        "/sys/fs/cgroup/market/shop", "/sys/fs/cgroup/market/shop",
    )  # fmt: skip
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def docker(lab: Lab, root: Path, containerd: Daemon) -> Iterator[Daemon]:
    data = Path("/var/lib/docker")
    data.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(data)], check=True)
    host = "unix:///run/image-test/docker.sock"
    client = ["docker", "--host", host]
    process = serve(
        lab,
        ["dockerd", "--host", host, "--containerd=/run/containerd/containerd.sock",
         "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
         "--exec-opt=native.cgroupdriver=cgroupfs"],
        [*client, "info"],
    )  # fmt: skip
    archive = PLACE / "box.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    lab.a.run([*client, "import", str(archive), "box"])
    run = [*client, "run", "--detach", "--network=host", "--name=shop", "box", *IDLE]
    yield Daemon(
        lab, run, [*client, "exec", "shop"], [[*client, "rm", "--force", "shop"]],
        "/sys/fs/cgroup/docker/", "shop",
    )  # fmt: skip
    process.terminate()
    process.wait(60)
    subprocess.run(["umount", "--lazy", str(data)], check=True)


LABEL = "tier=front"


@pytest.mark.parametrize(
    ("runtime", "target", "option"),
    [
        ("containerd", "container:shop", ()),
        ("containerd", f"label:{LABEL}", ("--annotation", LABEL)),
        ("docker", "container:shop", ()),
        ("docker", f"label:{LABEL}", ("--label", LABEL)),
    ],
)
def test_a_container_is_gated_by_its_name_or_label(
    lab: Lab,
    cache: Path,
    request: pytest.FixtureRequest,
    runtime: str,
    target: str,
    option: tuple[str, ...],
) -> None:
    daemon: Daemon = request.getfixturevalue(runtime)
    lab.reset()
    peer = str(lab.b.address(SPEC))
    wget = ("/bin/busybox", "wget", "-q", "-O", "-", f"http://{peer}:{HTTP}/")
    with Gated(lab, cache=cache, policies=POLICY.format(peer=peer)) as gate:
        wait_for(gate, target)
        daemon.start(*option)
        try:
            wait_until(lambda: gated(gate, daemon.cgroup), f"not gated:\n{gate.log.read_text()}")
            with nothing_in_clear(lab, esp=False):
                refused = daemon.execute(*wget)
            assert refused.returncode
            assert "Operation not permitted" in refused.stdout + refused.stderr
            assert gate.reasons()["refuse_uncovered"] > 0
            assert f"in {daemon.shown}" in gate.cli("events").stdout
            lab.load(SPEC)
            gate.wait_policy(SPEC.name)
            gate.cli("wait", "--all", "--timeout", "60s")
            with nothing_in_clear(lab, esp=True):
                assert daemon.execute(*wget).stdout.strip() == PAGE
            assert gate.cli("detach", target, check=False).returncode == 0
        finally:
            daemon.remove()


def wait_for(gate: Gated, target: str) -> None:
    """Have the gate wait for a target that nothing has yet."""
    text = gate.config.read_text().replace('cgroups = ["', f'cgroups = ["{target}", "')
    gate.config.write_text(text)
    gate.cli("reload")
    kind, _, _ = target.partition(":")
    said = " ".join(gate.cli("status", check=False).stdout.split())
    assert f"{target} is {'on no running container' if kind == 'label' else 'not running'}" in said


POD = Path("/sys/fs/cgroup/kubepods/besteffort/pod6a1c5f0e-9a55-4b0c-8d6e-0c7b1f3a9e21")


def in_pod(ident: str, kind: str, name: str = "web-1") -> list[str]:
    """Return options of `ctr run` as containerd's CRI plugin annotates a pod's containers."""
    known = {"container-type": kind, "sandbox-id": "pause", "sandbox-namespace": "shop",
             "sandbox-name": name}  # fmt: skip
    options = [f"--annotation=io.kubernetes.cri.{key}={value}" for key, value in known.items()]
    return [*options, f"--cgroup=/{POD.relative_to('/sys/fs/cgroup')}/{ident}"]


def test_a_pod_is_gated_before_its_containers_start(
    lab: Lab, root: Path, cache: Path, containerd: Daemon
) -> None:
    """Its first container's first call is refused; a pod of another name is not touched."""
    lab.reset()
    peer = str(lab.b.address(SPEC))
    wget = ["/bin/busybox", "wget", "-q", "-O", "-", f"http://{peer}:{HTTP}/"]
    ctr = ["ctr", "--namespace", "k8s.io"]
    where = ["--net-host", "--rootfs", str(root)]
    pause = [*ctr, "run", "--detach", *in_pod("pause", "sandbox"), *where, "pause", *IDLE]
    with Gated(lab, cache=cache, policies=POLICY.format(peer=peer)) as gate:
        wait_for(gate, "pod:shop/web-*")
        POD.mkdir(parents=True)
        lab.a.run(pause)
        try:
            wait_until(lambda: gated(gate, POD.name), f"not gated:\n{gate.log.read_text()}")
            (one,) = [each for each in json.loads(gate.cli("--json", "cgroups").stdout)["cgroups"]
                      if each["by"] == "pod:shop/web-*"]  # fmt: skip
            assert one["cgroup"] == str(POD)
            app = [*ctr, "run", "--rm", *in_pod("app", "container"), *where, "app", *wget]
            with nothing_in_clear(lab, esp=False):
                refused = lab.a.run(app, check=False)
            assert "Operation not permitted" in refused.stdout + refused.stderr
            assert gate.reasons()["refuse_uncovered"] > 0
            beside = [word.replace("besteffort/pod6a", "besteffort/pod7b")
                      for word in in_pod("other", "sandbox", "db-0")]  # fmt: skip
            other = lab.a.run([*ctr, "run", "--rm", *beside, *where, "other", *wget])
            assert other.stdout.strip() == PAGE
            assert gated(gate, POD.name)
        finally:
            lab.a.run([*ctr, "task", "kill", "--signal", "KILL", "pause"])
            lab.a.run([*ctr, "container", "rm", "pause"])


def gated(gate: Gated, part: str) -> bool:
    return any(part in one["cgroup"] for one in gate.status()["hooks"] if one["attached"])
