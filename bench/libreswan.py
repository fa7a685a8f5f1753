"""Libreswan on host a of a lab, in place of strongSwan, with one on-demand connection.

    python -m bench.libreswan      download Debian's package and unpack it into the lab's cache

Debian's packages of Libreswan and strongSwan conflict, so nothing is installed: pluto runs from the
folder into which the package was unpacked, in its network namespace. It starts its helpers by
absolute path, so it also gets a mount namespace that shows them below /usr/libexec.

Host b stays strongSwan. All settings are Libreswan's defaults, but for the identities, the
algorithms and `leftupdown`, because the lab has its own routes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.archive import Archive
from ipsecgate.lab.connections import connection
from ipsecgate.lab.hosts import PSK, ConnSpec, Lab
from ipsecgate.lab.kernel import default_cache, locked, run_tool
from ipsecgate.lab.netns import LabError

PACKAGE = "libreswan"
START_TIMEOUT = 60.0
CONFIGURATION = """\
config setup
    logfile={folder}/log
    dumpdir={folder}
    nssdir={folder}/nss
    ipsecdir={folder}
    secretsfile={folder}/secrets
    dnssec-enable=no
conn {name}
    auto=ondemand
    authby=secret
    left={a.address}
    leftid={a.identity}
    leftsubnet={a.selectors[0]}
    leftupdown=%disabled
    right={b.address}
    rightid={b.identity}
    rightsubnet={b.selectors[0]}
    ike=aes128-sha2_256-modp2048
    esp=aes128-sha2_256
    esn=no
"""
SHOW_HELPERS = 'mount --bind "$0/usr/libexec" /usr/libexec && exec "$@"'


def home() -> Path:
    """Return the folder with the unpacked packages, which may not exist."""
    return default_cache() / PACKAGE


def fetch() -> Path:
    """Download and unpack Libreswan and what it needs and this machine lacks. Raises: GateError."""
    cache = default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock"):
        if home().is_dir():
            return home()
        aside = Path(tempfile.mkdtemp(prefix=f".{PACKAGE}-", dir=cache))
        try:
            aside.chmod(0o755)
            archive = Archive()
            archive.download(_missing(archive), aside)
            for package in aside.glob("*.deb"):
                run_tool(["dpkg", "-x", package.name, "."], aside, "try again")
                package.unlink()
            aside.rename(home())
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return home()


def _missing(archive: Archive) -> list[str]:
    """Return Libreswan and its dependencies, and theirs, as far as they are not installed."""
    found, queue = [PACKAGE], [PACKAGE]
    while queue:
        for name in archive.depends(queue.pop()):
            if name not in found and not _is_installed(name):
                found.append(name)
                queue.append(name)
    return found


def _is_installed(package: str) -> bool:
    argv = ["dpkg-query", "-W", "-f", "${db:Status-Status}", package]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout == "installed"


class Pluto:
    """Libreswan on host a of `lab`, for the connection `spec`; strongSwan there is stopped.

    Raises: LabError if it does not start.
    """

    def __init__(self, lab: Lab, spec: ConnSpec) -> None:
        self.lab, self.spec, self.root = lab, spec, home()
        libraries = next(self.root.glob("usr/lib/*-linux-gnu"), self.root)
        self._env = {"LD_LIBRARY_PATH": str(libraries)}
        self._helpers = self.root / "usr/libexec/ipsec"
        self._folder = lab.a.charon.folder / "pluto"
        for name in ("nss", "run"):
            (self._folder / name).mkdir(parents=True)
        self._settings = self._folder / "ipsec.conf"
        self._write_settings()
        lab.a.charon.kill()
        nss = ["-N", "-d", f"sql:{self._folder}/nss", "--empty-password"]
        lab.a.run([str(self.root / "usr/bin/certutil"), *nss], env=self._env)
        pluto = [str(self._helpers / "pluto"), "--config", str(self._settings), "--nofork"]
        wrapped = ["unshare", "--mount", "sh", "-c", SHOW_HELPERS, str(self.root), *pluto]
        self._process = lab.a.popen(
            [*wrapped, "--rundir", str(self._folder / "run")], env=self._env
        )
        self._wait_ready()

    def _write_settings(self) -> None:
        a, b = self.lab.a.end(self.spec, ()), self.lab.b.end(self.spec, ())
        (self._folder / "secrets").write_text(f': PSK "{PSK}"\n')
        self._settings.write_text(
            CONFIGURATION.format(folder=self._folder, name=self.spec.name, a=a, b=b)
        )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self._whack("--status", check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._folder / "log"
                said = log.read_text(errors="replace")[-500:] if log.exists() else "nothing"
                raise LabError(f"pluto did not start; it said: {said}")
            time.sleep(0.1)

    def _whack(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        argv = [str(self._helpers / "whack"), "--rundir", str(self._folder / "run"), *words]
        return self.lab.a.run(argv, env=self._env, check=check)

    def reset(self) -> None:
        """Bring both hosts back to one on-demand connection and no SA."""
        self.lab.let_tcp_close()
        self._whack("--name", self.spec.name, "--delete", check=False)
        self.lab.b.charon.drop_all()
        while not self.lab.b.charon.idle():
            time.sleep(0.01)
        for host in (self.lab.a, self.lab.b):
            host.namespace.flush_xfrm()
        b, a = self.lab.b.end(self.spec, ()), self.lab.a.end(self.spec, ())
        self.lab.b.charon.load(connection(self.spec, b, a, "none"))
        control = ["--ctlsocket", str(self._folder / "run/pluto.ctl"), self.spec.name]
        add = [str(self._helpers / "addconn"), "--config", str(self._settings), *control]
        self.lab.a.run(add, env=self._env)
        self._whack("--name", self.spec.name, "--route")


def main() -> int:
    """Download and unpack."""
    try:
        sys.stdout.write(f"Libreswan is in {fetch()}\n")
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
