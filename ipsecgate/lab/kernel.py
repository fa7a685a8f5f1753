"""The test kernel: where user-mode-linux is, downloaded if it is not here.

Nothing is installed: Debian's package is downloaded and unpacked into a cache folder.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import GateError

PACKAGE = "user-mode-linux"
MACHINES = ("x86_64", "i686")
"""Those that Debian has it for."""

Progress = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked user-mode-linux: its executable and the folder with its one modules version."""

    binary: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says inside, for example 6.1.176."""
        return self.modules.name


def default_cache() -> Path:
    """Return the folder for what the lab downloads; it need not exist yet."""
    if own := os.environ.get("IPSECGATE_LAB_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "ipsecgate"


def fetch(cache: Path | None = None, progress: Progress = lambda _text: None) -> Kernel:
    """Return the kernel in `cache` (None: `default_cache`), downloading it if it is not there.

    The package is unpacked aside and renamed, so a kernel that is there is
    whole; writers wait for each other. `progress` is told what takes long.
    Raises: GateError if the package can't be had.
    """
    cache = default_cache() if cache is None else cache.absolute()
    home = cache / PACKAGE
    if home.is_dir():
        return _look(home)
    if platform.machine() not in MACHINES:
        raise GateError(
            f"Debian has no {PACKAGE} for {platform.machine()}",
            hint="boot a kernel with ESP, such as Debian's own: then no test kernel is needed",
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
            f"the kernel cache can't be written: {error}",
            hint="name a writable folder in IPSECGATE_LAB_CACHE",
        ) from error
    return _look(home)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for others who do."""
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
        _look(aside)
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def run_tool(argv: list[str], cwd: Path, hint: str) -> str:
    """Run `argv`, return what it printed. Raises: GateError, with `hint` if it failed."""
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise GateError(
            f"{argv[0]} is not installed",
            hint=f"the test kernels are Debian's; elsewhere unpack {PACKAGE} by hand into"
            f" $IPSECGATE_LAB_CACHE/{PACKAGE}",
        ) from error
    if done.returncode != 0:
        reason = (done.stderr or done.stdout).strip()
        raise GateError(f"{' '.join(argv)} failed: {reason}", hint=hint)
    return done.stdout


def _look(home: Path) -> Kernel:
    binary = home / "usr/bin/linux.uml"
    modules = sorted((home / "usr/lib/uml/modules").glob("[0-9]*"))
    if not binary.is_file() or not modules:
        raise GateError(f"no user-mode-linux in {home}", hint=f"remove {home} and try again")
    return Kernel(binary, modules[-1])
