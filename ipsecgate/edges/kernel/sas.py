"""What the kernel's SAs have carried, and since when they exist; read on request."""

from __future__ import annotations

from ipsecgate.core.codec.xfrm import decode, encode_sa_dump, packets_of_sas
from ipsecgate.core.model.events import SaSet
from ipsecgate.core.model.ipsec import SaId
from ipsecgate.edges.kernel.netlink import Requests

NETLINK_XFRM = 6


async def packets() -> dict[SaId, int]:
    """Return how many each state of this network namespace has carried.

    Raises: OSError, DecodeError.
    """
    async with Requests(NETLINK_XFRM) as requests:
        return dict(await requests.dump(encode_sa_dump, packets_of_sas))


async def youngest() -> int:
    """Return when the youngest was installed, in seconds since the epoch; 0: there is none.

    Raises: OSError, DecodeError.
    """
    async with Requests(NETLINK_XFRM) as requests:
        events = await requests.dump(encode_sa_dump, decode)
    return max((one.sa.installed_at for one in events if isinstance(one, SaSet)), default=0)
