"""List sockets, and destroy those that core selects, over NETLINK_SOCK_DIAG.

Source: sock_diag(7); SOCK_DESTROY needs CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from socket import AF_INET

from ipsecgate.core.codec.sockdiag import (
    KINDS,
    UNCONNECTED,
    ListedSocket,
    decode_listing,
    encode_destroy,
    encode_listing,
)
from ipsecgate.core.model.flow import UDP
from ipsecgate.edges.kernel.netlink import Requests

NETLINK_SOCK_DIAG = 4
ANYWHERE = IPv4Address(0)


async def connected() -> list[ListedSocket]:
    """Return the connected TCP and UDP sockets of this network namespace.

    Raises: OSError, DecodeError.
    """
    found: list[ListedSocket] = []
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        for family, protocol in KINDS:
            with suppress(FileNotFoundError):  # the kernel lacks the family or the protocol
                found += await requests.dump(
                    partial(encode_listing, family, protocol), partial(decode_listing, protocol)
                )
    return found


async def udp_ports(pid: int, cgroup: int) -> list[int]:
    """Return the ports at which a process of a cgroup receives IPv4 datagrams from anybody.

    Those of other processes in that cgroup are among them if we may not see whose a socket is: that
    takes CAP_SYS_PTRACE. The lowest come first. Raises: OSError, DecodeError.
    """
    request = partial(encode_listing, AF_INET, UDP, states=UNCONNECTED)
    found: list[ListedSocket] = []
    async with Requests(NETLINK_SOCK_DIAG) as requests:
        with suppress(FileNotFoundError):
            found = await requests.dump(request, partial(decode_listing, UDP))
    own = _inodes(pid)
    return sorted(
        {
            one.flow.sport
            for one in found
            if one.cgroup == cgroup
            and one.flow.saddr == ANYWHERE
            and (own is None or one.inode in own)
        }
    )


def _inodes(pid: int) -> set[int] | None:
    """Return the inodes of a process's sockets, None if we may not read them."""
    try:
        links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return None
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}


async def destroy(sockets: list[ListedSocket]) -> int:
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
