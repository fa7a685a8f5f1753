"""A policy as documents have it, and back again."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Literal, cast

from ipsecgate.admin.status_document import ConfiguredPolicy
from ipsecgate.core.model.flow import ANY_PORT, PROTOCOL_NAMES, PROTOCOLS
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy


def policy_document(policy: Policy) -> ConfiguredPolicy:
    """Return a policy as the documents have it, without its coverage."""
    action = cast(Literal["protect", "bypass", "discard"], policy.action.name.lower())
    connection = f"connection {policy.name.partition('#')[0]}" if policy.derived else ""
    return {
        "name": policy.name,
        "action": action,
        "remote": [str(network) for network in policy.remote],
        "protocol": protocol_name(policy.proto),
        "port": port_text(policy.ports),
        "local_port": port_text(policy.local_ports),
        "child": policy.child,
        "initiate": "start" if policy.start else "on-demand",
        "derived": policy.derived,
        "source": connection or policy.origin,
    }


def policy_of(document: ConfiguredPolicy) -> Policy:
    """Return the policy of a document. Raises: KeyError, ValueError."""
    return Policy(
        name=document["name"],
        remote=tuple(map(ip_network, document["remote"])),
        action=Action[document["action"].upper()],
        proto=_protocol(document["protocol"]),
        ports=_ports(document["port"]),
        child=document["child"],
        start=document["initiate"] == "start",
        derived=document["derived"],
        origin="" if document["derived"] else document["source"],
        local_ports=_ports(document["local_port"]),
    )


def protocol_name(number: int) -> str:
    """Return the name of a protocol, or its number as text; 0 is any."""
    return PROTOCOL_NAMES.get(number, str(number))


def port_text(ports: tuple[int, int]) -> str:
    """Return a range of ports as the configuration has it."""
    low, high = ports
    if ports == ANY_PORT:
        return "any"
    return str(low) if low == high else f"{low}-{high}"


def _protocol(name: str) -> int:
    return PROTOCOLS[name] if name in PROTOCOLS else int(name)


def _ports(text: str) -> tuple[int, int]:
    if text == "any":
        return ANY_PORT
    low, _, high = text.partition("-")
    return int(low), int(high or low)
