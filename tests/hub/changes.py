"""What happens to tunnels that are up: rekeys, ends, lost SAs."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.chaos.fault_tools import vici
from tests.chaos.world import ip
from tests.hub.tunnels import Tunnel
from tests.hub.world import Hub

Change = Callable[[Hub, Tunnel, Random], None]


def rekeyed(hub: Hub, tunnel: Tunnel, dice: Random) -> None:
    vici(dice.choice([hub.lab.a, hub.lab.b]), "rekey", child=tunnel.name)


def ike_rekeyed(hub: Hub, tunnel: Tunnel, dice: Random) -> None:
    vici(dice.choice([hub.lab.a, hub.lab.b]), "rekey", ike=tunnel.name)


def ended(hub: Hub, tunnel: Tunnel, dice: Random) -> None:
    vici(dice.choice([hub.lab.a, hub.lab.b]), "terminate", child=tunnel.name)


def ike_ended(hub: Hub, tunnel: Tunnel, dice: Random) -> None:
    vici(dice.choice([hub.lab.a, hub.lab.b]), "terminate", ike=tunnel.name)


def outbound_sa_deleted(hub: Hub, tunnel: Tunnel, dice: Random) -> None:
    if spi := hub.spi(tunnel):
        source, peer = str(hub.lab.a.outer[4]), str(tunnel.peer)
        name = ["src", source, "dst", peer, "proto", "esp", "spi", hex(spi)]
        ip(hub.lab.a, "xfrm", "state", "delete", *name)


CHANGES: dict[str, Change] = {
    "CHILD_SA rekeyed": rekeyed,
    "IKE_SA rekeyed": ike_rekeyed,
    "CHILD_SA ended": ended,
    "IKE_SA ended": ike_ended,
    "outbound SA deleted": outbound_sa_deleted,
}
WEIGHTS = (6, 2, 2, 1, 3)
