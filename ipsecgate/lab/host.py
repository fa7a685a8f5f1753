"""One host of the lab: a network namespace, a strongSwan, and the processes that run in it."""

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
    """One host of the lab. Addresses by family (4, 6), see `Site`.

    `outer`: on the wire. `inner`: behind tunnel mode. `bare`: on the wire, in no connection.
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
        """Return the address of this host that a connection of the spec's mode protects."""
        return (self.inner if spec.mode == "tunnel" else self.outer)[spec.family]

    def end(self, spec: ConnSpec, selectors: tuple[str, ...]) -> End:
        """Return this host's end of a connection; no selectors: the default of the mode.

        The identity contains the connection's name, so that several connections can coexist: charon
        would otherwise reuse an IKE_SA whose configuration at the peer lacks the child.
        """
        inner, outer = self.site.inner[spec.family], self.outer[spec.family]
        usual = str(inner.network) if spec.mode == "tunnel" else str(outer)
        return End(f"{spec.name}@{self.site.name}.example", outer, selectors or (usual,))

    def launcher(self, cgroup: Path | None = None) -> list[str]:
        """Return the command prefix that runs a program in this host, and in `cgroup` if given.

        It uses nsenter, because `ip netns exec` hides the cgroup mount. Joining the cgroup is one
        write(2), and the program runs only if that succeeds.
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
        """Start a program in this host; the Popen's pid is the program's own.

        `env` adds to our environment. The program inherits the descriptors `fds`. The lab kills it
        at the end if it is still running.
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
        """Run a program in this host and return its exit code and output.

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
        """Start a tcp-server or udp-server and wait until it is ready; :: includes IPv4."""
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
        """Return the kernel's counters of this host by their nstat(8) names."""
        return self.namespace.counters()

    def established(self) -> tuple[str, ...]:
        """Return the names of the children whose SAs charon lists as installed."""
        return self.charon.established()

    def close(self) -> None:
        """Kill and reap the processes of this host."""
        self.charon.kill()
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
