"""CHILD_SAs that send and receive nothing: what a firewall that drops ESP looks like from here.

IKE is done and the SA is live, so nothing is refused, and yet no answer comes. Traffic that wants
no answer, such as syslog over UDP, looks the same: it is worth a warning, and never a verdict.

Rule of this module: all SAs of a child count together, because after a rekeying the peer may still
use the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ipsecgate.core.model.flow import Address, Flow, TrafficSelector
from ipsecgate.core.model.ipsec import ChildName, ChildSa, SaId
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value

ENOUGH = 3  # packets; a TCP connection sends its SYN that often within 3 s

_ADVICE = (
    "if answers are due, ESP is filtered on the way: let IP protocol 50 pass in both directions "
    "(UDP port 4500 behind NAT, or with `encap = yes`), and see `ip -s xfrm state` on the peer"
)


@value
class Silent:
    """A child that sent so many packets to a peer, and received none. `remote`: of its SAs."""

    name: ChildName
    peer: Address
    sent: int
    remote: tuple[TrafficSelector, ...] = ()

    @property
    def problem(self) -> Problem:
        """What is probably wrong."""
        text = (
            f"child {self.name}: {self.sent} packets left as ESP to {self.peer}, and none came back"
        )
        return Problem(text, _ADVICE)

    def carries(self, flow: Flow) -> bool:
        """Tell whether the child's SAs carry a flow."""
        return any(one.contains(flow.daddr, flow.proto, flow.dport) for one in self.remote)


def silent_children(established: Iterable[ChildSa], packets: Mapping[SaId, int]) -> list[Silent]:
    """Return the children that sent at least `ENOUGH` packets and received none.

    `packets`: a count for each state, in either direction. A child with an inbound state whose
    count is not known is left out.
    """
    sent: dict[tuple[ChildName, Address], int] = {}
    remote: dict[tuple[ChildName, Address], tuple[TrafficSelector, ...]] = {}
    heard = set()
    for sa in established:
        child = sa.name, sa.remote_host
        sent[child] = sent.get(child, 0) + packets.get(sa.outbound, 0)
        remote[child] = remote.get(child, ()) + sa.remote
        if sa.inbound is None or packets.get(sa.inbound, 1):
            heard.add(child)
    return [
        Silent(*child, count, remote[child])
        for child, count in sent.items()
        if count >= ENOUGH and child not in heard
    ]
