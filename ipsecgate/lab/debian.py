"""Debian's own kernels for `qemu`, downloaded and unpacked into the lab's cache, never installed.

Unlike user-mode-linux they have the BPF JIT, BTF, and the configuration of real machines. The
default is the newest kernel of the running Debian; `archive` downloads those of other suites.

    python -m ipsecgate.lab.debian [SUITE...]
"""

from __future__ import annotations

import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.archive import Archive
from ipsecgate.lab.kernel import Kernel, Progress, default_cache, locked, run_tool
from ipsecgate.lab.packed import unpack

META = "linux-image-amd64"
"""The meta-package that depends on the newest kernel of its suite."""
PARTS = re.compile(r"linux-(image|base|binary|modules)-[0-9]")
"""The packages of a kernel. Since Linux 7.3 there are several, and linux-image itself is empty."""
BUSYBOX = "busybox-static"
"""The programs for the start of the boot, before the host's files are mounted."""
QEMU = "qemu-system-x86_64"
AGAIN = "run apt-get update, then try again"


@dataclass(frozen=True, slots=True)
class DebianKernel(Kernel):
    """An unpacked linux-image package: the uncompressed kernel, and modules with modules.dep."""

    busybox: Path


def fetch(
    cache: Path | None = None,
    progress: Progress = lambda _text: None,
    suite: str | None = None,
) -> DebianKernel:
    """Return the kernel in `cache` (None: `default_cache`); download it if it is missing.

    `suite` is a Debian suite, for example trixie-backports; None: the one that apt is set up for.
    A cached kernel is complete and never updated: remove its folder to get a newer one.
    Raises: GateError if the packages cannot be downloaded, or QEMU is not installed.
    """
    if shutil.which(QEMU) is None:
        raise GateError(f"{QEMU} is not installed", hint="apt-get install qemu-system-x86")
    cache = default_cache() if cache is None else cache.absolute()
    home = cache / (META if suite is None else f"{META}-{suite}")
    if not home.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / ".lock"):
                for leftover in cache.glob(f".{META}-*"):
                    shutil.rmtree(leftover)
                if not home.is_dir():
                    _unpack_into(cache, home, progress, suite)
        except OSError as error:
            raise GateError(
                f"cannot write the kernel cache: {error}",
                hint="name a writable folder in IPSECGATE_LAB_CACHE",
            ) from error
    return _unpacked_kernel(home)


def uncompressed(image: bytes) -> bytes:
    """Return the ELF file inside a bzImage (xz or zstd). QEMU boots it in half the time.

    Source: the kernel's Documentation/arch/x86/boot.rst, "payload_offset"; the payload ends
    with the file's size (scripts/Makefile.lib, size_append).
    Raises: ValueError; GateError if zstd(1) is needed and not installed.
    """
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise ValueError("not a bzImage")
    offset, length = struct.unpack_from("<II", image, 0x248)
    begin = (image[0x1F1] + 1) * 512 + offset
    payload = image[begin : begin + length]
    unpacked = unpack(payload[:-4])
    if struct.pack("<I", len(unpacked)) != payload[-4:]:
        raise ValueError("the image is truncated")
    return unpacked


def _unpack_into(cache: Path, home: Path, progress: Progress, suite: str | None) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{META}-", dir=cache))
    try:
        aside.chmod(0o755)
        for name in ("bin", "lib"):  # newer packages have usr/lib, older ones lib
            (aside / "usr" / name).mkdir(parents=True)
            (aside / name).symlink_to(f"usr/{name}")
        with Archive.for_suite(suite) as archive:
            packages = kernel_packages(archive)
            progress(f"downloading Debian's {' '.join(packages)} into {home}")
            archive.download(packages, aside)
        run_tool(["apt-get", "download", "--quiet", BUSYBOX], aside, AGAIN)
        for package in sorted(aside.glob("*.deb")):
            run_tool(["dpkg", "-x", package.name, "."], aside, "remove the cache folder, try again")
            package.unlink()
        image, release = _image(aside)
        (aside / "boot").mkdir(exist_ok=True)
        (aside / "boot/vmlinux").write_bytes(uncompressed(image.read_bytes()))
        run_tool(["depmod", "--basedir", str(aside), release], aside, "apt-get install kmod")
        _unpacked_kernel(aside)
        aside.rename(home)
    except ValueError as error:
        raise GateError(f"cannot unpack Debian's kernel: {error}", hint=AGAIN) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def kernel_packages(archive: Archive) -> list[str]:
    """Return the names of the packages that make up the suite's newest kernel."""
    found: dict[str, None] = {}
    ask = [META]
    while ask:
        new = [name for name in archive.depends(ask.pop()) if PARTS.match(name)]
        ask += [name for name in new if name not in found]
        found |= dict.fromkeys(new)
    if not found:
        raise GateError(f"apt knows no {META}", hint=AGAIN)
    return list(found)


def _image(home: Path) -> tuple[Path, str]:
    """Return the compressed kernel and its release."""
    for path in sorted(home.glob("boot/vmlinuz-*")):
        return path, path.name.removeprefix("vmlinuz-")
    for path in sorted(home.glob("lib/modules/*/vmlinuz")):
        return path, path.parent.name
    raise ValueError("its packages have no vmlinuz")


def _unpacked_kernel(home: Path) -> DebianKernel:
    binary = home / "boot/vmlinux"
    busybox = home / "bin/busybox"
    modules = sorted((home / "lib/modules").glob("[0-9]*"))
    if not binary.is_file() or not busybox.is_file() or not modules:
        raise GateError(f"no complete kernel in {home}", hint=f"remove {home} and try again")
    return DebianKernel(binary, modules[-1], busybox)


def main(suites: Sequence[str]) -> int:
    """Download the kernels of the suites (default: the running Debian's); print their releases."""
    try:
        wanted: Sequence[str | None] = suites or [None]
        for suite in wanted:
            kernel = fetch(progress=lambda text: sys.stdout.write(f"{text}\n"), suite=suite)
            sys.stdout.write(f"Linux {kernel.release}: {kernel.binary}\n")
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
