"""Find out which features a kernel has by trying each of them; run this in the guest, as root.

python -m tests.matrix.features FILE      write `Features` as JSON
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ipsecgate.core.codec.seccomp import program
from ipsecgate.edges.bpf import bytecode, libbpf, nested
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel import sockets

BYTECODE = "IPSECGATE_TEST_BYTECODE"
RIGHTS = "-all,+bpf,+net_admin,+perfmon"


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a kernel.

    `jit`: bpf_jit_enable of /proc, "" if BPF programs are interpreted. `btf`: size of the kernel's
    BTF in bytes. `ends_sockets`: can destroy sockets, for `live_flows = "destroy"`. `rights`: the
    hooks load with only CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON. `compile_seconds`: BCC's time on
    that kernel. `same_bytecode`: the result is the bytecode that the tests load.
    """

    release: str
    jit: str
    btf: int
    cgroup2: bool
    xfrm_interfaces: bool
    esp4: bool
    esp6: bool
    mptcp: bool
    ends_sockets: bool
    holds_calls: bool
    rights: bool
    compile_seconds: float
    same_bytecode: bool


def text(path: str) -> str:
    """Return the text of a file in /proc or /sys, "" if it is missing."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def works(*argv: str) -> bool:
    """Return whether a command succeeds in a new network namespace."""
    done = subprocess.run(["unshare", "--net", *argv], capture_output=True, check=False)
    return done.returncode == 0


def has_esp(local: str, remote: str) -> bool:
    """Return whether the kernel accepts an ESP state with strongSwan's first default cipher."""
    with suppress(OSError):
        socket.socket(socket.AF_INET6).close()  # loads the ipv6 module, which adding ESP does not
    state = f"ip xfrm state add src {local} dst {remote} proto esp spi 0x100 mode tunnel aead"
    return works(*state.split(), "rfc4106(gcm(aes))", "0x" + "11" * 20, "128")


def ends_sockets() -> bool:
    """Return whether the kernel can destroy another process's socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours:
        ours.connect(("127.0.0.1", 9))
        port = ours.getsockname()[1]
        listed = [sock for sock in asyncio.run(sockets.connected()) if sock.flow.sport == port]
        try:
            return asyncio.run(sockets.destroy(listed)) == 1
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False


def holds_calls() -> bool:
    """Return whether `exec` can install its seccomp filter. Use a child: a filter is permanent."""
    child = os.fork()
    if not child:
        try:
            seccomp.install(program(seccomp.abi()))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def load_hooks() -> None:
    """Load every program without attaching it. Raises: OSError with the verifier's message."""
    code = bytecode.get(Path(os.environ[BYTECODE]))
    maps = {name: nested.create(name, shape) for name, shape in code.maps.items()}
    for hook, kind in HOOKS.items():
        program = code.programs[hook]
        libbpf.load_program(hook, program.linked(maps), *kind, program.functions)


def loads_with_few_rights() -> bool:
    """Return whether the hooks load without CAP_SYS_ADMIN."""
    script = "from tests.matrix.features import load_hooks; load_hooks()"
    command = ["setpriv", f"--bounding-set={RIGHTS}", sys.executable, "-c", script]
    done = subprocess.run(command, check=False)
    return done.returncode == 0


def compiled() -> tuple[float, bool]:
    """Compile the hooks; return the seconds, and whether the result is what the tests load."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        code = bytecode.get(Path(folder))
    same = code.to_json() == bytecode.get(Path(os.environ[BYTECODE])).to_json()
    return round(time.monotonic() - began, 1), same


def found() -> Features:
    """Try each feature."""
    jit = text("/proc/sys/net/core/bpf_jit_enable")
    btf = Path("/sys/kernel/btf/vmlinux")
    seconds, same = compiled()
    return Features(
        release=platform.release(),
        jit=jit if jit != "0" else "",
        btf=btf.stat().st_size if btf.exists() else 0,
        cgroup2=cgroups.root().is_dir(),
        xfrm_interfaces=works("sh", "-c", "ip link add ipsec0 type xfrm dev lo if_id 7"),
        esp4=has_esp("192.0.2.1", "192.0.2.2"),
        esp6=has_esp("2001:db8::1", "2001:db8::2"),
        mptcp=bool(text("/proc/sys/net/mptcp/enabled")),
        ends_sockets=ends_sockets(),
        holds_calls=holds_calls(),
        rights=loads_with_few_rights(),
        compile_seconds=seconds,
        same_bytecode=same,
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asdict(found())))
