"""A process that deletes an SA and sends until it is refused; as a script it uses only the library.

closer ADDRESS PORT
    input "send": sends until it succeeds; answers with the number of attempts
    input "delete SPI PEER": deletes the state (XFRM_MSG_DELSA), then sends until it is refused;
        answers {"seconds": since before the deletion, "sends": that were not refused,
        "error": of the last send}
"""

from __future__ import annotations

import errno
import json
import socket
import struct
import sys
import time

NETLINK_XFRM, XFRM_MSG_DELSA, NLMSG_ERROR = 6, 0x11, 2
REQUEST_WITH_ACK = 0x1 | 0x4
REFUSED = (errno.EPERM, errno.EHOSTUNREACH)  # the gate's; XFRM returns others
PAUSE = 20e-6  # seconds between two sends: lets other processes run
LIMIT = 20.0  # seconds


def send(sock: socket.socket, to: tuple[str, int]) -> int:
    """Return the errno of one send, 0 if it succeeds."""
    try:
        sock.sendto(b"closer", to)
    except OSError as error:
        return error.errno or -1
    return 0


def open_again(sock: socket.socket, to: tuple[str, int]) -> dict[str, object]:
    began = time.monotonic()
    while (error := send(sock, to)) and time.monotonic() < began + LIMIT:
        time.sleep(0.002)
    return {"open": not error, "seconds": time.monotonic() - began}


def delete(netlink: socket.socket, spi: int, peer: str) -> None:
    """Delete an ESP state. Raises: OSError. Source: struct xfrm_usersa_id, linux/xfrm.h."""
    identity = socket.inet_aton(peer).ljust(16, b"\0") + struct.pack("!I", spi)
    body = identity + struct.pack("=HBx", socket.AF_INET, socket.IPPROTO_ESP)
    head = struct.pack("=IHHII", 16 + len(body), XFRM_MSG_DELSA, REQUEST_WITH_ACK, 1, 0)
    netlink.send(head + body)
    answer = netlink.recv(4096)
    kind, code = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
    if kind != NLMSG_ERROR or code:
        raise OSError(-code, "XFRM_MSG_DELSA")


def close(
    sock: socket.socket, to: tuple[str, int], netlink: socket.socket, spi: int, peer: str
) -> dict[str, object]:
    is_open = not send(sock, to)
    began, sends, error = time.monotonic(), 0, 0
    delete(netlink, spi, peer)
    while time.monotonic() < began + LIMIT:
        error = send(sock, to)
        if error in REFUSED:
            break
        sends += 1
        time.sleep(PAUSE)
    took = time.monotonic() - began
    name = errno.errorcode.get(error, str(error))
    return {"open": is_open, "seconds": took, "sends": sends, "error": name}


def main() -> None:
    address, port = sys.argv[1], int(sys.argv[2])
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
    netlink.bind((0, 0))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        words = line.split()
        if words[0] == "send":
            answer = open_again(sock, (address, port))
        else:
            answer = close(sock, (address, port), netlink, int(words[1]), words[2])
        sys.stdout.write(json.dumps([answer]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
