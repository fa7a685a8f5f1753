"""Run a command as on a CPU with AMX, where the kernel refuses to restore partial register state.

    python -m tests.guest.amx CMD...

A seccomp listener answers ptrace(PTRACE_SETREGSET, NT_X86_XSTATE) with EFAULT if the buffer is
smaller than the XSAVE area of such a CPU, as the kernel does there. All other requests reach the
kernel. `python -m tests.guest.amx make demo` runs the README's command as on such a machine.

This does not cover the AMX registers themselves, which this CPU may not have.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from ipsecgate.core.codec.seccomp import (
    ARCH,
    ARGUMENTS,
    JUMP_EQUAL,
    LOAD,
    NOTIFICATION,
    NR,
    RET_ALLOW,
    RET_USER_NOTIF,
    RETURN,
    notification,
)
from ipsecgate.edges.holding.seccomp import abi, answer, install, read_memory, receive

AREA = 11008
"""Bytes of the XSAVE area of a CPU with AMX."""
PTRACE = 101  # x86-64
SETREGSET, XSTATE = 0x4205, 0x202


def program() -> bytes:
    """Return the filter, a struct sock_filter[], which reports only this request."""
    lines = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 0, 7, abi().arch),
        (LOAD, 0, 0, NR),
        (JUMP_EQUAL, 0, 5, PTRACE),
        (LOAD, 0, 0, ARGUMENTS),
        (JUMP_EQUAL, 0, 3, SETREGSET),
        (LOAD, 0, 0, ARGUMENTS + 2 * 8),
        (JUMP_EQUAL, 0, 1, XSTATE),
        (RETURN, 0, 0, RET_USER_NOTIF),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def serve(listener: int, ended: threading.Event) -> int:
    """Answer requests until the command has ended; return the number of refused ones."""
    refused = 0
    buffer = ctypes.create_string_buffer(NOTIFICATION.size)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while not ended.is_set():
        for _fd, events in poll.poll(100):
            if events & select.POLLHUP:
                return refused
            ctypes.memset(buffer, 0, NOTIFICATION.size)
            if not receive(listener, ctypes.addressof(buffer)):
                continue
            asked = notification(buffer.raw)
            short = False
            with suppress(OSError, struct.error):  # the process was killed meanwhile
                _base, length = struct.unpack("=QQ", read_memory(asked.pid, asked.args[3], 16))
                short = length < AREA
            refused += short
            answer(listener, asked.id, errno.EFAULT if short else None)
    return refused


def run(argv: Sequence[str]) -> tuple[int, int]:
    """Run a command; return its exit code and the number of refused requests."""
    installed, ended = threading.Event(), threading.Event()
    facts: dict[str, int] = {}

    def under_the_filter() -> None:
        """Install the filter, which applies only to this thread and its children."""
        try:
            facts["listener"] = install(program())
            installed.set()
            facts["code"] = subprocess.run(argv, check=False).returncode
        finally:
            installed.set()
            ended.set()

    thread = threading.Thread(target=under_the_filter)
    thread.start()
    installed.wait()
    refused = serve(facts["listener"], ended)
    thread.join()
    os.close(facts["listener"])
    return facts["code"], refused


def main() -> int:
    """Run the command on the command line, and print the number of refused requests."""
    code, refused = run(sys.argv[1:])
    sys.stderr.write(f"refused as on a CPU with AMX: {refused} requests\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
