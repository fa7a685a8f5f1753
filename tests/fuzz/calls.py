"""Input from held calls: notifications, addresses in the caller's memory, /proc status."""

from __future__ import annotations

from random import Random
from typing import Any

from ipsecgate.core.codec import seccomp
from ipsecgate.core.model.flow import unmap
from tests.fuzz.engine import Target
from tests.fuzz.kernel import address

ABI = seccomp.ABIS["x86_64"]
STATUS = (
    "Name:\tx\nTgid:\t{pid}\nThreads:\t{threads}\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\n"
)
MASKS = "SigBlk:\t{blocked:016x}\nSigIgn:\t0000000000000000\nSigCgt:\t{caught:016x}\n"
WHERE = 0x7000


class Calls(Target):
    """A notification and the memory at its pointer; after a zero byte, a thread's status."""

    name = "seccomp"
    refusals = (seccomp.NotificationError,)
    words = (
        b"\2\0",
        b"\x0a\0",
        b"\0\0",
        b"Tgid:\t",
        b"SigCgt:\t",
        b"ffffffffffffffff",
        b"\n",
        b"g",
    )

    def real(self, random: Random) -> tuple[bytes, Any]:
        if random.random() < 0.3:
            return self._thread(random)
        version = random.choice((4, 6))
        where, port = address(random, version), random.getrandbits(16)
        body = port.to_bytes(2) + (bytes(4) if version == 6 else b"") + where.packed
        family = 2 if version == 4 else 10
        raw = family.to_bytes(2, "little") + body + bytes(8 if version == 4 else 4)
        ident, pid, fd = random.getrandbits(64), random.getrandbits(31), random.randrange(9)
        if random.random() < 0.5:
            nr, args = ABI.connect, (fd, WHERE, len(raw), 0, 0, 0)
        else:
            nr, args = ABI.sendto, (fd, 1, 1, 0, WHERE, len(raw))
        call = seccomp.NOTIFICATION.pack(ident, pid, 0, nr, ABI.arch, 0, *args)
        meant = seccomp.Notification(ident, pid, nr, ABI.arch, args)
        return b"\1" + call + raw, (meant, fd, (unmap(where), port))

    def _thread(self, random: Random) -> tuple[bytes, Any]:
        pid, threads = random.getrandbits(22), random.choice((1, 1, 10))
        pending, shared, blocked, caught = (random.choice((0, 1, 2, 3)) for _ in range(4))
        text = (STATUS + MASKS).format(
            pid=pid, threads=threads, pending=pending, shared=shared, blocked=blocked, caught=caught
        )
        surely = pending | (shared if threads == 1 else 0)
        return b"\0" + text.encode(), (bool(surely & caught & ~blocked), pid)

    def feed(self, data: bytes) -> Any:
        kind, data = data[:1], data[1:]
        if kind in (b"", b"\0"):
            status = data.decode(errors="replace")
            return seccomp.has_signal(status), seccomp.thread_group(status)
        size = seccomp.NOTIFICATION.size
        call, memory = seccomp.notification(data[:size]), data[size:]
        for abi in seccomp.ABIS.values():
            seccomp.destination(call, abi, lambda at, length: memory[at & 0xFF :][:length])
        return call, call.fd, seccomp.destination(call, ABI, lambda _at, length: memory[:length])
