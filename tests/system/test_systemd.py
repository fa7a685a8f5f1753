"""The units as installed, under a real systemd as process 1: boot, life, every way to end.

One boot for all tests, in their order. What is judged are system calls of gated processes, a
capture between the hosts, the kernel's files of a process, and what systemd itself says.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ipsecgate.daemon import CONNECT
from ipsecgate.edges.objects import HOOKS
from ipsecgate.edges.pins import Pins
from ipsecgate.lab import traffic
from ipsecgate.lab.hosts import Lab
from tests.system import held
from tests.system.booted import (
    CONFIG,
    COVERED,
    LATER,
    LOAD,
    PORT,
    PROBES,
    SERVICE,
    SPEC,
    booted,
    closed,
    module_lab,
    refused,
    systemd,
)
from tests.system.caller import Caller
from tests.system.holding import nothing_in_clear, stopped
from tests.system.manager import CHECKOUT, Manager

__all__ = ["booted", "module_lab", "systemd"]

CAPABILITIES = {"NET_ADMIN": 12, "SYS_PTRACE": 19, "PERFMON": 38, "BPF": 39}  # capability.h


def usec(systemd: Manager, unit: str) -> int:
    """Return when a unit became active."""
    return int(systemd.show(unit, "ActiveEnterTimestampMonotonic"))


# --- boot ---------------------------------------------------------------------------------


def test_it_is_closed_before_there_is_a_network(booted: Manager) -> None:
    """And before any ordinary service, though what it is to refuse is not known yet."""
    told = {name: booted.output(name).strip() for name in PROBES}
    assert told == {
        "probe-before": "EINPROGRESS",
        "probe-gated": "EPERM",
        "probe-free": "EINPROGRESS",
        "probe-ordinary": "EPERM",
    }
    assert 0 < usec(booted, LOAD) <= usec(booted, "network-pre.target")
    assert usec(booted, LOAD) <= usec(booted, "sysinit.target")
    assert usec(booted, LOAD) < usec(booted, SERVICE) <= usec(booted, "strongswan.service")
    for unit in (LOAD, SERVICE):
        assert "path=/usr/bin/ipsecgate " in booted.show(unit, "ExecStart")
    command = Path(f"/proc/{booted.main_pid(SERVICE)}/cmdline").read_text().split("\0")
    assert command[:4] == ["/usr/bin/python3", "-I", "/usr/bin/ipsecgate", "run"]


def test_all_is_well(systemd: Manager) -> None:
    told = systemd.run("ipsecgate", "status")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "controller running" in told.stdout
    systemd.until(
        lambda: systemd.show(SERVICE, "StatusText").endswith("asked for up"), "it says otherwise"
    )
    assert systemd.show(SERVICE, "NRestarts") == "0"


def test_it_is_confined(lab: Lab, systemd: Manager) -> None:
    pid = systemd.main_pid(SERVICE)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    granted = sum(1 << number for number in CAPABILITIES.values())
    assert {int(status[key], 16) for key in ("CapEff", "CapPrm", "CapBnd")} == {granted}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, pid) == -20
    cgroup = systemd.cgroup / "system.slice" / SERVICE
    assert (cgroup / "memory.max").read_text().strip() == str(512 << 20)
    assert (cgroup / "pids.max").read_text().strip() == "1024"
    ways = ("/usr/x", "/etc/x", "/var/x", "/sys/fs/bpf/x", "/proc/sys/kernel/domainname")
    inside = {path for path in ways if can_write(pid, path)}
    outside = {path for path in ways if can_write(systemd.pid, path)}
    assert (inside, outside) == (set(), set(ways))
    for path in ("/sys/fs/bpf/ipsecgate/x", "/run/ipsecgate/x", "/var/cache/ipsecgate/x"):
        assert can_write(pid, path), path
    listing = ["nsenter", f"--target={pid}", "--mount", "ls", "/dev", "/tmp", "/home"]
    seen = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    assert {"null", "full"} <= set(seen)
    assert not {"kmsg", CHECKOUT.name} & set(seen)
    for group, told in ((cgroup, "EPERM"), (None, "")):  # IPAddressDeny=
        caller = Caller(lab.a.namespace.path, group)
        assert caller("sendto", COVERED, PORT) == told
        caller.close()


def can_write(pid: int, path: str) -> bool:
    """Tell whether root could write there, as a process sees the file system."""
    script = 'case $0 in (*/bpf/*) mkdir "$0" && rmdir "$0";; (*) echo x >"$0";; esac'
    words = ["nsenter", f"--target={pid}", "--mount", "sh", "-c", script, path]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


# --- a gated service ----------------------------------------------------------------------


def test_a_gated_service_reaches_the_peer_inside_esp_only(lab: Lab, systemd: Manager) -> None:
    command = traffic.command("tcp-client", "--to", COVERED, "--port", str(PORT))
    errors, clear = {}, {}
    for group in ("gated.slice", "system.slice"):
        name = group.replace(".", "-")
        with lab.capture() as capture:
            systemd.start(name, command, f"Slice={group}", "Type=oneshot")
            seen = capture.stop()
        report = json.loads(systemd.output(name))
        assert report["error"] is None
        errors[group], clear[group] = set(report["errnos"]), bool(seen.clear)
        assert bool(seen.esp) is bool(seen.ike) is not clear[group]
        lab.reset()
        lab.load(SPEC)
    assert errors == {"gated.slice": {"EPERM"}, "system.slice": set()}
    assert clear == {"gated.slice": False, "system.slice": True}


def test_who_has_systemd_ask_is_outside(systemd: Manager) -> None:
    """A limit that docs/threat-model.md tells: a process is gated, not its wish."""
    probe = ["/usr/bin/python3", "-S", "-I", "/etc/probe.py"]
    said = ["--property=Type=oneshot", "--property=StandardOutput=file:/run/another.out"]
    asks = ["systemd-run", "--quiet", *said, *probe]
    for name, command in (("itself", probe), ("asks", asks)):
        systemd.start(name, command, "Slice=gated.slice", "Type=oneshot")
    told = [systemd.output(name).strip() for name in ("itself", "another")]
    assert told == ["EPERM", "EINPROGRESS"]


# --- the controller's ends ----------------------------------------------------------------


def test_a_controller_that_is_killed_has_a_successor(lab: Lab, systemd: Manager) -> None:
    restarts = int(systemd.show(SERVICE, "NRestarts"))
    with closed(lab, systemd), systemd.successor():
        os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
    assert int(systemd.show(SERVICE, "NRestarts")) == restarts + 1


def test_a_controller_that_is_stuck_is_replaced(lab: Lab, systemd: Manager) -> None:
    drop_in = systemd.file(f"/etc/systemd/system/{SERVICE}.d/watchdog.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nWatchdogSec=4s\n")
    systemd.systemctl("daemon-reload")
    with closed(lab, systemd):
        with systemd.successor():
            os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
        systemd.until(lambda: alive_for(systemd) > 5, "one that decides is not left alone")
        drop_in.unlink()  # it keeps its limit, its successor has the usual one
        systemd.systemctl("daemon-reload")
        with systemd.successor():
            os.kill(systemd.main_pid(SERVICE), signal.SIGSTOP)
    killed = "Watchdog timeout (limit 4s)"
    systemd.until(lambda: killed in systemd.log(SERVICE), "it was not the watchdog")


def alive_for(systemd: Manager) -> float:
    """Return for how many seconds the controller was ready when it last said that it is alive."""
    alive = int(systemd.show(SERVICE, "WatchdogTimestampMonotonic"))
    return (alive - usec(systemd, SERVICE)) / 1e6


@pytest.mark.parametrize(("end", "error"), [("kill", ""), ("restart", ""), ("stop", "ENOSYS")])
def test_a_held_call_is_answered_by_the_successor(
    lab: Lab, systemd: Manager, end: str, error: str
) -> None:
    """systemd keeps its listener, but not when it is told that the service shall stop."""
    command = held.command("tcp", COVERED, PORT)
    name = f"held-{end}"
    with nothing_in_clear(lab, esp=not error):
        with stopped(lab):
            systemd.start(
                name, ["ipsecgate", "exec", "--hold", "60s", "--", *command],
                "Slice=gated.slice", f"WorkingDirectory={CHECKOUT}",
            )  # fmt: skip
            systemd.until(lambda: systemd.ask().get("holds"), "it is not held")
            assert systemd.show(SERVICE, "NFileDescriptorStore") == "1"
            if end == "stop":
                systemd.systemctl("stop", SERVICE)
            else:
                with systemd.successor():
                    if end == "kill":
                        os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
                    else:
                        systemd.systemctl("restart", "--no-block", SERVICE)
                assert started_for(systemd) >= CONNECT, "active before it asked for IPsec"
                systemd.until(lambda: systemd.ask().get("holds"), "it is not held any more")
        systemd.until(lambda: systemd.output(name), "it is never answered")
    assert json.loads(systemd.output(name))["error"] == error
    systemd.until(lambda: systemd.show(SERVICE, "NFileDescriptorStore") == "0", "a listener stays")


def started_for(systemd: Manager) -> float:
    """Return for how many seconds a controller was started before its service was active."""
    systemd.until(lambda: systemd.show(SERVICE, "ActiveState") == "active", "it is not active")
    began = int(systemd.show(SERVICE, "ExecMainStartTimestampMonotonic"))
    return (usec(systemd, SERVICE) - began) / 1e6


# --- what an operator does ----------------------------------------------------------------


def test_a_reload_takes_the_configuration_whole_or_not_at_all(lab: Lab, systemd: Manager) -> None:
    config = systemd.file("/etc/ipsecgate/ipsecgate.toml")
    more = f'{CONFIG}[[policy]]\nname = "later"\nremote = ["{LATER}"]\n'
    assert not refused(lab, systemd, LATER)
    with closed(lab, systemd):
        config.write_text(more)
        told = systemd.systemctl("reload", SERVICE)
        assert told.returncode == 0, told.stderr
        assert refused(lab, systemd, LATER)
        config.write_text(more.replace(LATER, "nonsense"))
        told = systemd.systemctl("reload", SERVICE)
        assert told.returncode != 0
        assert f"Job for {SERVICE} failed" in told.stderr
        refusal = re.compile(r"reload refused: \S+ipsecgate.toml: policy.*'nonsense'")
        systemd.until(lambda: refusal.search(systemd.log(SERVICE)), "it is not told why")
        assert systemd.show(SERVICE, "ActiveState") == "active"
        assert refused(lab, systemd, LATER), "the old one is in force"
        assert "the last reload was refused" in systemd.run("ipsecgate", "status").stdout
        config.write_text(CONFIG)
        assert systemd.systemctl("reload", SERVICE).returncode == 0
    assert not refused(lab, systemd, LATER)


def test_nothing_that_is_stopped_or_restarted_opens(lab: Lab, systemd: Manager) -> None:
    with closed(lab, systemd):
        with systemd.successor():
            assert systemd.systemctl("restart", SERVICE).returncode == 0
        assert systemd.systemctl("stop", SERVICE).returncode == 0
        assert systemd.show(SERVICE, "ActiveState") in ("inactive", "failed")  # if it was slow
        assert systemd.systemctl("stop", LOAD).returncode == 0
        assert systemd.show(LOAD, "ActiveState") == "inactive"
        config = systemd.file("/etc/ipsecgate/ipsecgate.toml")
        put(config, CONFIG.replace(COVERED, "nonsense"))
        assert systemd.systemctl("start", SERVICE).returncode != 0
        assert not runs(systemd, f"Requires={LOAD}", f"After={LOAD}")
        assert runs(systemd)
        told = systemd.run("ipsecgate", "status")
        assert told.returncode == 1
        assert {"dead:", "'nonsense'"} <= set(told.stdout.replace(":\n", ": ").split())
        put(config, CONFIG)
        # Restart= may be at it with what was configured before: such a start is joined, and fails.
        systemd.until(
            lambda: systemd.systemctl("start", LOAD, SERVICE).returncode == 0, "neither starts"
        )
        assert systemd.show(LOAD, "ActiveState") == "active"
        systemd.until(lambda: systemd.ask().get("ready"), "it is not ready")


def put(config: Path, text: str) -> None:
    """Write it at once: who is restarted may read it at any time, and half of it is another one."""
    beside = config.with_name("next")
    beside.write_text(text)
    beside.replace(config)


def runs(systemd: Manager, *properties: str) -> bool:
    """Tell whether a service that does nothing, with these properties, is run."""
    options = [f"--property={word}" for word in ("Type=oneshot", *properties)]
    return systemd.run("systemd-run", "--quiet", *options, "true").returncode == 0


def test_a_controller_that_needs_too_much_memory_is_replaced(lab: Lab, systemd: Manager) -> None:
    limit = ("set-property", "--runtime", SERVICE)
    with closed(lab, systemd), systemd.successor():
        before = int(systemd.show(SERVICE, "NRestarts"))
        systemd.systemctl(*limit, "MemoryMax=8M")
        systemd.until(lambda: int(systemd.show(SERVICE, "NRestarts")) > before, "it is not ended")
        systemd.systemctl(*limit, "MemoryMax=512M")
    killed = "killed by the OOM killer"
    systemd.until(lambda: killed in systemd.log(SERVICE), "it was not the memory")


def test_it_is_closed_until_the_very_end(lab: Lab, systemd: Manager) -> None:
    with closed(lab, systemd):
        systemd.shut_down()
        time.sleep(0.5)
        assert refused(lab, systemd)
    pins = Pins(systemd.bpffs, "default").attachments()
    ids = {(systemd.cgroup / "gated.slice").stat().st_ino}
    assert {(one.hook, one.cgroup_id) for one in pins} >= {(hook, i) for hook in HOOKS for i in ids}
