"""Check what the gate needs of a machine, by trying each need. Changes nothing.

The checks run in the order in which one depends on another.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

from ipsecgate.admin.loader import check_targets, pins_of, runs_before
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy, SaSource
from ipsecgate.core.model.value import value
from ipsecgate.edges.bpf import bytecode, libbpf, nested
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.host import cgroups, mounts
from ipsecgate.edges.host.config import DEFAULT_VICI, Config
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.strongswan.probe import ike_daemon
from ipsecgate.errors import GateError, KernelLacksError
from ipsecgate.paths import Paths

OLDEST_KERNEL = (6, 1)


@value
class Finding:
    """The result of one check. `hint` says what to do if it is not `ok`."""

    name: str
    ok: bool
    found: str
    hint: str = ""
    exit_code: int = 1  # of `ipsecgate check`, if this is the worst finding


def examine(paths: Paths, read_config: Callable[[], Config]) -> list[Finding]:
    """Run every check. `read_config` reads the configuration."""
    config = Config()
    userspace_esp = False

    def configuration() -> str:
        nonlocal config
        config = read_config()
        check_targets(paths, config)
        file = str(paths.config) if paths.config.exists() else f"no {paths.config}: defaults"
        return f"{file}; {_policies(config.settings.policies)}"

    def strongswan() -> str:
        nonlocal userspace_esp
        daemon, userspace_esp = _strongswan(config.vici)
        return f"{daemon}; ESP is done by {'strongSwan' if userspace_esp else 'the kernel'}"

    def for_kernel_esp(check: Callable[[], str]) -> str:
        source = config.settings.sa_source
        if source is SaSource.VICI or (source is SaSource.AUTO and userspace_esp):
            return "not needed: strongSwan does ESP"
        return check()

    checks: list[tuple[str, Callable[[], str]]] = [
        ("root", _root),
        ("kernel", _kernel),
        ("compiler", lambda: _compiler(paths)),
        ("cgroup2", lambda: str(cgroups.root())),
        ("bpffs", lambda: _bpffs(paths)),
        ("hooks", lambda: _hooks(paths)),
        ("order", lambda: _order(paths)),
        ("configuration", configuration),
        ("strongswan", strongswan),
        ("xfrm", lambda: for_kernel_esp(_xfrm)),
        ("esp", lambda: for_kernel_esp(_esp)),
        ("floor", lambda: for_kernel_esp(lambda: _floor(config))),
    ]
    return [_run(name, check) for name, check in checks]


def _run(name: str, check: Callable[[], str]) -> Finding:
    """Run a check, which returns what it found. Its errors become a finding that is not `ok`."""
    try:
        return Finding(name, ok=True, found=check())
    except GateError as error:
        return Finding(name, False, str(error), error.hint, error.exit_code)
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else ""
        return Finding(name, False, error.strerror or str(error), hint)


def _policies(policies: tuple[Policy, ...]) -> str:
    count = f"{len(policies)} {'policy' if len(policies) == 1 else 'policies'}"
    if any(policy.action is Action.PROTECT for policy in policies):
        return count
    first = f"{count}, and then " if policies else ""
    return f"{first}policies are derived from strongSwan's connections"


def _floor(config: Config) -> str:
    if config.settings.floor:
        return "xfrm-block: what no hook sees is blocked, too, unless an SA protects it"
    outside = "" if config.host else "what processes outside gated cgroups send, "
    return (
        f"none: {outside}what the kernel sends on its own (GRE, VXLAN, Geneve, IPIP, NFS) and "
        "what it forwards leaves in clear while no SA protects it"
    )


def _root() -> str:
    if os.geteuid():
        raise GateError(f"running as user id {os.geteuid()}", hint="run it as root")
    return "running as root"


def _kernel() -> str:
    release = platform.release()
    numbers = tuple(int(n) for n in release.split("-")[0].split(".")[:2])
    if numbers < OLDEST_KERNEL:
        raise KernelLacksError(f"Linux {release}", hint="boot Linux 6.1 or newer")
    return f"Linux {release}"


def _is_compiled(paths: Paths) -> bool:
    return bytecode.cached(paths.cache).is_file()


def _compiler(paths: Paths) -> str:
    if _is_compiled(paths):
        return f"not needed: the compiled hooks are in {paths.cache}"
    if not bytecode.compiler_version():
        raise GateError("BCC is not installed", hint="apt install python3-bpfcc")
    return f"BCC ({bytecode.compiler_version()})"


def _bpffs(paths: Paths) -> str:
    if "bpf" not in Path("/proc/filesystems").read_text().split():
        raise KernelLacksError(
            "the kernel has no bpffs", hint="boot a kernel with CONFIG_BPF_SYSCALL"
        )
    if mounts.type_of(paths.bpffs) != "bpf":
        return f"not mounted on {paths.bpffs} yet: `ipsecgate load` and `run` mount it"
    loaded = "" if pins_of(paths).loaded else "not "
    return f"{paths.bpffs}; hooks of instance {paths.instance} {loaded}loaded"


def _hooks(paths: Paths) -> str:
    """Load the programs, without pinning or attaching them."""
    code = bytecode.get(paths.cache) if _is_compiled(paths) else bytecode.compiled()
    fds = {}
    try:
        for name, shape in code.maps.items():
            fds[name] = nested.create(name, shape)
        for hook, kind in HOOKS.items():
            program = code.programs[hook]
            linked = program.linked(fds)
            os.close(libbpf.load_program(hook, linked, *kind, program.functions))
    except OSError as error:
        raise KernelLacksError(
            str(error.strerror),
            hint="boot a kernel with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, and run it with "
            "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
        ) from error
    finally:
        for fd in fds.values():
            os.close(fd)
    return f"the kernel accepts {', '.join(HOOKS)}"


def _order(paths: Paths) -> str:
    """Look for programs of other tools that may change what the hooks have checked."""
    if not pins_of(paths).loaded:
        return "no hooks are loaded yet"
    found = runs_before(paths)
    if found:
        raise GateError(str(found[0]), hint="see `bpftool cgroup tree`")
    return "no other tool's program runs after the hooks"


def _xfrm() -> str:
    if not probe.has_xfrm():
        raise KernelLacksError(
            "the kernel has no XFRM netlink interface",
            hint="modprobe xfrm_user, or boot a kernel with CONFIG_XFRM_USER",
        )
    return "the kernel has the XFRM netlink interface"


def _esp() -> str:
    if not probe.has_esp():
        raise KernelLacksError(
            f"Linux {platform.release()} cannot install an ESP SA",
            hint="modprobe esp4 esp6, or boot a kernel with CONFIG_INET_ESP and "
            "CONFIG_INET6_ESP; `ipsecgate demo` brings its own test kernel",
        )
    return "the kernel can install an ESP SA"


def _strongswan(vici: Path) -> tuple[str, bool]:
    try:
        return ike_daemon(vici)
    except OSError as error:
        hint = "systemctl start strongswan; it needs charon-systemd and the vici plugin"
        if vici != DEFAULT_VICI:
            hint += "; gate.vici in the configuration names the socket"
        raise GateError(
            f"strongSwan does not answer on {vici}: {error.strerror or error}", hint=hint
        ) from error
