"""Real dockerd and containerd: `container:NAME` is gated when it starts; real ESP.

`make image-test` runs it where there is ESP. The gate runs beside the runtimes, as a service would,
and is told the container's name before there is such a container.
"""

from __future__ import annotations

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

    def start(self) -> None:
        self.lab.a.run(self.start_words)

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


@pytest.mark.parametrize("runtime", ["containerd", "docker"])
def test_a_container_is_gated_by_its_name(
    lab: Lab, cache: Path, request: pytest.FixtureRequest, runtime: str
) -> None:
    daemon: Daemon = request.getfixturevalue(runtime)
    lab.reset()
    peer = str(lab.b.address(SPEC))
    wget = ("/bin/busybox", "wget", "-q", "-O", "-", f"http://{peer}:{HTTP}/")
    with Gated(lab, cache=cache, policies=POLICY.format(peer=peer)) as gate:
        text = gate.config.read_text().replace('cgroups = ["', 'cgroups = ["container:shop", "')
        gate.config.write_text(text)
        gate.cli("reload")
        assert "container:shop is not running" in gate.cli("status", check=False).stdout
        daemon.start()
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
            assert gate.cli("detach", "container:shop", check=False).returncode == 0
        finally:
            daemon.remove()


def gated(gate: Gated, part: str) -> bool:
    return any(part in one["cgroup"] for one in gate.status()["hooks"] if one["attached"])
