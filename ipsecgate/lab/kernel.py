"""The test kernel, if this machine needs one: Debian's user-mode-linux, unpacked in a cache folder.

Nothing is installed.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.errors import GateError

PACKAGE = "user-mode-linux"
MACHINES = ("x86_64", "i686")
"""The machines that Debian builds it for."""

Progress = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel: its executable, and the modules folder of its release."""

    binary: Path
    modules: Path

    @property
    def release(self) -> str:
        """The output of `uname -r` in the guest, for example 6.1.176."""
        return self.modules.name


def missing_feature() -> str | None:
    """Return what the lab needs and this machine's kernel lacks, "ESP" or "IPv6"; None if nothing.

    The kernel has no IPv6 at all if it was booted with ipv6.disable=1. Raises: see `has_esp`.
    """
    if not has_esp():
        return "ESP"
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return "IPv6"
    return None


def default_cache() -> Path:
    """Return the folder for the lab's downloads, which may not exist yet."""
    if own := os.environ.get("IPSECGATE_LAB_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "ipsecgate"


def fetch(cache: Path | None = None, progress: Progress = lambda _text: None) -> Kernel:
    """Return the kernel in `cache` (None: `default_cache`); download it if it is missing.

    The package is unpacked aside and renamed, so a cached kernel is complete. Writers wait for
    each other. `progress` gets a line before each slow step.
    Raises: GateError if the package cannot be downloaded.
    """
    cache = default_cache() if cache is None else cache.absolute()
    home = cache / PACKAGE
    if home.is_dir():
        return _unpacked_kernel(home)
    if platform.machine() not in MACHINES:
        raise GateError(
            f"Debian has no {PACKAGE} for {platform.machine()}",
            hint="boot a kernel with ESP and IPv6, such as Debian's own: that needs no test kernel",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            for leftover in cache.glob(f".{PACKAGE}-*"):
                shutil.rmtree(leftover)
            if not home.is_dir():
                _unpack_into(cache, home, progress)
    except OSError as error:
        raise GateError(
            f"cannot write the kernel cache: {error}",
            hint="name a writable folder in IPSECGATE_LAB_CACHE",
        ) from error
    return _unpacked_kernel(home)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; wait for it if necessary."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unpack_into(cache: Path, home: Path, progress: Progress) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{PACKAGE}-", dir=cache))
    try:
        aside.chmod(0o755)
        progress(f"downloading Debian's {PACKAGE} into {home}")
        run_tool(
            ["apt-get", "download", "--quiet", PACKAGE],
            aside,
            f"run apt-get update; {PACKAGE} is in Debian's main section (or set"
            " IPSECGATE_LAB_CACHE to a folder that has it unpacked)",
        )
        package = next(aside.glob("*.deb"))
        run_tool(["dpkg", "-x", package.name, "."], aside, "remove the cache folder, try again")
        package.unlink()
        _unpacked_kernel(aside)
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run_tool(argv: list[str], cwd: Path, hint: str) -> str:
    """Run `argv` and return its stdout. Raises: GateError; `hint` is for a non-zero exit code."""
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GateError(
            f"{argv[0]} is not installed",
            hint=f"the test kernels come from Debian; elsewhere, unpack {PACKAGE} by hand into"
            f" $IPSECGATE_LAB_CACHE/{PACKAGE}",
        ) from error
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()
        raise GateError(f"{' '.join(argv)} failed: {reason}", hint=hint)
    return done.stdout


def _unpacked_kernel(home: Path) -> Kernel:
    binary = home / "usr/bin/linux.uml"
    modules = sorted((home / "usr/lib/uml/modules").glob("[0-9]*"))
    if not binary.is_file() or not modules:
        raise GateError(f"no user-mode-linux in {home}", hint=f"remove {home} and try again")
    return Kernel(binary, modules[-1])
