"""Held programs where nobody may look at a call any more: kernel.yama.ptrace_scope = 3.

Only a boot takes that back. Prints what `exec` says, and the report of a program that was
held already: its outcome, and whether the wire saw ESP, and nothing in clear.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.holding import PORT, nothing_in_clear, say, start

SPEC = ConnSpec("yama", "tunnel", 4)

if __name__ == "__main__":
    with Lab("ipsecgate-test-yama") as lab, Gated(lab) as gate, lab.b.serve("tcp-server", PORT):
        lab.load(SPEC)
        gate.wait_policy(SPEC.name)
        to = ("--to", str(lab.b.address(SPEC)), "--port", str(PORT))
        command = f"echo; read line; exec {shlex.join(traffic.command('tcp-client', *to))}"
        held = start(lab, gate, ["sh", "-c", command])
        assert held.stdout
        held.stdout.readline()
        Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3")
        refused = lab.a.run(gate.holding("echo", "ran"), check=False)
        with nothing_in_clear(lab, esp=True):
            say(held)
            report = Client(held).result()
        outcome = [report["error"], report["echoed"], sorted(report["errnos"])]
        print(json.dumps([refused.returncode, refused.stdout, refused.stderr, outcome]))  # noqa: T201
