"""What root may read, write to and run: files, folders and programs that no other user can change.

Rules of this module: the owner must be root or the caller, and nobody else may have write access.
A folder that fails this check is an error; no other folder replaces it. Programs run in / with
`ENVIRONMENT`, so neither the current folder nor a variable can substitute a program or module.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ipsecgate.errors import GateError

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
"""The environment of the programs that we start: no PYTHONPATH, LD_PRELOAD or TMPDIR."""


class UntrustedError(GateError):
    """A file or folder that another user could change."""


def run(
    argv: Sequence[str],
    variables: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a system program until it exits, and capture its output.

    `variables` are added to `ENVIRONMENT`. `limit`: seconds. Raises: OSError if it cannot be
    started, subprocess.TimeoutExpired if it takes longer.
    """
    return subprocess.run(
        argv,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**ENVIRONMENT, **(variables or {})},
        errors="replace",
        timeout=limit,
    )


def folder(path: Path, mode: int = 0o755) -> Path:
    """Create a folder and its parents if missing, check it, and return it.

    Raises: UntrustedError; OSError if it cannot be created.
    """
    for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
        missing.mkdir(mode=mode, exist_ok=True)
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and not _owned(link):
        raise _untrusted(path, link)
    facts = path.stat()
    if not stat.S_ISDIR(facts.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not _safe(facts):
        raise _untrusted(path, facts)
    return path


def open_file(path: Path, flags: int = os.O_RDONLY | os.O_NOFOLLOW) -> int:
    """Open a regular file and return its close-on-exec descriptor. A new file has mode 0600.

    Raises: UntrustedError; OSError.
    """
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        facts = os.fstat(fd)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not (stat.S_ISREG(facts.st_mode) and _safe(facts)):
            raise _untrusted(path, facts)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(path: Path, *, follow: bool = False, limit: int | None = None) -> str:
    """Return the text of a file. `follow`: it may be a symbolic link, whose target is checked.

    Raises: UntrustedError; OSError, also if it has more than `limit` bytes; UnicodeDecodeError.
    """
    flags = os.O_RDONLY | (0 if follow else os.O_NOFOLLOW)
    with open(open_file(path, flags), "rb") as file:
        data = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(data) > limit:
        raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
    return data.decode()


def check(path: Path) -> None:
    """Raises: UntrustedError if this is no regular file that only root can change; OSError."""
    os.close(open_file(path))


def _owned(facts: os.stat_result) -> bool:
    return facts.st_uid in (0, os.geteuid())


def _safe(facts: os.stat_result) -> bool:
    """Return whether the owner is root or we, and no other user or group can write.

    The group may write if it is root's or ours.
    """
    writable = facts.st_mode & stat.S_IWOTH
    if facts.st_gid not in (0, os.getegid()):
        writable |= facts.st_mode & stat.S_IWGRP
    return _owned(facts) and not writable


def _untrusted(path: Path, facts: os.stat_result) -> UntrustedError:
    mode = stat.filemode(facts.st_mode)
    return UntrustedError(
        f"{path} is not trusted: {mode}, owned by user {facts.st_uid} and group {facts.st_gid}",
        hint="another user could change it: find out who created it, then remove it, or "
        "`chown root:root` and `chmod go-w` it",
    )
