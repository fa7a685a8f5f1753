"""Two hosts with real IKE, connected by a path of their own: `with Lab() as lab: lab.a … lab.b`.

Host a is the one under test: it initiates, and gets the gate. Host b responds. Everything that the
lab creates (namespaces, processes, cgroups, one folder) is named after its prefix and the owner's
pid. The end of the `with` removes it all, however it ends. If the owner was killed, the next lab
with the same prefix removes the leftovers.

The lab does not attach a gate and does not judge what it captures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from ipsecgate.lab import cgroups, netns, path
from ipsecgate.lab.capture import Capture
from ipsecgate.lab.connections import ConnSpec, connection
from ipsecgate.lab.frames import NATT_PORT
from ipsecgate.lab.host import Host
from ipsecgate.lab.netns import LabError, Namespace
from ipsecgate.lab.path import FAMILIES, SITE_A, SITE_B
from ipsecgate.lab.recorder import Recorder

__all__ = ["FAMILIES", "MODES", "Capture", "ConnSpec", "Host", "Lab", "LabError", "Recorder"]

MODES = ("transport", "tunnel")
PREFIX = "ipsecgate-lab"
PSK = "the pre-shared key of the lab"
OTHER_PSK = "another key, which the peer doesn't know"
RESET_TIMEOUT = 60.0
QUIET_TIMEOUT = 2.0  # without an SA, some connections never close
CLOSE_TIMEOUT = 20.0  # a process that has not closed yet will do so, even on a busy machine


class Lab:
    """Host a, a path with a delay, host b. The module docstring says what it owns.

    `prefix` distinguishes the labs of one process, which may have one lab per prefix at a time.
    `libipsec`: both strongSwans do userspace ESP, in tunnel mode only, without XFRM.
    """

    a: Host
    b: Host
    path: Namespace
    _open: ClassVar[set[str]] = set()

    def __init__(self, prefix: str = PREFIX, *, libipsec: bool = False) -> None:
        self.prefix = prefix
        self.libipsec = libipsec
        self.name = f"{prefix}-{os.getpid()}"
        self.natt_ports = {NATT_PORT}  # for captures; a test may have charon use others
        self._broken = self._muted = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if os.geteuid():
            raise LabError("a lab needs network namespaces", hint="run it as root")
        if self.name in Lab._open:
            raise LabError(f"a lab {self.name} is open", hint="give this one another prefix")
        sweep(self.prefix)
        with contextlib.ExitStack() as stack:
            Lab._open.add(self.name)
            stack.callback(Lab._open.discard, self.name)
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _build(self, stack: contextlib.ExitStack) -> None:
        folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self._cgroups = cgroups.Tree(self.name)
        stack.callback(self._cgroups.remove)
        spaces: dict[str, Namespace] = {}
        for role in ("a", "path", "b"):
            spaces[role] = Namespace(f"{self.name}-{role}")
            stack.callback(spaces[role].remove)
            path.prepare(spaces[role])
        self.path = spaces["path"]
        path.connect(self.path, spaces)
        hosts = []
        for site in (SITE_A, SITE_B):
            (folder / site.name).mkdir()
            host = Host(site, spaces[site.name], folder / site.name, self.libipsec)
            stack.callback(host.close)
            host.charon.spawn()
            hosts.append(host)
        self.a, self.b = hosts
        for host in hosts:
            host.charon.wait_ready()
        self.mend_psk()

    def peer(self, host: Host) -> Host:
        """Return the other host."""
        return self.b if host is self.a else self.a

    def load(self, spec: ConnSpec, host: Host | None = None) -> None:
        """Load a connection on a host (default: a) and its mirror image on the other.

        Only the first gets the spec's `start_action`; the mirror responds.
        """
        here = host or self.a
        there = self.peer(here)
        local, remote = here.end(spec, spec.local_ts), there.end(spec, spec.remote_ts)
        there.charon.load(connection(spec, remote, local, "none"))
        here.charon.load(connection(spec, local, remote, spec.start_action))

    def unload(self, name: str) -> None:
        """Unload a connection on both hosts; its SAs stay."""
        for host in (self.a, self.b):
            host.charon.unload(name)

    def reset(self) -> None:
        """Bring both hosts back to no connection, no SA, no policy, one key, and IKE that answers.

        The delay stays. A charon that is down is started. TCP connections that are closing get a
        moment to finish: without an SA their last packets would go out in clear, and the next
        capture would show them. Raises: LabError if charon keeps its SAs.
        """
        self.let_tcp_close()
        for host in (self.a, self.b):
            if not host.charon.alive:
                self.restart(host)
            for name in host.charon.loaded():
                host.charon.unload(name)
        for host in (self.a, self.b):
            host.charon.drop_all()
        deadline = time.monotonic() + RESET_TIMEOUT
        while not (self.a.charon.idle() and self.b.charon.idle()):
            if time.monotonic() > deadline:
                raise LabError("charon keeps SAs", hint=f"see {self.a.charon.log}")
            time.sleep(0.01)
        for host in (self.a, self.b) if not self.libipsec else ():
            host.namespace.flush_xfrm()
        if self._broken:
            self.mend_psk()
        if self._muted:
            self.drop_ike(False)

    def let_tcp_close(self) -> None:
        """Wait until no TCP connection is opening or closing, for a limited time."""
        began = time.monotonic()
        spaces = (self.a.namespace, self.b.namespace)
        while not all(space.tcp_is_quiet() for space in spaces):
            process_must_close = any(space.has_close_wait() for space in spaces)
            limit = CLOSE_TIMEOUT if process_must_close else QUIET_TIMEOUT
            if time.monotonic() > began + limit:
                break
            time.sleep(0.01)

    def warm_up(self, modes: Sequence[str] = MODES, families: Sequence[int] = FAMILIES) -> None:
        """Load the ciphers, then negotiate once per mode and family.

        The first SA on a fresh kernel loads modules. That takes seconds, longer than the lab's
        charon waits for an answer.
        """
        for family in families:
            self.a.namespace.try_sa(self.a.outer[family], self.b.outer[family])
        for mode in modes:
            for family in families:
                spec = ConnSpec(f"warm-{mode}-{family}", mode, family)
                self.load(spec)
                self.a.charon.initiate(spec.child_name, timeout=60)
        self.reset()

    def set_delay(self, one_way_ms: float) -> None:
        """Delay every frame, in both directions. Raises: LabError without netem."""
        path.set_delay(self.path, one_way_ms)

    def break_psk(self) -> None:
        """Give host b a different key: authentication fails until `mend_psk()` or `reset()`."""
        self._broken = True
        self.b.charon.load_psk(OTHER_PSK)

    def mend_psk(self) -> None:
        """Give both hosts the same key."""
        for host in (self.a, self.b):
            host.charon.load_psk(PSK)
        self._broken = False

    def drop_ike(self, dropped: bool = True) -> None:
        """Make host b receive IKE and never answer, or undo that (as `reset()` does)."""
        if dropped != self._muted:
            path.mute_ike(self.b.namespace, dropped)
            self._muted = dropped

    def restart(self, host: Host, cgroup: Path | None = None) -> None:
        """Start a host's charon again after its `kill()` or `stop()`, without any connection.

        It runs in `cgroup`, if one is given.
        """
        host.charon.spawn(host.launcher(cgroup))
        host.charon.wait_ready()
        host.charon.load_psk(OTHER_PSK if self._broken and host is self.b else PSK)

    def cgroup(self, name: str) -> Path:
        """Make a cgroup (v2) that is removed with the lab; `name` may contain slashes."""
        return self._cgroups.make(name)

    def capture(self) -> Capture:
        """Return a capture of the traffic between the hosts; the caller starts it.

        This first waits until no earlier connection is closing, so that the capture has none of it.
        """
        self.let_tcp_close()
        capture = Capture(self.path, {"a": SITE_A.port, "b": SITE_B.port}, self.natt_ports)
        self._stack.callback(capture.close)
        return capture

    def record(self, host: Host | None = None) -> Recorder:
        """Record a host's XFRM events (default: a) from now on."""
        recorded = host or self.a
        recorder = Recorder(recorded.namespace, recorded.outer.values())
        self._stack.callback(recorder.close)
        return recorder


def sweep(prefix: str) -> None:
    """Remove what the labs of dead owners left behind: processes, namespaces, cgroups, folders."""
    for entry in netns.RUN.iterdir() if netns.RUN.exists() else ():
        if netns.is_leftover(entry.name, prefix):
            netns.discard(entry)
    for entry in cgroups.tops():
        if netns.is_leftover(entry.name, prefix):
            cgroups.discard(entry)
    for entry in Path(tempfile.gettempdir()).iterdir():
        if netns.is_leftover(entry.name, prefix):
            shutil.rmtree(entry, ignore_errors=True)
