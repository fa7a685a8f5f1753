"""A file, served by FUSE from this process, on which read() and close() never return.

Source: linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

IN = struct.Struct("=IIQQIIII")  # struct fuse_in_header
OUT = struct.Struct("=IiQ")
GETATTR, OPEN, READ, RELEASE, FLUSH, INIT = 3, 14, 15, 18, 25, 26
LARGEST = 1 << 17
SIZE = 4096


def _init() -> bytes:
    return struct.pack("=4I2H2I2HI28x", 7, 31, 0, 0, 0, 0, SIZE, 1, 0, 0, 0)


def _attributes() -> bytes:
    mode = stat.S_IFREG | 0o644
    return struct.pack("=QII6Q3I6I4x", 3600, 0, 0, 1, SIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, *[0] * 4)


ANSWERS = {INIT: _init(), GETATTR: _attributes(), OPEN: bytes(16), RELEASE: b""}


class StallingFile:
    """The file. A process that reads or closes it waits until the `with` block ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[int] = []

    def __enter__(self) -> Self:
        subprocess.run(["modprobe", "fuse"], check=False, capture_output=True)
        self.path.touch()
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fuse},rootmode=100644,user_id=0,group_id=0"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"stall", os.fsencode(self.path), b"fuse", 0, options.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_reason: object) -> None:
        subprocess.run(["umount", "--force", "--lazy", str(self.path)], check=True)
        self._thread.join()
        os.close(self._fuse)

    def _serve(self) -> None:
        with suppress(OSError):  # ENODEV: it was unmounted
            while True:
                request = os.read(self._fuse, LARGEST)
                _, opcode, unique, *_ = IN.unpack_from(request)
                self.asked.append(opcode)
                if opcode in (READ, FLUSH):
                    continue
                answer = ANSWERS.get(opcode)
                failed = -errno.ENOSYS if answer is None else 0
                answer = answer or b""
                os.write(self._fuse, OUT.pack(OUT.size + len(answer), failed, unique) + answer)
