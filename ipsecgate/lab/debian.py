"""Debian's own kernel for `qemu`: downloaded and unpacked into the lab's cache, never installed.

It has what user-mode-linux has not: the BPF JIT, BTF, and the configuration of real machines.
"""

from __future__ import annotations

import lzma
import shutil
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.kernel import Kernel, Progress, call, default_cache, locked

META = "linux-image-amd64"
"""Depends on the newest kernel of the running Debian."""
BUSYBOX = "busybox-static"
"""The first programs of a boot, when no file of the host is there yet."""
QEMU = "qemu-system-x86_64"
XZ_MAGIC = b"\xfd7zXZ\x00"
AGAIN = "run apt-get update, then try again"


@dataclass(frozen=True, slots=True)
class DebianKernel(Kernel):
    """An unpacked linux-image package: uncompressed kernel, modules with their modules.dep."""

    busybox: Path


def fetch(cache: Path | None = None, progress: Progress = lambda _text: None) -> DebianKernel:
    """Return the kernel in `cache` (None: `default_cache`), downloading it if it is not there.

    What is there is whole, and stays: remove the folder to have a newer one.
    Raises: GateError if the packages can't be had, or QEMU is not installed.
    """
    if shutil.which(QEMU) is None:
        raise GateError(f"{QEMU} is not installed", hint="apt-get install qemu-system-x86")
    cache = default_cache() if cache is None else cache.absolute()
    home = cache / META
    if not home.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / ".lock"):
                for leftover in cache.glob(f".{META}-*"):
                    shutil.rmtree(leftover)
                if not home.is_dir():
                    _unpack_into(cache, home, progress)
        except OSError as error:
            raise GateError(
                f"the kernel cache can't be written: {error}",
                hint="name a writable folder in IPSECGATE_LAB_CACHE",
            ) from error
    return _look(home)


def uncompressed(image: bytes) -> bytes:
    """Return the ELF file in a bzImage packed with xz; QEMU starts it in half the time.

    Source: the kernel's Documentation/arch/x86/boot.rst, "payload_offset".
    Raises: ValueError.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (image[0x1F1] + 1) * 512 + offset
    payload = image[begin : begin + length]
    if not payload.startswith(XZ_MAGIC):
        raise ValueError("not packed with xz")
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        unpacked = unpacker.decompress(payload)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("cut short")
    return unpacked


def _unpack_into(cache: Path, home: Path, progress: Progress) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{META}-", dir=cache))
    try:
        aside.chmod(0o755)
        package = _newest(aside)
        progress(f"downloading Debian's {package} into {home}")
        call(["apt-get", "download", "--quiet", package, BUSYBOX], aside, AGAIN)
        for archive in sorted(aside.glob("*.deb")):
            call(["dpkg", "-x", archive.name, "."], aside, "remove the cache folder, try again")
            archive.unlink()
        image = next((aside / "boot").glob("vmlinuz-*"))
        (aside / "boot/vmlinux").write_bytes(uncompressed(image.read_bytes()))
        release = image.name.removeprefix("vmlinuz-")
        call(["depmod", "--basedir", str(aside), release], aside, "apt-get install kmod")
        _look(aside)
        aside.rename(home)
    except (ValueError, StopIteration) as error:
        raise GateError(f"no kernel to be had from Debian: {error}", hint=AGAIN) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _newest(cwd: Path) -> str:
    for line in call(["apt-cache", "depends", META], cwd, AGAIN).splitlines():
        kind, _colon, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith("linux-image-"):
            return name
    raise GateError(f"apt knows no {META}", hint=AGAIN)


def _look(home: Path) -> DebianKernel:
    binary = home / "boot/vmlinux"
    busybox = home / "bin/busybox"
    modules = sorted((home / "lib/modules").glob("[0-9]*"))
    if not binary.is_file() or not busybox.is_file() or not modules:
        raise GateError(f"no kernel in {home}", hint=f"remove {home} and try again")
    return DebianKernel(binary, modules[-1], busybox)


def main() -> int:
    """Have the kernel ready, and say which it is."""
    try:
        kernel = fetch(progress=lambda text: sys.stdout.write(f"{text}\n"))
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return 1
    sys.stdout.write(f"Linux {kernel.release}: {kernel.binary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
