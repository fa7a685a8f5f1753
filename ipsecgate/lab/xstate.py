"""Check whether user-mode-linux can restore a task's registers on this CPU; work around it if not.

User-mode-linux up to 6.12 keeps `KEPT` bytes of a task's XSAVE area. The kernel restores the whole
area or fails with EFAULT, and then the guest panics at its first return to user space. On CPUs with
AMX the area is larger. The workaround is xstate.c, a library that is preloaded into
user-mode-linux. `fits` does not check the CPU model: it makes user-mode-linux's own request.

Source: Linux arch/x86/kernel/fpu/regset.c, arch/um/os-Linux/registers.c; ptrace(2).
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.kernel import default_cache, locked, run_tool

SOURCE = Path(__file__).with_name("xstate.c")
COMPILERS = ("cc", "tcc")
"""The first one installed builds the library. `make setup` installs tcc."""
KEPT = 2696
"""Bytes of the XSAVE area that user-mode-linux keeps, up to AVX-512 and PKRU."""

_GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT = 0x4204, 0x4205, 0x4206, 0x4207
_XSTATE = 0x202  # NT_X86_XSTATE, linux/elf.h
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@cache
def fits() -> bool:
    """Return whether the kernel restores a task from the first `KEPT` bytes of its XSAVE area.

    This traces a child process. Raises: OSError if tracing is not allowed.
    """
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            return _restores(process.pid)
        finally:
            process.kill()


def _restores(pid: int) -> bool:
    _trace(_SEIZE, pid)
    _trace(_INTERRUPT, pid)
    os.waitpid(pid, os.WUNTRACED)
    area = ctypes.create_string_buffer(KEPT)
    vector = _Vector(ctypes.addressof(area), KEPT)
    _trace(_GETREGSET, pid, _XSTATE, ctypes.addressof(vector))
    vector.length = KEPT
    try:
        _trace(_SETREGSET, pid, _XSTATE, ctypes.addressof(vector))
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    return True


def _trace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")


def compiler() -> str | None:
    """Return the compiler for the library, None if none is installed."""
    return next((name for name in COMPILERS if shutil.which(name)), None)


def library(cache_folder: Path | None = None) -> Path:
    """Return the library in the cache folder (None: `default_cache`); build it if it is missing.

    Raises: GateError if there is no compiler, or it fails.
    """
    folder = default_cache() if cache_folder is None else cache_folder.absolute()
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = folder / f"xstate-{digest}.so"
    if built.exists():
        return built
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            build(built)
    except OSError as error:
        raise GateError(
            f"cannot write the library {built}: {error.strerror}",
            hint="name a writable folder in IPSECGATE_LAB_CACHE",
        ) from error
    return built


def build(built: Path, with_compiler: str | None = None) -> None:
    """Compile the library aside and rename it to `built`. Raises: GateError, OSError."""
    program = with_compiler or compiler()
    if program is None:
        raise GateError(
            "user-mode-linux needs a library on this CPU, but no C compiler is installed",
            hint="apt-get install tcc (it is small; `make setup` installs it)",
        )
    aside = built.with_name(f".{built.name}-{os.getpid()}")
    try:
        options = ["-shared", "-fPIC", "-nostdlib", "-o", str(aside)]
        run_tool(
            [program, *options, str(SOURCE)], built.parent, f"see whether {program} works at all"
        )
        aside.rename(built)
    finally:
        with suppress(FileNotFoundError):
            aside.unlink()


def needed() -> bool:
    """Return whether user-mode-linux needs the library on this machine."""
    try:
        return not fits()
    except OSError:  # without the right to trace, user-mode-linux fails and its console says why
        return False


def environment() -> dict[str, str]:
    """Return the environment that user-mode-linux needs on this machine: empty, or LD_PRELOAD.

    Raises: GateError if the library is needed and cannot be built.
    """
    return {"LD_PRELOAD": str(library())} if needed() else {}
