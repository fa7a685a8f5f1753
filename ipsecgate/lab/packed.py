"""Decompress Debian's kernels and modules: xz in Python, zstd with zstd(1)."""

from __future__ import annotations

import lzma
import subprocess

from ipsecgate.errors import GateError

XZ = b"\xfd7zXZ\x00"
ZSTD = b"\x28\xb5\x2f\xfd"
ELF = b"\x7fELF"


def unpack(data: bytes) -> bytes:
    """Return the decompressed `data`; an ELF file is returned unchanged.

    Raises: ValueError; GateError if zstd(1) is needed and not installed.
    """
    if data.startswith(ELF):
        return data
    if data.startswith(XZ):
        return _xz(data)
    if data.startswith(ZSTD):
        return _zstd(data)
    raise ValueError("neither xz nor zstd")


def _xz(data: bytes) -> bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        unpacked = unpacker.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("the xz data is truncated")
    return unpacked


def _zstd(data: bytes) -> bytes:
    try:
        done = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise GateError("zstd is not installed", hint="apt-get install zstd") from error
    if done.returncode:
        raise ValueError(done.stderr.decode(errors="replace").strip())
    return done.stdout
