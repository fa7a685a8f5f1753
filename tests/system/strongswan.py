"""Commands to the lab's strongSwan that `ipsecgate.lab.charon` does not have."""

from __future__ import annotations

from ipsecgate.lab.host import Host


def vici(host: Host, command: str, **options: str) -> None:
    """Run a VICI command, and wait until it has finished."""
    with host.charon.session() as session:
        answer = getattr(session, command)(options)
        if command == "terminate":
            list(answer)


def ike_sas(host: Host) -> set[bytes]:
    """Return the unique IDs of a host's IKE_SAs."""
    with host.charon.session() as session:
        return {sa["uniqueid"] for each in session.list_sas() for sa in each.values()}
