"""Random rules and flows from a tiny universe, so that they overlap, nest and hide each other.

Eight addresses, eight ports, TCP and UDP, IPv4 and IPv6.
"""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import strategies as st

from ipsecgate.core.tables.layout import Key
from ipsecgate.core.tables.table import Ternary, ternary

_PREFIX = st.integers(0, 3)


@st.composite
def ternaries(draw: st.DrawFn) -> Ternary:
    """Draw what a rule matches."""
    family = draw(st.sampled_from((4, 6)))

    def network() -> str:
        length, bits = draw(_PREFIX), draw(st.integers(0, 7))
        bits &= 7 << (3 - length)
        if family == 4:
            return f"{bits << 5}.0.0.0/{length}"
        return f"{bits << 13:x}::/{length}"

    low = draw(st.sampled_from((0, 4, 5, 6)))
    port = draw(st.sampled_from(((0, 0), (low & 0xFFFE, 0xFFFE), (low, 0xFFFF))))
    return ternary(
        ip_network(network()),
        src=draw(st.none() | st.just(ip_network(network()))),
        proto=draw(st.sampled_from((0, 6, 17))),
        dport=port,
    )


@st.composite
def flows(draw: st.DrawFn) -> Key:
    """Draw the key of a flow."""
    family = draw(st.sampled_from((4, 6)))
    shift, base = (29, 0xFFFF << 32) if family == 4 else (125, 0)
    return Key(
        base | draw(st.integers(0, 7)) << shift,
        base | draw(st.integers(0, 7)) << shift,
        0,
        draw(st.integers(0, 7)),
        draw(st.sampled_from((6, 17))),
        family,
    )
