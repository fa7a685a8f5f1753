"""Take the samples that `top` compares."""

from __future__ import annotations

import time
from collections.abc import Callable

from ipsecgate.admin.status import status_of
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError
from ipsecgate.monitor.top import Sample
from ipsecgate.paths import Paths


def sample(paths: Paths, read_config: Callable[[], Config]) -> Sample:
    """Read the gate now. Raises: FileNotFoundError if nothing is loaded; OSError, GateError."""
    status, at = status_of(paths, read_config), time.monotonic()
    held_in = {}
    for hold in status["holds"]:
        try:
            held_in[hold["pid"]] = cgroups.of_process(hold["pid"]).stat().st_ino
        except (OSError, GateError):
            continue  # it has ended
    names = {number: str(path) for number, path in cgroups.by_id().items()}
    return Sample(at, status, names, held_in)
