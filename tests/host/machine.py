"""The host: Debian's kernel under QEMU, systemd as process 1, on this machine's files.

It runs the commands one after the other as a service, writes its `state` before the first and
after each into the results folder, and goes off. Nothing of it is judged here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ipsecgate.edges.bpf.bytecode import get
from ipsecgate.lab import debian
from ipsecgate.lab.console import OnOutput
from ipsecgate.lab.guest import command_file, settings_file
from ipsecgate.lab.qemu import Qemu

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
CACHE = CHECKOUT / ".cache/bytecode"
MEMORY = 6144
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Host(Qemu):
    """A QEMU whose boot is systemd's."""

    boot_limit = 1800.0


def boot(
    commands: Sequence[str], results: Path, timeout: float, on_output: OnOutput
) -> tuple[int, str]:
    """Run shell commands on a new host; return the first exit code that is not 0, and all it said.

    `results` gets state-0.json, state-1.json and so on.
    Raises: GuestHung, GuestPanicked, GateError.
    """
    kernel = debian.fetch(progress=on_output)
    results.mkdir(parents=True, exist_ok=True)
    for old in results.glob("state-*.json"):
        old.unlink()
    get(CACHE)  # compiling takes a minute there
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
    environment |= {"IPSECGATE_TEST_BYTECODE": str(CACHE)}
    with tempfile.TemporaryDirectory(prefix="ipsecgate-host-", dir="/tmp") as folder:
        work = Path(folder)
        script = command_file(["sh", "-c", story(commands, results)], environment, CHECKOUT)
        (work / "command").write_bytes(os.fsencode(script))
        (work / "settings").write_text(settings_file(kernel, results, terminal=False))
        shutil.copytree(HERE / "units", work / "units")
        with Host(kernel, work, MEMORY, results, on_output, init=HERE / "host-init.sh") as host:
            host.follow(timeout)
            return host.exit_code(), host.output.text


def story(commands: Sequence[str], results: Path) -> str:
    """Return the script that gates the host's own cgroup, runs the commands, writes states."""
    own = f"{sys.executable} -m ipsecgate --cache-dir {shlex.quote(str(CACHE))}"
    state = f"/usr/bin/python3 -I {HERE}/state.py"
    lines = [
        "status=0",
        f"{own} load && {own} attach /sys/fs/cgroup/own || exit 1",
        # With its first delegated scope systemd sets all units' limits again, and those of early
        # boot change, as kernel.pid_max was lower then.
        "systemd-run --quiet --scope --property=Delegate=yes true || exit 1",
        'echo "this host: Linux $(uname -r), process 1 is $(cat /proc/1/comm),'
        ' its charon is $(systemctl show --value --property=MainPID strongswan)"',
        f"{state} >{results}/state-0.json || exit 1",
    ]
    for number, command in enumerate(commands, 1):
        lines += [
            f"echo; echo {shlex.quote('# ' + command)}; began=$(date +%s)",
            f"sh -c {shlex.quote(command)} || {{ code=$?; status=${{status%0}}$code; }}",
            'echo "# that took $(($(date +%s) - began)) s"',
            f"{state} >{results}/state-{number}.json || exit 1",
        ]
    return "\n".join([*lines, 'exit "${status}"'])
