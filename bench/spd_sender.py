"""Writes kernel policies as fast as the kernel takes them: NETLINK_XFRM requests, many in one send.

    ip netns exec NAME python -m bench.spd_sender add 100000
    ip netns exec NAME python -m bench.spd_sender update 1000 --rate 50000 --seconds 5

Each policy is a road warrior's: one host on both sides, an ESP tunnel template with its own reqid.
The kernel needs no ESP for that. Source: linux/xfrm.h.
"""

from __future__ import annotations

import argparse
import itertools
import socket
import struct
import sys
import time
from collections.abc import Iterator

from ipsecgate.core.codec.xfrm import DELPOLICY, DELSA, NEWPOLICY, UPDPOLICY

NETLINK_XFRM, XFRMA_TMPL, ESP, TUNNEL, OUT = 6, 5, 50, 1, 1
NEAR, FAR, PEER = 0xC0000201, 0x0A000000, 0xC6000000  # 192.0.2.1, 10.0.0.0, 198.0.0.0
PER_SEND = 64
NO_LIFETIME = struct.pack("=8Q", *([2**64 - 1] * 4), *([0] * 4))  # XFRM_INF; no times


def selector(number: int) -> bytes:
    """Return struct xfrm_selector of a policy, 56 bytes."""
    near, far = struct.pack("!I12x", NEAR), struct.pack("!I12x", FAR + number)
    return far + near + bytes(8) + struct.pack("=HBBB3xiI", socket.AF_INET, 32, 32, 0, 0, 0)


def set_policy(number: int, kind: int, spi: int = 0x1000) -> bytes:
    """Return a request that adds a policy, or replaces it (UPDPOLICY) with one for another SPI."""
    template = struct.pack(
        "!I12xIB3x", PEER + number, spi + number, ESP
    ) + struct.pack("=H2x", socket.AF_INET) + struct.pack("!I12x", NEAR) + struct.pack(
        "=IBBBxIII", number + 1, TUNNEL, 0, 0, *([2**32 - 1] * 3)
    )  # fmt: skip
    info = (
        selector(number) + NO_LIFETIME + bytes(32) + struct.pack("=IIBBBB4x", 1000, 0, OUT, 0, 0, 0)
    )
    body = info + struct.pack("=HH", 4 + len(template), XFRMA_TMPL) + template
    return _request(kind, body)


def add_policy(number: int) -> bytes:
    """Return a request that adds a policy."""
    return set_policy(number, NEWPOLICY)


def delete_policy(number: int) -> bytes:
    """Return a request that deletes a policy."""
    return _request(DELPOLICY, selector(number) + struct.pack("=IB3x", 0, OUT))


def delete_state(peer: str, spi: int) -> bytes:
    """Return a request that deletes an ESP state: struct xfrm_usersa_id."""
    body = socket.inet_aton(peer) + bytes(12) + struct.pack("!I", spi)
    return _request(DELSA, body + struct.pack("=HB1x", socket.AF_INET, ESP))


def _request(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 1, 0, 0) + body


def requests(what: str, count: int) -> Iterator[tuple[bytes, int]]:
    """Yield bytes to send, and how many requests they are.

    `add` and `delete` name each policy once, `update` names them in turn for ever.
    """
    numbers = [range(at, min(at + PER_SEND, count)) for at in range(0, count, PER_SEND)]
    if what != "update":
        make = delete_policy if what == "delete" else add_policy
        yield from [(b"".join(map(make, some)), len(some)) for some in numbers]
        return
    made = [
        (b"".join(set_policy(number, UPDPOLICY, spi) for number in some), len(some))
        for spi in (0x1000, 0x2000)
        for some in numbers
    ]
    yield from itertools.cycle(made)


def main() -> None:
    """Send, and print how many requests were sent in a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("add", "update", "delete"))
    parser.add_argument("count", type=int)
    parser.add_argument("--rate", type=float, default=float("inf"), help="requests a second")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    every = requests(options.what, options.count)
    following = next(every, None)
    sent, began = 0, time.monotonic()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM) as kernel:
        while following and (passed := time.monotonic() - began) < options.seconds:
            if sent > passed * options.rate:
                time.sleep(0.0002)
                continue
            kernel.send(following[0])
            sent += following[1]
            following = next(every, None)
        took = time.monotonic() - began
        kernel.setblocking(False)
        try:
            sys.exit(f"the kernel refused one: {kernel.recv(64)!r}")  # it answers errors only
        except BlockingIOError:
            sys.stdout.write(f"{sent / took:.0f}\n")


if __name__ == "__main__":
    main()
