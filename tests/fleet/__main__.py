"""Roll packaging/ansible out to a fleet, break things, and judge by system calls.

`make fleet-test` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.fleet.hosts import Fleet, Host
from tests.until import wait_until

ROOT = Path(__file__).parents[2]
PLAYBOOKS = ROOT / "packaging/ansible"
PEER = "192.0.2.200"  # protected for all; no SA, so audit mode would refuse it
EXEMPT = "192.0.2.201"  # in the protected network, but a policy of the host exempts it
FREE = "198.51.100.1"  # no policy names it
QUIET, NOISY, LATE = f"{EXEMPT} {FREE}", f"{PEER} {FREE}", f"+{PEER} {EXEMPT}"
BY_HAND = '[[policy]]\nname = "by-hand"\nremote = ["192.0.2.192/26"]\n'
POLICIES = [{"name": "site", "remote": ["192.0.2.192/26"]}]
CONFIG = "/etc/ipsecgate/ipsecgate.toml"
AUDIT_SECONDS, WATCH_SECONDS = 10, 3


class Rollout:
    """The playbooks, run on a fleet whose hosts have these variables."""

    def __init__(
        self, fleet: Fleet, tools: Path, package: Path, folder: Path, noisy: set[str]
    ) -> None:
        self.hosts, self._noisy = fleet.hosts, noisy
        self.exempt: set[str] = set()  # hosts with a policy that lets the peer go
        self.inventory = folder / "inventory.json"
        self.variables: dict[str, dict[str, Any]] = {
            name: {
                "machine_pid": host.pid,
                "ipsecgate_host_policies": [
                    {"name": f"{name}-monitoring", "remote": [f"{EXEMPT}/32"], "action": "bypass"}
                ],
            }
            for name, host in fleet.hosts.items()
        }
        self._all = {
            "ansible_connection": "machine",
            "ansible_become": False,  # it is root already
            "ansible_python_interpreter": "/usr/bin/python3",
            "ipsecgate_deb": str(package.resolve()),
            "ipsecgate_gate": {"cgroups": ["unit:app"]},
            "ipsecgate_policies": POLICIES,
            "ipsecgate_audit_seconds": AUDIT_SECONDS,
            "ipsecgate_watch_seconds": WATCH_SECONDS,
        }
        self._tools = tools
        self._environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(PLAYBOOKS / "ansible.cfg"),
            "ANSIBLE_CONNECTION_PLUGINS": str(Path(__file__).with_name("connection_plugins")),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
        }

    def play(self, name: str, *options: str) -> tuple[int, str, dict[str, dict[str, int]]]:
        """Run a playbook; return its exit code, its output and its recap by host."""
        groups = {"ipsecgate": {"hosts": self.variables, "vars": self._all}}
        self.inventory.write_text(json.dumps(groups))
        began = time.monotonic()
        done = subprocess.run(
            [self._tools / "ansible-playbook", f"{name}.yml", "-i", self.inventory, *options],
            cwd=PLAYBOOKS, env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        recap = {
            host: {key: int(number) for key, number in re.findall(r"(\w+)=(\d+)", rest)}
            for host, rest in re.findall(r"^(\w+) +: (ok=.*)$", done.stdout, re.MULTILINE)
        }
        text = done.stdout + done.stderr
        print(
            f"{name} {' '.join(options)}: {time.monotonic() - began:.0f} s, "
            f"{sum(one['changed'] for one in recap.values())} changes, "
            f"{sum(one['failed'] > 0 for one in recap.values())} failed, exit {done.returncode}",
            flush=True,
        )
        return done.returncode, text, recap

    def enforcing(self) -> set[str]:
        """Return which hosts enforce, and check by calls in their gated cgroup that they do.

        A call to the peer would spoil the audit of a quiet host, so those are asked for their mode.
        """
        found = {name for name, host in self.hosts.items() if status(host)["mode"] == "enforce"}
        for name in found | self._noisy:
            refused = name in found and name not in self.exempt
            error = "EPERM" if refused else "EINPROGRESS"
            assert self.hosts[name].calls(PEER) == error, name
        for name, host in self.hosts.items():
            assert {host.calls(EXEMPT), host.calls(FREE)} == {"EINPROGRESS"}, name
        return found


def status(host: Host) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(host.run("ipsecgate", "--json", "status").stdout)
    return document


def install(rollout: Rollout, package: Path, gated: str) -> None:
    """All begin in audit mode, except a host that somebody gated before: it goes on enforcing."""
    host = rollout.hosts[gated]
    shutil.copy(package, host.file("/var/cache/before.deb"))
    assert host.run("apt-get", "install", "--yes", "/var/cache/before.deb").returncode == 0
    host.file(CONFIG).write_text('[gate]\ncgroups = ["unit:app"]\n' + BY_HAND)
    assert host.run("systemctl", "reload", "ipsecgate").returncode == 0
    code, text, _ = rollout.play("site")
    assert code == 0, text
    assert rollout.enforcing() == {gated}
    for name, host in rollout.hosts.items():
        metrics = host.run("ipsecgate", "metrics").stdout
        assert f"ipsecgate_audit_mode {float(name != gated)}" in metrics, name
        assert host.run("systemctl", "is-active", "ipsecgate-metrics").stdout == "active\n", name


def refuse_nonsense(rollout: Rollout, name: str) -> None:
    """A configuration that is invalid on one host changes nothing there, nor what is in force."""
    host = rollout.hosts[name]
    before = {path.name: path.read_text() for path in host.file("/etc/ipsecgate").rglob("*.toml")}
    good = rollout.variables[name]["ipsecgate_host_policies"]
    rollout.variables[name]["ipsecgate_host_policies"] = [{"name": "bad", "remote": ["nonsense"]}]
    code, text, recap = rollout.play("site", "--limit", name)
    assert code == 2, text
    assert "nonsense" in text
    assert recap[name]["failed"] == 1
    after = {path.name: path.read_text() for path in host.file("/etc/ipsecgate").rglob("*.toml")}
    assert before == after
    assert status(host)["healthy"]
    rollout.variables[name]["ipsecgate_host_policies"] = good


def enforce(rollout: Rollout, noisy: set[str], late: str, gated: str) -> None:
    """Only quiet hosts enforce; the host that refuses then goes back, and ends the roll-out."""
    code, text, recap = rollout.play("enforce")
    first = rollout.enforcing()
    assert code != 0, text
    assert recap[late]["failed"] == 1, text
    assert status(rollout.hosts[late])["mode"] == "audit"
    names = list(rollout.hosts)
    assert first > {gated}, text
    assert first - {gated} <= set(names[: names.index(late) + max(1, len(names) // 5)]) - noisy - {
        late
    }
    print(f"stopped by {late}: {len(first)} enforce, {len(names) - len(first)} as before")
    exempt(rollout, [late])
    wait_until(lambda: audited(rollout, [late]), "the audit does not go on", 60)
    code, text, recap = rollout.play("enforce")
    assert code == 0, text
    assert rollout.enforcing() == set(rollout.hosts) - noisy
    for name in noisy:
        assert re.search(rf"{name}: audit, it would have refused [1-9]\d* requests", text), text


def exempt(rollout: Rollout, names: Iterable[str]) -> None:
    """Give hosts a policy of their own for what they call, and roll it out."""
    for name in names:
        rollout.exempt.add(name)
        rollout.variables[name]["ipsecgate_host_policies"] = [
            *rollout.variables[name]["ipsecgate_host_policies"],
            {"name": "old-database", "remote": [f"{PEER}/32"], "protocol": "tcp", "port": "5432",
             "action": "bypass"},
        ]  # fmt: skip
    code, text, _ = rollout.play("site", "--limit", ",".join(names))
    assert code == 0, text
    assert f"{PEER}" in text, "what it opens is not shown"


def audited(rollout: Rollout, names: Iterable[str]) -> bool:
    """Return whether these hosts have been audited for long enough."""
    up = float(Path("/proc/uptime").read_text().split()[0])
    began = [
        json.loads(rollout.hosts[name].file("/var/cache/ipsecgate/audit-began.json").read_text())
        for name in names
    ]
    return all(up - one["uptime"] > AUDIT_SECONDS for one in began)


def calls_of(count: int) -> tuple[dict[str, str], set[str], str]:
    """Return the calls of each host, which hosts are noisy, and the late one."""
    names = [f"h{number:02}" for number in range(1, count + 1)]
    noisy, late = {names[1], *names[6::7]}, names[2 if count < 10 else 11]
    calls: Mapping[str, str] = dict.fromkeys(noisy, NOISY) | {late: LATE}
    return {name: calls.get(name, QUIET) for name in names}, noisy - {late}, late


def main() -> None:
    """Do it all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fleet", description=__doc__)
    for name in ("tools", "root", "package"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--hosts", type=int, default=20)
    options = parser.parse_args()
    calls, noisy, late = calls_of(options.hosts)
    gated = list(calls)[-1]
    began = time.monotonic()
    with (
        Fleet(options.root, calls) as fleet,
        tempfile.TemporaryDirectory(prefix="ipsecgate-fleet-") as folder,
    ):
        print(f"{len(calls)} hosts up in {time.monotonic() - began:.1f} s; noisy: {sorted(noisy)}")
        rollout = Rollout(fleet, options.tools, options.package, Path(folder), noisy)
        install(rollout, options.package, gated)
        refuse_nonsense(rollout, "h01")
        wait_until(lambda: audited(rollout, rollout.hosts), "the audit does not go on", 60)
        enforce(rollout, noisy, late, gated)

        code, text, recap = rollout.play("site")  # a later run changes nothing
        assert code == 0, text
        assert not any(one["changed"] for one in recap.values()), text
        assert rollout.enforcing() == set(rollout.hosts) - noisy
        code, text, _ = rollout.play("rollback", "--limit", "h01")
        assert code == 0, text
        assert rollout.enforcing() == set(rollout.hosts) - noisy - {"h01"}
    print(f"passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
