"""The host: user-mode-linux, or Debian's kernel under QEMU, with systemd, on this machine's files.

It runs the commands in turn as a service, writes its `state` into the results folder before the
first one and after each, and powers off. This module does not judge the results.
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
from ipsecgate.lab.guest import KINDS, assignments, command_file, settings_file
from ipsecgate.lab.kernel import Kernel
from ipsecgate.lab.qemu import Qemu
from ipsecgate.lab.signals import exit_on_sigterm
from ipsecgate.lab.uml import Uml

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
CACHE = CHECKOUT / ".cache/bytecode"
MEMORY = 6144
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


INIT = HERE / "host-init.sh"
SHARES = {"uml": ("hostfs", "/dev/tty1"), "qemu": ("9p", "/dev/ttyS1")}
"""The file system that shares folders with this machine, and the terminal for the output."""


class UmlHost(Uml):
    """User-mode-linux that boots with systemd."""

    boot_limit = 300.0


class QemuHost(Qemu):
    """A QEMU guest that boots with systemd."""

    boot_limit = 1800.0


def boot(
    kind: str, commands: Sequence[str], results: Path, timeout: float, on_output: OnOutput
) -> tuple[int, str]:
    """Run shell commands on a new host; return 0 or the first non-zero exit code, and the output.

    `kind`: uml or qemu. `results` gets state-0.json, state-1.json and so on.
    Raises: GuestHung, GuestPanicked, GateError.
    """
    kernel = KINDS[kind](progress=on_output)
    results.mkdir(parents=True, exist_ok=True)
    for old in results.glob("state-*.json"):
        old.unlink()
    get(CACHE)
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
    if kind == "qemu":  # compiling takes a minute under emulation
        environment["IPSECGATE_TEST_BYTECODE"] = str(CACHE)
    temporary = tempfile.TemporaryDirectory(prefix="ipsecgate-host-", dir="/tmp")
    with exit_on_sigterm(), temporary as folder:
        work = Path(folder)
        script = command_file(["sh", "-c", host_script(commands, results)], environment, CHECKOUT)
        (work / "command").write_bytes(os.fsencode(script))
        share, output = SHARES[kind]
        settings = settings_file(kernel, results, terminal=False)
        settings += assignments({"checkout": str(CHECKOUT), "share": share, "output": output})
        (work / "settings").write_text(settings)
        shutil.copytree(HERE / "units", work / "units")
        with machine(kernel, work, results, on_output) as host:
            host.follow(timeout)
            return host.exit_code(), host.output.text


def machine(kernel: Kernel, work: Path, results: Path, on_output: OnOutput) -> Uml:
    """Start the host with this kernel."""
    if isinstance(kernel, debian.DebianKernel):
        return QemuHost(kernel, work, MEMORY, results, on_output, init=INIT)
    return UmlHost(kernel, work, MEMORY, on_output, init=INIT)


def host_script(commands: Sequence[str], results: Path) -> str:
    """Return the script that gates the host's cgroup, runs the commands and records the states."""
    own = f"{sys.executable} -m ipsecgate --cache-dir {shlex.quote(str(CACHE))}"
    state = f"/usr/bin/python3 -I {HERE}/state.py"
    lines = [
        "status=0",
        f"{own} load && {own} attach /sys/fs/cgroup/own || exit 1",
        # When systemd starts its first delegated scope it sets all units' limits again. Those from
        # early boot change, because kernel.pid_max was lower then; so do that first.
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
