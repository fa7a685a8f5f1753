"""One host of the lab: a namespace, a strongSwan, and the processes that run in them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ipsecgate.core.model.flow import Address
from ipsecgate.lab import traffic
from ipsecgate.lab.charon import Charon
from ipsecgate.lab.connections import ConnSpec, End
from ipsecgate.lab.endpoints import Client, Server
from ipsecgate.lab.netns import Namespace
from ipsecgate.lab.path import FAMILIES, Site

Stream = int | IO[str] | None


class Host:
    """One host: a namespace, a strongSwan, and the processes run in them.

    Addresses by family: `outer` on the wire, `inner` behind tunnel mode, `bare` on the
    wire as well but named by no connection.
    """

    def __init__(
        self, site: Site, namespace: Namespace, folder: Path, libipsec: bool = False
    ) -> None:
        self.site = site
        self.namespace = namespace
        self.outer: dict[int, Address] = {f: site.outer[f].ip for f in FAMILIES}
        self.inner: dict[int, Address] = {f: site.inner[f].ip for f in FAMILIES}
        self.bare: dict[int, Address] = {f: site.bare[f].ip for f in FAMILIES}
        self.charon = Charon(folder, self.launcher(), libipsec)
        self._processes: list[subprocess.Popen[str]] = []

    def address(self, spec: ConnSpec) -> Address:
        """Return the address of this host that a connection of that mode protects."""
        return (self.inner if spec.mode == "tunnel" else self.outer)[spec.family]

    def end(self, spec: ConnSpec, selectors: tuple[str, ...]) -> End:
        """Return this host's end of a connection; no selectors: the mode's usual one.

        The identity has the connection's name, so that several live side by side: charon
        would otherwise take up an IKE_SA whose configuration at the peer lacks the child.
        """
        inner, outer = self.site.inner[spec.family], self.outer[spec.family]
        usual = str(inner.network) if spec.mode == "tunnel" else str(outer)
        return End(f"{spec.name}@{self.site.name}.example", outer, selectors or (usual,))

    def launcher(self, cgroup: Path | None = None) -> list[str]:
        """Return the command prefix that puts a program into this host.

        nsenter, not `ip netns exec`: that one hides the cgroup mount. The join to the
        cgroup is an unbuffered write(2), and the program does not run unless it succeeded.
        """
        enter = ["nsenter", f"--net={self.namespace.path}", "--"]
        if cgroup is None:
            return enter
        join = 'echo 0 > "$0" && exec "$@"'
        return ["sh", "-c", join, str(cgroup / "cgroup.procs"), *enter]

    def popen(
        self,
        argv: Sequence[str],
        *,
        cgroup: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
        fds: Sequence[int] = (),
    ) -> subprocess.Popen[str]:
        """Start a program in this host; its pid is the Popen's. `env` adds to our own.

        `fds` are descriptors that it inherits.

        The lab kills it at the end if it still runs.
        """
        process = subprocess.Popen(
            [*self.launcher(cgroup), *argv],
            env={**os.environ, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            pass_fds=fds,
        )
        self._processes = [p for p in self._processes if p.poll() is None] + [process]
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        cgroup: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this host to its end, its output captured.

        Raises: CalledProcessError if it fails and `check`; TimeoutExpired.
        """
        return subprocess.run(
            [*self.launcher(cgroup), *argv],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
        )

    def serve(self, role: str, port: int, address: str = "::") -> Server:
        """Start a tcp-server or udp-server and wait until it is ready; :: is IPv4 too."""
        argv = traffic.command(role, "--bind", address, "--port", str(port))
        pipe = subprocess.PIPE
        return Server(self.popen(argv, stdin=pipe, stdout=pipe))

    def client(
        self, role: str, to: Address, port: int, *options: str, cgroup: Path | None = None
    ) -> Client:
        """Start a tcp-client or udp-client; `Client.result()` waits for its report."""
        argv = traffic.command(role, "--to", str(to), "--port", str(port), *options)
        return Client(self.popen(argv, cgroup=cgroup, stdout=subprocess.PIPE))

    def counters(self) -> dict[str, int]:
        """Return the kernel's counters of this host, under nstat(8)'s names."""
        return self.namespace.counters()

    def established(self) -> tuple[str, ...]:
        """Return the names of the children whose SAs are installed, as charon says."""
        return self.charon.established()

    def close(self) -> None:
        """Kill what runs in this host and reap it."""
        self.charon.kill()
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
