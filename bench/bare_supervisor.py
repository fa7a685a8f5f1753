"""Run a command whose calls one Python process lets continue at once, without looking at them.

    bare_supervisor.py COMMAND...

What seccomp's user notification costs at least, with a supervisor in Python. Like any other, it has
a session of its own: the kernel may schedule each session as a group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ipsecgate.core.codec import seccomp as codec
from ipsecgate.edges.holding import seccomp


def main() -> None:
    """Start the command, and answer its calls until it ends."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        os.setsid()
        listener = seccomp.install(codec.program(seccomp.abi()))
        socket.send_fds(theirs, [b"\0"], [listener])
        for end in (ours.fileno(), theirs.fileno(), listener):
            os.close(end)
        os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606
    _, (listener,), *_ = socket.recv_fds(ours, 1, 1)
    seccomp.wake_on_one_processor(listener)
    buffer = ctypes.create_string_buffer(codec.NOTIFICATION.size)
    address, view = ctypes.addressof(buffer), memoryview(buffer).cast("B")
    empty = bytes(len(view))
    # The end of the command interrupts the wait for its next call.
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(os.waitstatus_to_exitcode(os.wait()[1])))
    while True:
        if seccomp.receive(listener, address):
            seccomp.answer(listener, int.from_bytes(view[:8], sys.byteorder), None)
            view[:] = empty


if __name__ == "__main__":
    main()
