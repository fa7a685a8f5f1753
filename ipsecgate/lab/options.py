"""Shared by the lab's clients and servers: arguments, a socket, a line of JSON."""

from __future__ import annotations

import json
import socket
import sys

TEXTS = {"to": "", "bind": "", "retry": ""}
NUMBERS = {"port": "7", "local": "0", "limit": "30", "count": "200", "rate": "1000", "size": "64"}
SWITCHES = ("same-socket", "connected")
# A datagram begins with a random id of the sender's run and its number in that run (big-endian).
RUN_LENGTH, NUMBER_LENGTH = 8, 4

Report = dict[str, object]


class UnknownWordError(Exception):
    """An unknown argument."""


class Options:
    """A role's arguments: `--name value` or a bare `--switch`. Raises: UnknownWordError."""

    def __init__(self, arguments: list[str]) -> None:
        values = TEXTS | NUMBERS
        self.switches = set()
        rest = iter(arguments)
        for word in rest:
            name = word.removeprefix("--")
            if name in SWITCHES:
                self.switches.add(name)
            elif name in values and word != name:
                values[name] = next(rest, "")
            else:
                raise UnknownWordError(word)
        self.to, self.bind, self.retry = values["to"], values["bind"], values["retry"]
        self.port, self.count, self.size = (int(values[k]) for k in ("port", "count", "size"))
        self.local = int(values["local"])
        self.limit, self.rate = float(values["limit"]), float(values["rate"])


def new_socket(kind: int, address: str) -> socket.socket:
    """Return a socket of the address's family."""
    return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)


def say(report: Report) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
