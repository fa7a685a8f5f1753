"""The Debian package on a clean Debian with a real systemd and without BCC: its whole life.

`make package-test` builds what this needs. The tests share one boot, in their order. The evidence
is system calls of gated processes, a capture between the hosts, pins, and systemd's own properties.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.lab.hosts import Lab
from tests.system.booted_systemd import BootedSystemd
from tests.system.caller import Caller
from tests.system.prober import Prober
from tests.system.systemd_host import (
    CONFIG,
    COVERED,
    LATE,
    LOAD,
    NEVER,
    PORT,
    SERVICE,
    SPEC,
    boot_files,
    closed,
    knocking,
    module_lab,
    outcomes,
    refused,
    usec,
)

__all__ = ["module_lab"]

# Set by tests/package/run.sh: the clean root, the package, and the same with a higher version and
# other maps.
ROOT, PACKAGE, NEXT = (
    Path(os.environ.get(f"IPSECGATE_PACKAGE_{name}", "")) for name in ("ROOT", "FILE", "NEXT")
)
CONFIG_FILE = "/etc/ipsecgate/ipsecgate.toml"
DEPENDENT = "requires-the-gate.service"
FILES = {
    # A service that would stop if an upgrade stopped or restarted the early unit.
    f"etc/systemd/system/{DEPENDENT}": (
        f"[Unit]\nRequires={LOAD}\nAfter={LOAD}\n[Service]\nExecStart=/usr/bin/sleep infinity\n"
    ),
}


@pytest.fixture(scope="module")
def machine(module_lab: Lab) -> Iterator[BootedSystemd]:
    with BootedSystemd(module_lab, FILES, clean_root=ROOT) as manager:
        assert manager.systemctl("start", "gated.slice").returncode == 0
        yield manager


@pytest.fixture
def systemd(lab: Lab, machine: BootedSystemd) -> BootedSystemd:
    """The machine with the installed, configured gate, a loaded connection and no SA."""
    lab.load(SPEC)
    machine.until(lambda: "net/net" in machine.ask().get("children", ()), "no connection")
    machine.until(lambda: refused(lab, machine), "it is not gated")
    return machine


def apt(machine: BootedSystemd, *words: str) -> str:
    """Run apt-get without a network, and return its output."""
    options = ("--yes", "--no-install-recommends", "--option=Dpkg::Use-Pty=0")
    done = machine.run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Failed" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def version(package: Path) -> str:
    return package.name.split("_")[1]


def installed(machine: BootedSystemd) -> str:
    words = ("dpkg-query", "--show", "--showformat=${Version} ${db:Status-Status}", "ipsecgate")
    return machine.run(*words).stdout


def test_installing_gates_nothing_and_needs_no_compiler(lab: Lab, machine: BootedSystemd) -> None:
    assert machine.run("python3", "-c", "import bcc").returncode
    assert not list(ROOT.glob("usr/lib/*/libbcc*"))
    apt(machine, "install", str(PACKAGE))
    assert installed(machine) == f"{version(PACKAGE)} installed"
    for unit in (LOAD, SERVICE):
        assert machine.show(unit, "ActiveState") == "active", machine.log()
        assert machine.systemctl("is-enabled", unit).stdout == "enabled\n"
    assert machine.show(SERVICE, "NRestarts") == "0"
    check = json.loads(machine.run("ipsecgate", "--json", "check").stdout)
    (compiler,) = (one["found"] for one in check if one["name"] == "compiler")
    assert compiler.startswith("not needed: the compiled hooks are in /usr/lib/ipsecgate/")
    assert not Pins(machine.bpffs, "default").attachments()
    assert not list(machine.file("/var/cache/ipsecgate").glob("????????????????????????????????*"))
    assert not refused(lab, machine)
    for page in ("man8/ipsecgate.8", "man5/ipsecgate.toml.5"):
        assert machine.file(f"/usr/share/man/{page}.gz").is_file()
    assert machine.run("dpkg", "--verify", "ipsecgate").stdout == ""


def test_the_configuration_takes_effect(lab: Lab, machine: BootedSystemd) -> None:
    assert knocking(machine).is_dir()
    machine.file(CONFIG_FILE).write_text(CONFIG)
    with machine.successor():
        assert machine.systemctl("restart", SERVICE).returncode == 0  # `vici` needs a restart
    machine.until(lambda: refused(lab, machine), "it is not gated")
    assert machine.systemctl("start", DEPENDENT).returncode == 0
    lab.load(SPEC)
    machine.until(lambda: "net/net" in machine.ask().get("children", ()), "no connection")
    status = machine.run("ipsecgate", "status")
    assert status.returncode == 0, status.stdout


def change(lab: Lab, systemd: BootedSystemd, package: Path, *options: str) -> None:
    """Install another version under traffic."""
    loaded, service = usec(systemd, LOAD), systemd.main_pid(DEPENDENT)
    programs = {one.prog_id for one in Pins(systemd.bpffs, "default").attachments()}
    with closed(lab, systemd), systemd.successor():
        apt(systemd, "install", *options, str(package))
    assert installed(systemd) == f"{version(package)} installed"
    assert systemd.show(SERVICE, "NRestarts") == "0"
    assert (usec(systemd, LOAD), systemd.main_pid(DEPENDENT)) == (loaded, service)
    after = {one.prog_id for one in Pins(systemd.bpffs, "default").attachments()}
    assert after
    assert after.isdisjoint(programs), "the other version's hooks are not in force"
    assert systemd.file(CONFIG_FILE).read_text() == CONFIG
    assert systemd.run("ipsecgate", "status").returncode == 0


def test_an_upgrade_under_traffic_has_no_gap(lab: Lab, systemd: BootedSystemd) -> None:
    change(lab, systemd, NEXT)


def test_a_downgrade_under_traffic_has_no_gap(lab: Lab, systemd: BootedSystemd) -> None:
    change(lab, systemd, PACKAGE, "--allow-downgrades")


def test_removing_it_opens_nothing_and_says_so(lab: Lab, systemd: BootedSystemd) -> None:
    with closed(lab, systemd):
        said = apt(systemd, "remove", "ipsecgate")
    assert "ipsecgate: the gated cgroups stay gated" in said
    assert "apt purge ipsecgate" in said
    assert installed(systemd) == f"{version(PACKAGE)} config-files"
    assert not systemd.ask()
    assert not systemd.file("/usr/bin/ipsecgate").exists()
    assert not systemd.file("/usr/lib/ipsecgate").exists()
    assert systemd.file(CONFIG_FILE).read_text() == CONFIG
    assert systemd.show(DEPENDENT, "ActiveState") == "active"
    assert refused(lab, systemd)


def test_installing_it_again_takes_the_gate_over(lab: Lab, machine: BootedSystemd) -> None:
    assert refused(lab, machine)
    apt(machine, "install", str(PACKAGE))
    machine.until(lambda: machine.ask().get("ready"), "it is not ready")
    lab.load(SPEC)
    machine.until(lambda: "net/net" in machine.ask().get("children", ()), "no connection")
    with closed(lab, machine):
        time.sleep(1)


def test_a_reboot_closes_the_gate_before_the_network_is_up(
    lab: Lab, systemd: BootedSystemd
) -> None:
    probes = "probe-gated", LATE
    for name, text in boot_files(*probes).items():
        systemd.file(f"/{name}").parent.mkdir(exist_ok=True)
        systemd.file(f"/{name}").write_text(text)
    with lab.capture() as capture:
        systemd.reboot()
        systemd.until(lambda: systemd.ask().get("ready"), "it is not ready")
        assert refused(lab, systemd)
        seen = capture.stop()
    assert not seen.clear
    for probe in probes:
        assert systemd.output(probe) == "EPERM\n"
    assert 0 < usec(systemd, LOAD) <= usec(systemd, "network-pre.target")
    assert systemd.show(SERVICE, "NRestarts") == "0"
    assert systemd.run("ipsecgate", "status").returncode == 0


def floor(machine: BootedSystemd) -> list[str]:
    """Return the priorities of the policies that block what leaves outside gated cgroups."""
    found = machine.run("ip", "xfrm", "policy", "list", "action", "block").stdout
    return [n for n in re.findall(r"priority (\d+)", found) if int(n) >= 0xFFFF0000]


def called(lab: Lab, cgroup: Path) -> str:
    caller = Caller(lab.a.namespace.path, cgroup)
    error = caller("tcp", NEVER, PORT)
    caller.close()
    return error


def test_purging_opens_the_gate_and_removes_everything(lab: Lab, systemd: BootedSystemd) -> None:
    config = CONFIG.replace("[gate]", '[gate]\nfloor = "xfrm-block"')
    systemd.file(CONFIG_FILE).write_text(config)
    assert systemd.systemctl("reload", SERVICE).returncode == 0
    systemd.until(lambda: floor(systemd), "there is no floor")
    free = lab.cgroup("free")
    assert (called(lab, free), called(lab, knocking(systemd))) == ("EPERM", "EPERM")
    theirs = "src 192.0.2.0/24 dst 198.18.0.0/15 priority 9"
    add = f"ip -n {lab.a.namespace.name} xfrm policy add dir out action block {theirs}"
    subprocess.run(["sh", "-c", add], check=True)
    (systemd.bpffs / "other").mkdir()
    said = apt(systemd, "purge", "ipsecgate")
    assert not (systemd.bpffs / "ipsecgate").exists()
    assert (systemd.bpffs / "other").is_dir()
    assert floor(systemd) == []
    left = systemd.run("ip", "xfrm", "policy", "list", "action", "block").stdout
    assert "198.18.0.0/15" in left, said
    assert {called(lab, free), called(lab, knocking(systemd))} == {"EINPROGRESS"}
    for path in ("/etc/ipsecgate", "/run/ipsecgate", "/var/cache/ipsecgate", "/usr/lib/ipsecgate"):
        assert not systemd.file(path).exists(), path
    links = systemd.file("/etc/systemd/system").rglob("*.wants/ipsecgate*")
    assert not list(links)


def soft_reboots(machine: BootedSystemd) -> str:
    return machine.systemctl("show", "--value", "--property=SoftRebootsCount").stdout.strip()


def test_a_soft_reboot_opens_nothing(lab: Lab, machine: BootedSystemd) -> None:
    """A caller outside of systemd's pids lives on, gated: bpffs stays, and so do the pins.

    The last test, because systemd unmounts the folder of the lab's strongSwan. So a covered flow
    may be refused at the end, as it is on a host whose strongSwan ends with everything else.
    """
    if int(machine.run("systemctl", "--version").stdout.split()[1]) < 254:
        assert "Unknown command verb soft-reboot" in machine.systemctl("soft-reboot").stderr
        return
    apt(machine, "install", str(PACKAGE))
    test_the_configuration_takes_effect(lab, machine)
    lab.a.charon.initiate("net")
    machine.until(lambda: not refused(lab, machine, COVERED), "it is not covered")
    programs = {one.prog_id for one in Pins(machine.bpffs, "default").attachments()}
    targets = [("tcp", COVERED, PORT, ""), ("tcp", NEVER, PORT, "")]
    with lab.capture() as capture:
        prober = Prober(lab.a.namespace.path, knocking(machine), targets, 0.02)
        try:
            with machine.successor():
                machine.systemctl("soft-reboot")
                machine.until(lambda: soft_reboots(machine) == "1", "it does not boot again")
            after = {one.prog_id for one in Pins(machine.bpffs, "default").attachments()}
            attempts = prober.stop()
        finally:
            prober.close()
        seen = capture.stop()
    assert seen.esp
    assert not seen.clear
    assert outcomes(attempts, NEVER) == {"EPERM"}
    assert "" in outcomes(attempts, COVERED) <= {"", "EPERM"}
    assert after == programs
    assert machine.show(LOAD, "ActiveState") == "active"
