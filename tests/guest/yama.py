"""Run programs under `ipsecgate exec` where no call can be inspected: kernel.yama.ptrace_scope = 3.

    python -m tests.guest.yama  ->  [EXIT CODE, OUTPUT, ERRORS, [ERROR, ECHOED, ERRNOS]]

The first three are of an `exec` after the change; the list is the report of a client that `exec`
started before. The script fails unless that client's packets left in ESP, and none in clear.
Only a reboot resets the setting, so this needs a guest of its own.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.under_exec import PORT, nothing_in_clear, say, start

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
        refused = lab.a.run(gate.exec_argv("echo", "ran"), check=False)
        with nothing_in_clear(lab, esp=True):
            say(held)
            report = Client(held).result()
        outcome = [report["error"], report["echoed"], sorted(report["errnos"])]
        print(json.dumps([refused.returncode, refused.stdout, refused.stderr, outcome]))  # noqa: T201
