"""One call of a program whose socket has a mark, a device or a source; and a route-based tunnel."""

from __future__ import annotations

import json
import sys
from typing import Any

from ipsecgate.lab.connections import connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7400
THERE, INNER_A, INNER_B = "203.0.113.1", "198.51.100.0/24", "203.0.113.0/24"
REFUSED = ("ETIMEDOUT", "EPERM", "EHOSTUNREACH", "ENETUNREACH")
CALL = """
import errno, json, socket, sys
kind, address, port, mark, device, source = json.loads(sys.argv[1])
sock = socket.socket(type=socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
if mark:
    sock.setsockopt(socket.SOL_SOCKET, 36, mark)
if device:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
if source:
    sock.bind((source, 0))
try:
    sock.connect((address, port))
    if kind == "udp":
        sock.send(b"one")
    result = [None, sock.getsockname()[0]]
except OSError as error:
    result = [errno.errorcode[error.errno], None]
print(json.dumps(result))
"""


def ip(lab: Lab, *commands: str) -> None:
    for command in commands:
        lab.a.run(["ip", *command.split()])


def call(
    lab: Lab,
    gate: Gated,
    kind: str = "tcp",
    *,
    to: str = THERE,
    mark: int = 0,
    device: str = "",
    source: str = "",
    held: str = "20s",
) -> Any:
    """Make one call under `ipsecgate exec`; return its errno's name, and the source that it got."""
    what = json.dumps([kind, to, PORT, mark, device, source])
    command = gate.exec_argv(sys.executable, "-c", CALL, what, options=["--hold", held])
    done = lab.a.run(command, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def load_route_based(lab: Lab, name: str, **child_options: str) -> None:
    """Load a tunnel for everything on host a; host b narrows it to the two networks."""
    narrow = ConnSpec(name, "tunnel", 4)
    near, far = lab.a.end(narrow, (INNER_A,)), lab.b.end(narrow, (INNER_B,))
    lab.b.charon.load(connection(narrow, far, near, "none"))
    wide = ConnSpec(name, "tunnel", 4, child_options=child_options)
    near, far = lab.a.end(wide, ("0.0.0.0/0",)), lab.b.end(wide, ("0.0.0.0/0",))
    lab.a.charon.load(connection(wide, near, far, "trap"))
