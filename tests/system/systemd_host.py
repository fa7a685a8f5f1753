"""The files with which systemd is booted, and gated processes that probe the gate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.path import SITE_B
from tests.system.booted_systemd import CHARON, CHECKOUT, INSTALLED, UNITS, BootedSystemd
from tests.system.caller import Caller
from tests.system.prober import Attempt, Prober

PORT = 7900
SPEC = ConnSpec("net", "transport", 4)  # no trap: without the gate packets leave in clear
COVERED = str(SITE_B.outer[4].ip)
NEVER = str(SITE_B.bare[4].ip)  # protected by the configuration; no connection covers it
LATER = "203.0.113.9"
SERVICE, LOAD = "ipsecgate.service", "ipsecgate-load.service"
WAIT = "ipsecgate-wait-online.service"
CONFIG = f"""
[gate]
vici = "{CHARON}/vici"
cgroups = ["/sys/fs/cgroup/gated.slice"]
[[policy]]
name = "net"
remote = ["{COVERED}"]
[[policy]]
name = "never"
remote = ["{NEVER}"]
"""

# Calls once, and prints the errno.
PROBE = f"""
import errno, socket
sock = socket.socket()
sock.setblocking(False)
print(errno.errorcode[sock.connect_ex(("{NEVER}", {PORT}))])
"""
PROBE_UNIT = """
[Unit]
{orders}
[Service]
Type=oneshot
RemainAfterExit=yes
Slice={group}
ExecStart=/usr/bin/python3 -S -I /etc/probe.py
StandardOutput=file:/run/%p.out
"""
# Connects to the peer, and prints its user and the result.
DIAL = f"""
import errno, os, socket
try:
    socket.create_connection(("{COVERED}", {PORT}), 30).close()
    print(os.getuid(), "connected")
except OSError as error:
    print(os.getuid(), errno.errorcode[error.errno])
"""
DIAL_UNIT = """
[Service]
Type=oneshot
RemainAfterExit=yes
Slice=gated.slice
{more}
ExecStart=/usr/bin/python3 -S -I \\
    /etc/dial.py
StandardOutput=file:/run/%p.out
"""
LATE = "probe-ordinary"
EARLY = "DefaultDependencies=no\nBefore=network-pre.target\n"
PROBES = {
    "probe-before": ("gated.slice", f"{EARLY}After=gated.slice\nBefore={LOAD}"),
    "probe-gated": ("gated.slice", f"{EARLY}After={LOAD}"),
    "probe-free": ("system.slice", f"{EARLY}After={LOAD}"),
    LATE: ("gated.slice", ""),
}


def boot_files(*probes: str) -> dict[str, str]:
    """Return the files of these probes, and of the slice that is gated before any of them runs."""
    units = "etc/systemd/system"
    early = [f"{name}.service" for name in probes if name != LATE]
    late = [f"{name}.service" for name in probes if name == LATE]
    return {
        "etc/probe.py": PROBE,
        f"{units}/{LOAD}.d/gated.conf": "[Unit]\nWants=gated.slice\nAfter=gated.slice\n",
        **{
            f"{units}/{target}.target.d/probes.conf": f"[Unit]\nWants={' '.join(wanted)}\n"
            for target, wanted in (("sysinit", early), ("multi-user", late))
        },
        **{
            f"{units}/{name}.service": PROBE_UNIT.format(group=group, orders=orders)
            for name, (group, orders) in PROBES.items()
            if name in probes
        },
    }


FILES = {
    **boot_files(*PROBES),
    "etc/dial.py": DIAL,
    "etc/systemd/system/dial.service": DIAL_UNIT.format(more=""),
    "etc/systemd/system/held.service": DIAL_UNIT.format(more="User=nobody"),
    "etc/ipsecgate/ipsecgate.toml": CONFIG,
    # Debian's own unit, without a daemon: the lab runs charon.
    "etc/systemd/system/strongswan.service.d/lab.conf": (
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nRestart=no\n"
        "ExecStart=\nExecStart=/bin/true\nExecStartPost=\n"
    ),
    "etc/systemd/system/multi-user.target.d/lab.conf": "[Unit]\nWants=strongswan.service\n",
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-systemd") as lab:
        lab.warm_up(["transport"], [4])
        lab.b.serve("tcp-server", PORT)
        yield lab


def installs() -> Iterator[tuple[Path, Path]]:
    """Yield each installed file of the checkout, and where it is installed."""
    program = INSTALLED / "usr/lib/ipsecgate/ipsecgate"
    places = {"ipsecgate": program, "bpf": program / "_bpf", "packaging/systemd": INSTALLED / UNITS}
    for name, place in places.items():
        folder = CHECKOUT / name
        for file in folder.rglob("*.*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file, place / file.relative_to(folder)


@pytest.fixture(scope="module")
def booted(module_lab: Lab) -> Iterator[BootedSystemd]:
    hint = f"not what this checkout installs: `make installed`, outside, makes {INSTALLED}"
    for file, copy in installs():
        assert copy.is_file(), f"{copy} is missing: {hint}"
        text = file.read_bytes()
        if copy.parent == INSTALLED / UNITS:
            text = text.replace(b"@bindir@", b"/usr/bin")
        assert copy.read_bytes() == text, f"{copy} is {hint}"
    with BootedSystemd(module_lab, FILES) as manager:
        yield manager


@pytest.fixture
def systemd(lab: Lab, booted: BootedSystemd) -> BootedSystemd:
    """The booted systemd, with a loaded connection and no SA."""
    if booted.show(SERVICE, "ActiveState") != "active":
        booted.systemctl("start", SERVICE)
    lab.load(SPEC)
    booted.until(
        lambda: "net/net" in booted.ask().get("children", ()), "the connection is not noticed"
    )
    return booted


def refused(lab: Lab, systemd: BootedSystemd, address: str = NEVER) -> bool:
    """Return whether a call of a gated process is refused."""
    caller = Caller(lab.a.namespace.path, knocking(systemd))
    error = caller("tcp", address, PORT)
    caller.close()
    assert error in ("EPERM", "EINPROGRESS", "ENETUNREACH")
    return error == "EPERM"


def knocking(systemd: BootedSystemd) -> Path:
    """Return a cgroup in the gated slice for processes that outlive all units."""
    cgroup = systemd.cgroup / "gated.slice/knocking"
    cgroup.mkdir(exist_ok=True)
    return cgroup


@contextlib.contextmanager
def closed(lab: Lab, systemd: BootedSystemd) -> Iterator[None]:
    """Assert that during the block covered flows pass and uncovered ones are refused."""
    lab.a.charon.initiate("net")
    systemd.until(lambda: not refused(lab, systemd, COVERED), "it is not covered")
    targets = [("tcp", COVERED, PORT, ""), ("tcp", NEVER, PORT, "")]
    with lab.capture() as capture:
        prober = Prober(lab.a.namespace.path, knocking(systemd), targets, 0.02)
        try:
            yield
            attempts = prober.stop()
        finally:
            prober.close()
        seen = capture.stop()
    assert seen.esp
    assert not seen.clear
    assert outcomes(attempts, COVERED) == {""}
    assert outcomes(attempts, NEVER) == {"EPERM"}


def outcomes(attempts: Sequence[Attempt], address: str) -> set[str]:
    return {one.error for one in attempts if one.target[1] == address}


def usec(systemd: BootedSystemd, unit: str) -> int:
    """Return when a unit became active."""
    return int(systemd.show(unit, "ActiveEnterTimestampMonotonic"))
