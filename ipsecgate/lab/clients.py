"""The lab's clients: they retry refused calls and report every attempt."""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
import time
from collections.abc import Callable

from ipsecgate.lab.options import NUMBER_LENGTH, RUN_LENGTH, Options, Report, new_socket

RETRY_TCP = "EPERM"
RETRY_UDP = "EPERM,EAGAIN,ECONNREFUSED"
PAUSE = 0.001


class OutOfTimeError(Exception):
    """The time limit has passed."""


class GaveUpError(Exception):
    """A call failed with an errno that is not on the retry list."""


class Tries:
    """The attempts of a client: their number, the first times, and a count of each errno."""

    def __init__(self, retry: str) -> None:
        self.retry = {getattr(errno, name) for name in retry.split(",") if name.startswith("E")}
        self.attempts = 0
        self.errnos: dict[str, int] = {}
        self.first: float | None = None
        self.first_refused: float | None = None
        self.first_success: float | None = None

    def call(self, operation: Callable[[], object]) -> tuple[float, float]:
        """Repeat an operation until it succeeds; return the start and end of that last attempt.

        Raises: GaveUpError on an errno that is not on the retry list.
        """
        while True:
            self.attempts += 1
            start = time.monotonic()
            if self.first is None:
                self.first = start
            try:
                operation()
            except OSError as error:
                name = errno.errorcode.get(error.errno or 0, str(error))
                self.errnos[name] = self.errnos.get(name, 0) + 1
                self.first_refused = self.first_refused or time.monotonic()
                if error.errno not in self.retry:
                    raise GaveUpError(name) from error
                time.sleep(PAUSE)
                continue
            end = time.monotonic()
            if self.first_success is None:
                self.first_success = start
            return start, end

    def report(self) -> Report:
        """Return the attempts as part of a client's report."""
        return {
            "attempts": self.attempts,
            "errnos": self.errnos,
            "first": self.first,
            "first_refused": self.first_refused,
            "first_success": self.first_success,
        }


def limited(seconds: float, body: Callable[[], None]) -> str | None:
    """Run `body`; return None, the errno that it failed with, or "limit" when time ran out."""

    def alarm(*_: object) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        body()
    except OutOfTimeError:
        return "limit"
    except GaveUpError as error:
        return str(error)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def tcp_client(options: Options) -> Report:
    """Connect, send a byte, wait for its echo.

    `success_start` and `connected`: when the connect() that succeeded began and ended.
    """
    tries = Tries(options.retry or RETRY_TCP)
    report: Report = {"success_start": None, "connected": None, "echoed": False, "local": None}
    sockets: list[socket.socket] = []

    def connect() -> None:
        if not sockets or "same-socket" not in options.switches:
            while sockets:
                sockets.pop().close()
            sockets.append(new_socket(socket.SOCK_STREAM, options.to))
            if options.bind:
                sockets[0].bind((options.bind, 0))
        sockets[0].connect((options.to, options.port))

    def body() -> None:
        report["success_start"], report["connected"] = tries.call(connect)
        report["local"] = sockets[0].getsockname()[:2]
        sockets[0].sendall(b"\x2a")
        report["echoed"] = sockets[0].recv(1) == b"\x2a"

    report["error"] = limited(options.limit, body)
    report["finished"] = time.monotonic()
    return {"role": "tcp-client", **tries.report(), **report}


def udp_client(options: Options) -> Report:
    """Send numbered datagrams at a fixed rate, and resend refused ones.

    A refusal delays the datagrams behind it, as in an application that sends in order. They are
    not sent in a burst afterwards.
    """
    tries = Tries(options.retry or RETRY_UDP)
    run = os.urandom(RUN_LENGTH)
    target = (options.to, options.port)
    report: Report = {"sent": 0, "local": None}

    def body() -> None:
        sock = new_socket(socket.SOCK_DGRAM, options.to)
        if options.bind:
            sock.bind((options.bind, options.local))
        send: Callable[..., int] = sock.sendto
        where: tuple[object, ...] = (target,)
        if "connected" in options.switches:
            tries.call(functools.partial(sock.connect, target))
            tries.first_success = None
            send, where = sock.send, ()
        due = time.monotonic()
        for number in range(options.count):
            time.sleep(max(0.0, due - time.monotonic()))
            data = (run + number.to_bytes(NUMBER_LENGTH, "big")).ljust(options.size, b"\0")
            start, _ = tries.call(functools.partial(send, data, *where))
            due = max(due, start) + 1 / options.rate
            report["sent"] = number + 1
        report["local"] = sock.getsockname()[:2]

    report["error"] = limited(options.limit, body)
    report["finished"] = time.monotonic()
    return {"role": "udp-client", **tries.report(), **report}
