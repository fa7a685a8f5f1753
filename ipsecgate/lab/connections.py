"""Connections of the lab: a short specification, and the VICI section that it becomes.

Pure: nothing here talks to a daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ipsecgate.core.model.flow import Address

IKE_PROPOSAL = "aes128-sha256-modp2048"
ESP_PROPOSAL = "aes128-sha256"


@dataclass(frozen=True, slots=True)
class ConnSpec:
    """A connection with one child, from the viewpoint of the host that loads it.

    `mode`: transport or tunnel. `family`: 4 or 6. `start_action`: trap, none or start. Traffic
    selectors default to the outer addresses (transport) or the inner networks (tunnel) with every
    protocol; their syntax is strongSwan's, such as 192.0.2.2[tcp/5432]. `options` and
    `child_options` are copied into the configuration.
    """

    name: str
    mode: str = "transport"
    family: int = 4
    start_action: str = "none"
    child: str = ""
    local_ts: tuple[str, ...] = ()
    remote_ts: tuple[str, ...] = ()
    ike_proposals: tuple[str, ...] = (IKE_PROPOSAL,)
    esp_proposals: tuple[str, ...] = (ESP_PROPOSAL,)
    options: Mapping[str, str] = field(default_factory=dict)
    child_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def child_name(self) -> str:
        """The name of the child: `child`, or the connection's name if that is empty."""
        return self.child or self.name


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection: IKE identity, address, and traffic selectors."""

    identity: str
    address: Address
    selectors: tuple[str, ...]


def connection(spec: ConnSpec, local: End, remote: End, start_action: str) -> dict[str, Any]:
    """Return the VICI load-conn section for `spec` between two ends."""
    return {
        spec.name: {
            "version": "2",
            "local_addrs": [str(local.address)],
            "remote_addrs": [str(remote.address)],
            "proposals": list(spec.ike_proposals),
            "local": {"auth": "psk", "id": local.identity},
            "remote": {"auth": "psk", "id": remote.identity},
            **spec.options,
            "children": {
                spec.child_name: {
                    "mode": spec.mode,
                    "local_ts": list(local.selectors),
                    "remote_ts": list(remote.selectors),
                    "esp_proposals": list(spec.esp_proposals),
                    "start_action": start_action,
                    **spec.child_options,
                }
            },
        }
    }
