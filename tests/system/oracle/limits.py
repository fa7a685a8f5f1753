"""The documented limits: why the gate may refuse what the kernel protects, and the reverse.

A gate that is stricter than the kernel must have a reason that is named here, and so must a call
that it lets go and that the kernel drops.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.system.oracle.model import COVERED, REFUSED, Model, Packet
from tests.system.oracle.topology import VRF, VRF_SOURCES, VRF_TABLE
from tests.system.oracle.world import AH, BEET, ESP, TUNNEL, Call, Policy


def reasons(model: Model, call: Call) -> list[str]:
    """Return the documented limits that apply to this call, the most specific first."""
    return list(dict.fromkeys(_reasons(model, call)))


def _reasons(model: Model, call: Call) -> Iterator[str]:
    yield from _of_call(model, call)
    for packet in model.lookups(call):
        tied = model.tied(packet)
        each = [model.outcomes(p, packet) for p in tied]
        known = call.port_known and model.translated(call) is None
        if not known and _asks_for_port(model, packet):
            yield "source port not chosen yet"
        if any(p.sel.ifindex for p in _near(model, packet)):
            yield "policy for an interface"
        if len(set().union(*each)) > 1 and len(tied) > 1:
            yield "ties that disagree"
        elif len(tied) > 1:
            yield "ties, live in part"
        if {COVERED, REFUSED} <= set().union(*each) and len(tied) == 1:
            yield "state of another source, by the kernel's hash"
        for policy in tied:
            yield from _of_policy(model, policy)


def _of_call(model: Model, call: Call) -> Iterator[str]:
    if call.inside and call.mark:
        yield "a mark in the container"
    if model.translated(call) and model.is_spared():
        yield "an SA for the source that only unprotected packets get"
    if call.inside and call.dst.version == 6 and any(r.to is None for r in model.world.nat):
        yield "masquerade by one of several IPv6 addresses"
    if call.inside and model.is_tunneled(call):
        yield "from the container into a tunnel device"
    if call.device == VRF and call.src is None and call.dst.version == 6 and any(
        one.table == VRF_TABLE and call.dst in one.network and one.src != VRF_SOURCES[6]
        for one in model.world.routes
    ):  # fmt: skip
        yield "a route out of the VRF names a source of its own"


def _of_policy(model: Model, policy: Policy) -> Iterator[str]:
    if all(t.optional for t in policy.tmpls if t.proto in (ESP, AH)):
        yield "protected by an optional template"
    if any(t.mode in (TUNNEL, BEET) and t.src is None for t in policy.tmpls):
        yield "tunnel from any address"
    reqids = {t.reqid for t in policy.tmpls}
    states = [s for s in model.world.states if s.reqid in reqids]
    if model.has_state_from_any(policy):
        yield "state from any address"
    if any(not s.spi for s in states):
        yield "state with SPI 0"
    ids = {(s.dst, s.spi, s.proto) for s in states}
    if sum((s.dst, s.spi, s.proto) in ids for s in model.world.states) > len(ids):
        yield "states that share an SPI"
    if any(s.sel is not None and s.sel.ifindex for s in states):
        yield "state for an interface"


def _near(model: Model, packet: Packet) -> list[Policy]:
    """Return the policies whose networks match."""
    return [
        p for p in model.world.policies
        if p.sel.src.version == packet.dst.version
        and packet.src in p.sel.src.network
        and packet.dst in p.sel.dst.network
    ]  # fmt: skip


def _asks_for_port(model: Model, packet: Packet) -> bool:
    near = _near(model, packet)
    reqids = {t.reqid for p in near for t in p.tmpls}
    return any(p.sel.sport[1] for p in near) or any(
        s.sel is not None and s.sel.sport[1] for s in model.world.states if s.reqid in reqids
    )


def drops(model: Model, call: Call) -> str:
    """Return the documented reason for which the kernel drops a call that has an SA, or ""."""
    if model.packet(call, 0) is None:
        return "no route"
    if model.translated(call) and model.is_spared() and model.passes(call):
        return "an exception, whose packets the host translates"
    inside = model.inside(call)
    if inside is None:
        return ""
    packet, tunnel = inside
    first = model.forwarded(call)
    if COVERED in first:
        if REFUSED not in model.beyond(call):
            return ""
        return "translated before a tunnel" if call.inside else "transport mode before a tunnel"
    outcomes = [model.outcomes(p, packet) for p in model.tied(packet)]
    if any(COVERED in one for one in outcomes):
        return f"an SA that does not suit the {tunnel.kind} interface"
    return ""
