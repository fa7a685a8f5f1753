"""Make refused calls at a steady rate: `python flood.py WHAT NETWORK PER_SECOND SECONDS`.

WHAT differs from call to call: `ports` (the source port; all go to one address), `destinations`, or
`programs` (the process's name and the destination). Prints the number of calls, and of refusals.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from pathlib import Path

PORT = 9
FLOWS = 60_000
COMM = Path("/proc/self/comm")


def main(what: str, network: str, per_second: float, seconds: float) -> None:
    first = int(ipaddress.ip_network(network)[1])
    began, calls, refused = time.monotonic(), 0, 0
    while (due := began + calls / per_second) < began + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        number = FLOWS if what == "ports" else calls % FLOWS
        address = str(ipaddress.ip_address(first + number))
        if what == "programs":
            COMM.write_text(f"p{calls}")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            if what == "ports":
                sock.bind(("", 1024 + calls % FLOWS))
            sock.setblocking(False)
            try:
                sock.connect((address, PORT))
            except PermissionError:
                refused += 1
            except BlockingIOError:
                pass
        calls += 1
    sys.stdout.write(f"{calls} {refused}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
