"""Network namespaces beside a host, connected as container runtimes connect them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from ipaddress import ip_interface
from pathlib import Path

from ipsecgate.lab import path
from ipsecgate.lab.netns import Namespace

INSIDE = {4: "10.88.0.5/24", 6: "fd88::5/64"}
OUTSIDE = {4: "10.88.0.1/24", 6: "fd88::1/64"}
ON_THE_WIRE = {4: "192.0.2.77/24", 6: "2001:db8::77/64"}
BRIDGE, PORT, LINK = "cni0", "cni-port", "eth0"


class Box:
    """A network namespace; `host` is the one that it is connected to.

    `kind`: "bridge" (a veth whose other end is a port of a bridge on the host), "veth" (without a
    bridge), "macvlan" and "ipvlan" (on the host's device `lower`, with an address of the wire).
    """

    def __init__(
        self, name: str, host: Namespace, kind: str, lower: str = "eth0", mode: str = ""
    ) -> None:
        self.host = host
        self.kind = kind
        self.namespace = Namespace(name)
        self.address = {4: "10.88.0.5", 6: "fd88::5"}
        try:
            path.prepare(self.namespace)
            if kind in ("bridge", "veth"):
                self._through_the_host()
            else:
                self._around_the_host(lower, mode)
        except BaseException:
            self.close()
            raise

    def _through_the_host(self) -> None:
        self.ip("link add", self.host, PORT, "type veth peer", LINK, "netns", self.namespace.name)
        at = PORT
        if self.kind == "bridge":
            at = BRIDGE
            self.ip("link add", self.host, BRIDGE, "type bridge")
            self.ip("link set", self.host, PORT, "up master", BRIDGE)
        self.ip("link set", self.host, at, "up")
        self.ip("link set", self.namespace, "lo up")
        self.ip("link set", self.namespace, LINK, "up")
        for family in (4, 6):
            self.ip("address add", self.host, OUTSIDE[family], "dev", at)
            self.ip("address add", self.namespace, INSIDE[family], "dev", LINK)
            gateway = OUTSIDE[family].split("/")[0]
            self.ip(f"-{family} route add", self.namespace, "default via", gateway)
        self.host.sysctl("ipv4/ip_forward", "1")
        self.host.sysctl("ipv6/conf/all/forwarding", "1")

    def _around_the_host(self, lower: str, mode: str) -> None:
        kind = f"{self.kind} mode {mode}" if mode else self.kind
        place = "netns", self.namespace.name
        self.ip("link add", self.host, "made link", lower, "type", kind)
        self.ip("link set", self.host, "made name", LINK, *place)
        self.ip("link set", self.namespace, "lo up")
        self.ip("link set", self.namespace, LINK, "up")
        for family, address in ON_THE_WIRE.items():
            self.ip("address add", self.namespace, address, "dev", LINK)
            self.address[family] = address.split("/")[0]
        self.ip("-4 route add", self.namespace, "default via 192.0.2.2")

    @staticmethod
    def ip(verb: str, namespace: Namespace, *words: str) -> None:
        """Run ip(8) in a namespace. Raises: CalledProcessError."""
        argv = ["ip", "-n", namespace.name, *verb.split(), *" ".join(words).split()]
        subprocess.run(argv, check=True, capture_output=True)

    def launcher(self, cgroup: Path | None = None) -> list[str]:
        """Return the command prefix that runs a program in the box, and in `cgroup` if given."""
        enter = ["nsenter", f"--net={self.namespace.path}", "--"]
        if cgroup is None:
            return enter
        return ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(cgroup / "cgroup.procs"), *enter]

    def popen(
        self, argv: Sequence[str], cgroup: Path | None = None, **options: object
    ) -> subprocess.Popen[str]:
        """Start a program in the box."""
        return subprocess.Popen([*self.launcher(cgroup), *argv], text=True, **options)  # type: ignore[call-overload,no-any-return]

    def close(self) -> None:
        """Kill the processes in the box, and remove it with its devices on the host."""
        self.namespace.remove()
        for device in (PORT, BRIDGE):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.ip("link del", self.host, device)


def iptables(family: int) -> str:
    """Return an iptables with which this kernel translates addresses; UML has only the legacy one.

    Asking for a table makes it, so this asks in a namespace of its own.
    """
    names = [{4: "iptables", 6: "ip6tables"}[family] + variant for variant in ("-nft", "-legacy")]
    for name in names:
        ask = ["unshare", "--net", name, "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE"]
        if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
            return name
    raise AssertionError(f"missing: a kernel for which one of {names} can masquerade")


@contextlib.contextmanager
def masquerade(host: Namespace, family: int = 4) -> Iterator[None]:
    """Masquerade the boxes' subnet on a host for the block, as container runtimes do."""
    subnet = str(ip_interface(INSIDE[family]).network)
    rule = f"POSTROUTING -s {subnet} ! -o {BRIDGE} -j MASQUERADE"
    program = iptables(family)

    def change(verb: str) -> None:
        argv = [program, "-t", "nat", verb, *rule.split()]
        with host.inside():
            subprocess.run(argv, check=True, capture_output=True)

    change("-A")
    try:
        yield
    finally:
        change("-D")


@contextlib.contextmanager
def box(host: Namespace, kind: str, *, mode: str = "", name: str = "") -> Iterator[Box]:
    """Make a box beside a host for the block."""
    made = Box(name or f"box-{os.getpid()}-{kind}{mode}", host, kind, mode=mode)
    try:
        yield made
    finally:
        made.close()
