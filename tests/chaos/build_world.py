"""Build a `World`, and remove it at the end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ipsecgate.edges.bpf import bytecode
from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.path import LINK
from tests.chaos.reporter import Reporter
from tests.chaos.targets import NOWHERE, OPEN, PORT, SPECS
from tests.chaos.world import World, ip
from tests.system.fd_store import FdStore

CACHE_SIZE = "2m"


@contextlib.contextmanager
def build_world(cache: Path, name: str = "ipsecgate-chaos") -> Iterator[World]:
    """Build a world in which everything is covered and answers; the end of the block removes it.

    `cache` has the compiled hooks. The gate's own cache is on a small disk, which faults fill.
    """
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(name))
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        lab.a.namespace.sysctl("ipv4/ping_group_range", "0 0")
        ip(lab.b, "addr", "add", f"{OPEN}/24", "dev", "eth0", check=True)
        ip(lab.a, "route", "add", "default", "via", str(lab.b.outer[4]), check=True)
        for host in (lab.a, lab.b):
            know_neighbour(host, lab.peer(host))
            host.charon.configure(HASTY)
        Reporter(lab.b, World.argv("server", str(PORT)))
        recorder = lab.record()
        store = stack.enter_context(FdStore())
        gate = stack.enter_context(Gated(lab, cache=stack.enter_context(disk(cache))))
        gate.kill()  # the store must start the controller, to keep its descriptors
        store.start(gate)
        made = World(lab, gate, recorder, store)
        stack.callback(made.close)
        for host in (lab.b, lab.a):
            made.load(host)
        for spec in (*SPECS, NOWHERE):
            gate.wait_policy(spec.name)
        made.start()
        yield made


@contextlib.contextmanager
def disk(cache: Path) -> Iterator[Path]:
    """Yield a small disk with the compiled hooks from a cache."""
    bytecode.get(cache)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={CACHE_SIZE},mode=755", "none", folder]
        subprocess.run(mount, check=True)
        try:
            for path in cache.iterdir():
                if path.suffix == ".json":
                    shutil.copy(path, folder)
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def know_neighbour(host: Host, peer: Host) -> None:
    """Give a host a permanent neighbour entry for its peer.

    A transport-mode policy for all protocols between two IPv6 neighbours also covers neighbour
    discovery. With a trap and no SA they could no longer find each other, not even for IKE.
    """
    with peer.namespace.route() as route:
        (link,) = route.get_links(ifname=LINK)
    address = dict(link["attrs"])["IFLA_ADDRESS"]
    to = str(peer.outer[6])
    ip(host, "neigh", "replace", to, "lladdr", address, "dev", LINK, "nud", "permanent", check=True)
