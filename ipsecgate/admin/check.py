"""Check what the gate needs of a machine, by trying each need, and what will not work on it.

The checks run in the order in which one depends on another. Rules of this module: it changes
nothing. What it gathers is judged by `core.check`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from ipsecgate.admin import host_facts
from ipsecgate.admin import ungated as open_sockets
from ipsecgate.admin.loader import check_targets, gated_cgroups, pins_of, runs_before
from ipsecgate.core.check import connections, machine, order, policies, ungated
from ipsecgate.core.check.connections import Loaded
from ipsecgate.core.check.finding import Finding, State, missing, ok, some, warning
from ipsecgate.core.gate.host_floor import NO_EFFECT
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy, SaSource, derived_policies, in_force
from ipsecgate.core.state.silence import Silent
from ipsecgate.edges.bpf import bytecode, exclusive, libbpf, nested
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.host import cgroups, mounts
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.strongswan import inventory
from ipsecgate.edges.strongswan.vici import not_running, start_it
from ipsecgate.errors import GateError, KernelLacksError
from ipsecgate.paths import Paths

OLDEST_KERNEL = (6, 1)
FOR_ANYONE = ("root", "kernel", "compiler", "cgroup2", "configuration", "xfrm", "floor")
"""The checks that say the truth to a user who is not root."""

Check = Callable[[], str | list[Finding]]
"""Returns what it found; raises GateError or OSError for what is missing."""


def examine(paths: Paths, read_config: Callable[[], Config]) -> list[Finding]:
    """Run every check. `read_config` reads the configuration."""
    host = _Host(paths, read_config)
    checks: list[tuple[str, Check]] = [
        ("root", _root),
        ("kernel", _kernel),
        ("compiler", lambda: _compiler(paths)),
        ("cgroup2", lambda: str(cgroups.root())),
        ("bpffs", lambda: _bpffs(paths)),
        ("hooks", lambda: _hooks(paths)),
        ("configuration", host.configuration),
        ("cgroups", host.gated),
        ("programs", host.programs),
        ("strongswan", host.strongswan),
        (order.NAME, host.policies),
        (connections.NAME, host.connections),
        (connections.PLUGINS, host.plugins),
        (ungated.NAME, host.ungated),
        ("traffic", host.traffic),
        ("xfrm", lambda: host.for_kernel_esp(_xfrm)),
        ("esp", lambda: host.for_kernel_esp(_esp)),
        ("floor", host.floor),
        (machine.CLOCK, host.clock),
        (machine.LIMITS, lambda: machine.check_limits(host_facts.limits(paths))),
        (machine.UNITS, lambda: host_facts.check_installed(paths)),
    ]
    found: list[Finding] = []
    for name, check in checks:
        if os.geteuid() and name not in FOR_ANYONE:
            continue
        known = {one.found for one in found if one.state is State.MISSING}
        # What one check misses, those that depend on it would miss, too.
        found += [one for one in _run(name, check) if one.found not in known]
    return found


def _run(name: str, check: Check) -> list[Finding]:
    """Run a check; its errors become a finding."""
    try:
        found = check()
    except GateError as error:
        return [missing(name, str(error), error.hint, error.exit_code)]
    except OSError as error:
        hint = "run it as root" if isinstance(error, PermissionError) else ""
        return [missing(name, error.strerror or str(error), hint)]
    return [ok(name, found)] if isinstance(found, str) else found


class _Host:
    """What the first checks have found, for those that come later."""

    def __init__(self, paths: Paths, read_config: Callable[[], Config]) -> None:
        self._paths = paths
        self._read_config = read_config
        self._config = Config()
        self._loaded: Loaded | None = None  # None: strongSwan does not answer
        self._silent: list[Silent] = []
        self._peers: policies.PeerAddresses = {}
        self._unresolved: dict[str, str] = {}

    def configuration(self) -> str:
        self._config = self._read_config()
        check_targets(self._paths, self._config)
        path = self._paths.config
        file = str(path) if path.exists() else f"no {path}: defaults"
        return f"{file}; {_policies(self._config.settings.policies)}"

    def gated(self) -> list[Finding]:
        """Return which configured cgroups do not exist, and whether any is gated."""
        targets = check_targets(self._paths, self._config)
        found = [
            warning("cgroups", cgroups.absence(target), "start what lives there, or remove it")
            for target, paths in cgroups.find_all(targets).items()
            if not paths
        ]
        gated = gated_cgroups(self._paths)
        if not gated:
            nothing = "none is gated: the hooks check nothing"
            hint = "set gate.cgroups, then `systemctl reload-or-restart ipsecgate`; or "
            hint += "`ipsecgate attach unit:NAME`, until it is detached"
            if targets:
                nothing += f". Configured: {some(targets)}"
                hint = "`systemctl reload-or-restart ipsecgate`; if the controller runs already, "
                hint += "`ipsecgate status` says why they are not gated"
            found.append(warning("cgroups", nothing, hint))
        return found or [ok("cgroups", f"gated: {some(gated)}")]

    def programs(self) -> list[Finding]:
        """Return the programs of other tools that get in the way of the hooks."""
        loaded = pins_of(self._paths).loaded
        found = [
            warning("programs", one.problem.text, one.problem.advice)
            for one in (runs_before(self._paths) if loaded else ())
        ]
        gated = set(gated_cgroups(self._paths))
        targets = check_targets(self._paths, self._config)
        wanted = {one for some in cgroups.find_all(targets).values() for one in some}
        for cgroup in wanted - gated:
            for hook, kind in HOOKS.items():
                error = exclusive.explain(cgroup, hook, kind.attach_type)
                if error is not None:
                    found.append(missing("programs", str(error), error.hint))
        return found or [ok("programs", "no other tool's program is in the way of the hooks")]

    # --- strongSwan -------------------------------------------------------------------

    def strongswan(self) -> str:
        vici = self._config.vici
        try:
            self._loaded, self._silent = inventory.read(vici)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise GateError(_unchecked(not_running(vici, error)), hint=start_it(vici)) from error
        except OSError as error:
            said = f"strongSwan does not answer on {vici}: {error.strerror or error}"
            raise GateError(_unchecked(said), hint=start_it(vici)) from error
        self._peers, self._unresolved = host_facts.peers(self._loaded)
        who = "strongSwan" if self._loaded.userspace_esp else "the kernel"
        return f"{self._loaded.daemon}; ESP is done by {who}"

    def policies(self) -> list[Finding]:
        if self._loaded is None:
            return []
        settings, children = self._config.settings, self._loaded.children
        return policies.check_policies(settings.policies, children, self._peers, deny=settings.deny)

    def connections(self) -> list[Finding]:
        if self._loaded is None:
            return []
        addresses = host_facts.addresses()
        return connections.check_connections(self._loaded, addresses, self._unresolved)

    def plugins(self) -> list[Finding]:
        return connections.check_plugins(self._loaded) if self._loaded is not None else []

    def ungated(self) -> list[Finding]:
        """Return which processes outside gated cgroups have connections that must be protected."""
        if self._config.host or not gated_cgroups(self._paths):
            return []
        configured = self._config.settings.policies
        children = self._loaded.children if self._loaded is not None else ()
        found = [
            (flow, "" if cgroup == cgroups.root() else open_sockets.target_of(cgroup))
            for flow, cgroup, is_gated in open_sockets.connections(self._paths)
            if not is_gated
        ]
        return ungated.check_ungated(in_force(configured, derived_policies(children)), found)

    def traffic(self) -> list[Finding]:
        if self._loaded is None:
            return []
        problems = [one.problem for one in self._silent]
        found = [warning("traffic", one.text, one.advice) for one in problems]
        return found or [ok("traffic", "every SA that has sent packets has received some")]

    def for_kernel_esp(self, check: Callable[[], str]) -> str:
        return "not needed: strongSwan does ESP" if self._is_userspace_esp() else check()

    def _is_userspace_esp(self) -> bool:
        source = self._config.settings.sa_source
        userspace = self._loaded is not None and self._loaded.userspace_esp
        return source is SaSource.VICI or (source is SaSource.AUTO and userspace)

    # --- the machine ------------------------------------------------------------------

    def floor(self) -> str | list[Finding]:
        wanted = self._config.settings.floor
        if self._is_userspace_esp():
            if not wanted:
                return "not available, as strongSwan does ESP: only gated processes are checked"
            return [warning("floor", NO_EFFECT.text, NO_EFFECT.advice)]
        if wanted:
            return "xfrm-block: what no hook sees is blocked, too, unless an SA protects it"
        outside = "" if self._config.host else "processes outside gated cgroups, "
        return (
            f"off: only gated processes are checked; {outside}tunnels and NFS of the kernel, and "
            'forwarded packets are not. gate.floor = "xfrm-block" blocks these without an SA'
        )

    def clock(self) -> list[Finding]:
        certificates = self._loaded is not None and self._loaded.uses_certificates
        return machine.check_clock(host_facts.clock(uses_certificates=certificates))


def _unchecked(said: str) -> str:
    return f"{said}; so its connections were not checked"


def _policies(configured: Iterable[Policy]) -> str:
    found = tuple(configured)
    count = f"{len(found)} {'policy' if len(found) == 1 else 'policies'}"
    if any(policy.action is Action.PROTECT for policy in found):
        return count
    first = f"{count}, and then " if found else ""
    return f"{first}policies are derived from strongSwan's connections"


# --- the kernel -------------------------------------------------------------------------------


def _root() -> str:
    if os.geteuid():
        raise GateError(
            f"running as user id {os.geteuid()}, so most was not checked", hint="run it as root"
        )
    return "running as root"


def _kernel() -> str:
    release = platform.release()
    numbers = tuple(int(n) for n in release.split("-")[0].split(".")[:2])
    if numbers < OLDEST_KERNEL:
        raise KernelLacksError(f"Linux {release}", hint="boot Linux 6.1 or newer")
    return f"Linux {release}"


def _compiler(paths: Paths) -> str:
    if found := bytecode.find(paths.cache):
        return f"not needed: the compiled hooks are in {found.parent}"
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
    code = bytecode.get(paths.cache) if bytecode.find(paths.cache) else bytecode.compiled()
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
            hint="modprobe -a esp4 esp6, or boot a kernel with CONFIG_INET_ESP and "
            "CONFIG_INET6_ESP; `ipsecgate demo` brings its own test kernel",
        )
    return "the kernel can install an ESP SA"
