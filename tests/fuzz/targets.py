"""Every decoder of outside bytes; add a new one here."""

from __future__ import annotations

from tests.fuzz import calls, control, files, ike, kernel, oci
from tests.fuzz.engine import Target

TARGETS: tuple[type[Target], ...] = (
    files.Config,
    files.Memory,
    kernel.Xfrm,
    kernel.Framing,
    kernel.Routes,
    kernel.Ring,
    kernel.Maps,
    ike.Vici,
    calls.Calls,
    control.Control,
    control.Answer,
    oci.State,
    oci.Profile,
)
