"""The installed units under a real systemd as process 1: boot, operation, and every way to end.

All tests share one boot, in their order. The evidence is system calls of gated processes, a capture
between the hosts, /proc, and systemd's own properties.
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

from ipsecgate.controller.ike_follower import CONNECT
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.lab import traffic
from ipsecgate.lab.hosts import Lab
from tests.processes import descendants
from tests.system import held_client
from tests.system.booted_systemd import CHECKOUT, BootedSystemd
from tests.system.caller import Caller
from tests.system.systemd_host import (
    CONFIG,
    COVERED,
    LATER,
    LOAD,
    PORT,
    PROBES,
    SERVICE,
    SPEC,
    WAIT,
    booted,
    closed,
    module_lab,
    refused,
    systemd,
)
from tests.system.under_exec import nothing_in_clear, stopped

__all__ = ["booted", "module_lab", "systemd"]

pytestmark = pytest.mark.second_guest

# Source: linux/capability.h
CAPABILITIES = {"NET_ADMIN": 12, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "PERFMON": 38, "BPF": 39}


def usec(systemd: BootedSystemd, unit: str) -> int:
    """Return when a unit became active."""
    return int(systemd.show(unit, "ActiveEnterTimestampMonotonic"))


# --- boot ---------------------------------------------------------------------------------


def test_the_gate_is_closed_before_the_network_is_up(booted: BootedSystemd) -> None:
    """And before any ordinary service, although the policies are not known yet."""
    results = {name: booted.output(name).strip() for name in PROBES}
    assert results == {
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


def test_the_services_are_healthy_after_boot(systemd: BootedSystemd) -> None:
    done = systemd.run("ipsecgate", "status")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^Controller +running, pid", done.stdout, re.MULTILINE), done.stdout
    systemd.until(
        lambda: systemd.show(SERVICE, "StatusText").endswith("children covered"),
        "the status text does not say so",
    )
    assert systemd.show(SERVICE, "NRestarts") == "0"


def test_the_controller_is_confined(lab: Lab, systemd: BootedSystemd) -> None:
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
    assert (cgroup / "memory.max").read_text().strip() == str(2 << 30)
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
    for group, error in ((cgroup, "EPERM"), (None, "")):  # IPAddressDeny=
        caller = Caller(lab.a.namespace.path, group)
        assert caller("sendto", COVERED, PORT) == error
        caller.close()


def test_the_exporter_answers_with_one_capability(systemd: BootedSystemd) -> None:
    unit = "ipsecgate-metrics.service"
    systemd.systemctl("start", unit)  # returns once it listens
    lines = Path(f"/proc/{systemd.main_pid(unit)}/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    assert {int(status[key], 16) for key in ("CapEff", "CapBnd")} == {1 << CAPABILITIES["BPF"]}
    answer = systemd.run("curl", "--silent", "--show-error", "http://127.0.0.1:9765/metrics")
    assert "ipsecgate_controller_up 1.0" in answer.stdout, answer.stderr
    assert 'ipsecgate_policy_covered{policy="net"}' in answer.stdout
    systemd.systemctl("stop", unit)
    assert systemd.show(unit, "Result") == "success"


def can_write(pid: int, path: str) -> bool:
    """Return whether root could write to a path in the mount namespace of a process."""
    script = 'case $0 in (*/bpf/*) mkdir "$0" && rmdir "$0";; (*) echo x >"$0";; esac'
    words = ["nsenter", f"--target={pid}", "--mount", "sh", "-c", script, path]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


# --- a gated service ----------------------------------------------------------------------


def test_a_gated_service_reaches_the_peer_inside_esp_only(lab: Lab, systemd: BootedSystemd) -> None:
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


def test_the_journal_answers_by_policy_and_unit(systemd: BootedSystemd) -> None:
    """The service of the test before was refused first, then covered."""
    asked = ("IPSECGATE_POLICY=net", "IPSECGATE_UNIT=gated-slice.service")
    listed = systemd.run("journalctl", "--no-pager", "--output=json", *asked).stdout
    refused, covered = map(json.loads, listed.splitlines())
    for entry in (refused, covered):
        assert (entry["_SYSTEMD_UNIT"], entry["SYSLOG_IDENTIFIER"]) == (SERVICE, "ipsecgate")
        assert (entry["PRIORITY"], entry["IPSECGATE_INSTANCE"]) == ("6", "default")
        assert entry["IPSECGATE_FLOW"] == f"tcp {COVERED}:{PORT}"
    assert [entry["IPSECGATE_EVENT"] for entry in (refused, covered)] == ["refused", "covered"]
    assert refused["IPSECGATE_REASON"] == "refuse_uncovered"
    assert covered["IPSECGATE_CHILD"] == "net/net"
    assert int(covered["IPSECGATE_SPI"], 16) > 0
    assert float(covered["IPSECGATE_COVERED_AFTER"]) > 0


def test_a_process_that_systemd_starts_for_a_gated_one_is_not_gated(
    systemd: BootedSystemd,
) -> None:
    """A limit in docs/threat-model.md: the gate applies to a process, not to its requests."""
    probe = ["/usr/bin/python3", "-S", "-I", "/etc/probe.py"]
    options = ["--property=Type=oneshot", "--property=StandardOutput=file:/run/another.out"]
    request = ["systemd-run", "--quiet", *options, *probe]
    for name, command in (("itself", probe), ("request", request)):
        systemd.start(name, command, "Slice=gated.slice", "Type=oneshot")
    results = [systemd.output(name).strip() for name in ("itself", "another")]
    assert results == ["EPERM", "EINPROGRESS"]


# --- services that wait for their peers ---------------------------------------------------


def test_a_service_starts_only_when_its_peers_are_protected(
    lab: Lab, systemd: BootedSystemd
) -> None:
    """And `--hold` lets a service's calls wait when an SA is gone later."""
    config = systemd.file("/etc/ipsecgate/ipsecgate.toml")
    put(config, CONFIG.partition('[[policy]]\nname = "never"')[0])
    assert systemd.systemctl("reload", SERVICE).returncode == 0
    lab.drop_ike()
    done = systemd.run("ipsecgate", "unit-dropin", "dial", "--install")
    assert done.returncode == 0, done.stderr
    assert systemd.show("dial", "Requires").split().count("ipsecgate-online.target") == 1
    with lab.capture() as capture:
        assert systemd.systemctl("start", "--no-block", "dial").returncode == 0
        systemd.until(
            lambda: "net" in systemd.show(WAIT, "StatusText"), "what it waits for is not told"
        )
        time.sleep(1)
        assert systemd.show("dial", "ActiveState") == "inactive"
        assert systemd.show(WAIT, "ActiveState") == "activating"
        lab.drop_ike(False)
        systemd.until(lambda: systemd.show("dial", "ActiveState") == "active", "it never starts")
        lab.let_tcp_close()
        seen = capture.stop()
    assert systemd.output("dial").split() == ["0", "connected"]
    assert bool(seen.esp) > bool(seen.clear), "its first packet was protected"
    began = int(systemd.show("dial", "ExecMainStartTimestampMonotonic"))
    assert 0 < usec(systemd, WAIT) <= usec(systemd, "ipsecgate-online.target") <= began

    assert systemd.run("ipsecgate", "down", "net").returncode == 0
    done = systemd.run("ipsecgate", "unit-dropin", "held", "--hold", "--install")
    assert done.returncode == 0, done.stderr
    with lab.capture() as capture:
        done = systemd.systemctl("start", "held")
        assert done.returncode == 0, systemd.log("held.service")
        lab.let_tcp_close()
        seen = capture.stop()
    assert systemd.output("held").split() == ["65534", "connected"], "as its user, and no error"
    assert bool(seen.esp) > bool(seen.clear)
    assert systemd.systemctl("stop", "ipsecgate-online.target", WAIT).returncode == 0
    assert systemd.show("dial", "ActiveState") == "inactive", "Requires= stops it as well"
    for name in ("dial", "held"):
        systemd.file(f"/etc/systemd/system/{name}.service.d/ipsecgate.conf").unlink()
    put(config, CONFIG)
    systemd.systemctl("daemon-reload")
    assert systemd.systemctl("reload", SERVICE).returncode == 0


# --- how the controller ends --------------------------------------------------------------


def test_a_killed_controller_is_restarted(lab: Lab, systemd: BootedSystemd) -> None:
    restarts = int(systemd.show(SERVICE, "NRestarts"))
    with closed(lab, systemd), systemd.successor():
        os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
    assert int(systemd.show(SERVICE, "NRestarts")) == restarts + 1


def test_a_stuck_controller_is_replaced_by_the_watchdog(lab: Lab, systemd: BootedSystemd) -> None:
    drop_in = systemd.file(f"/etc/systemd/system/{SERVICE}.d/watchdog.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nWatchdogSec=4s\n")
    systemd.systemctl("daemon-reload")
    with closed(lab, systemd):
        with systemd.successor():
            os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
        systemd.until(lambda: alive_for(systemd) > 5, "a healthy controller was replaced")
        drop_in.unlink()  # the running controller keeps this limit, the next one has the usual
        systemd.systemctl("daemon-reload")
        with systemd.successor():
            os.kill(systemd.main_pid(SERVICE), signal.SIGSTOP)
    killed = "Watchdog timeout (limit 4s)"
    systemd.until(lambda: killed in systemd.log(SERVICE), "the watchdog did not end it")


def alive_for(systemd: BootedSystemd) -> float:
    """Return the seconds from readiness to the controller's last watchdog message."""
    alive = int(systemd.show(SERVICE, "WatchdogTimestampMonotonic"))
    return (alive - usec(systemd, SERVICE)) / 1e6


@pytest.mark.parametrize(
    ("end", "error"), [("kill", ""), ("restart", ""), ("reexec", ""), ("stop", "ENOSYS")]
)
def test_a_held_call_is_answered_by_the_next_controller(
    lab: Lab, systemd: BootedSystemd, end: str, error: str
) -> None:
    """systemd keeps the listener, also when executed again; not when the service is stopped."""
    command = held_client.command("tcp", COVERED, PORT)
    name = f"held-{end}"
    with nothing_in_clear(lab, esp=not error):
        with stopped(lab):
            systemd.start(
                name, ["ipsecgate", "exec", "--hold", "60s", "--", *command],
                "Slice=gated.slice", f"WorkingDirectory={CHECKOUT}",
            )  # fmt: skip
            systemd.until(lambda: systemd.ask().get("holds"), "it is not held")
            assert systemd.show(SERVICE, "NFileDescriptorStore") == "1"
            if end == "reexec":
                reexecute(systemd)
                assert systemd.ask()["holds"], "it is not held any more"
                assert systemd.show(SERVICE, "NFileDescriptorStore") == "1"
            inspectors = descendants(systemd.main_pid(SERVICE))
            assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in inspectors} == {0}
            if end == "stop":
                systemd.systemctl("stop", SERVICE)
            else:
                with systemd.successor():
                    if end != "restart":
                        os.kill(systemd.main_pid(SERVICE), signal.SIGKILL)
                    else:
                        systemd.systemctl("restart", "--no-block", SERVICE)
                assert started_for(systemd) >= CONNECT, "it became active before it had asked IKE"
                systemd.until(lambda: systemd.ask().get("holds"), "it is not held any more")
        systemd.until(lambda: systemd.output(name), "it is never answered")
    assert json.loads(systemd.output(name))["error"] == error
    systemd.until(lambda: systemd.show(SERVICE, "NFileDescriptorStore") == "0", "a listener stays")


def reexecute(systemd: BootedSystemd) -> None:
    """Have systemd executed again, and wait until it answers."""
    systemd.systemctl("daemon-reexec")
    systemd.until(lambda: systemd.show(SERVICE, "ActiveState") == "active", "it does not answer")


def started_for(systemd: BootedSystemd) -> float:
    """Return the seconds from the start of the controller until its service was active."""
    systemd.until(lambda: systemd.show(SERVICE, "ActiveState") == "active", "it is not active")
    began = int(systemd.show(SERVICE, "ExecMainStartTimestampMonotonic"))
    return (usec(systemd, SERVICE) - began) / 1e6


# --- operation ----------------------------------------------------------------------------


def test_a_reload_adopts_the_whole_configuration_or_nothing(
    lab: Lab, systemd: BootedSystemd
) -> None:
    config = systemd.file("/etc/ipsecgate/ipsecgate.toml")
    more = f'{CONFIG}[[policy]]\nname = "later"\nremote = ["{LATER}"]\n'
    assert not refused(lab, systemd, LATER)
    with closed(lab, systemd):
        config.write_text(more)
        done = systemd.systemctl("reload", SERVICE)
        assert done.returncode == 0, done.stderr
        assert refused(lab, systemd, LATER)
        config.write_text(more.replace(LATER, "nonsense"))
        done = systemd.systemctl("reload", SERVICE)
        assert done.returncode != 0
        assert f"Job for {SERVICE} failed" in done.stderr
        refusal = re.compile(r"reload refused: \S+ipsecgate.toml: policy.*'nonsense'")
        systemd.until(lambda: refusal.search(systemd.log(SERVICE)), "the cause is not logged")
        assert systemd.show(SERVICE, "ActiveState") == "active"
        assert refused(lab, systemd, LATER), "the old configuration is in force"
        assert "the last reload was refused" in systemd.run("ipsecgate", "status").stdout
        config.write_text(CONFIG)
        assert systemd.systemctl("reload", SERVICE).returncode == 0
    assert not refused(lab, systemd, LATER)


def test_stopping_or_restarting_the_services_opens_nothing(
    lab: Lab, systemd: BootedSystemd
) -> None:
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
        done = systemd.run("ipsecgate", "status")
        assert done.returncode == 1
        assert {"not", "running:", "'nonsense'"} <= set(done.stdout.replace(":\n", ": ").split())
        put(config, CONFIG)
        # Restart= may be starting it with the old configuration; our start would join it and fail.
        systemd.until(
            lambda: systemd.systemctl("start", LOAD, SERVICE).returncode == 0, "neither starts"
        )
        assert systemd.show(LOAD, "ActiveState") == "active"
        systemd.until(lambda: systemd.ask().get("ready"), "it is not ready")


def put(config: Path, text: str) -> None:
    """Replace the file atomically: a restarting service may read it at any time."""
    beside = config.with_name("next")
    beside.write_text(text)
    beside.replace(config)


def runs(systemd: BootedSystemd, *properties: str) -> bool:
    """Return whether an empty service with these properties runs."""
    options = [f"--property={word}" for word in ("Type=oneshot", *properties)]
    return systemd.run("systemd-run", "--quiet", *options, "true").returncode == 0


def test_executing_systemd_again_opens_nothing(lab: Lab, systemd: BootedSystemd) -> None:
    """As its package's upgrade does. The controller goes on, and its watchdog with it."""
    pid, restarts = systemd.main_pid(SERVICE), systemd.show(SERVICE, "NRestarts")
    with closed(lab, systemd):
        reexecute(systemd)
        assert (systemd.main_pid(SERVICE), systemd.show(SERVICE, "NRestarts")) == (pid, restarts)
        alive = alive_for(systemd)
        systemd.until(lambda: alive_for(systemd) > alive, "the watchdog's messages are not read")
        with systemd.successor():
            assert systemd.systemctl("restart", SERVICE).returncode == 0


def test_a_controller_over_its_memory_limit_is_replaced(lab: Lab, systemd: BootedSystemd) -> None:
    limit = ("set-property", "--runtime", SERVICE)
    with closed(lab, systemd), systemd.successor():
        before = int(systemd.show(SERVICE, "NRestarts"))
        systemd.systemctl(*limit, "MemoryMax=8M")
        systemd.until(lambda: int(systemd.show(SERVICE, "NRestarts")) > before, "it is not ended")
        systemd.systemctl(*limit, "MemoryMax=2G")
    killed = "killed by the OOM killer"
    systemd.until(lambda: killed in systemd.log(SERVICE), "the OOM killer did not end it")


def test_the_gate_stays_closed_until_the_end_of_shutdown(lab: Lab, systemd: BootedSystemd) -> None:
    with closed(lab, systemd):
        systemd.shut_down()
        time.sleep(0.5)
        assert refused(lab, systemd)
    pins = Pins(systemd.bpffs, "default").attachments()
    ids = {(systemd.cgroup / "gated.slice").stat().st_ino}
    assert {(one.hook, one.cgroup_id) for one in pins} >= {(hook, i) for hook in HOOKS for i in ids}
