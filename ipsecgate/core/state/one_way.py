"""CHILD_SAs that can send but not receive, because the kernel has lost their inbound half."""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import ChildSa, Sa, SpdEntry, Template


def one_way_children(
    listed: Iterable[ChildSa],
    sas: Iterable[Sa],
    outbound: Iterable[SpdEntry],
    inbound: Iterable[SpdEntry],
) -> set[ChildSa]:
    """Return those of the `listed` that lack the inbound state, or an inbound policy.

    It must be there for the replies to each outbound policy that names the SA. A lost IPComp state
    is not detected.
    """
    states = {(sa.id, sa.reqid) for sa in sas}
    by_spi: dict[tuple[int, int], list[tuple[Template, Selector]]] = {}
    for entry in outbound:
        for template in entry.templates:
            uses = by_spi.setdefault((template.spi, template.reqid), [])
            uses.append((template, entry.key.selector))
    receiving = {
        (entry.key.selector, template.reqid) for entry in inbound for template in entry.templates
    }
    return {
        child_sa
        for child_sa in listed
        if child_sa.inbound is not None
        and (child_sa.outbound, child_sa.reqid) in states
        and not (
            (child_sa.inbound, child_sa.reqid) in states
            and all(
                (selector.reply, child_sa.reqid) in receiving
                for template, selector in by_spi.get((child_sa.spi_out, child_sa.reqid), ())
                if template.accepts(child_sa.outbound)
            )
        )
    }
