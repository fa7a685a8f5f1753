"""What a support bundle has: what the kernel, strongSwan and systemd say, without any secret.

Rules of this module: nothing is changed. Nothing is read that has keys in it: `ip xfrm state` is
asked for no keys, strongSwan's files and log are left out. Every text is scrubbed all the same.
Each item fails alone, and the manifest says why.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ipsecgate import trust
from ipsecgate.admin.scrub import scrub
from ipsecgate.admin.versions import versions
from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

PROGRAM_LIMIT = 10.0  # seconds
SIZE_LIMIT = 8 << 20  # characters of one item; what follows is cut off
UNITS = ("ipsecgate", "ipsecgate-load")

PROGRAMS: Mapping[str, tuple[str, ...]] = {
    # Never without `nokeys`. A version of ip that does not know the word prints an error.
    "xfrm/states": ("ip", "-s", "xfrm", "state", "list", "nokeys"),
    "xfrm/policies": ("ip", "-s", "xfrm", "policy", "list"),
    "network/links": ("ip", "-details", "link"),
    "network/addresses": ("ip", "address"),
    "network/rules4": ("ip", "-4", "rule"),
    "network/rules6": ("ip", "-6", "rule"),
    "network/routes4": ("ip", "-4", "route", "show", "table", "all"),
    "network/routes6": ("ip", "-6", "route", "show", "table", "all"),
    "network/nftables": ("nft", "list", "ruleset"),
    "network/iptables": ("iptables-save",),
    "network/ip6tables": ("ip6tables-save",),
    "bpf/programs": ("bpftool", "prog", "show"),
    "bpf/maps": ("bpftool", "map", "show"),
    "bpf/links": ("bpftool", "link", "show"),
    "bpf/cgroups": ("bpftool", "cgroup", "tree"),
    "systemd/units": ("systemctl", "show", *UNITS),
    "systemd/journal": (
        "journalctl", "--no-pager", "--output=short-precise", "--since=-2days", "--lines=20000",
        *(f"--unit={unit}" for unit in UNITS),
    ),
}  # fmt: skip
SWANCTL = ("stats", "list-conns", "list-sas", "list-pols")
SYSCTLS = (
    "net/core/xfrm_*",
    "net/core/bpf_jit_*",
    "net/ipv4/ip_forward",
    "net/ipv4/conf/*/disable_xfrm",
    "net/ipv4/conf/*/disable_policy",
    "net/ipv4/conf/*/rp_filter",
    "net/ipv6/conf/*/disable_ipv6",
    "net/ipv6/conf/*/forwarding",
    "fs/file-max",
    "fs/inotify/*",
    "kernel/unprivileged_bpf_disabled",
    "kernel/yama/ptrace_scope",
)
FILES = ("/etc/os-release", "/proc/net/xfrm_stat", "/proc/self/mountinfo", "/proc/uptime")
KERNEL_LOG = re.compile(r"(?i)bpf|xfrm|esp|ipsec|cgroup|oom|seccomp")
LEFT_OUT = (
    "the keys of the SAs",
    "strongSwan's files in /etc (they have secrets)",
    "strongSwan's log (at a high level it has keys)",
    "the log of all other programs",
)

Item = tuple[str, Callable[[], str]]
"""The name of a file in the bundle, and what reads it."""


@value
class Collected:
    """One item. `error`: why it could not be read, or not wholly; then the text may be empty."""

    name: str
    text: str
    hidden: int  # secrets that were taken out of the text
    error: str = ""


def collect(items: Iterable[Item]) -> Iterator[Collected]:
    """Read each item and take secrets out of it."""
    for name, read in items:
        text, error = "", ""
        try:
            text = read()
        except GateError as failure:
            text, error = failure.evidence, str(failure)
        except OSError as failure:
            error = failure.strerror or str(failure)
        except Exception as failure:  # a defect must not keep the rest from those who mend it
            text, error = traceback.format_exc(), f"{type(failure).__name__}: {failure}"
        if len(text) > SIZE_LIMIT:
            text, error = text[:SIZE_LIMIT], f"cut off after {SIZE_LIMIT} characters"
        clean, hidden = scrub(text)
        yield Collected(name, clean, hidden, scrub(error)[0])


def items(paths: Paths, vici: Path) -> Iterator[Item]:
    """Yield what does not come from one of our own verbs."""
    yield "versions.json", lambda: json.dumps(versions(vici), indent=1)
    for file in [paths.config, *sorted((paths.config.parent / "policies.d").glob("*.toml"))]:
        yield f"configuration/{file.name}", file.read_text
    for file in (paths.remembered, paths.targets):
        if _is_there(file):
            yield f"cache/{file.name}", file.read_text
    for name, argv in PROGRAMS.items():
        yield f"{name}.txt", lambda argv=argv: _output(argv)  # type: ignore[misc]
    for what in SWANCTL:
        argv = ("swanctl", f"--{what}", "--uri", f"unix://{vici}")
        yield f"strongswan/{what}.txt", lambda argv=argv: _output(argv)  # type: ignore[misc]
    yield "kernel/log.txt", _kernel_log
    yield "kernel/sysctls.txt", _sysctls
    for path in map(Path, FILES):
        yield f"kernel/{path.name}.txt", path.read_text
    yield "bpf/pins.txt", lambda: _listing(paths.bpffs / "ipsecgate")


def manifest(paths: Paths, collected: Iterable[Collected]) -> dict[str, object]:
    """Return what the bundle has, what it lacks and why."""
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "instance": paths.instance,
        "user": os.geteuid(),
        "items": [
            {
                "name": item.name,
                "bytes": len(item.text.encode(errors="replace")),
                "hidden": item.hidden,
                "error": item.error or None,
            }
            for item in collected
        ],
        "left_out": list(LEFT_OUT),
    }


def _output(argv: tuple[str, ...]) -> str:
    """Return what a program prints. Raises: GateError, whose evidence is the output; OSError."""
    try:
        done = trust.run(argv, limit=PROGRAM_LIMIT)
    except FileNotFoundError as error:
        raise GateError(f"{argv[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise GateError(f"{argv[0]} did not end within {PROGRAM_LIMIT:.0f} s") from error
    if done.returncode:
        lines = (line for line in done.stderr.splitlines() if not line.startswith("plugin "))
        reason = next(lines, f"exit code {done.returncode}")
        raise GateError(f"{argv[0]}: {reason}", evidence=done.stdout)
    return done.stdout


def _is_there(path: Path) -> bool:
    """Tell whether a file exists, or may."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return True


def _kernel_log() -> str:
    lines = _output(("dmesg",)).splitlines()
    return "\n".join(line for line in lines if KERNEL_LOG.search(line))


def _sysctls() -> str:
    root = Path("/proc/sys")
    found = (path for pattern in SYSCTLS for path in sorted(root.glob(pattern)))
    return "".join(f"{path.relative_to(root)} = {_value(path)}\n" for path in found)


def _value(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        return f"({error.strerror})"


def _listing(folder: Path) -> str:
    """Return every pin, one a line. Raises: OSError."""
    folder.stat()
    return "".join(f"{path}\n" for path in sorted(folder.rglob("*")))
