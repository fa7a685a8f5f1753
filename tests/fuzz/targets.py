"""Every decoder of outside bytes; add a new one here."""

from __future__ import annotations

from tests.fuzz import bundles, calls, control, files, ike, kernel, namespaces, nat, oci
from tests.fuzz.engine import Target

TARGETS: tuple[type[Target], ...] = (
    files.Config,
    files.Memory,
    bundles.Bundle,
    kernel.Xfrm,
    kernel.Framing,
    kernel.Routes,
    namespaces.Namespaces,
    kernel.Ring,
    kernel.Maps,
    nat.Nftables,
    nat.Iptables,
    ike.Vici,
    calls.Calls,
    control.Control,
    control.Answer,
    oci.State,
    oci.Profile,
)
