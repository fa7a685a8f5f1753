"""Real servers on a host of the lab: Debian's HTTP, git, ssh, PostgreSQL and Redis daemons.

All their data is in one folder, which is in memory in a guest. They run until the lab ends, listen
on every address of their host, and need no password.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ipsecgate.lab.host import Host
from ipsecgate.lab.netns import LabError

HTTP, GIT, SSH, POSTGRES, REDIS = 8080, 9418, 2222, 5432, 6379
PAGE = "the page of host b"
POSTGRES_VERSIONS = Path("/usr/lib/postgresql")
"""A folder per version, such as 15 or 17; the programs are not in PATH."""
READY_TIMEOUT = 60.0

SSHD = """\
Port {port}
HostKey {folder}/host-key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
UsePAM yes
PidFile none
"""


@contextlib.contextmanager
def serving(host: Host, ports: Collection[int]) -> Iterator[Path]:
    """Run the daemons of these ports; yield their folder, which contains ssh's private `key`.

    Raises: LabError if one does not start to listen.
    """
    folder = Path(tempfile.mkdtemp(prefix="daemons-"))
    folder.chmod(0o755)
    try:
        with (folder / "log").open("w") as log:
            for port in ports:
                host.popen(DAEMONS[port](folder), stdout=log, stderr=log)
        wait_listening(host, ports, folder / "log")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def http(folder: Path) -> list[str]:
    """Make a page, and a repository for git over HTTP."""
    root = folder / "www"
    root.mkdir()
    (root / "index.html").write_text(PAGE + "\n")
    repository = root / "repository"
    identity = ("-c", "user.name=b", "-c", "user.email=b@b.example")
    for words in (
        ("init", "--quiet", "--initial-branch=main", str(repository)),
        ("-C", str(repository), *identity, "commit", "--quiet", "--allow-empty", "-m", PAGE),
        ("-C", str(repository), "update-server-info"),
    ):
        subprocess.run(["git", *words], check=True)
    return ["busybox", "httpd", "-f", "-p", f"[::]:{HTTP}", "-h", str(root)]


def git(folder: Path) -> list[str]:
    """Serve the same repository over git's own protocol; `http` must come first."""
    return ["git", "daemon", "--export-all", f"--port={GIT}", f"--base-path={folder}/www"]


def ssh(folder: Path) -> list[str]:
    """Make the keys of server and client."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host-key", "key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    (folder / "sshd_config").write_text(SSHD.format(port=SSH, folder=folder))
    return ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]


def postgres(folder: Path) -> list[str]:
    """Make a database cluster as the user postgres, because PostgreSQL refuses to run as root."""
    data = folder / "postgres"
    data.mkdir()
    shutil.chown(data, "postgres")
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    settle = ["--auth=trust", "--no-sync", "--no-instructions", "--locale=C", "-D", str(data)]
    programs = max(POSTGRES_VERSIONS.iterdir(), key=lambda version: int(version.name)) / "bin"
    initdb = [*user, str(programs / "initdb"), *settle]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    with (data / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n")
    settings = {
        "listen_addresses": "*",
        "port": POSTGRES,
        "unix_socket_directories": "",
        "fsync": "off",
        "shared_buffers": "2MB",
        "autovacuum": "off",
    }
    options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    return [*user, str(programs / "postgres"), "-D", str(data), *options]


def redis(folder: Path) -> list[str]:
    """Configure no persistence and no password."""
    options = {"port": str(REDIS), "protected-mode": "no", "save": "", "dir": str(folder)}
    return ["redis-server", *(word for key in options for word in (f"--{key}", options[key]))]


DAEMONS: dict[int, Callable[[Path], list[str]]] = {
    HTTP: http,
    GIT: git,
    SSH: ssh,
    POSTGRES: postgres,
    REDIS: redis,
}
"""By port: a function that prepares a daemon's files in a folder and returns its argv."""


def wait_listening(host: Host, ports: Collection[int], log: Path) -> None:
    """Wait until each port accepts connections from the host itself. Raises: LabError."""
    deadline = time.monotonic() + READY_TIMEOUT
    for port in ports:
        while True:
            with host.namespace.inside():
                probe = socket.socket()
            with probe:
                error = probe.connect_ex(("127.0.0.1", port))
            if not error:
                break
            if time.monotonic() > deadline:
                raise LabError(f"port {port}: {os.strerror(error)}\n{log.read_text()}")
            time.sleep(0.02)
