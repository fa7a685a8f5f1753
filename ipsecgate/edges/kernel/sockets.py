"""List the connected sockets, and destroy those that core selects, over NETLINK_SOCK_DIAG.

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


async def connected() -> list[ConnectedSocket]:
    """Return the connected TCP and UDP sockets of this network namespace.

    Raises: OSError, DecodeError.
    """
    found: list[ConnectedSocket] = []
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        for family, protocol in KINDS:
            with suppress(FileNotFoundError):  # the kernel lacks the family or the protocol
                found += await requests.dump(
                    partial(encode_listing, family, protocol), partial(decode_listing, protocol)
                )
    return found


async def destroy(sockets: list[ConnectedSocket]) -> int:
    """Destroy sockets; return how many still existed.

    Raises: OSError; EOPNOTSUPP if the kernel lacks CONFIG_INET_DIAG_DESTROY.
    """
    destroyed = 0
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        for socket in sockets:
            try:
                requests.ask(partial(encode_destroy, socket), lambda _datagram: ())
                destroyed += 1
            except OSError as error:
                if error.errno != errno.ENOENT:  # closed in the meantime
                    raise
    return destroyed
