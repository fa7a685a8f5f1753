"""The first step of most tests of the whole gate: load a connection."""

from __future__ import annotations

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab


def load_connection(
    lab: Lab, gate: Gated, mode: str = "tunnel", family: int = 4, start_action: str = "trap"
) -> ConnSpec:
    """Load a connection on both hosts, and wait until the gate has its policy."""
    spec = ConnSpec(f"{mode}-{family}", mode, family, start_action=start_action)
    lab.load(spec)
    gate.wait_policy(spec.name)
    return spec
