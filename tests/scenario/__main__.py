"""Run a command on a host that may have a mistake.

    tests/scenario/run HOST -- COMMAND...       alder, birch, cedar, dogwood, elm, fir
    tests/scenario/run HOST stop

The first command starts the host, in half a minute; it runs until `stop`, for an hour at most.
COMMAND is a command and its arguments, or one word that is a script for the host's shell:

    tests/scenario/run alder -- ipsecgate status
    tests/scenario/run alder -- 'ipsecgate check; tail /var/log/charon.log'
    tests/scenario/run alder -- sh -c 'ipsecgate check; tail /var/log/charon.log'

Standard input is empty, and a command may take two minutes.

The host: webshop-worker.service reads the database 10.2.0.5:5432, and must do so only under IPsec;
ipsecgate is to enforce that. /etc/ipsecgate, /etc/swanctl and `swanctl` are as usual. The host
has no systemd: the logs are in /var/log (ipsecgate.log, charon.log, webshop-worker.log), and the
services' cgroups below /sys/fs/cgroup/system.slice. The task: find out whether
something is wrong with this setup, and if so, what, and which line has to be changed; a host may
be healthy. There is no access to the peer.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.scenario.faults import FAULTS

CHECKOUT = Path(__file__).parents[2]
FOLDER = CHECKOUT / ".cache/scenario"
UPTIME, START_LIMIT, COMMAND_LIMIT = 3600, 300.0, 180.0
PAUSE = 0.02


class NoAnswerError(Exception):
    """The host does not start, or does not answer."""


def wait_for(file: Path, limit: float, guest: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a file exists. Raises: NoAnswerError."""
    deadline = time.monotonic() + limit
    while not file.exists():
        if time.monotonic() > deadline or (guest is not None and guest.poll() is not None):
            raise NoAnswerError(f"no {file}; see {file.parent / 'guest.log'}")
        time.sleep(PAUSE)


def start(name: str, folder: Path) -> None:
    """Start the host in the background, and wait until it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    words = ["-m", "ipsecgate.lab.guest", "--always", "--timeout", str(UPTIME)]
    inside = [sys.executable, "-m", "tests.scenario.host", name, str(folder)]
    with (folder / "guest.log").open("wb") as log:
        guest = subprocess.Popen(
            [sys.executable, *words, "--results", str(folder), "--", *inside],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(guest.pid))
    wait_for(folder / "ready", START_LIMIT, guest)


def runs(folder: Path) -> bool:
    """Return whether the host is up."""
    try:
        pid = (folder / "pid").read_text()
        return (folder / "ready").exists() and b"scenario" in Path(
            f"/proc/{pid}/cmdline"
        ).read_bytes()
    except FileNotFoundError:
        return False


def run(name: str, words: Sequence[str]) -> int:
    """Run a command on the host, print its output, and return its exit code."""
    folder = FOLDER / name
    if not runs(folder):
        start(name, folder)
    base = folder / str(time.monotonic_ns())
    command = words[0] if len(words) == 1 else shlex.join(words)
    base.with_suffix(".part").write_text(f"{command}\n")
    base.with_suffix(".part").rename(base.with_suffix(".sh"))
    wait_for(base.with_suffix(".code"), COMMAND_LIMIT)
    sys.stdout.write(base.with_suffix(".out").read_text(errors="replace"))
    return int(base.with_suffix(".code").read_text())


def main(arguments: Sequence[str]) -> int:
    try:
        match arguments:
            case [name, "stop"] if name in FAULTS:
                (FOLDER / name / "stop").touch()
                return 0
            case [name, "--", _, *_] if name in FAULTS:
                return run(name, arguments[2:])
    except NoAnswerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(__doc__ or "")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
