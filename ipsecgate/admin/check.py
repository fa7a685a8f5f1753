"""What the gate needs of a machine, each need tried for real. Changes nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.admin.loader import check_targets, pins_of
from ipsecgate.core.model.policy import SaSource
from ipsecgate.edges.bpf import bytecode, libbpf
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.host import cgroups, mounts
from ipsecgate.edges.host.config import DEFAULT_VICI, Config
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.strongswan.probe import ike_daemon
from ipsecgate.errors import GateError, KernelLacksError
from ipsecgate.paths import Paths

OLDEST_KERNEL = (6, 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One need: what was found, and what to do where it is not met."""

    name: str
    ok: bool
    found: str
    hint: str = ""
    exit_code: int = 1


class _MissingError(Exception):
    def __init__(self, found: str, hint: str, exit_code: int = 1) -> None:
        super().__init__(found)
        self.finding = (found, hint, exit_code)


def examine(paths: Paths, read_config: Callable[[], Config]) -> list[Finding]:
    """Try every need, in the order in which one rests on the other."""
    config = Config()

    def configuration() -> str:
        nonlocal config
        config = read_config()
        check_targets(paths, config)
        policies = len(config.settings.policies)
        where = paths.config if paths.config.exists() else f"none at {paths.config}, defaults"
        return f"{where}: {f'{policies} policies' if policies else 'policies from connections'}"

    userland = False

    def strongswan() -> str:
        nonlocal userland
        found, userland = _strongswan(config.vici)
        return f"{found}, {'does ESP itself' if userland else 'has the kernel do ESP'}"

    def unless_userland(need: Callable[[], str]) -> str:
        source = config.settings.sa_source
        if source is SaSource.VICI or (source is SaSource.AUTO and userland):
            return "not needed: strongSwan does ESP itself"
        return need()

    tries: list[tuple[str, Callable[[], str]]] = [
        ("root", _root),
        ("kernel", _kernel),
        ("compiler", lambda: _compiler(paths)),
        ("cgroup2", lambda: str(cgroups.root())),
        ("bpffs", lambda: _bpffs(paths)),
        ("hooks", lambda: _hooks(paths)),
        ("configuration", configuration),
        ("strongswan", strongswan),
        ("xfrm", lambda: unless_userland(_xfrm)),
        ("esp", lambda: unless_userland(_esp)),
    ]
    return [_try(name, need) for name, need in tries]


def _try(name: str, need: Callable[[], str]) -> Finding:
    try:
        return Finding(name, ok=True, found=need())
    except _MissingError as missing:
        found, hint, exit_code = missing.finding
        return Finding(name, False, found, hint, exit_code)
    except GateError as error:
        return Finding(name, False, str(error), error.hint, error.exit_code)
    except OSError as error:
        return Finding(name, False, error.strerror or str(error), "run it as root")


def _root() -> str:
    if os.geteuid():
        raise _MissingError(f"user id {os.geteuid()}", "run it as root")
    return "yes"


def _kernel() -> str:
    release = platform.release()
    numbers = tuple(int(n) for n in release.split("-")[0].split(".")[:2])
    if numbers < OLDEST_KERNEL:
        raise _MissingError(release, "Linux 6.1 or newer is needed", KernelLacksError.exit_code)
    return f"Linux {release}"


def _is_compiled(paths: Paths) -> bool:
    return bytecode.cached(paths.cache).is_file()


def _compiler(paths: Paths) -> str:
    if _is_compiled(paths):
        return f"not needed: bytecode in {paths.cache}"
    if not bytecode.compiler_version():
        raise _MissingError("BCC is not installed", "apt install python3-bpfcc")
    return f"BCC ({bytecode.compiler_version()})"


def _bpffs(paths: Paths) -> str:
    if "bpf" not in Path("/proc/filesystems").read_text().split():
        raise _MissingError(
            "the kernel has no bpffs", "CONFIG_BPF_SYSCALL is needed", KernelLacksError.exit_code
        )
    if mounts.type_of(paths.bpffs) != "bpf":
        return f"not mounted on {paths.bpffs} yet: load and run do that"
    loaded = "is" if pins_of(paths).loaded else "is not"
    return f"{paths.bpffs}, instance {paths.instance} {loaded} loaded"


def _hooks(paths: Paths) -> str:
    """Load the real programs, without pinning or attaching them."""
    code = bytecode.get(paths.cache) if _is_compiled(paths) else bytecode.compiled()
    fds = {}
    try:
        for name, shape in code.maps.items():
            fds[name] = libbpf.create_map(name, shape)
        for hook, kind in HOOKS.items():
            linked = code.programs[hook].linked(fds)
            os.close(libbpf.load_program(hook, linked, *kind))
    except OSError as error:
        raise _MissingError(
            str(error.strerror),
            "the kernel needs CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, the caller CAP_BPF",
            KernelLacksError.exit_code,
        ) from error
    finally:
        for fd in fds.values():
            os.close(fd)
    return f"{', '.join(HOOKS)} load"


def _xfrm() -> str:
    if not probe.has_xfrm():
        raise _MissingError(
            "no NETLINK_XFRM",
            "modprobe xfrm_user, or a kernel with CONFIG_XFRM_USER",
            KernelLacksError.exit_code,
        )
    return "SPD and SAD can be read"


def _esp() -> str:
    if not probe.has_esp():
        raise _MissingError(
            f"Linux {platform.release()} cannot install an ESP SA",
            "modprobe esp4 esp6, or boot a kernel with CONFIG_INET_ESP and CONFIG_INET6_ESP; "
            "`ipsecgate demo` brings a test kernel of its own",
            KernelLacksError.exit_code,
        )
    return "an ESP SA can be installed"


def _strongswan(vici: Path) -> tuple[str, bool]:
    try:
        return ike_daemon(vici)
    except OSError as error:
        hint = "systemctl start strongswan (charon-systemd with the vici plugin)"
        if vici != DEFAULT_VICI:
            hint += "; [gate] vici names the socket"
        raise _MissingError(f"nobody answers on {vici}: {error.strerror or error}", hint) from error
