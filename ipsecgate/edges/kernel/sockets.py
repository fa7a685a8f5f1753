"""Sockets that stand: listed, and ended from outside, over NETLINK_SOCK_DIAG. No decisions.

Source: sock_diag(7); SOCK_DESTROY needs CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import partial

from ipsecgate.core.codec.sockdiag import (
    KINDS,
    ConnectedSocket,
    decode_listing,
    encode_destroy,
    encode_listing,
)
from ipsecgate.edges.kernel.netlink import Requests

NETLINK_SOCK_DIAG = 4


async def standing() -> list[ConnectedSocket]:
    """Return the connected TCP and UDP sockets of this network namespace.

    Raises: OSError, DecodeError.
    """
    found: list[ConnectedSocket] = []
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        for family, protocol in KINDS:
            with suppress(FileNotFoundError):  # a kernel that has no such family or protocol
                found += await requests.dump(
                    partial(encode_listing, family, protocol), partial(decode_listing, protocol)
                )
    return found


async def destroy(sockets: list[ConnectedSocket]) -> int:
    """End sockets, return how many there still were.

    Raises: OSError; EOPNOTSUPP where the kernel cannot.
    """
    ended = 0
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        for socket in sockets:
            try:
                requests.ask(partial(encode_destroy, socket), lambda _datagram: ())
                ended += 1
            except OSError as error:
                if error.errno != errno.ENOENT:  # it went by itself
                    raise
    return ended
